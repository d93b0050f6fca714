"""The CPU group norm kernels against float64: every path through memory, dtype, activation."""

from __future__ import annotations

import numpy as np
import pytest
import torch

from . import native
from .emulator.norm import LAYOUTS
from .group_norm_kernels import GroupNorm
from .reference import SLOPE, GroupNormReference, to_float64
from .tensors import DTYPES
from .tolerances import assert_close, before_rounding, elementwise, norm_error

SHAPES = {  # N, C, HxW, G
    "planes": (3, 6, 49, 3),  # planes that end inside a vector, whatever its width
    "one plane a group": (2, 4, 300, 4),  # instance norm
    "whole planes": (2, 8, 1024, 2),  # planes of whole cache lines
    "long planes": (2, 3, 20011, 1),  # several pieces a plane
    "many chunks": (1, 3, 90001, 1),  # chunks that end inside a plane, shared by threads
    "short planes": (3, 20, 5, 5),  # joined to rows; odd mask rows
    "rows": (5, 33, 1, 1),  # layer norm, with a part of a vector
    "rows of groups": (5, 60, 1, 3),  # groups that begin inside a mask byte
    "many rows": (300, 40, 1, 2),  # several blocks of rows for dweight
    "wide row": (2, 9000, 1, 1),  # longer than one accumulator run
    "few channels": (2, 3, 700, 3),  # pixels joined to rows, and a short last row
    "many samples": (130, 6, 20, 2),  # several samples a block
    "wide pixels": (2, 320, 150, 32),  # more rows than a flush
    "one value": (4, 6, 1, 6),  # var = 0
}


def inputs(shape, dtype, offset=0.5, scale=2.0):
    N, C, HxW, _ = shape
    x = (torch.randn(N, C, HxW, dtype=torch.float64) * scale + offset).to(dtype)
    residual, dy = torch.randn(N, C, HxW).to(dtype), torch.randn(N, C, HxW).to(dtype)
    return x, residual, dy, (torch.rand(C) + 0.5).to(dtype), torch.randn(C).to(dtype)


def reference(x, G, *tensors, act="none"):
    return GroupNormReference(to_float64(x), G, *map(to_float64, tensors), act=act)


def check(shape, dtype, layout, activation, with_residual, threads=1, parameters=True):
    x, residual, dy, weight, bias = inputs(shape, dtype)
    if not with_residual:
        residual = None
    if not parameters:
        weight = bias = None
    N, _, HxW, G = shape
    kernel = GroupNorm(x, G, weight, bias, residual, layout, activation, SLOPE)
    y = kernel.forward(threads)
    got = kernel.backward(dy, threads)
    oracle = reference(x, G, weight, bias, residual, act=activation)
    # A group of one value has x̂ = 0 and rstd = 1/√eps = 316, which all roundings of x meet.
    bound = elementwise(dtype, oracle.count)
    assert_close(y, oracle.y, bound, "y")
    if activation == "hardswish" and oracle.near_a_kink(bound).any():
        return  # its derivative jumps there, and y does not show to which side
    derivative = oracle.derivative_shown(to_float64(y), before_rounding(dtype, oracle.count))
    dx, dz, dweight, dbias = oracle.backward(to_float64(dy), derivative)
    terms = np.abs(oracle.weight).max() * oracle.rstd.max() * 3 * max(1, np.abs(dz).max())
    assert_close(got[0], dx, bound * max(1.0, terms), "dx")
    if with_residual and activation != "none":
        assert_close(got[1], dz, bound, "dresidual")
    # sums of N · HxW terms, whose errors add up like a random walk
    walk = bound * np.sqrt(N * HxW)
    for name, result, want in (("dweight", got[2], dweight), ("dbias", got[3], dbias)):
        assert_close(result, want, walk, name)


@pytest.mark.parametrize("with_residual", [False, True], ids=["plain", "residual"])
@pytest.mark.parametrize("activation", ["none", "relu", "silu"])
@pytest.mark.parametrize("layout", LAYOUTS)
@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("shape", SHAPES.values(), ids=SHAPES)
def test_forward_and_backward(shape, dtype, layout, activation, with_residual):
    check(shape, dtype, layout, activation, with_residual)


@pytest.mark.parametrize("with_residual", [False, True], ids=["plain", "residual"])
@pytest.mark.parametrize("activation", ["leaky_relu", "gelu", "gelu_tanh", "hardswish"])
@pytest.mark.parametrize("layout", LAYOUTS)
@pytest.mark.parametrize("shape", ["planes", "rows of groups", "few channels"])
def test_other_activations(shape, layout, activation, with_residual):
    for dtype in (torch.float32, torch.float64):
        check(SHAPES[shape], dtype, layout, activation, with_residual)


@pytest.mark.parametrize("layout", LAYOUTS)
@pytest.mark.parametrize("shape", SHAPES.values(), ids=SHAPES)
def test_the_same_bits_for_any_number_of_threads(shape, layout):
    shape = (shape[0], shape[1], shape[2], shape[3])
    x, residual, dy, weight, bias = inputs(shape, torch.float32)
    # enough for the kernel to fork at all
    repeat = -(-40000 // x.numel())
    x, residual, dy = (t.repeat(repeat, 1, 1) for t in (x, residual, dy))
    for activation, added in (("none", None), ("silu", None), ("relu", residual)):
        results = []
        for threads in (1, 2, 3, 16):
            kernel = GroupNorm(x, shape[3], weight, bias, added, layout, activation)
            y = kernel.forward(threads)
            results.append((y, kernel.stats, *kernel.backward(dy, threads)))
        for other in results[1:]:
            for a, b in zip(results[0], other, strict=True):
                assert a is None or torch.equal(a, b)


@pytest.mark.parametrize("layout", LAYOUTS)
@pytest.mark.parametrize("shape", [(1, 2, 200_000, 1), (2, 3, 70_000, 3)], ids=str)
def test_few_large_groups_are_shared_out(shape, layout):
    for activation, residual in (("none", False), ("silu", True), ("relu", True)):
        check(shape, torch.float32, layout, activation, residual, threads=4)


@pytest.mark.parametrize("ratio", [1.0, 1e3, 1e4])
@pytest.mark.parametrize("layout", LAYOUTS)
@pytest.mark.parametrize("shape", ["whole planes", "wide pixels", "many rows", "many chunks"])
def test_large_mean(shape, layout, ratio):
    """x̂ from a mean rounded to float32 would be off by 4.8e-4 at a ratio of 1e4."""
    shape = SHAPES[shape]
    x, _, dy, weight, bias = inputs(shape, torch.float32, offset=ratio, scale=1.0)
    kernel = GroupNorm(x, shape[3], weight, bias, None, layout, "none")
    y = kernel.forward()
    dx, _, dweight, _ = kernel.backward(dy)
    oracle = reference(x, shape[3], weight, bias)
    expected = oracle.backward(to_float64(dy))
    for got, want in ((y, oracle.y), (dx, expected[0]), (dweight, expected[2])):
        assert norm_error(got, want) <= 1e-5


@pytest.mark.parametrize("layout", LAYOUTS)
def test_bfloat16_far_from_zero(layout):
    """All bfloat16, 50 σ from zero: dweight within 2e-3 before it is rounded."""
    shape = (4, 64, 256, 8)
    x, _, dy, weight, bias = inputs(shape, torch.bfloat16, offset=50.0, scale=1.0)
    kernel = GroupNorm(x, 8, weight.float(), bias.float(), None, layout, "none")
    kernel.forward()
    dweight = kernel.backward(dy)[2]
    expected = reference(x, 8, weight, bias).backward(to_float64(dy))[2]
    assert norm_error(dweight, expected) <= 2e-3


@pytest.mark.parametrize("layout", LAYOUTS)
@pytest.mark.parametrize("shape", ["planes", "short planes", "rows of groups", "wide pixels"])
def test_without_parameters(shape, layout):
    check(SHAPES[shape], torch.float32, layout, "silu", True, parameters=False)


@pytest.mark.parametrize("unwanted", range(4))
@pytest.mark.parametrize("activation", ["none", "silu", "relu"])
@pytest.mark.parametrize("shape", ["planes", "many chunks", "rows of groups", "few channels"])
def test_outputs_that_nobody_wants_change_nothing(shape, activation, unwanted):
    shape = SHAPES[shape]
    x, residual, dy, weight, bias = inputs(shape, torch.float32)
    for layout in LAYOUTS:
        kernel = GroupNorm(x, shape[3], weight, bias, residual, layout, activation)
        kernel.forward()
        whole = kernel.backward(dy)
        wanted = tuple(i != unwanted for i in range(4))
        for got, want in zip(kernel.backward(dy, 1, wanted), whole, strict=True):
            assert got is None or torch.equal(got, want)
        alone = tuple(i == unwanted for i in range(4))
        for got, want in zip(kernel.backward(dy, 1, alone), whole, strict=True):
            assert got is None or torch.equal(got, want)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
@pytest.mark.parametrize("layout", LAYOUTS)
@pytest.mark.parametrize("shape", [(5, 6, 70001, 3), (9, 330, 1000, 33), (2100, 1001, 1, 1)])
def test_outputs_past_the_cache(shape, layout, dtype):
    """8 MB and more, at any alignment of the rows."""
    for activation, residual in (("none", False), ("silu", True), ("relu", True)):
        check(shape, dtype, layout, activation, residual)


@pytest.mark.parametrize("layout", LAYOUTS)
@pytest.mark.parametrize("shape", ["planes", "rows of groups", "few channels", "wide pixels"])
def test_infinite_values_spoil_their_group_alone(shape, layout):
    shape = SHAPES[shape]
    x, _, _, weight, bias = inputs(shape, torch.float32)
    x[0, 0, 0] = torch.inf
    huge = x.clone()
    huge[0, 0, 0] = 1e30  # its square overflows float
    G = shape[3]
    y = GroupNorm(x, G, weight, bias, None, layout, "none").forward()
    D = shape[1] // G
    assert y[0, :D].isnan().all()
    assert y[0, D:].isfinite().all()
    assert y[1:].isfinite().all()
    y = GroupNorm(huge, G, weight, bias, None, layout, "none").forward()
    oracle = reference(huge, G, weight, bias)
    assert_close(y, oracle.y, elementwise(torch.float32, D * shape[2]), "y")


@pytest.mark.parametrize("layout", LAYOUTS)
@pytest.mark.parametrize("shape", [(0, 4, 9, 2), (3, 4, 0, 2), (0, 4, 1, 1)], ids=str)
def test_nothing_is_written_for_no_elements(shape, layout):
    x, _, dy, weight, bias = inputs(shape, torch.float32)
    kernel = GroupNorm(x, shape[3], weight, bias, None, layout, "none")
    assert kernel.forward().numel() == 0
    assert kernel.backward(dy)[2].isnan().all()


@pytest.mark.parametrize("capability", native.other_instruction_sets())
def test_the_other_instruction_sets(capability):
    """In a process of its own, since the choice is made once a process."""
    some = "test_forward_and_backward and (float32 or bfloat16) and (planes or few or groups)"
    result = native.run_python(
        capability, "-m", "pytest", "-q", "-p", "no:cacheprovider", __file__, "-k", some
    )
    assert result.returncode == 0, result.stdout
    assert " passed" in result.stdout
