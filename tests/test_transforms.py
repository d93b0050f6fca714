"""The norms under torch.func's vmap, and in the graphs of compiled autograd."""

from __future__ import annotations

import pytest
import torch
import torch.nn.functional as F
from torch._dynamo import compiled_autograd
from torch.func import grad, jacrev, vjp, vmap

from batchops import functional as BF
from batchops import nn as bnn

EXAMPLES, C = 3, 6
MEAN, VAR = torch.randn(C).double(), torch.rand(C).double() + 0.5

# name: (ours, torch's), functions of (x, weight, bias) for x of size (N, C, C)
NORMS = {
    "batch": (
        lambda x, w, b, **more: BF.batch_norm(x, None, None, w, b, True, **more),
        lambda x, w, b: F.batch_norm(x, None, None, w, b, True),
    ),
    "batch, eval": (
        lambda x, w, b, **more: BF.batch_norm(x, MEAN, VAR, w, b, **more),
        lambda x, w, b: F.batch_norm(x, MEAN, VAR, w, b),
    ),
    "group": (
        lambda x, w, b, **more: BF.group_norm(x, 3, w, b, **more),
        lambda x, w, b: F.group_norm(x, 3, w, b),
    ),
    "layer": (
        lambda x, w, b, **more: BF.layer_norm(x, (C,), w, b, **more),
        lambda x, w, b: F.layer_norm(x, (C,), w, b),
    ),
    "instance": (
        lambda x, w, b, **more: BF.instance_norm(x, weight=w, bias=b, **more),
        lambda x, w, b: F.instance_norm(x, weight=w, bias=b),
    ),
}
norms = pytest.mark.parametrize(("ours", "theirs"), NORMS.values(), ids=NORMS)


# what torch warns of where it has no rule for an operator under vmap
pytestmark = pytest.mark.filterwarnings("error:There is a performance drop")


def example(*size):
    return torch.randn(*size, dtype=torch.float64)


@pytest.mark.parametrize("in_dims", [(0, None, None), (2, None, 0), (1, 1, None)], ids=str)
@norms
def test_vmap(ours, theirs, in_dims):
    tensors = []
    for size, dim in zip([(4, C, C), (C,), (C,)], in_dims, strict=True):
        t = example(*size) if dim is None else example(EXAMPLES, *size).movedim(0, dim)
        tensors.append(t)
    got = vmap(lambda *t: ours(*t, activation="relu"), in_dims)(*tensors)
    expected = vmap(lambda *t: theirs(*t).relu(), in_dims)(*tensors)
    torch.testing.assert_close(got, expected)


@pytest.mark.parametrize("activation", ["relu", "silu"])
@norms
def test_vmap_with_a_residual_and_out_dims(ours, theirs, activation):
    x, z, w, b = example(4, C, C), example(EXAMPLES, 4, C, C), example(C), example(C)
    act = getattr(F, activation)
    got = vmap(lambda r: ours(x, w, b, residual=r, activation=activation), out_dims=1)(z)
    expected = vmap(lambda r: act(theirs(x, w, b) + r), out_dims=1)(z)
    torch.testing.assert_close(got, expected)


@pytest.mark.parametrize("residual", [False, True])
@norms
def test_gradients_of_each_example(ours, theirs, residual):
    x, w, b = example(EXAMPLES, 4, C, C), example(C), example(C)

    def of(norm):
        def loss(w, b, t):
            return norm(t, w, b).square().sum()

        return vmap(grad(loss, (0, 1, 2)), (None, None, 0))(w, b, x)

    def fused(t, w, b):
        return ours(t, w, b, activation="relu", residual=t if residual else None)

    def stock(t, w, b):
        return (theirs(t, w, b) + (t if residual else 0)).relu()

    for got, expected in zip(of(fused), of(stock), strict=True):
        torch.testing.assert_close(got, expected)


@norms
def test_jacobians_of_jacobians(ours, theirs):
    x, w, b = example(2, C, C), example(C), example(C)

    def of(norm):
        return jacrev(jacrev(lambda t: norm(x, t, b).pow(3).sum()))(w)

    assert not of(ours).requires_grad
    torch.testing.assert_close(of(ours), of(theirs))
    got = jacrev(lambda t: ours(t, w, b))(x)
    torch.testing.assert_close(got, jacrev(lambda t: theirs(t, w, b))(x))


@norms
def test_a_derivative_asked_for_after_its_transform(ours, theirs):
    """vjp's function is called when nothing requires a gradient any more, here under jacrev."""
    x, w, b = example(2, C, C), example(C), example(C)

    def of(norm):
        def loss(t):
            return norm(x, t, b).pow(3).sum()

        def product(t):
            _, pull = vjp(grad(loss), t)
            return pull(torch.ones_like(t))[0]

        return product(w), jacrev(product)(w)

    for got, expected in zip(of(ours), of(theirs), strict=True):
        torch.testing.assert_close(got, expected)


def test_vmap_in_vmap():
    x = example(2, EXAMPLES, 4, C, C)
    got = vmap(vmap(lambda t: BF.batch_norm(t, None, None, training=True)))(x)
    expected = vmap(vmap(lambda t: F.batch_norm(t, None, None, training=True)))(x)
    torch.testing.assert_close(got, expected)


def test_ensemble_with_running_statistics_of_its_own():
    """Each member of an ensemble updates its own buffers."""
    members = [bnn.BatchNorm1d(C).double() for _ in range(EXAMPLES)]
    _, buffers = torch.func.stack_module_state(members)
    buffers.pop("num_batches_tracked")
    x = example(EXAMPLES, 5, C)

    def step(t, mean, var):
        return BF.batch_norm(t, mean, var, training=True)

    y = vmap(step)(x, buffers["running_mean"], buffers["running_var"])
    for i, member in enumerate(members):
        torch.testing.assert_close(y[i], member(x[i]))
        torch.testing.assert_close(buffers["running_mean"][i], member.running_mean)
        torch.testing.assert_close(buffers["running_var"][i], member.running_var)


def test_shared_running_statistics_are_refused():
    x, mean, var = example(EXAMPLES, 5, C), MEAN.clone(), VAR.clone()
    with pytest.raises(RuntimeError, match="running_mean is shared by all examples of vmap"):
        vmap(lambda t: BF.batch_norm(t, mean, var, training=True))(x)
    assert torch.equal(mean, MEAN)
    assert torch.equal(var, VAR)


def test_no_examples():
    with pytest.raises(RuntimeError, match="vmap over a dimension of size 0"):
        vmap(lambda t: BF.group_norm(t, 3))(example(0, 4, C))


GRAPHS = {
    **{name: ours for name, (ours, _) in NORMS.items()},
    "ghost": lambda x, w, b, **more: BF.batch_norm(
        x, None, None, w, b, True, ghost_batch_size=2, **more
    ),
}


# Saved: x alone, x twice, a mask, the residual.
@pytest.mark.parametrize(
    ("activation", "residual"), [("silu", False), (None, True), ("relu", True), ("silu", True)]
)
@pytest.mark.parametrize("norm", GRAPHS.values(), ids=GRAPHS)
def test_compiled_autograd(norm, activation, residual):
    tensors = [t.requires_grad_() for t in (example(4, C, C), example(C), example(C))]

    def backward(context=None):
        x, w, b = tensors
        y = norm(x, w, b, activation=activation, residual=x if residual else None)
        loss = y.square().sum()
        for t in tensors:
            t.grad = None
        if context is None:
            loss.backward()
        else:
            with context:
                loss.backward()
        return [t.grad for t in tensors]

    torch._dynamo.reset()
    compiler = torch.compile(backend="aot_eager", fullgraph=True)
    expected, got = backward(), backward(compiled_autograd._enable(compiler))
    assert all(map(torch.equal, got, expected))


def test_compiled_autograd_of_a_double_backward_is_refused():
    x = example(4, C, C).requires_grad_()
    y = BF.group_norm(x, 3, activation="silu").pow(2).sum()
    (g,) = torch.autograd.grad(y, x, create_graph=True)
    torch._dynamo.reset()
    message = "group_norm: compiled autograd of a double backward is not implemented"
    with (
        compiled_autograd._enable(torch.compile(backend="eager")),
        pytest.raises(NotImplementedError, match=message),
    ):
        g.sum().backward()
