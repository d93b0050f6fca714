"""Batch norm inside torch's machinery: opcheck, gradcheck, compile, func, checkpoint, export."""

from __future__ import annotations

import io

import pytest
import torch
import torch.nn.functional as F
from torch.utils.checkpoint import checkpoint

import batchops
from batchops import functional as BF
from batchops import nn as bnn

from .threads import run_in_threads

ops = torch.ops.batchops
VARIANTS = [(a, r) for a in (None, "relu", "silu", "leaky_relu") for r in (False, True)]
# What the backward keeps: x alone, x twice, a mask, the residual. Graphs are of these four kinds.
GRAPHS = [("silu", False), (None, True), ("relu", True), ("silu", True)]


def case(
    dtype=torch.float32,
    residual=False,
    layout=torch.contiguous_format,
    grad=True,
    size=(4, 5, 6, 3),
):
    def new(*shape):
        return torch.randn(*shape, dtype=dtype)

    x = new(*size).to(memory_format=layout)
    tensors = [x, new(5).abs() + 0.5, new(5)]
    if residual:
        tensors.append(new(*size).to(memory_format=layout))
    return [t.requires_grad_(grad) for t in tensors]


def run(x, weight, bias, residual=None, *, activation=None, stats=None, training=True):
    mean, var = stats if stats is not None else (None, None)
    return BF.batch_norm(
        x, mean, var, weight, bias, training, activation=activation, residual=residual
    )


def stock(x, weight, bias, residual=None, *, activation=None, stats=None, training=True):
    mean, var = stats if stats is not None else (None, None)
    y = F.batch_norm(x, mean, var, weight, bias, training)
    y = y if residual is None else y + residual
    return {None: lambda t: t, "relu": F.relu, "silu": F.silu, "leaky_relu": F.leaky_relu}[
        activation
    ](y)


@pytest.mark.parametrize("layout", [torch.contiguous_format, torch.channels_last])
@pytest.mark.parametrize(("activation", "residual"), GRAPHS)
def test_opcheck(activation, residual, layout):
    tensors = case(residual=residual, layout=layout)
    x, weight, bias, *rest = tensors
    z = rest[0] if rest else None
    name = activation or "none"
    stats = torch.zeros(5), torch.ones(5)
    torch.library.opcheck(ops.batch_norm.default, (x, weight, bias, z, 1e-5, name))
    torch.library.opcheck(
        ops.batch_norm_update.default, (x, *stats, weight, bias, z, 0.1, 1e-5, name)
    )
    torch.library.opcheck(ops.batch_norm_eval.default, (x, *stats, weight, bias, z, 1e-5, name))
    with torch.no_grad():
        y, saved, mask = ops.batch_norm(x, weight, bias, z, 1e-5, name, save_mask=True)
        mask = mask if mask.numel() else None
        for outputs in ([True] * 4, [True, False, True, False]):
            residual = None if mask is not None else z
            args = (y, x, residual, weight, bias, saved, mask, True, 1e-5, name, 0.01, outputs)
            torch.library.opcheck(
                ops.batch_norm_backward.default,
                [a.detach() if torch.is_tensor(a) else a for a in args],
            )


@pytest.mark.parametrize("training", [True, False])
@pytest.mark.parametrize("layout", [torch.contiguous_format, torch.channels_last])
@pytest.mark.parametrize(("activation", "residual"), VARIANTS)
def test_gradcheck_and_double_backward(activation, residual, layout, training):
    tensors = case(torch.float64, residual, layout, size=(3, 5, 2, 2))  # each element costs calls
    stats = None if training else (torch.randn(5).double(), torch.rand(5).double() + 0.5)

    def f(*t):
        return run(*t, activation=activation, stats=stats, training=training)

    assert torch.autograd.gradcheck(f, tensors)
    assert torch.autograd.gradgradcheck(f, tensors)


def composed(x, weight, bias):
    """Batch norm from elementary operations, so that autograd can differentiate it any number of
    times (torch's own operator is off by 1.7 % in its third derivative here)."""
    dims, view = (0, 2, 3), (1, -1, 1, 1)
    centred = x - x.mean(dims, keepdim=True)
    rstd = (centred.pow(2).mean(dims, keepdim=True) + 1e-5).rsqrt()
    return centred * rstd * weight.view(view) + bias.view(view)


def test_third_derivative():
    x, weight, bias = case(torch.float64)

    def third(f):
        y = f(x, weight, bias).pow(3).sum()
        (g,) = torch.autograd.grad(y, x, create_graph=True)
        (h,) = torch.autograd.grad(g.pow(3).sum(), x, create_graph=True)
        return torch.autograd.grad(h.pow(2).sum(), (x, weight))

    for ours, theirs in zip(third(run), third(composed), strict=True):
        assert (ours - theirs).norm() <= 1e-10 * theirs.norm()


def test_double_backward_where_dy_depends_on_x():
    """A path from x through dy must not be counted twice."""
    x, weight, bias = case(torch.float64)

    def second(f):
        y = f(x, weight, bias, activation="relu")
        (g,) = torch.autograd.grad(y, x, grad_outputs=x.pow(2), create_graph=True)
        return torch.autograd.grad(g.pow(2).sum(), (x, weight), allow_unused=True)

    for ours, theirs in zip(second(run), second(stock), strict=True):
        torch.testing.assert_close(ours, theirs, rtol=1e-9, atol=1e-9)


@pytest.mark.parametrize("dynamic", [False, True])
@pytest.mark.parametrize(("activation", "residual"), GRAPHS)
def test_compile_fullgraph(activation, residual, dynamic):
    torch._dynamo.reset()
    tensors = case(residual=residual)
    stats = torch.zeros(5), torch.ones(5)

    def step(*t):
        return run(*t[:-2], activation=activation, stats=t[-2:])

    compiled = torch.compile(step, fullgraph=True, backend="aot_eager", dynamic=dynamic)
    eager_stats = [s.clone() for s in stats]
    y = compiled(*tensors, *stats)
    expected = step(*tensors, *eager_stats)
    assert torch.equal(y, expected)
    assert all(torch.equal(a, b) for a, b in zip(stats, eager_stats, strict=True))
    dy = torch.randn_like(y)
    ours = torch.autograd.grad(y, tensors, dy)
    theirs = torch.autograd.grad(expected, tensors, dy)
    assert all(torch.equal(a, b) for a, b in zip(ours, theirs, strict=True))
    with torch.no_grad():
        assert torch.equal(compiled(*tensors, *stats), step(*tensors, *eager_stats))


@pytest.mark.slow
def test_compile_with_inductor():
    torch._dynamo.reset()
    module = bnn.BatchNorm2d(5, activation="relu")
    compiled = torch.compile(module, fullgraph=True)
    x, *_ = case()
    compiled(x * 2).sum().backward()
    got, x.grad = x.grad, None
    reference = bnn.BatchNorm2d(5, activation="relu")
    reference(x * 2).sum().backward()
    torch.testing.assert_close(got, x.grad)
    torch.testing.assert_close(module.running_var, reference.running_var)
    assert module.num_batches_tracked == 1


@pytest.mark.parametrize(("activation", "residual"), VARIANTS)
def test_func_grad(activation, residual):
    tensors = case(torch.float64, residual, grad=False)
    argnums = tuple(range(len(tensors)))

    def loss(f):
        return lambda *t: f(*t, activation=activation).pow(2).sum()

    ours = torch.func.grad(loss(run), argnums)(*tensors)
    theirs = torch.func.grad(loss(stock), argnums)(*tensors)
    for a, b in zip(ours, theirs, strict=True):
        torch.testing.assert_close(a, b)

    def curvature(f):
        inner = torch.func.grad(loss(f))
        return torch.func.grad(lambda *t: inner(*t).pow(2).sum())(*tensors)

    torch.testing.assert_close(curvature(run), curvature(stock))


@pytest.mark.parametrize("use_reentrant", [False, True])
def test_checkpoint(use_reentrant):
    x, weight, bias = case()

    def block(t):
        return run(t * 2, weight, bias, activation="relu")

    block(x).pow(2).sum().backward()
    expected = [t.grad.clone() for t in (x, weight, bias)]
    x.grad = weight.grad = bias.grad = None
    checkpoint(block, x, use_reentrant=use_reentrant).pow(2).sum().backward()
    assert all(torch.equal(t.grad, e) for t, e in zip((x, weight, bias), expected, strict=True))


@pytest.mark.parametrize("amp_dtype", [torch.bfloat16, torch.float16])
def test_autocast(amp_dtype):
    """float32 parameters and low-precision activations meet; the output keeps the input's dtype."""
    conv = torch.nn.Conv2d(3, 5, 3)
    norm = bnn.BatchNorm2d(5, activation="relu")
    x = torch.randn(4, 3, 8, 8)
    with torch.autocast("cpu", amp_dtype):
        h = conv(x)
        y = norm(h)
        expected = F.batch_norm(h, None, None, norm.weight, norm.bias, True).relu()
    assert h.dtype == y.dtype == expected.dtype == amp_dtype
    torch.testing.assert_close(y, expected)
    y.float().sum().backward()
    assert norm.weight.grad.dtype == torch.float32
    assert norm.running_mean.dtype == torch.float32


@pytest.mark.parametrize("training", [True, False])
def test_export(training):
    model = torch.nn.Sequential(torch.nn.Conv2d(3, 5, 3), bnn.BatchNorm2d(5, activation="relu"))
    model.train(training)
    x = torch.randn(4, 3, 8, 8)
    dynamic = {"input": {0: torch.export.Dim("batch", min=2, max=64)}}
    program = torch.export.export(model, (x,), dynamic_shapes=dynamic)
    targets = [str(n.target) for n in program.graph.nodes if n.op == "call_function"]
    assert any(t.startswith("batchops.batch_norm") for t in targets)
    buffer = io.BytesIO()
    torch.export.save(program, buffer)
    buffer.seek(0)
    loaded = torch.export.load(buffer).module()
    fresh = torch.randn(7, 3, 8, 8)
    with torch.no_grad():
        assert torch.equal(loaded(fresh), model(fresh))


def test_meta_and_fake_tensors():
    for layout in (torch.contiguous_format, torch.channels_last):
        x = torch.empty(4, 5, 6, 7, device="meta").to(memory_format=layout)
        y = BF.batch_norm(x, None, None, training=True)
        assert y.is_meta
        assert y.stride() == x.stride()
    with torch._subclasses.FakeTensorMode():
        y = BF.batch_norm(torch.empty(4, 5, 6, 7), None, None, training=True, activation="relu")
        assert y.shape == (4, 5, 6, 7)


def test_forward_mode_is_refused():
    x, weight, bias = case(grad=False)
    with pytest.raises(NotImplementedError, match="forward-mode"):
        torch.func.jvp(lambda t: run(t, weight, bias), (x,), (x,))


def test_input_changed_in_place_is_noticed():
    x, weight, bias = case()
    h = x * 1
    y = run(h, weight, bias)
    h.add_(1)
    with pytest.raises(RuntimeError, match="modified by an inplace operation"):
        y.sum().backward()


def test_running_statistics_count_as_changed():
    x, weight, bias = case()
    stats = torch.zeros(5), torch.ones(5)
    versions = [s._version for s in stats]
    run(x, weight, bias, stats=stats)
    assert all(s._version > v for s, v in zip(stats, versions, strict=True))


def test_saved_tensor_hooks():
    x, weight, bias, z = case(residual=True)
    with torch.autograd.graph.save_on_cpu():
        y = run(x, weight, bias, z, activation="relu")
    y.pow(2).sum().backward()
    got = x.grad.clone()
    x.grad = None
    run(x, weight, bias, z, activation="relu").pow(2).sum().backward()
    assert torch.equal(got, x.grad)


@pytest.mark.parametrize("layout", [torch.contiguous_format, torch.channels_last])
@pytest.mark.parametrize("size", [(4, 8, 4, 4), (2, 5, 3, 7), (3, 4, 2, 2)], ids=str)
def test_saved_input_in_another_layout(size, layout):
    """Hooks may hand the input back in another layout than the bit mask was written for; in the
    first size the masks of both layouts are of one size."""
    x = torch.randn(size).to(memory_format=layout).requires_grad_()
    z = torch.randn(size)

    def gradient():
        y = run(x, None, None, z, activation="relu")
        return torch.autograd.grad(y.pow(2).sum(), x, create_graph=True)[0]

    expected = gradient()
    second = torch.autograd.grad(expected.pow(2).sum(), x)[0]
    swapped = torch.channels_last if layout is torch.contiguous_format else torch.contiguous_format

    def other_layout(t):
        return t.contiguous(memory_format=swapped) if t.dim() == 4 else t

    with torch.autograd.graph.saved_tensors_hooks(lambda t: t, other_layout):
        got = gradient()
        got_second = torch.autograd.grad(got.pow(2).sum(), x)[0]
    torch.testing.assert_close(got, expected)
    torch.testing.assert_close(got_second, second)


@pytest.mark.parametrize("transposed", ["(C, N)", "(C, N, 1)"])
def test_compile_of_a_transposed_input(transposed):
    """The mask's size without data must be the size with data, also where a copy is made."""
    torch._dynamo.reset()
    x = torch.randn(4, 6).t() if transposed == "(C, N)" else torch.randn(9, 4, 1).transpose(0, 1)
    z = torch.randn(x.shape)
    x = x.detach().requires_grad_()

    def step(t, r):
        return run(t, None, None, r, activation="relu").pow(2).sum()

    compiled = torch.compile(step, fullgraph=True, backend="aot_eager")
    (got,) = torch.autograd.grad(compiled(x, z), x)
    (expected,) = torch.autograd.grad(step(x, z), x)
    assert torch.equal(got, expected)


def test_only_wanted_gradients():
    x, weight, bias, z = case(residual=True)
    for wanted in ([x], [weight], [bias], [z], [z, bias]):
        y = run(x, weight, bias, z, activation="relu")
        got = torch.autograd.grad(y, wanted, torch.ones_like(y))
        y = run(x, weight, bias, z, activation="relu")
        everything = torch.autograd.grad(y, [x, weight, bias, z], torch.ones_like(y))
        every = dict(zip(map(id, [x, weight, bias, z]), everything, strict=True))
        assert all(torch.equal(g, every[id(t)]) for g, t in zip(got, wanted, strict=True))


def test_backward_twice_needs_retain_graph():
    x, weight, bias = case()
    y = run(x, weight, bias).sum()
    y.backward(retain_graph=True)
    y.backward()
    with pytest.raises(RuntimeError, match="second time"):
        y.backward()


def test_inference_mode():
    norm = bnn.BatchNorm2d(5, activation="relu").eval()
    x = torch.randn(4, 5, 6, 3)
    with torch.inference_mode():
        y = norm(x)
    assert torch.equal(y, norm(x))


def test_many_threads():
    def work(_):
        for _ in range(50):
            x, weight, bias = case()
            run(x, weight, bias, activation="relu").sum().backward()

    run_in_threads(work)


def test_config_names_the_parts():
    text = batchops.show_config()
    for part in ("torch binding", "CPU capability", "CUDA build", "threads"):
        assert part in text
