"""Batch norm's numbers: against the float64 oracle, for every dtype, layout and mode."""

from __future__ import annotations

import pytest
import torch
import torch.nn.functional as F

from batchops import functional as BF

from .batch_norm_case import Case
from .reference import BatchNormReference, to_float64
from .tensors import (
    DTYPES,
    LAYOUTS,
    channels_last,
    huge_zeros,
    leaf,
    make,
    needs_memory,
    parameters,
    saved_bytes,
    skip_unless_kernel,
)
from .tolerances import assert_close, elementwise, norm_error

SHAPES = {
    "rows": (5, 7),  # 2-D, odd everything
    "two rows": (2, 8),  # the fewest values per channel
    "one channel": (4, 1, 3, 5),
    "one pixel": (6, 33, 1, 1),  # both layouts are the same memory
    "seven": (3, 19, 7, 7),  # rows of 49: no multiple of any vector width
    "pixels": (2, 3, 31),  # 3-D
    "wide": (2, 160, 9, 4),  # channels over several vectors and a tail
    "volume": (2, 5, 3, 4, 6),  # 5-D
    "tall": (300, 4, 6, 6),  # many samples: several chunks of partial sums
    "large": (3, 8, 96, 96),  # planes longer than one accumulator run
}


@pytest.mark.parametrize("training", [True, False], ids=["train", "eval"])
@pytest.mark.parametrize("with_residual", [False, True], ids=["plain", "residual"])
@pytest.mark.parametrize("activation", ["none", "relu"])
@pytest.mark.parametrize("layout", LAYOUTS)
@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("shape", SHAPES.values(), ids=SHAPES)
def test_forward_and_backward(shape, dtype, layout, activation, with_residual, training, device):
    skip_unless_kernel(device, dtype)
    Case(shape, dtype, device, layout, with_residual, training, activation).check()


@pytest.mark.parametrize("parameter", ["input", "float32", "none", "weight only", "bias only"])
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16, torch.float64], ids=str)
def test_parameter_dtypes(dtype, parameter, device):
    skip_unless_kernel(device, dtype)
    x = leaf(make((4, 6, 5, 5), dtype, device))
    weight, bias = parameters(6, dtype if parameter == "input" else torch.float32, device)
    weight = None if parameter in ("none", "bias only") else leaf(weight)
    bias = None if parameter in ("none", "weight only") else leaf(bias)
    y = BF.batch_norm(x, None, None, weight, bias, True, activation="relu")
    y.sum().backward()
    oracle = BatchNormReference(*map(to_float64, (x, weight, bias)), act="relu")
    assert_close(y, oracle.y, elementwise(dtype, 100))
    for p in (weight, bias):
        assert p is None or p.grad.dtype == p.dtype


# What a GPU of compute capability 9.0 keeps of these is 28 to 48 KB a block: with the kernel's own
# variables more than it has without being asked.
@pytest.mark.cuda
@pytest.mark.parametrize("residual", [False, True], ids=["", "add"])
@pytest.mark.parametrize(
    ("shape", "dtype", "layout"),
    [
        ((4, 16, 9, 9), torch.bfloat16, "channels_last"),
        ((8, 512, 7, 7), torch.bfloat16, "channels_last"),
        ((4, 2048, 7, 7), torch.bfloat16, "channels_last"),
        ((24, 2048, 7, 7), torch.bfloat16, "channels_last"),
        ((128, 1024), torch.float32, "contiguous"),
        ((256, 4096), torch.bfloat16, "contiguous"),
        ((3, 64, 112, 112), torch.float32, "contiguous"),
    ],
    ids=str,
)
def test_sizes_just_below_48_kilobytes(shape, dtype, layout, residual):
    Case(shape, dtype, torch.device("cuda"), layout, residual, True, "relu").check()


LARGE_MEAN_SHAPES = [
    (16, 6, 24, 24),
    (64, 40, 7, 7),  # planes shorter than a row of the kernel
    (257, 128),  # the last chunk is one short row, with a shift of its own
    (4127, 10),  # the same, with many channels' worth of columns a row
]


@pytest.mark.reduced
@pytest.mark.parametrize("layout", LAYOUTS)
@pytest.mark.parametrize("ratio", [1.0, 1e3, 1e4])
@pytest.mark.parametrize("shape", LARGE_MEAN_SHAPES, ids=str)
def test_large_mean(shape, ratio, layout, device):
    """|mean| / std up to 1e4 in float32: y, dx and dweight within 1e-5 norm-wise of float64."""
    x = leaf(make(shape, torch.float32, device, layout, offset=ratio, scale=1.0))
    weight, bias = map(leaf, parameters(shape[1], torch.float32, device))
    y = BF.batch_norm(x, None, None, weight, bias, True)
    dy = make(y.shape, torch.float32, device, layout, offset=0.0, scale=1.0)
    y.backward(dy)
    oracle = BatchNormReference(*map(to_float64, (x, weight, bias)))
    dx, _, dweight, _ = oracle.backward(to_float64(dy))
    assert norm_error(y, oracle.y) <= 1e-5
    assert norm_error(x.grad, dx) <= 1e-5
    assert norm_error(weight.grad, dweight) <= 1e-5


def test_infinite_running_mean(device):
    x = make((4, 3, 5, 5), torch.float32, device)
    mean = torch.tensor([0.0, float("inf"), -float("inf")], device=device)
    var = torch.ones(3, device=device)
    y, expected = (f(x, mean, var, training=False) for f in (BF.batch_norm, F.batch_norm))
    torch.testing.assert_close(y, expected, rtol=1e-6, atol=1e-6)


@pytest.mark.parametrize("layout", LAYOUTS)
def test_outlier_first(layout, device):
    """A shift taken from the first value alone would lose the variance of all others."""
    x = make((8, 3, 20, 20), torch.float32, device, layout, offset=0.0, scale=1.0)
    x[0, :, 0, 0] = 1e4
    y = BF.batch_norm(x, None, None, None, None, True)
    oracle = BatchNormReference(to_float64(x), None, None)
    assert norm_error(y, oracle.y) <= 1e-5


@pytest.mark.parametrize("layout", LAYOUTS)
@pytest.mark.parametrize("value", [float("nan"), float("inf")])
def test_non_finite_stays_in_its_channel(value, layout, device):
    x = make((4, 3, 6, 6), torch.float32, device, layout)
    x[1, 2, 3, 3] = value
    ours = BF.batch_norm(x, None, None, training=True, activation="relu")
    stock = F.batch_norm(x, None, None, training=True).relu()
    assert ours[:, 2].isnan().all() == stock[:, 2].isnan().all()
    assert ours[:, :2].isfinite().all()


def test_strided_inputs(device):
    """Views that are dense in neither layout are copied once; views with odd offsets are not."""
    base = make((6, 8, 12, 12), torch.float32, device)
    views = {
        "every other column": base[:, :, :, ::2],
        "some channels": base[:, 2:7],
        "transposed": base.transpose(2, 3),
        "offset": base.view(-1)[1 : 1 + 6 * 8 * 11 * 12].view(6, 8, 11, 12),
        "channels_last slice": base.to(memory_format=torch.channels_last)[:, :, 1:9],
        "expanded": base[:1].expand(6, 8, 12, 12),
    }
    for name, view in views.items():
        x = leaf(view)
        y = BF.batch_norm(x, None, None, training=True, activation="relu")
        y.sum().backward()
        oracle = BatchNormReference(to_float64(view), None, None, act="relu")
        assert_close(y, oracle.y, elementwise(torch.float32, 864), name)
        assert x.grad.shape == view.shape


@pytest.mark.parametrize("mixed", ["dy", "residual"])
def test_layouts_may_differ(mixed, device):
    x = leaf(make((3, 5, 4, 6), torch.float32, device, "channels_last"))
    other = make((3, 5, 4, 6), torch.float32, device, "contiguous")
    residual = leaf(other) if mixed == "residual" else None
    y = BF.batch_norm(x, None, None, training=True, activation="relu", residual=residual)
    dy = other if mixed == "dy" else channels_last(other)
    y.backward(dy)
    oracle = BatchNormReference(to_float64(x), None, None, to_float64(residual), act="relu")
    dx, dz, _, _ = oracle.backward(to_float64(dy))
    assert_close(y, oracle.y, elementwise(torch.float32, 72))
    assert_close(x.grad, dx, 3 * elementwise(torch.float32, 72))
    if residual is not None:
        assert_close(residual.grad, dz, elementwise(torch.float32, 72))


@pytest.mark.parametrize("shape", [(0, 4), (0, 4, 3, 3), (2, 4, 0, 3)], ids=str)
def test_empty(shape, device):
    x = torch.empty(shape, device=device, requires_grad=True)
    weight, bias = map(leaf, parameters(4, torch.float32, device))
    mean, var = torch.zeros(4, device=device), torch.ones(4, device=device)
    y = BF.batch_norm(x, mean, var, weight, bias, True, activation="relu", residual=x.detach())
    y.sum().backward()
    assert y.shape == shape
    assert x.grad.shape == shape
    assert weight.grad.eq(0).all()
    assert bias.grad.eq(0).all()
    assert mean.eq(0).all()
    assert var.eq(1).all()


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
@pytest.mark.parametrize("layout", LAYOUTS)
def test_same_bits_for_any_thread_count(layout, dtype, threads):
    for shape in [(32, 24, 40, 40), (2048, 40), (7, 3, 100, 50)]:
        x = make(shape, dtype, "cpu", layout)
        residual = make(shape, dtype, "cpu", layout)
        dy = make(shape, dtype, "cpu", layout)
        seen = []
        for count in (1, 2, 3, 5):
            threads(count)
            a, r = leaf(x), leaf(residual)
            w, b = map(leaf, (torch.ones(shape[1]), torch.zeros(shape[1])))
            mean, var = torch.zeros(shape[1]), torch.ones(shape[1])
            y = BF.batch_norm(a, mean, var, w, b, True, activation="relu", residual=r)
            y.backward(dy)
            seen.append((y, mean, var, a.grad, r.grad, w.grad, b.grad))
        for other in seen[1:]:
            assert all(torch.equal(p, q) for p, q in zip(seen[0], other, strict=True))


def test_same_bits_in_every_run(device):
    x = make((16, 12, 20, 20), torch.float32, device)
    first = None
    for _ in range(1000):
        a = leaf(x)
        w = torch.ones(12, device=device, requires_grad=True)
        y = BF.batch_norm(a, None, None, w, None, True, activation="relu")
        y.backward(x)
        now = (y.detach(), a.grad, w.grad)
        first = first or now
        assert all(torch.equal(p, q) for p, q in zip(first, now, strict=True))


@pytest.mark.parametrize("activation", [None, "relu"])
@pytest.mark.parametrize("with_residual", [False, True])
def test_saved_memory(activation, with_residual):
    """norm + relu keeps x; norm + add + relu keeps x and one bit an element; no copy of y."""
    shape = (8, 16, 32, 32)
    x = leaf(make(shape, torch.float32, "cpu"))
    residual = leaf(make(shape, torch.float32, "cpu")) if with_residual else None
    weight, bias = map(leaf, parameters(16, torch.float32, "cpu"))
    kept = saved_bytes(
        lambda: BF.batch_norm(
            x, None, None, weight, bias, True, activation=activation, residual=residual
        )
    )
    bits = x.numel() // 8 if activation and with_residual else 0
    per_channel = 16 * 4 * (2 + 3)
    assert kept <= x.nbytes + bits + per_channel


def test_fallback_composes_torch_operators(device):
    """What has no kernel takes torch's operators: CUDA float64, and a residual of another dtype."""
    x = make((3, 4, 5, 5), torch.bfloat16, device)
    residual = make((3, 4, 5, 5), torch.float32, device)
    y = BF.batch_norm(x, None, None, training=True, activation="relu", residual=residual)
    expected = torch.relu(F.batch_norm(x, None, None, training=True) + residual)
    assert y.dtype == torch.float32
    assert torch.equal(y, expected)
    if device.type == "cuda":
        x = x.double()
        y = BF.batch_norm(x, None, None, training=True, activation="relu")
        assert torch.equal(y, F.batch_norm(x, None, None, training=True).relu())


@needs_memory(12)
def test_more_than_two_billion_elements_are_addressed():
    """Index arithmetic is 64-bit: an input of 2³¹ + elements in bfloat16, checked at its ends."""
    C, rows = 2**13, 2**18 + 3
    x = huge_zeros((rows, C), torch.bfloat16)
    x[-2:, -3:] = 1.0
    mean, var = torch.zeros(C), torch.ones(C)
    y = torch.ops.batchops.batch_norm_eval(x, mean, var, None, None, None, 0.0, "none")[0]
    assert y.numel() > 2**31
    assert y[-2:, -3:].eq(1).all()
    assert y[-3].eq(0).all()
    assert y[:, 0].eq(0).all()
