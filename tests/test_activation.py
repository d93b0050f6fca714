"""The activation functors at every instruction set, over tensors, and at their kinks."""

from __future__ import annotations

import ctypes
import math

import numpy as np
import pytest
import torch
import torch.nn.functional as F

from . import native
from .reference import ACTIVATIONS, GATES, SLOPE, logistic, tanh_argument

NAMES = tuple(ACTIVATIONS)


# The oracle's errors, for finite z.
def condition_of(name, z):
    """How much a relative error of one in the inner argument changes the value."""
    if name == "gelu_tanh":
        u = tanh_argument(z)[0]
        return np.abs(z * logistic(u) * u * logistic(-u))
    if name == "hardswish":
        return np.where(np.abs(z) < 3, np.abs(z) / 2, 0.0)
    return np.zeros_like(z)


def terms_of(name, z):
    """How large the terms are that are added up to the derivative."""
    if name in GATES:
        gate, derivative = (f(z) for f in GATES[name])
        size = np.abs(gate) + np.abs(z * derivative)
        return size * (1 + np.abs(tanh_argument(z)[0])) if name == "gelu_tanh" else size
    if name == "hardswish":
        return np.where(np.abs(z) < 3, 1.0, 0.0)
    return np.zeros_like(z)


def oracle_condition(name, z):
    """How much of the oracle's relative rounding errors, in ulp, its inner argument passes on."""
    return 1 + z * z if name == "gelu" else np.ones_like(z)


def points(dtype):
    """Every bfloat16 number that is finite, and densely where the functions bend."""
    every = (np.arange(1 << 16, dtype=np.uint32) << 16).view(np.float32)
    dense = np.linspace(-16, 16, 200_001), np.linspace(-110, -12, 20_001)
    kinks = [np.nextafter(dtype(k), dtype(to)) for k in (-3, 0, 3) for to in (-9, 9)]
    z = np.concatenate([every[np.isfinite(every)], *dense, kinks]).astype(dtype)
    if dtype == np.float32:
        return z
    return np.concatenate([z, np.linspace(-760, 40, 20_001), [5e-324, -5e-324, 1e-310]])


@pytest.fixture(scope="module")
def library(tmp_path_factory):
    return native.compile_library(
        tmp_path_factory.mktemp("activation"), "tests/kernels/activation_api.cpp"
    )


def call(library, isa, name, z, dy=None, own=True, bits=False):
    out = np.empty_like(z)
    function = getattr(library, f"activation_{isa}")
    pointer = ctypes.c_void_p
    function.argtypes = [ctypes.c_int, ctypes.c_double, *[ctypes.c_int] * 3, *[pointer] * 3]
    function.argtypes += [ctypes.c_int64]
    refused = function(
        NAMES.index(name),
        SLOPE,
        own,
        bits,
        3 if z.dtype == np.float64 else 0,
        None if dy is None else dy.ctypes.data,
        z.ctypes.data,
        out.ctypes.data,
        z.size,
    )
    return None if refused else out


def assert_within_ulp(got, expected, size, factor, z, ulps, dtype):
    """|got - expected| <= ulps units in the last place of `size`; where the exponential of z is
    subnormal, of that, times the `factor` it is multiplied with."""
    info = np.finfo(dtype)
    unit = np.maximum(size * info.eps, float(info.smallest_subnormal) * np.clip(factor, 1, 1e4))
    error = np.abs(got.astype(np.float64) - expected) / unit
    worst = int(np.argmax(error))
    assert error[worst] <= ulps, (
        f"{error[worst]:.2f} ulp at z = {z[worst]!r}: {got[worst]!r}, expected {expected[worst]!r}"
    )


# Roundings on the way in ulp: a product or two for the piecewise ones; exp within 2, a sum, a
# quotient and two products for the logistic ones; 4 for Φ and a product for gelu.
ULPS = {"none": 0, "relu": 0, "leaky_relu": 1, "hardswish": 2, "silu": 5, "gelu_tanh": 6, "gelu": 6}


@pytest.mark.parametrize("own", [1, 0, 2], ids=["functor", "any", "fast"])
@pytest.mark.parametrize("dtype", [np.float32, np.float64], ids=["float32", "float64"])
@pytest.mark.parametrize("name", NAMES)
@pytest.mark.parametrize("isa", native.instruction_sets())
def test_values_and_derivatives(library, isa, name, dtype, own):
    if own == 2 and name != "silu":
        pytest.skip("only silu has a fast form")
    z = points(dtype)
    wide = z.astype(np.float64)
    ulps = ULPS[name]
    with np.errstate(over="ignore", under="ignore", invalid="ignore"):
        value, differentiate = ACTIVATIONS[name]
        expected, condition = value(wide), condition_of(name, wide)
        derivative, terms = differentiate(wide), terms_of(name, wide)
    known = np.isfinite(expected) & np.isfinite(condition)
    size = np.abs(expected) + condition
    if dtype == np.float64:  # what the oracle's own rounding does to exponentials
        size = size * oracle_condition(name, wide)
    factor = np.abs(wide)
    got = call(library, isa, name, z, own=own)
    assert known.mean() > 0.9
    assert_within_ulp(*(a[known] for a in (got, expected, size, factor, z)), ulps, dtype)
    assert np.isfinite(got).all()

    dy = np.random.default_rng(0).uniform(0.5, 1.5, z.size).astype(dtype)
    got = call(library, isa, name, z, dy, own=own)
    known = np.isfinite(derivative) & np.isfinite(terms)
    expected, size = dy * derivative, dy * np.maximum(np.abs(derivative), terms)
    if dtype == np.float64:
        size = size * oracle_condition(name, wide)
    if name == "gelu_tanh":
        factor = factor * np.abs(tanh_argument(wide)[1])
    assert known.mean() > 0.9
    assert_within_ulp(*(a[known] for a in (got, expected, size, factor, z)), ulps + 2, dtype)


SPECIAL = [-math.inf, math.inf, math.nan, 0.0, -0.0, 3.0, -3.0, 3e38, -3e38, 1e-45, -1e-45]


def torch_activation(name):
    return {
        "none": lambda z: z * 1,
        "relu": F.relu,
        "leaky_relu": lambda z: F.leaky_relu(z, SLOPE),
        "silu": F.silu,
        "gelu": F.gelu,
        "gelu_tanh": lambda z: F.gelu(z, approximate="tanh"),
        "hardswish": F.hardswish,
    }[name]


@pytest.mark.parametrize("name", NAMES)
@pytest.mark.parametrize("isa", native.instruction_sets())
def test_kinks_and_infinities_are_those_of_torch(library, isa, name):
    # One number at a time: torch's vectorised code differs from its scalar code at some of these.
    # torch's gelu loses 1e-5 of a value near -3 to cancellation.
    z = torch.tensor(SPECIAL)
    got = torch.from_numpy(call(library, isa, name, z.numpy()))
    slope = torch.from_numpy(call(library, isa, name, z.numpy(), np.ones(len(z), np.float32)))
    for i, value in enumerate(SPECIAL):
        leaf = torch.tensor([value], requires_grad=True)
        y = torch_activation(name)(leaf)
        y.backward(torch.ones(1))
        if name == "gelu" and value == math.inf:
            assert got[i] == math.inf  # torch on CUDA; its vectorised erf gives NaN here
        elif name == "hardswish" and abs(value) == 3e38:
            assert got[i] == max(value, 0)  # torch overflows before it divides by 6
        else:
            torch.testing.assert_close(got[i], y[0].detach(), equal_nan=True, rtol=2e-5, atol=0)
        if name == "hardswish" and math.isnan(value):
            assert math.isnan(slope[i])  # as torch's vectorised code, which is not its scalar code
        elif name == "gelu_tanh" and abs(value) == 3e38:
            assert slope[i] == (value > 0)  # the limit; torch: 0 · ∞
        else:
            torch.testing.assert_close(slope[i], leaf.grad[0], equal_nan=True, rtol=2e-5, atol=0)


@pytest.mark.parametrize("name", NAMES)
@pytest.mark.parametrize("isa", native.instruction_sets())
def test_a_bit_stands_for_z_where_the_derivative_takes_two_values(library, isa, name):
    z = np.concatenate([np.float32(SPECIAL), np.linspace(-4, 4, 1001, dtype=np.float32)])
    dy = np.random.default_rng(1).standard_normal(z.size).astype(np.float32)
    for own in (True, False):
        from_bits = call(library, isa, name, z, dy, own=own, bits=True)
        if name in ("relu", "leaky_relu"):
            np.testing.assert_array_equal(from_bits, call(library, isa, name, z, dy, own=own))
        else:
            assert from_bits is None


@pytest.mark.parametrize("name", [name for name in NAMES if name != "leaky_relu"])
def test_tensors_take_the_same_functors(name):
    """By differentiable operations: their second derivative is what a double backward needs."""
    z = torch.linspace(-5, 5, 100, dtype=torch.float64).requires_grad_()
    orders = []
    for function in (lambda t: torch.ops.batchops.activation(t, name), torch_activation(name)):
        y = function(z)
        (first,) = torch.autograd.grad(y.sum(), z, create_graph=True)
        second = torch.zeros_like(z)
        if first.requires_grad and name not in ("none", "relu"):
            (second,) = torch.autograd.grad(first.sum(), z)
        orders.append((y, first, second))
    for got, expected in zip(*orders, strict=True):
        torch.testing.assert_close(got, expected, rtol=1e-11, atol=1e-12)


@pytest.mark.parametrize("isa", native.instruction_sets())
def test_short_silu_is_exact_enough_for_16_bits(library, isa):
    """Forward 2^-14 and rounding of σ; backward 4e-6 of e^-z, times z where σ nears 1."""
    z = np.linspace(-60, 60, 200_001).astype(np.float32)
    wide = z.astype(np.float64)
    value, derivative = (f(wide) for f in ACTIVATIONS["silu"])
    forward = call(library, isa, "silu", z, own=3)
    assert (np.abs(forward - value) <= 7e-5 * np.abs(value)).all()
    backward = call(library, isa, "silu", z, np.ones_like(z), own=3)
    assert np.abs(backward - derivative).max() <= 1e-5
    special = np.float32([-np.inf, np.inf, np.nan, -3e38, 3e38])
    forward = call(library, isa, "silu", special, own=3)
    np.testing.assert_array_equal(forward, np.float32([np.nan, np.inf, np.nan, 0, 3e38]))
