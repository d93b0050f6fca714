"""ghost_batch_size: statistics for each ghost batch, one pooled step of the running ones."""

from __future__ import annotations

import numpy as np
import pytest
import torch
import torch._dynamo.testing  # not there of itself
import torch.nn.functional as F

import batchops
from batchops import functional as BF
from batchops import nn as bnn

from .reference import BatchNormReference, activation_argument, to_float64
from .tensors import DTYPES, LAYOUTS, leaf, make, parameters, skip_unless_kernel
from .tolerances import assert_close, before_rounding, elementwise, norm_error

# (shape, ghost_batch_size, first samples of the ghost batches)
CASES = {
    "even": ((8, 5, 4, 3), 4, (0, 4)),
    "ragged": ((10, 19, 7, 7), 4, (0, 4, 8)),  # the last has two samples
    "a sample each": ((3, 6, 9, 9), 1, (0, 1, 2)),
    "rows": ((9, 33), 2, (0, 2, 4, 6)),  # a tail of one value joins the one before
    "rows, ragged": ((11, 16), 3, (0, 3, 6, 9)),
    "more than the batch": ((4, 3, 5), 100, (0,)),
    "as many as there are": ((4, 3, 5), 4, (0,)),
    "one left over, few": ((3, 8), 2, (0,)),
    "many": ((64, 40), 2, tuple(range(0, 64, 2))),  # more ghost batches than threads
    "volume": ((5, 4, 3, 4, 2), 2, (0, 2, 4)),
    "planes": ((5, 3, 64, 40), 2, (0, 2, 4)),  # the kernel of large planes
}
case = pytest.mark.parametrize(("shape", "size", "firsts"), CASES.values(), ids=CASES)


class GhostReference:
    """BatchNormReference for each ghost batch, and for the running statistics of all of them."""

    def __init__(self, firsts, x, weight, bias, residual, act):
        self.firsts = firsts
        self.whole = BatchNormReference(x, weight, bias)
        self.parts = [
            BatchNormReference(a, weight, bias, r, act=act)
            for a, r in zip(self.cut(x), self.cut(residual), strict=True)
        ]
        self.y = np.concatenate([part.y for part in self.parts])

    def cut(self, t):
        if t is None:
            return [None] * len(self.firsts)
        return np.split(t, self.firsts[1:])

    def backward(self, dy, y, bound):
        found = [
            part.backward(d, part.derivative_shown(shown, bound))
            for part, d, shown in zip(self.parts, self.cut(dy), self.cut(y), strict=True)
        ]
        dx, dz, dweight, dbias = zip(*found, strict=True)
        return np.concatenate(dx), np.concatenate(dz), sum(dweight), sum(dbias)


@pytest.mark.parametrize(
    ("activation", "with_residual"),
    [("none", False), ("relu", True), ("silu", False), ("gelu", True)],
)
@pytest.mark.parametrize("layout", LAYOUTS)
@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@case
def test_against_the_oracle(shape, size, firsts, dtype, layout, activation, with_residual, device):
    skip_unless_kernel(device, dtype)
    C = shape[1]
    x = make(shape, dtype, device, layout)
    # Ghost batches that differ, so that statistics of the wrong one show.
    x = leaf(x + torch.arange(shape[0], device=device).view(-1, *[1] * (x.dim() - 1)).to(dtype))
    residual = leaf(make(shape, dtype, device, layout)) if with_residual else None
    weight, bias = map(leaf, parameters(C, dtype, device))
    mean, var = torch.randn(C, device=device), torch.rand(C, device=device) + 0.5
    mean64, var64 = to_float64(mean), to_float64(var)
    oracle = GhostReference(
        firsts,
        *map(to_float64, (x, weight, bias, residual)),
        activation,
    )

    y = BF.batch_norm(
        *(x, mean, var, weight, bias, True, 0.3),
        activation=activation_argument(activation),
        residual=residual,
        ghost_batch_size=size,
    )
    dy = make(shape, dtype, device, layout, offset=0.2, scale=1.0)
    y.backward(dy)

    count = oracle.whole.count
    bound = elementwise(dtype, count)
    assert y.stride() == x.stride() == x.grad.stride()
    assert_close(y, oracle.y, bound * max(1.0, np.abs(oracle.y).max()), "y")
    running_mean, running_var = oracle.whole.running(mean64, var64, 0.3)
    in_float = elementwise(torch.float32, count) * max(1.0, np.abs(to_float64(x)).max()) ** 2
    assert_close(mean, running_mean, in_float, "running_mean")
    assert_close(var, running_var, in_float, "running_var")

    in_z = before_rounding(dtype, count)
    dx, dz, dweight, dbias = oracle.backward(to_float64(dy), to_float64(y), in_z)
    steepest = max(float(np.abs(p.weight * p.rstd).max()) for p in oracle.parts)
    assert_close(x.grad, dx, bound * max(1.0, 3 * steepest * max(1.0, np.abs(dz).max())), "dx")
    if residual is not None:
        assert_close(residual.grad, dz, bound, "dresidual")
    assert_close(weight.grad, dweight, bound * np.sqrt(count), "dweight")
    assert_close(bias.grad, dbias, bound * np.sqrt(count), "dbias")


@pytest.mark.parametrize("layout", LAYOUTS)
def test_sums_of_low_precision_parameters_are_rounded_once(layout, device):
    """64 ghost batches of all-positive terms: rounding every partial sum to bfloat16 would be off
    by many ulps."""
    x = leaf(make((128, 8, 4, 4), torch.bfloat16, device, layout))
    weight, bias = map(leaf, parameters(8, torch.bfloat16, device))
    y = BF.batch_norm(x, None, None, weight, bias, True, ghost_batch_size=2)
    y.backward(torch.ones_like(y))
    assert torch.equal(bias.grad, torch.full_like(bias, 128 * 16))
    dy = make((128, 8, 4, 4), torch.bfloat16, device, layout).abs()
    bias.grad = None
    y = BF.batch_norm(x, None, None, weight, bias, True, ghost_batch_size=2)
    y.backward(dy)
    exact = dy.double().sum((0, 2, 3))
    assert torch.equal(bias.grad, exact.to(torch.bfloat16))


def test_large_mean(device):
    """The running variance is pooled from moments, not from rounded statistics."""
    x = make((24, 6, 12, 12), torch.float32, device, offset=1e4, scale=1.0)
    mean, var = torch.zeros(6, device=device), torch.zeros(6, device=device)
    BF.batch_norm(x, mean, var, None, None, True, 1.0, ghost_batch_size=5)
    exact_var, exact_mean = torch.var_mean(x.double(), (0, 2, 3))
    assert norm_error(var, to_float64(exact_var)) <= 1e-5
    assert norm_error(mean, to_float64(exact_mean)) <= 1e-7


@pytest.mark.reduced
def test_the_same_as_stock_on_each_part(device):
    x = make((12, 4, 5, 5), torch.float32, device)
    parts = [F.batch_norm(part, None, None, None, None, True) for part in x.split(4)]
    y = BF.batch_norm(x, None, None, training=True, ghost_batch_size=4)
    torch.testing.assert_close(y, torch.cat(parts), rtol=1e-5, atol=1e-5)


def test_no_effect_in_evaluation(device):
    x, stats = make((6, 4, 5), torch.float32, device), (torch.zeros(4), torch.ones(4))
    stats = [t.to(device) for t in stats]
    y = BF.batch_norm(x, *stats, ghost_batch_size=2)
    assert torch.equal(y, BF.batch_norm(x, *stats))


@pytest.mark.parametrize("size", [2, 7, 16])
@pytest.mark.parametrize("shape", [(96, 24, 20, 20), (48, 3, 64, 64)], ids=str)
def test_same_bits_for_any_thread_count(shape, size, threads):
    """Ghost batches go to threads whole or shared out, as it suits."""
    x, dy = torch.randn(shape), torch.randn(shape)
    weight, bias = parameters(shape[1], torch.float32, x.device)
    results = []
    for count in (1, 2, 3, 8):
        threads(count)
        leaves = [leaf(t) for t in (x, weight, bias)]
        stats = torch.zeros(shape[1]), torch.ones(shape[1])
        y = BF.batch_norm(leaves[0], *stats, *leaves[1:], True, ghost_batch_size=size)
        y.backward(dy)
        results.append([y.detach(), *stats, *(t.grad for t in leaves)])
    for other in results[1:]:
        assert all(torch.equal(a, b) for a, b in zip(results[0], other, strict=True))


def test_empty(device):
    x = torch.empty(0, 4, 3, device=device, requires_grad=True)
    stats = torch.zeros(4, device=device), torch.ones(4, device=device)
    y = BF.batch_norm(x, *stats, training=True, ghost_batch_size=2)
    y.sum().backward()
    assert y.shape == x.grad.shape == x.shape
    assert torch.equal(stats[1], torch.ones_like(stats[1]))


@pytest.mark.parametrize(
    ("size", "error", "message"),
    [
        (0, ValueError, "expected ghost_batch_size to be positive or None, got 0"),
        (-3, ValueError, "expected ghost_batch_size to be positive or None, got -3"),
        (2.0, TypeError, "expected ghost_batch_size to be an int or None, got float"),
        (True, TypeError, "expected ghost_batch_size to be an int or None, got bool"),
    ],
)
def test_errors(size, error, message):
    with pytest.raises(error, match=message):
        BF.batch_norm(torch.randn(4, 3), None, None, training=True, ghost_batch_size=size)
    with pytest.raises(error, match=message):
        BF.batch_norm(torch.randn(4, 3), torch.zeros(3), torch.ones(3), ghost_batch_size=size)
    with pytest.raises(error, match=message):
        bnn.BatchNorm1d(3, ghost_batch_size=size)


def test_ghost_batches_of_one_value_raise():
    stats = torch.zeros(3), torch.ones(3)
    with pytest.raises(ValueError, match="more than 1 value per channel in a ghost batch"):
        BF.batch_norm(torch.randn(4, 3), *stats, training=True, ghost_batch_size=1)
    assert torch.equal(stats[1], torch.ones(3))


@pytest.mark.parametrize(
    ("activation", "residual"), [(None, False), ("relu", True), ("silu", True)]
)
@pytest.mark.parametrize("layout", [torch.contiguous_format, torch.channels_last])
def test_gradcheck_and_double_backward(activation, residual, layout):
    shape = (5, 3, 2, 3)
    x = torch.randn(shape, dtype=torch.float64).to(memory_format=layout)
    tensors = [x, torch.rand(3).double() + 0.5, torch.randn(3).double()]
    if residual:
        tensors.append(torch.randn(shape, dtype=torch.float64).to(memory_format=layout))
    tensors = [leaf(t) for t in tensors]

    def f(x, weight, bias, z=None):
        return BF.batch_norm(
            *(x, None, None, weight, bias, True),
            activation=activation,
            residual=z,
            ghost_batch_size=2,
        )

    assert torch.autograd.gradcheck(f, tensors)
    assert torch.autograd.gradgradcheck(f, tensors)


def test_opcheck():
    x, z = torch.randn(7, 4, 3, 3, requires_grad=True), torch.randn(7, 4, 3, 3)
    weight, bias = torch.ones(4, requires_grad=True), torch.zeros(4, requires_grad=True)
    stats, ops = (torch.zeros(4), torch.ones(4)), torch.ops.batchops
    rest = (1e-5, "relu", 0.01, False, 3)
    torch.library.opcheck(ops.batch_norm.default, (x, weight, bias, z, *rest))
    torch.library.opcheck(ops.batch_norm_update.default, (x, *stats, weight, bias, z, 0.1, *rest))


@pytest.mark.parametrize("N", [8, 7])
def test_compile_with_any_batch(N):
    """The number of ghost batches is an expression of the batch's size."""
    torch._dynamo.reset()
    frames = torch._dynamo.testing.CompileCounter()

    def f(x, mean, var):
        return BF.batch_norm(x, mean, var, training=True, ghost_batch_size=3) * 2

    compiled = torch.compile(f, fullgraph=True, dynamic=True, backend="aot_eager")
    counted = torch.compile(f, fullgraph=True, dynamic=True, backend=frames)
    for n in (N, N + 3, N + 6):
        x = leaf(torch.randn(n, 4, 5, 5))
        ours, theirs = [[torch.zeros(4), torch.ones(4)] for _ in range(2)]
        y, expected = compiled(x, *ours), f(x, *theirs)
        assert torch.equal(y, expected)
        assert all(map(torch.equal, ours, theirs))
        (dx,), (dx_expected,) = (torch.autograd.grad(t.sum(), x) for t in (y, expected))
        assert torch.equal(dx, dx_expected)
        counted(x, *ours)
    assert frames.frame_count == 1


def test_module():
    model = bnn.BatchNorm2d(4, activation="relu", ghost_batch_size=3)
    assert "ghost_batch_size=3" in repr(model)
    x = torch.randn(8, 4, 5, 5)
    y = model(x)
    expected = BF.batch_norm(x, None, None, training=True, activation="relu", ghost_batch_size=3)
    assert torch.equal(y, expected)
    assert model.num_batches_tracked == 1
    assert model.state_dict().keys() == torch.nn.BatchNorm2d(4).state_dict().keys()
    assert bnn.BatchNorm2d(4).ghost_batch_size is None


def test_recompute():
    norm, conv = bnn.BatchNorm2d(4, ghost_batch_size=2), torch.nn.Conv2d(4, 3, 3)
    x = torch.randn(5, 4, 6, 6, requires_grad=True)
    (expected,) = torch.autograd.grad(conv(norm(x)).square().sum(), x)
    with batchops.recompute():
        y = conv(norm(x))
    (dx,) = torch.autograd.grad(y.square().sum(), x)
    assert torch.equal(dx, expected)


def test_without_a_kernel_statistics_are_in_float32():
    x = (torch.randn(7, 4, 3, 3) + 3).bfloat16()
    mean, var = torch.zeros(4), torch.ones(4)
    residual = torch.randn(7, 4, 3, 3)  # of another dtype: torch's operators
    BF.batch_norm(x, mean, var, training=True, momentum=1.0, residual=residual, ghost_batch_size=3)
    exact_var, exact_mean = torch.var_mean(x.double(), (0, 2, 3))
    torch.testing.assert_close(mean.double(), exact_mean, rtol=1e-6, atol=0)
    torch.testing.assert_close(var.double(), exact_var, rtol=1e-5, atol=0)


@pytest.mark.parametrize("shape", [(4, 2, 0), (0, 2, 3), (4, 0, 3)], ids=str)
def test_without_a_kernel_empty(shape):
    stats = torch.zeros(shape[1]), torch.ones(shape[1])
    x, residual = torch.empty(shape), torch.empty(shape, dtype=torch.float64)
    y = BF.batch_norm(x, *stats, training=True, residual=residual, ghost_batch_size=2)
    assert y.shape == shape
    assert torch.equal(stats[1], torch.ones(shape[1]))


def test_revert_refuses():
    model = torch.nn.Sequential(bnn.BatchNorm2d(4, ghost_batch_size=2))
    with pytest.raises(ValueError, match="'0' has ghost_batch_size=2"):
        batchops.revert(model)
    assert type(model[0]) is bnn.BatchNorm2d


def test_sizes_of_other_integer_types():
    x = torch.randn(6, 4)
    y = BF.batch_norm(x, None, None, training=True, ghost_batch_size=np.int64(3))
    assert torch.equal(y, BF.batch_norm(x, None, None, training=True, ghost_batch_size=3))
    y = BF.batch_norm(x, None, None, training=True, ghost_batch_size=2**70)
    assert torch.equal(y, BF.batch_norm(x, None, None, training=True))


@pytest.mark.parametrize("shape", [(7, 4, 3, 3), (5, 4)], ids=str)
def test_without_a_kernel(shape, monkeypatch):
    """torch's operators, one ghost batch after the other."""
    x = torch.randn(shape)
    results = []
    for has_kernel in (True, False):
        stats = torch.zeros(4), torch.ones(4)
        monkeypatch.setattr(BF, "_has_kernel", lambda t, r=None, answer=has_kernel: answer)
        y = BF.batch_norm(x, *stats, training=True, activation="relu", ghost_batch_size=2)
        results.append((y, *stats))
    for ours, theirs in zip(*results, strict=True):
        torch.testing.assert_close(ours, theirs, rtol=1e-5, atol=1e-5)
