"""instance_norm's running statistics: their numbers, and the operator that writes them in torch's
machinery. The norm itself is in test_group_norm.py."""

from __future__ import annotations

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from torch.func import functional_call, functionalize, vmap

import batchops
from batchops import functional as BF
from batchops import nn as bnn

from .reference import activation_argument, to_float64
from .tensors import DTYPES, LAYOUTS, skip_unless_kernel

ops = torch.ops.batchops
layouts = pytest.mark.parametrize("layout", LAYOUTS)


def averages(x):
    """In float64: over the samples, of the means and of the unbiased variances of the channels."""
    values = to_float64(x).reshape(*x.shape[:2], -1)
    return values.mean(2).mean(0), values.var(2, ddof=1).mean(0)


INPUTS = {
    # the variance is no part of rstd's float32 there
    "tiny": lambda: torch.rand(8, 6, 16, 16) * 1e-6,
    "below eps": lambda: torch.randn(8, 6, 16, 16) * 1e-5,
    # and a difference of large numbers here
    "large mean": lambda: torch.randn(3, 5, 9, 11) + 1e4,
    "constant": lambda: torch.full((2, 3, 4, 5), 0.1),
    # planes shorter than a vector, one sample, two positions
    "small planes": lambda: torch.randn(5, 33, 3, 3),
    "one sample": lambda: torch.randn(1, 4, 6, 7),
    "two positions": lambda: torch.randn(4, 3, 1, 2),
}


@layouts
@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("name", INPUTS)
def test_running_statistics(name, dtype, layout, device):
    skip_unless_kernel(device, dtype)
    x = LAYOUTS[layout](INPUTS[name]().to(device, dtype))
    kind = torch.float64 if dtype == torch.float64 else torch.float32
    mean, var = torch.full((x.size(1),), 0.5, dtype=kind), torch.full((x.size(1),), 2.0, dtype=kind)
    mean, var = mean.to(device), var.to(device)
    BF.instance_norm(x, mean, var, momentum=1.0)
    for got, expected in zip((mean, var), averages(x), strict=True):
        size = np.abs(to_float64(x)).max() if got is mean else expected
        bound = (1e-13 if dtype == torch.float64 else 2e-6) * size
        assert (np.abs(to_float64(got) - expected) <= bound).all()
    BF.instance_norm(x, mean.fill_(1), var.fill_(3), momentum=0.25)
    for got, begin, expected in zip((mean, var), (1, 3), averages(x), strict=True):
        moved = 0.75 * begin + 0.25 * expected
        np.testing.assert_allclose(to_float64(got), moved, rtol=1e-5, atol=1e-6)


@layouts
@pytest.mark.parametrize(
    ("activation", "residual"),
    # what the backward keeps: x, x twice, a mask (of which each sample has its part), the residual
    [("silu", False), ("none", True), ("relu", True), ("silu", True)],
)
@pytest.mark.parametrize("size", [(3, 5, 4, 3), (2, 13, 7, 7)], ids=str)  # masks of odd rows
def test_the_same_norm_as_without_statistics(size, activation, residual, layout, device):
    x, r, dy = (LAYOUTS[layout](torch.randn(size, device=device)) for _ in range(3))
    w, b = torch.rand(size[1], device=device) + 0.5, torch.randn(size[1], device=device)
    tensors = [t.requires_grad_() for t in (x, w, b, r)][: 4 if residual else 3]

    def outcome(*statistics):
        y = BF.instance_norm(
            x,
            *statistics,
            weight=w,
            bias=b,
            activation=activation_argument(activation),
            residual=r if residual else None,
        )
        assert y.stride() == x.stride()
        return y, *torch.autograd.grad(y, tensors, dy)

    expected = outcome()
    got = outcome(torch.zeros(size[1], device=device), torch.ones(size[1], device=device))
    for one, other in zip(got, expected, strict=True):
        torch.testing.assert_close(one, other, rtol=1e-5, atol=1e-5)


def test_statistics_of_any_floating_dtype():
    """As in torch: they are no operands of the norm while it takes its own."""
    x = torch.randn(4, 3, 5)
    for dtype in (torch.float64, torch.bfloat16):
        ours, theirs = ([torch.zeros(3, dtype=dtype), torch.ones(3, dtype=dtype)] for _ in "ab")
        BF.instance_norm(x, *ours)
        F.instance_norm(x, *theirs)
        for one, other in zip(ours, theirs, strict=True):
            torch.testing.assert_close(one, other)


@pytest.mark.parametrize("layout", LAYOUTS)
def test_same_bits_for_any_thread_count(layout, threads):
    x = LAYOUTS[layout](torch.randn(4, 3, 200, 200))  # planes above the grain of torch's reductions
    seen = []
    for count in (1, 2, 3):
        threads(count)
        mean, var = torch.zeros(3), torch.ones(3)
        seen.append((BF.instance_norm(x, mean, var), mean, var))
    for other in seen[1:]:
        assert all(map(torch.equal, seen[0], other))


@layouts
@pytest.mark.parametrize(("activation", "residual"), [("none", False), ("relu", True)])
def test_opcheck(activation, residual, layout):
    x = LAYOUTS[layout](torch.randn(4, 5, 6, 3)).requires_grad_()
    w, b = (torch.rand(5).requires_grad_() for _ in range(2))
    r = torch.randn_like(x) if residual else None
    torch.library.opcheck(ops.instance_norm.default, (x, w, b, r, 1e-5, activation))
    statistics = torch.zeros(5), torch.ones(5)
    torch.library.opcheck(
        ops.instance_norm_update.default, (x, *statistics, w, b, r, 0.1, 1e-5, activation)
    )


@pytest.mark.parametrize("dynamic", [False, True])
def test_compile_fullgraph(dynamic):
    torch._dynamo.reset()
    norms = [bnn.InstanceNorm2d(5, affine=True, track_running_stats=True) for _ in range(2)]
    compiled = torch.compile(norms[0], fullgraph=True, backend="aot_eager", dynamic=dynamic)
    for batch in (4, 2):
        x = torch.randn(batch, 5, 6, 3)
        assert torch.equal(compiled(x), norms[1](x))
    for name, value in norms[1].state_dict().items():
        assert torch.equal(norms[0].state_dict()[name], value), name


def test_gradients_of_a_functional_call():
    """The buffers are captured, and written to, as torch's are."""
    x = torch.randn(4, 3, 8, 8)
    ours, theirs = (
        kind(3, affine=True, track_running_stats=True)
        for kind in (bnn.InstanceNorm2d, torch.nn.InstanceNorm2d)
    )

    def gradients(module):
        def loss(parameters):
            return functional_call(module, parameters, (x,)).pow(2).sum()

        return torch.func.grad(loss)(dict(module.named_parameters()))

    torch.testing.assert_close(gradients(ours), gradients(theirs), rtol=1e-4, atol=1e-4)
    torch.testing.assert_close(ours.running_var, theirs.running_var)


def test_statistics_that_all_examples_share_are_refused():
    x, mean, var = torch.randn(2, 4, 3, 8), torch.zeros(3), torch.ones(3)
    for norm in (BF.instance_norm, F.instance_norm):
        with pytest.raises(RuntimeError, match="Batch norm got a batched tensor as input while"):
            vmap(lambda t, norm=norm: norm(t, mean, var))(x)
    assert mean.eq(0).all()
    assert var.eq(1).all()


def test_statistics_of_each_example():
    x, mean, var = torch.randn(3, 4, 5, 6), torch.zeros(3, 5), torch.ones(3, 5)
    y = vmap(BF.instance_norm)(x, mean, var)
    for i in range(3):
        own = torch.zeros(5), torch.ones(5)
        assert torch.equal(y[i], BF.instance_norm(x[i], *own))
        assert all(map(torch.equal, (mean[i], var[i]), own))


@pytest.mark.parametrize("patched", [False, True])
@pytest.mark.parametrize("ghost", [None, 2])
@pytest.mark.parametrize("name", ["batch_norm", "instance_norm"])
def test_functionalize(name, ghost, patched):
    """torch.func.functionalize follows the statistics that are written to."""
    if name == "instance_norm" and ghost is not None:
        pytest.skip("ghost batches are batch norm's")
    x, r = torch.randn(5, 3, 8), torch.randn(5, 3, 8)
    more = {"training": True, "ghost_batch_size": ghost} if name == "batch_norm" else {}

    def norm(x, mean, var):
        return getattr(BF, name)(x, mean, var, activation="relu", residual=r, **more), mean, var

    eager = [torch.zeros(3), torch.ones(3)]
    expected = norm(x, *eager)
    given = [torch.zeros(3), torch.ones(3)]
    with batchops.patch() if patched else torch.enable_grad():
        got = functionalize(norm)(x, *given)
    for one, other in zip((*got, *given), (*expected, *eager), strict=True):
        torch.testing.assert_close(one, other, rtol=1e-5, atol=1e-5)


@pytest.mark.parametrize("tracked", [False, True])
def test_no_channels(tracked):
    x = torch.ones(4, 0, 5, requires_grad=True)
    y = BF.instance_norm(x, *(torch.ones(0), torch.ones(0)) if tracked else ())
    assert y.shape == F.instance_norm(x).shape == (4, 0, 5)
    (dx,) = torch.autograd.grad(y.sum(), x, create_graph=True)
    assert dx.shape == x.shape


def test_the_operators_check_for_themselves():
    x, w = torch.randn(2, 3, 1), torch.ones(3)
    for call in (
        lambda x: ops.instance_norm(x, None, None, None, 1e-5, "none"),
        lambda x: ops.instance_norm_update(x, w, w, None, None, None, 0.1, 1e-5, "none"),
    ):
        for given in (x, x.to("meta")):
            with pytest.raises(ValueError, match=r"1 spatial .*input size torch.Size\(\[2, 3, 1"):
                call(given)
        with pytest.raises(RuntimeError, match="instance_norm: expected input of 2 or more"):
            call(x[0, :, 0].requires_grad_())
