"""float64 oracles, by definition and in NumPy; they share nothing with batchops."""

from __future__ import annotations

import math

import numpy as np
import torch


def to_float64(t: torch.Tensor) -> np.ndarray:
    """A copy in logical (N, C, ...) order."""
    return t.detach().cpu().contiguous().to(torch.float64).numpy().copy()


SLOPE = 0.1  # of leaky_relu, in every test that reaches it through a reference

erfc = np.vectorize(math.erfc, otypes=[np.float64])


def _logistic(z):
    e = np.exp(-np.abs(z))
    return np.where(z > 0, 1, e) / (1 + e)


def _cdf(z):
    return 0.5 * erfc(-z / math.sqrt(2))


def _inner(z):
    """gelu_tanh is z · logistic(_inner(z))."""
    return math.sqrt(8 / math.pi) * (z + 0.044715 * z**3)


def _gelu_tanh_derivative(z):
    s = _logistic(_inner(z))
    return s + z * s * (1 - s) * math.sqrt(8 / math.pi) * (1 + 3 * 0.044715 * z * z)


# name: (value, derivative)
ACTIVATIONS = {
    "none": (lambda z: z, lambda z: np.ones_like(z)),
    "relu": (lambda z: np.where(z <= 0, 0.0, z), lambda z: np.where(z <= 0, 0.0, 1.0)),
    "leaky_relu": (
        lambda z: np.where(z > 0, z, SLOPE * z),
        lambda z: np.where(z > 0, 1.0, SLOPE),
    ),
    "silu": (
        lambda z: z * _logistic(z),
        lambda z: _logistic(z) * (1 + z * _logistic(-z)),
    ),
    "gelu": (
        lambda z: z * _cdf(z),
        lambda z: _cdf(z) + z * np.exp(-z * z / 2) / math.sqrt(2 * math.pi),
    ),
    "gelu_tanh": (lambda z: z * _logistic(_inner(z)), _gelu_tanh_derivative),
    "hardswish": (
        lambda z: z * np.clip(z + 3, 0, 6) / 6,
        lambda z: np.where(z <= -3, 0.0, np.where(z < 3, z / 3 + 0.5, 1.0)),
    ),
}
# Where a derivative jumps.
KINKS = {"relu": (0.0,), "leaky_relu": (0.0,), "hardswish": (-3.0, 3.0)}


def activation_argument(name):
    """What functional forms and modules take for it."""
    return {"none": None, "leaky_relu": ("leaky_relu", SLOPE)}.get(name, name)


class BatchNormReference:
    """y, running statistics and gradients of batch norm + residual + activation.

    All inputs are float64 arrays; x has shape (N, C, ...).
    """

    def __init__(self, x, weight, bias, residual=None, mean=None, var=None, eps=1e-5, act="none"):
        self.axes = tuple(d for d in range(x.ndim) if d != 1)
        self.shape = [1, -1] + [1] * (x.ndim - 2)
        self.training = mean is None
        self.count = x.size // max(1, x.shape[1])
        self.batch_mean = x.mean(self.axes) if self.training else mean
        centred = x - self._wide(self.batch_mean)
        self.batch_var = (centred**2).mean(self.axes) if self.training else var
        self.rstd = 1.0 / np.sqrt(self.batch_var + eps)
        self.xhat = centred * self._wide(self.rstd)
        self.weight = np.ones(x.shape[1]) if weight is None else weight
        z = self.xhat * self._wide(self.weight)
        if bias is not None:
            z = z + self._wide(bias)
        if residual is not None:
            z = z + residual
        self.z = z
        forward, self.derivative = ACTIVATIONS[act]
        self.y = forward(z)

    def _wide(self, per_channel):
        return per_channel.reshape(self.shape)

    def running(self, mean, var, momentum):
        """The running statistics after this batch, with the unbiased variance."""
        unbiased = self.batch_var * self.count / (self.count - 1)
        return (
            (1 - momentum) * mean + momentum * self.batch_mean,
            (1 - momentum) * var + momentum * unbiased,
        )

    def backward(self, dy, dz_mask=None):
        """dx, dresidual, dweight, dbias. `dz_mask` replaces activation' where it is given."""
        dz = dy * (self.derivative(self.z) if dz_mask is None else dz_mask)
        dbias = dz.sum(self.axes)
        dweight = (dz * self.xhat).sum(self.axes)
        dxhat = dz
        if self.training:
            dxhat = (
                dz - self._wide(dbias / self.count) - self.xhat * self._wide(dweight / self.count)
            )
        dx = dxhat * self._wide(self.weight * self.rstd)
        return dx, dz, dweight, dbias
