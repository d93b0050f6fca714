"""One training or eval step of batch norm through the functional form, against float64."""

from __future__ import annotations

import numpy as np
import torch

from batchops import functional as BF

from .reference import BatchNormReference, activation_argument, to_float64
from .tensors import leaf, make, parameters
from .tolerances import assert_close, before_rounding, elementwise

MOMENTUM = 0.3


class Case:
    """Tensors, and what they should give; `act` is a name of reference.ACTIVATIONS."""

    def __init__(self, shape, dtype, device, layout, with_residual, training, act):
        self.act, self.training, self.layout = act, training, layout
        C = shape[1]
        self.x = leaf(make(shape, dtype, device, layout))
        self.residual = leaf(make(shape, dtype, device, layout)) if with_residual else None
        self.weight, self.bias = map(leaf, parameters(C, dtype, device))
        self.mean = torch.randn(C, device=device).to(dtype)
        self.var = (torch.rand(C, device=device) + 0.5).to(dtype)
        self.running = to_float64(self.mean), to_float64(self.var)
        self.oracle = BatchNormReference(
            *map(to_float64, (self.x, self.weight, self.bias, self.residual)),
            *((None, None) if training else self.running),
            act=act,
        )
        if training:
            self.running = self.oracle.running(*self.running, MOMENTUM)
        self.in_z = before_rounding(dtype, self.oracle.count)

    def check(self):
        x, residual, oracle = self.x, self.residual, self.oracle
        y = BF.batch_norm(
            x,
            self.mean,
            self.var,
            self.weight,
            self.bias,
            self.training,
            MOMENTUM,
            activation=activation_argument(self.act),
            residual=residual,
        )
        dy = make(x.shape, x.dtype, x.device, self.layout, offset=0.2, scale=1.0)
        y.backward(dy)

        bound = elementwise(x.dtype, oracle.count)
        assert y.dtype == x.dtype
        assert y.stride() == x.stride()
        assert_close(y, oracle.y, bound, "y")
        assert_close(self.mean, self.running[0], bound, "running_mean")
        assert_close(self.var, self.running[1], bound, "running_var")

        derivative = oracle.derivative_shown(to_float64(y), self.in_z)
        dx, dz, dweight, dbias = oracle.backward(to_float64(dy), derivative)
        # dx = weight · rstd · (a sum that cancels): errors scale with its terms
        terms = float(np.abs(oracle.weight * oracle.rstd).max()) * 3 * max(1.0, np.abs(dz).max())
        assert_close(x.grad, dx, bound * max(1.0, terms), "dx")
        assert x.grad.stride() == x.stride()
        if residual is not None:
            assert_close(residual.grad, dz, bound, "dresidual")
        # sums of `count` terms: their errors add up like a random walk
        walk = bound * np.sqrt(oracle.count)
        assert_close(self.weight.grad, dweight, walk, "dweight")
        assert_close(self.bias.grad, dbias, walk, "dbias")
