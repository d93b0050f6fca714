"""float64 oracles, by definition and in NumPy; they share nothing with batchops."""

from __future__ import annotations

import math
from typing import TYPE_CHECKING

import numpy as np

if TYPE_CHECKING:  # the sanitizers' processes do without torch
    import torch


def to_float64(t: torch.Tensor | None) -> np.ndarray | None:
    """A copy in logical (N, C, ...) order; None of None."""
    return None if t is None else t.detach().cpu().contiguous().double().numpy().copy()


SLOPE = 0.1  # of leaky_relu, in every test that reaches it through a reference

erfc = np.vectorize(math.erfc, otypes=[np.float64])


def logistic(z):
    e = np.exp(-np.abs(z))
    return np.where(z > 0, 1, e) / (1 + e)


def _logistic_derivative(z):
    return logistic(z) * logistic(-z)


def tanh_argument(z):
    """gelu_tanh is z · logistic(u): u and its derivative."""
    scale, cubic = math.sqrt(8 / math.pi), 0.044715 * math.sqrt(8 / math.pi)
    return scale * z + cubic * z**3, scale + 3 * cubic * z * z


def _gelu_tanh_gate_derivative(z):
    u, slope = tanh_argument(z)
    return _logistic_derivative(u) * slope


# Activations that are z · gate(z): the gate and its derivative.
GATES = {
    "silu": (logistic, _logistic_derivative),
    "gelu": (
        lambda z: 0.5 * erfc(-z / math.sqrt(2)),
        lambda z: np.exp(-0.5 * z * z) / math.sqrt(2 * math.pi),
    ),
    "gelu_tanh": (lambda z: logistic(tanh_argument(z)[0]), _gelu_tanh_gate_derivative),
}


def _gated(gate, derivative):
    return lambda z: z * gate(z), lambda z: gate(z) + z * derivative(z)


# name: (value, derivative), in the order of the kernels' Activation
ACTIVATIONS = {
    "none": (lambda z: z, lambda z: np.ones_like(z)),
    "relu": (lambda z: np.where(z <= 0, 0.0, z), lambda z: np.where(z <= 0, 0.0, 1.0)),
    "leaky_relu": (
        lambda z: np.where(z > 0, z, SLOPE * z),
        lambda z: np.where(z > 0, 1.0, SLOPE),
    ),
    **{name: _gated(*gate) for name, gate in GATES.items()},
    "hardswish": (
        lambda z: z * np.clip(z + 3, 0, 6) / 6,
        lambda z: np.where(z <= -3, 0.0, np.where(z < 3, z / 3 + 0.5, 1.0)),
    ),
}
# Where a derivative jumps.
KINKS = {"relu": (0.0,), "leaky_relu": (0.0,), "hardswish": (-3.0, 3.0)}
# Those with one derivative on either side of 0: a bit can stand for z.
MASKABLE = tuple(name for name, kinks in KINKS.items() if kinks == (0.0,))


def activation_argument(name):
    """What functional forms and modules take for it."""
    return {"none": None, "leaky_relu": ("leaky_relu", SLOPE)}.get(name, name)


class NormReference:
    """y and gradients of a norm + residual + activation.

    All inputs are float64 arrays; x has shape (N, C, ...). The statistics, unless given, are over
    the `axes` of x in the shape `split`, and so is xhat's part in dx.
    """

    def __init__(self, x, split, axes, weight, bias, residual, eps, act, mean=None, var=None):
        self._split, self._axes, self.act = split, axes, act
        self.training = mean is None
        self.count = math.prod(split[axis] for axis in axes)
        values = x.reshape(split)
        self.mean = values.mean(axes) if mean is None else mean
        centred = values - self._of_values(self.mean)
        self.var = (centred**2).mean(axes) if var is None else var
        self.rstd = 1.0 / np.sqrt(self.var + eps)
        self.xhat = (centred * self._of_values(self.rstd)).reshape(x.shape)
        self.weight = np.ones(x.shape[1]) if weight is None else weight
        z = self.xhat * self._of_channels(self.weight)
        if bias is not None:
            z = z + self._of_channels(bias)
        self.z = z if residual is None else z + residual
        forward, self.derivative = ACTIVATIONS[act]
        self.y = forward(self.z)

    def _of_values(self, statistic):
        return np.expand_dims(statistic, self._axes)

    def _of_channels(self, parameter):
        return parameter.reshape(-1, *[1] * (self.xhat.ndim - 2))

    def near_a_kink(self, bound):
        """Where errors of `bound` times the largest |z| may decide between two derivatives."""
        reach = bound * max(1.0, np.abs(self.z).max())
        near = np.zeros(self.z.shape, dtype=bool)
        for kink in KINKS.get(self.act, ()):
            near |= np.abs(self.z - kink) <= reach
        return near

    def derivative_shown(self, y, bound):
        """activation'(z), where z is near a kink at 0 that of the side of it that `y` shows."""
        derivative = self.derivative(self.z)
        if self.act not in MASKABLE:
            return derivative
        shown = self.derivative(np.where(y > 0, 1.0, -1.0))
        return np.where(self.near_a_kink(bound), shown, derivative)

    def backward(self, dy, derivative=None):
        """dx, dresidual, dweight, dbias. `derivative` replaces activation'(z) where given."""
        dz = dy * (self.derivative(self.z) if derivative is None else derivative)
        others = tuple(axis for axis in range(dz.ndim) if axis != 1)
        dbias, dweight = dz.sum(others), (dz * self.xhat).sum(others)
        dxhat = (dz * self._of_channels(self.weight)).reshape(self._split)
        if self.training:
            xhat = self.xhat.reshape(self._split)
            along = (dxhat * xhat).mean(self._axes, keepdims=True)
            dxhat = dxhat - dxhat.mean(self._axes, keepdims=True) - xhat * along
        return (dxhat * self._of_values(self.rstd)).reshape(dy.shape), dz, dweight, dbias


class BatchNormReference(NormReference):
    """Statistics by channel: of the batch, or `mean` and `var`."""

    def __init__(self, x, weight, bias, residual=None, mean=None, var=None, eps=1e-5, act="none"):
        axes = tuple(axis for axis in range(x.ndim) if axis != 1)
        super().__init__(x, x.shape, axes, weight, bias, residual, eps, act, mean, var)

    def running(self, mean, var, momentum):
        """The running statistics after this batch, with the unbiased variance."""
        unbiased = self.var * self.count / (self.count - 1)
        return (
            (1 - momentum) * mean + momentum * self.mean,
            (1 - momentum) * var + momentum * unbiased,
        )


class GroupNormReference(NormReference):
    """Statistics by sample and group of C / G channels."""

    def __init__(self, x, G, weight, bias, residual=None, eps=1e-5, act="none"):
        split = len(x), G, math.prod(x.shape[1:]) // G
        super().__init__(x, split, (2,), weight, bias, residual, eps, act)
