"""Every activation in batch norm, with and without a residual, against the float64 oracle."""

from __future__ import annotations

import pytest
import torch
import torch.nn.functional as F

from batchops import functional as BF
from batchops import nn as bnn

from .batch_norm_case import Case
from .reference import ACTIVATIONS, MASKABLE, SLOPE, activation_argument
from .tensors import DTYPES, LAYOUTS, saved_bytes, skip_unless_kernel

SHAPES = {
    "rows": (33, 7),  # 2-D, odd everything
    "seven": (3, 19, 7, 7),  # rows that end inside a vector
    "large": (2, 3, 40, 40),  # planes, which take the other kernel
}


@pytest.mark.parametrize("training", [True, False], ids=["train", "eval"])
@pytest.mark.parametrize("with_residual", [False, True], ids=["plain", "residual"])
@pytest.mark.parametrize("name", [n for n in ACTIVATIONS if n not in ("none", "relu")])
@pytest.mark.parametrize("layout", LAYOUTS)
@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("shape", SHAPES.values(), ids=SHAPES)
def test_batch_norm(shape, dtype, layout, name, with_residual, training, device):
    skip_unless_kernel(device, dtype)
    for seed in range(100):
        torch.manual_seed(seed)
        case = Case(shape, dtype, device, layout, with_residual, training, name)
        # y shows the side of 0, but not of hardswish's kinks
        if name == "leaky_relu" or not case.oracle.near_a_kink(case.in_z).any():
            break
    else:
        pytest.fail("no seed without a value on a kink")
    case.check()


@pytest.mark.parametrize("name", ACTIVATIONS)
@pytest.mark.parametrize("with_residual", [False, True], ids=["plain", "residual"])
def test_saves_nothing_that_can_be_recomputed(name, with_residual):
    """x and parameters; with a residual one bit an element, or the residual itself by reference."""
    x = torch.randn(4, 8, 6, 6, requires_grad=True)
    residual = torch.randn(4, 8, 6, 6, requires_grad=True) if with_residual else None
    weight, bias = torch.ones(8, requires_grad=True), torch.zeros(8, requires_grad=True)

    def forward():
        return BF.batch_norm(
            x,
            None,
            None,
            weight,
            bias,
            True,
            activation=activation_argument(name),
            residual=residual,
        )

    bits = 4 * 8 * 5 if with_residual and name in MASKABLE else 0  # 36 bits: 5 bytes
    new = bits + 3 * 8 * 4  # and mean, its low part and rstd
    if with_residual and name not in ("none", *MASKABLE):
        assert saved_bytes(forward, (x, weight, bias)) == new + residual.nbytes
        assert saved_bytes(forward, (x, weight, bias, residual)) == new
    else:
        assert saved_bytes(forward, (x, weight, bias)) == new


def test_slope_and_its_default():
    x = torch.randn(8, 4)
    for activation, slope in (("leaky_relu", 0.01), (("leaky_relu", 0.3), 0.3)):
        y = BF.batch_norm(x, None, None, training=True, activation=activation)
        expected = F.leaky_relu(BF.batch_norm(x, None, None, training=True), slope)
        assert torch.equal(y, expected)
    module = bnn.BatchNorm1d(4, activation=("leaky_relu", SLOPE))
    assert "leaky_relu" in repr(module)
    assert torch.equal(module(x), F.leaky_relu(BF.batch_norm(x, None, None, training=True), SLOPE))


@pytest.mark.parametrize("activation", ["softplus", ("relu", 0.1), ("leaky_relu",), 3])
def test_refuses_what_is_no_activation(activation):
    with pytest.raises(ValueError, match="activation"):
        BF.batch_norm(torch.randn(4, 3), None, None, training=True, activation=activation)
    with pytest.raises(ValueError, match="activation"):
        bnn.BatchNorm1d(3, activation=activation)
