"""The operators that make y once more from saved statistics."""

from __future__ import annotations

import pytest
import torch

from .reference import ACTIVATIONS
from .tensors import DTYPES, LAYOUTS, make, parameters, skip_unless_kernel

ops = torch.ops.batchops

SHAPES = {
    "rows": (5, 8),
    "small planes": (3, 12, 3, 3),
    "odd planes": (3, 20, 7, 7),
    "large planes": (3, 8, 96, 96),  # several chunks a plane
    "pixels": (2, 160, 9, 4),
}


@pytest.mark.parametrize("layout", LAYOUTS)
@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize(
    ("activation", "with_residual"), [(name, r) for name in ACTIVATIONS for r in (False, True)]
)
@pytest.mark.parametrize("shape", SHAPES.values(), ids=SHAPES)
def test_same_bits_as_the_forward(shape, activation, with_residual, dtype, layout, device):
    skip_unless_kernel(device, dtype)
    x = make(shape, dtype, device, layout)
    z = make(shape, dtype, device, layout) if with_residual else None
    affine, last = parameters(shape[1], dtype, device), (z, activation, 0.1)
    running = [t.float() for t in parameters(shape[1], dtype, device)]
    running = running[1], running[0]

    rest = z, 1e-5, activation, 0.1
    y, stats, _ = ops.batch_norm(x, *affine, *rest)
    assert torch.equal(ops.batch_norm_apply(x, stats, *affine, *last), y)
    y, stats, _ = ops.batch_norm(x, *affine, *rest, False, 2)
    assert torch.equal(ops.batch_norm_apply(x, stats, *affine, *last, 2), y)
    y, stats, _ = ops.batch_norm_eval(x, *running, *affine, *rest)
    assert torch.equal(ops.batch_norm_apply(x, stats, *affine, *last), y)
    for groups in (1, 4, shape[1]):
        y, stats, _ = ops.group_norm(x, groups, *affine, *rest)
        assert torch.equal(ops.group_norm_apply(x, stats, groups, *affine, *last), y)


@pytest.mark.parametrize("activation", ["none", "relu"])
@pytest.mark.parametrize("layout", LAYOUTS)
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
def test_past_the_cache(dtype, layout, activation, device):
    test_same_bits_as_the_forward((8, 32, 96, 96), activation, False, dtype, layout, device)


@pytest.mark.parametrize("threads_then", [1, 2, 8])
def test_same_bits_for_any_thread_count(threads_then, threads):
    x = torch.randn(3, 32, 64, 64)
    results = []
    for count in (2, threads_then):
        threads(count)
        _, stats, _ = ops.batch_norm(x, None, None, None, 1e-5, "silu")
        _, groups, _ = ops.group_norm(x, 8, None, None, None, 1e-5, "silu")
        results.append(ops.batch_norm_apply(x, stats, None, None, None, "silu"))
        results.append(ops.group_norm_apply(x, groups, 8, None, None, None, "silu"))
    assert torch.equal(results[0], results[2])
    assert torch.equal(results[1], results[3])


def test_statistics_are_read_not_computed(device):
    x = torch.randn(4, 6, 5, 5, device=device)
    stats = torch.stack([torch.full((6,), 2.0), torch.full((6,), 0.5), torch.full((6,), 3.0)])
    y = ops.batch_norm_apply(x, stats.to(device), None, None, None, "none")
    torch.testing.assert_close(y, (x - 2.5) * 3)
    stats = torch.stack([torch.full((8,), 2.0), torch.full((8,), 0.5), torch.full((8,), 3.0)])
    y = ops.group_norm_apply(x, stats.to(device), 2, None, None, None, "none")
    torch.testing.assert_close(y, (x - 2.5) * 3)


def test_opcheck():
    x, weight, bias = torch.randn(5, 6, 3, 3), torch.randn(6), torch.randn(6)
    tests = ("test_schema", "test_faketensor", "test_aot_dispatch_dynamic")
    _, stats, _ = ops.batch_norm(x, weight, bias, x, 1e-5, "relu", 0.01, False, 2)
    args = (x, stats, weight, bias, x, "relu", 0.01, 2)
    torch.library.opcheck(ops.batch_norm_apply.default, args, test_utils=tests)
    _, stats, _ = ops.group_norm(x, 3, weight, bias, x, 1e-5, "silu")
    args = (x, stats, 3, weight, bias, x, "silu")
    torch.library.opcheck(ops.group_norm_apply.default, args, test_utils=tests)


def test_errors():
    x = torch.randn(4, 6, 5)
    wrong = torch.zeros(3, 7)
    with pytest.raises(RuntimeError, match=r"expected stats .* of size \[3, 6\], got \[3, 7\]"):
        ops.batch_norm_apply(x, wrong, None, None, None, "none")
    with pytest.raises(RuntimeError, match=r"expected stats .* of size \[3, 12\], got \[3, 7\]"):
        ops.batch_norm_apply(x, wrong, None, None, None, "none", 0.01, 2)
    with pytest.raises(RuntimeError, match=r"expected stats .* of size \[3, 8\], got \[3, 7\]"):
        ops.group_norm_apply(x, wrong, 2, None, None, None, "none")


@pytest.mark.parametrize("shape", [(0, 4, 3), (2, 4, 0)], ids=str)
def test_empty(shape):
    x = torch.empty(shape)
    _, stats, _ = ops.batch_norm(x, None, None, None, 1e-5, "relu")
    assert ops.batch_norm_apply(x, stats, None, None, None, "relu").shape == x.shape
    _, stats, _ = ops.group_norm(x, 2, None, None, None, 1e-5, "relu")
    assert ops.group_norm_apply(x, stats, 2, None, None, None, "relu").shape == x.shape
