"""group_norm, layer_norm and instance_norm as torch operators: layouts, autograd, tracing, errors.

Their numbers, kernel by kernel, are in test_group_norm_kernels.py.
"""

from __future__ import annotations

import warnings

import numpy as np
import pytest
import torch
import torch.nn.functional as F

import batchops
from batchops import functional as BF
from batchops import nn as bnn

from .reference import (
    ACTIVATIONS,
    MASKABLE,
    GroupNormReference,
    activation_argument,
    to_float64,
)
from .tensors import DTYPES, LAYOUTS, huge_zeros, needs_memory, saved_bytes, skip_unless_kernel
from .tolerances import assert_close, before_rounding, elementwise

ops = torch.ops.batchops

# name: (x's size, ours, torch's, size of weight and bias, how the float64 oracle sees it)
NORMS = {
    "group_norm": (
        (4, 6, 5, 3),
        lambda x, w, b, **k: BF.group_norm(x, 3, w, b, **k),
        lambda x, w, b: F.group_norm(x, 3, w, b),
        (6,),
        lambda x: (x.reshape(4, 6, 15), 3),
    ),
    "layer_norm": (
        (4, 3, 5, 6),
        lambda x, w, b, **k: BF.layer_norm(x, (5, 6), w, b, **k),
        lambda x, w, b: F.layer_norm(x, (5, 6), w, b),
        (5, 6),
        lambda x: (x.reshape(12, 30, 1), 1),
    ),
    "instance_norm": (
        (4, 6, 5, 3),
        lambda x, w, b, **k: BF.instance_norm(x, weight=w, bias=b, **k),
        lambda x, w, b: F.instance_norm(x, weight=w, bias=b),
        (6,),
        lambda x: (x.reshape(4, 6, 15), 6),
    ),
}


def case(name, dtype=torch.float32, layout="contiguous", residual=False, grad=True):
    size, ours, theirs, params, oracle = NORMS[name]
    x = LAYOUTS[layout]((torch.randn(size) * 2 + 0.5).to(dtype))
    w, b = (torch.rand(params) + 0.5).to(dtype), torch.randn(params).to(dtype)
    r = LAYOUTS[layout](torch.randn(size).to(dtype)) if residual else None
    tensors = [t if t is None else t.detach().requires_grad_(grad) for t in (x, w, b, r)]
    return tensors, ours, theirs, oracle


def stock(theirs, activation):
    """torch's norm, sum and activation one after the other."""
    name, slope = BF._activation_of(activation)

    def f(x, w, b, r=None):
        y = theirs(x, w, b)
        return ops.activation(y if r is None else y + r, name, slope)

    return f


def assert_right(expected, y, dy, x, w, b, r):
    """y and the gradients of the leaves against the oracle; `dy` as it sees it."""
    size, bound = x.shape, elementwise(x.dtype, expected.count)
    assert y.dtype == x.dtype
    assert_close(y, expected.y.reshape(size), bound, "y")
    shown = to_float64(y).reshape(expected.y.shape)
    derivative = expected.derivative_shown(shown, before_rounding(x.dtype, expected.count))
    dx, dz, dweight, dbias = expected.backward(dy, derivative)
    terms = 3 * max(1.0, np.abs(expected.rstd).max() * np.abs(expected.weight).max())
    terms *= max(1.0, np.abs(dz).max())
    assert_close(x.grad, dx.reshape(size), bound * terms, "dx")
    if r is not None:
        assert_close(r.grad, dz.reshape(size), bound * terms, "dresidual")
    length = np.sqrt(x.numel() / w.numel())  # sums whose errors add up like a random walk
    assert_close(w.grad, dweight.reshape(w.shape), bound * length * terms, "dweight")
    assert_close(b.grad, dbias.reshape(b.shape), bound * length * terms, "dbias")


@pytest.mark.parametrize("residual", [False, True], ids=["plain", "residual"])
@pytest.mark.parametrize("activation", ACTIVATIONS)
@pytest.mark.parametrize("layout", LAYOUTS)
@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("name", NORMS)
def test_forward_and_backward(name, dtype, layout, activation, residual, device):
    skip_unless_kernel(device, dtype)
    tensors, ours, _, oracle = case(name, dtype, layout, residual)
    x, w, b, r = (t if t is None else t.detach().to(device).requires_grad_() for t in tensors)
    y = ours(x, w, b, activation=activation_argument(activation), residual=r)
    dy = torch.randn(y.shape).to(dtype)
    y.backward(dy.to(device))

    def flat(t):
        return None if t is None else to_float64(t).reshape(oracle(to_float64(x))[0].shape)

    groups = oracle(to_float64(x))[1]
    parameters = (to_float64(t).reshape(-1) for t in (w, b))
    expected = GroupNormReference(flat(x), groups, *parameters, flat(r), act=activation)
    assert y.is_contiguous() if name == "layer_norm" else y.stride() == x.stride()
    assert_right(expected, y, flat(dy), x, w, b, r)


GPU_SHAPES = {  # N, C, H, W, G
    "a group in a block": (2, 64, 16, 16, 32),
    "a group in a cluster": (2, 64, 64, 64, 4),
    "a group that fits no chip": (1, 8, 512, 512, 2),
    "planes that end inside a vector": (3, 6, 7, 7, 3),
    "as in a UNet": (2, 320, 32, 32, 32),
    "channels that are no multiple of a vector": (2, 30, 20, 20, 5),
    "rows": (300, 1024, 1, 1, 1),
}


@pytest.mark.cuda
@pytest.mark.parametrize("residual", [False, True], ids=["plain", "residual"])
@pytest.mark.parametrize(
    "activation", ["none", pytest.param("relu", marks=pytest.mark.reduced), "silu"]
)
@pytest.mark.parametrize("layout", LAYOUTS)
@pytest.mark.parametrize("dtype", DTYPES[:3], ids=str)
@pytest.mark.parametrize("shape", GPU_SHAPES.values(), ids=GPU_SHAPES)
def test_paths_of_a_gpu(shape, dtype, layout, activation, residual):
    *size, groups = shape
    N, C, H, W = size
    x, r, dy = (LAYOUTS[layout](torch.randn(size).to(dtype)) for _ in range(3))
    tensors = x, torch.rand(C) + 0.5, torch.randn(C), r if residual else None
    x, w, b, r = (t if t is None else t.cuda().requires_grad_() for t in tensors)
    y = BF.group_norm(x, groups, w, b, activation=activation_argument(activation), residual=r)
    y.backward(dy.cuda())

    def flat(t):
        return None if t is None else to_float64(t).reshape(N, C, H * W)

    parameters = map(to_float64, (w, b))
    expected = GroupNormReference(flat(x), groups, *parameters, flat(r), act=activation)
    assert y.stride() == x.stride()
    assert_right(expected, y, flat(dy), x, w, b, r)


@pytest.mark.parametrize("size", [(3, 4), (3, 4, 7), (2, 4, 3, 5), (2, 4, 3, 2, 5)], ids=str)
@pytest.mark.parametrize("layout", LAYOUTS)
def test_any_number_of_dimensions(size, layout):
    x = LAYOUTS[layout](torch.randn(size))
    torch.testing.assert_close(BF.group_norm(x, 2), F.group_norm(x, 2), rtol=1e-5, atol=1e-5)
    torch.testing.assert_close(
        BF.layer_norm(x, size[1:]), F.layer_norm(x, size[1:]), rtol=1e-5, atol=1e-5
    )
    if len(size) > 2:
        torch.testing.assert_close(BF.instance_norm(x), F.instance_norm(x), rtol=1e-5, atol=1e-5)


def test_other_strides_are_copied_once():
    x = torch.randn(6, 8, 10, 12)[::2, :, 1:9, ::3]
    y = BF.group_norm(x, 4)
    torch.testing.assert_close(y, F.group_norm(x, 4), rtol=1e-5, atol=1e-5)
    z = BF.layer_norm(x.transpose(1, 3), (8, 8))
    torch.testing.assert_close(z, F.layer_norm(x.transpose(1, 3), (8, 8)), rtol=1e-5, atol=1e-5)


VARIANTS = [(a, r) for a in ("none", "relu", "silu") for r in (False, True)]
# What the backward keeps: x alone, x twice, a mask, the residual. Graphs are of these four kinds.
GRAPHS = [("silu", False), ("none", True), ("relu", True), ("silu", True)]


@pytest.mark.parametrize("layout", LAYOUTS)
@pytest.mark.parametrize(("activation", "residual"), VARIANTS)
@pytest.mark.parametrize("name", NORMS)
def test_gradcheck_and_double_backward(name, activation, residual, layout):
    tensors, ours, _, _ = case(name, torch.float64, layout, residual)

    def f(x, w, b, r=None):
        return ours(x, w, b, activation=activation_argument(activation), residual=r)

    x, w, b, r = tensors
    x, r = (t if t is None else t.detach()[:2].requires_grad_() for t in (x, r))  # calls an element
    tensors = [t for t in (x, w, b, r) if t is not None]
    assert torch.autograd.gradcheck(f, tensors)
    assert torch.autograd.gradgradcheck(f, tensors, fast_mode=True)


@pytest.mark.parametrize("layout", LAYOUTS)
@pytest.mark.parametrize(("activation", "residual"), GRAPHS)
def test_opcheck(activation, residual, layout):
    (x, w, b, r), *_ = case("group_norm", layout=layout, residual=residual)
    torch.library.opcheck(ops.group_norm.default, (x, 3, w, b, r, 1e-5, activation))
    torch.library.opcheck(ops.layer_norm.default, (x, x.shape[3:], None, None, r, 1e-5, activation))
    with torch.no_grad():
        y, stats, mask = ops.group_norm(x, 3, w, b, r, 1e-5, activation, save_mask=True)
        mask = mask if mask.numel() else None
        kept = None if mask is not None else r
        for outputs in ([True] * 4, [False, True, False, True]):
            args = (y, x, kept, w, b, stats, mask, 3, 1e-5, activation, 0.01, outputs)
            torch.library.opcheck(
                ops.group_norm_backward.default,
                [a.detach() if torch.is_tensor(a) else a for a in args],
            )


@pytest.mark.parametrize("dynamic", [False, True])
@pytest.mark.parametrize(("activation", "residual"), GRAPHS)
@pytest.mark.parametrize("name", NORMS)
def test_compile_fullgraph(name, activation, residual, dynamic):
    torch._dynamo.reset()
    tensors, ours, _, _ = case(name, residual=residual)
    tensors = [t for t in tensors if t is not None]

    def step(x, w, b, r=None):
        return ours(x, w, b, activation=activation_argument(activation), residual=r)

    eager = step(*tensors)
    grads = torch.autograd.grad(eager.square().sum(), tensors)
    compiled = torch.compile(step, fullgraph=True, dynamic=dynamic, backend="aot_eager")
    for batch in (4, 2):
        parts = [t[:batch] if i in (0, 3) else t for i, t in enumerate(tensors)]
        torch.testing.assert_close(compiled(*parts), step(*parts))
    again = torch.autograd.grad(compiled(*tensors).square().sum(), tensors)
    for got, expected in zip(again, grads, strict=True):
        torch.testing.assert_close(got, expected)


@pytest.mark.parametrize(("activation", "residual"), VARIANTS)
@pytest.mark.parametrize("name", NORMS)
def test_func_grad(name, activation, residual):
    tensors, ours, theirs, _ = case(name, torch.float64, residual=residual, grad=False)
    tensors = [t for t in tensors if t is not None]
    argument = activation_argument(activation)
    reference = stock(theirs, argument)

    def loss(x, w, b, r=None):
        return ours(x, w, b, activation=argument, residual=r).pow(2).sum()

    argnums = tuple(range(len(tensors)))
    got = torch.func.grad(loss, argnums)(*tensors)
    expected = torch.func.grad(lambda *t: reference(*t).pow(2).sum(), argnums)(*tensors)
    for one, other in zip(got, expected, strict=True):
        torch.testing.assert_close(one, other, rtol=1e-9, atol=1e-9)


@pytest.mark.parametrize("name", NORMS)
def test_forward_mode_is_refused_clearly(name):
    (x, w, b, _), ours, _, _ = case(name, grad=False)
    with pytest.raises(NotImplementedError, match=f"^{name}: forward-mode.*functional.{name} "):
        torch.func.jvp(lambda t: ours(t, w, b), (x,), (torch.ones_like(x),))


@pytest.mark.parametrize("name", NORMS)
def test_outputs_are_no_views(name):
    """Autograd forbids writes to views that were made without it, and detach_() of any view."""
    (x, w, b, _), ours, _, _ = case(name)
    y = ours(x, w, b)
    assert y._base is None
    y.detach_()
    with torch.no_grad():
        z = ours(x, w, b)
    z += torch.ones_like(z, requires_grad=True)
    assert z.requires_grad


@pytest.mark.parametrize("activation", ["none", "relu", "silu", "gelu", "gelu_tanh"])
def test_nested_tensors_take_torchs_layer_norm(activation):
    rows = [torch.randn(2, 8), torch.randn(3, 8)]
    norm = bnn.LayerNorm(8, activation=activation_argument(activation))
    with torch.no_grad():
        norm.weight.uniform_(0.5, 1.5)
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # nested tensors are a prototype
        x = torch.nested.nested_tensor(rows)
    got = norm(x)
    assert got.is_nested
    for row, one in zip(rows, got.unbind(), strict=True):
        torch.testing.assert_close(one, norm(row), rtol=1e-5, atol=1e-5)
    stock = torch.nn.LayerNorm(8)
    expected = stock(x)
    with batchops.patch():
        patched = stock(x)
    assert all(map(torch.equal, patched.unbind(), expected.unbind()))


@pytest.mark.parametrize("name", NORMS)
def test_meta_and_export(name):
    (x, w, b, _), ours, theirs, _ = case(name, grad=False)
    on_meta = ours(*(t.to("meta") for t in (x, w, b)))
    assert on_meta.shape == x.shape
    assert on_meta.stride() == ours(x, w, b).stride()

    class Module(torch.nn.Module):
        def forward(self, x, w, b):
            return ours(x, w, b, activation="silu")

    exported = torch.export.export(Module(), (x, w, b)).module()
    torch.testing.assert_close(exported(x, w, b), F.silu(theirs(x, w, b)))


@pytest.mark.parametrize("name", NORMS)
def test_autocast_keeps_the_dtype_unless_told(name, device):
    (x, w, b, _), ours, theirs, _ = case(name, grad=False)
    x, w, b = x.to(device), w.to(device), b.to(device)
    low = x.bfloat16()
    with torch.autocast(device.type, dtype=torch.bfloat16):
        y, cast = ours(low, w, b), ours(low, w, b, cast_output=True)
        stock = theirs(low, w, b)
    assert y.dtype == torch.bfloat16
    assert cast.dtype == stock.dtype
    expected = theirs(low.float(), w, b)
    for got in (y, cast):
        torch.testing.assert_close(got.float(), expected, rtol=2**-7, atol=2**-7)


@pytest.mark.parametrize("name", NORMS)
@pytest.mark.parametrize("activation", ACTIVATIONS)
@pytest.mark.parametrize("residual", [False, True], ids=["plain", "residual"])
def test_saves_nothing_that_can_be_recomputed(name, activation, residual):
    (x, w, b, r), ours, _, oracle = case(name, residual=residual)
    new = saved_bytes(
        lambda: ours(x, w, b, activation=activation_argument(activation), residual=r),
        given=(x, w, b, r),
    )
    flat, groups = oracle(x.detach())
    bits = 0
    if residual and activation in MASKABLE:
        rows = (12, 30) if name == "layer_norm" else (24, 15)
        bits = rows[0] * ((rows[1] + 7) // 8)
    assert new == bits + 3 * 4 * flat.shape[0] * groups


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_empty_batches(dtype):
    for size in ((0, 6, 4, 4), (0, 6)):
        x = torch.empty(size, dtype=dtype, requires_grad=True)
        w, b = (torch.ones(6, dtype=dtype, requires_grad=True) for _ in range(2))
        for y in (
            BF.group_norm(x, 3, w, b),
            BF.layer_norm(x, size[1:2] if len(size) == 2 else 4)
            if len(size) == 2
            else BF.group_norm(x, 6, w, b),
        ):
            assert y.shape == x.shape
        BF.group_norm(x, 3, w, b).sum().backward()
        assert x.grad.shape == x.shape
        assert w.grad.eq(0).all()
        assert b.grad.eq(0).all()


def test_instance_norm_running_statistics():
    """As torch's: the batch's average of each sample's mean and unbiased variance."""
    for affine in (False, True):
        ours = bnn.InstanceNorm2d(5, affine=affine, track_running_stats=True, momentum=0.3)
        theirs = torch.nn.InstanceNorm2d(5, affine=affine, track_running_stats=True, momentum=0.3)
        theirs.load_state_dict(ours.state_dict())
        for _ in range(3):
            x = torch.randn(3, 5, 4, 6) * 2 + 1
            torch.testing.assert_close(ours(x), theirs(x), rtol=1e-5, atol=1e-5)
        assert ours.state_dict().keys() == theirs.state_dict().keys()
        for key, value in theirs.state_dict().items():
            torch.testing.assert_close(ours.state_dict()[key], value, rtol=1e-5, atol=1e-6)
        ours.eval(), theirs.eval()
        torch.testing.assert_close(ours(x), theirs(x), rtol=1e-5, atol=1e-5)
        torch.testing.assert_close(ours(x[0]), theirs(x[0]), rtol=1e-5, atol=1e-5)


def test_instance_norm_leaves_statistics_alone_for_nothing():
    mean, var = torch.zeros(5), torch.ones(5)
    y = BF.instance_norm(torch.empty(0, 5, 4, 4), mean, var)
    assert y.shape == (0, 5, 4, 4)
    assert mean.eq(0).all()
    assert var.eq(1).all()


ERRORS = {
    "channels": (lambda: BF.group_norm(torch.randn(2, 6, 4), 4), RuntimeError, "divisible"),
    "groups": (
        lambda: BF.group_norm(torch.randn(2, 6, 4), 0),
        RuntimeError,
        "num groups to be greater",
    ),
    "groups before weight": (
        lambda: BF.group_norm(torch.randn(4, 5, 2), 2, torch.ones(6)),
        RuntimeError,
        "channels in input to be divisible by num_groups",
    ),
    "groups of another type": (
        lambda: BF.group_norm(torch.randn(2, 6, 4), 2.0),
        TypeError,
        "group_norm: expected num_groups to be int, got 2.0 of type float",
    ),
    "dimensions": (lambda: BF.group_norm(torch.randn(6), 2), RuntimeError, "at least 2 dim"),
    "one value": (lambda: BF.group_norm(torch.randn(1, 4), 4), ValueError, "more than 1 value"),
    "weight": (
        lambda: BF.group_norm(torch.randn(2, 6, 4), 2, torch.ones(5)),
        RuntimeError,
        "weight should contain 6",
    ),
    "weight dtype": (
        lambda: BF.group_norm(torch.randn(2, 6, 4), 2, torch.ones(6).double()),
        RuntimeError,
        "weight to be Float",
    ),
    "residual": (
        lambda: BF.group_norm(torch.randn(2, 6, 4), 2, residual=torch.randn(2, 6, 5)),
        RuntimeError,
        "residual of input's size",
    ),
    "activation": (
        lambda: BF.group_norm(torch.randn(2, 6, 4), 2, activation="softplus"),
        ValueError,
        "activation must be one of",
    ),
    "no tensor": (
        lambda: BF.group_norm([[1.0]], 1),
        TypeError,
        "Tensor or a cupy.ndarray, got list",
    ),
    "row": (
        lambda: BF.layer_norm(torch.randn(2, 6), (5,)),
        RuntimeError,
        r"expected input with shape \[\*, 5\]",
    ),
    "no row": (lambda: BF.layer_norm(torch.randn(2, 6), ()), RuntimeError, "1-dimensional"),
    "row weight": (
        lambda: BF.layer_norm(torch.randn(2, 6), (6,), torch.ones(5)),
        RuntimeError,
        "weight to be of same shape as normalized_shape",
    ),
    "row weight dtype": (
        lambda: BF.layer_norm(torch.randn(2, 3, 6), (6,), torch.ones(6).double()),
        RuntimeError,
        "^layer_norm: expected weight to be Float, like input, but got Double",
    ),
    "row bias dtype": (
        lambda: BF.layer_norm(torch.randn(2, 6).bfloat16(), (6,), None, torch.ones(6).double()),
        RuntimeError,
        r"^layer_norm: expected bias to be BFloat16 \(like input\) or Float, but got Double",
    ),
    "row weight device": (
        lambda: BF.layer_norm(torch.randn(2, 6), (6,), torch.ones(6, device="meta")),
        RuntimeError,
        "^layer_norm: expected weight on cpu",
    ),
    "row of another type": (
        lambda: BF.layer_norm(torch.randn(2, 6), 6),
        TypeError,
        "layer_norm: expected normalized_shape to be .* got 6 of type int",
    ),
    "row without eps": (
        lambda: BF.layer_norm(torch.randn(2, 6), (6,), eps=None),
        TypeError,
        "layer_norm: expected eps to be float, got None",
    ),
    "row residual": (
        lambda: BF.layer_norm(torch.randn(2, 6), (6,), residual=torch.randn(2, 5)),
        RuntimeError,
        "residual of input's size",
    ),
    "one position": (
        lambda: BF.instance_norm(torch.randn(2, 6, 1)),
        ValueError,
        "more than 1 spatial element",
    ),
    "half of the statistics": (
        lambda: BF.instance_norm(torch.randn(2, 6, 4), torch.zeros(6)),
        ValueError,
        "running_mean and running_var must either both be None",
    ),
    "no statistics to use": (
        lambda: BF.instance_norm(torch.randn(2, 6, 4), use_input_stats=False),
        RuntimeError,
        "running_mean and running_var both given, since use_input_stats is False",
    ),
    "no momentum": (
        lambda: BF.instance_norm(torch.randn(2, 6, 4), momentum=None),
        TypeError,
        "instance_norm: expected momentum to be a float",
    ),
    "instance weight dtype": (
        lambda: BF.instance_norm(torch.randn(2, 6, 4), weight=torch.ones(6).double()),
        RuntimeError,
        "^instance_norm: expected weight to be Float, like input",
    ),
    "instance weight": (
        lambda: BF.instance_norm(torch.randn(2, 6, 4), weight=torch.ones(5)),
        RuntimeError,
        "^instance_norm: weight should contain 6 elements not 5",
    ),
    "size of the statistics": (
        lambda: BF.instance_norm(torch.randn(2, 6, 4), torch.zeros(5), torch.ones(5)),
        RuntimeError,
        "^instance_norm: running_mean should contain 6 elements not 5",
    ),
    "module weight": (
        lambda: bnn.InstanceNorm1d(3, affine=True)(torch.randn(2, 6, 4)),
        ValueError,
        "match num_features",
    ),
}


@pytest.mark.parametrize(("call", "error", "words"), ERRORS.values(), ids=ERRORS)
def test_errors(call, error, words):
    with pytest.raises(error, match=words):
        call()


def test_residual_of_another_dtype_takes_torchs_promotion():
    x, r = torch.randn(2, 4, 3, 3).bfloat16(), torch.randn(2, 4, 3, 3)
    y = BF.group_norm(x, 2, residual=r, activation="silu")
    assert y.dtype == torch.float32
    torch.testing.assert_close(y, F.silu(F.group_norm(x, 2) + r))


@pytest.mark.parametrize("name", NORMS)
def test_same_bits_in_every_run(name, device):
    (x, w, b, _), ours, *_ = case(name, layout="channels_last")
    x = x.detach().repeat(16, *[1] * (x.dim() - 1)).to(device)  # enough to fork
    w, b = (t.detach().to(device).requires_grad_() for t in (w, b))
    first = None
    for _ in range(1000):
        leaf = x.detach().requires_grad_()
        y = ours(leaf, w, b, activation="silu")
        now = (y.detach(), *torch.autograd.grad(y, (leaf, w, b), x))
        first = first or now
        assert all(map(torch.equal, first, now))


@needs_memory(12)
def test_more_than_two_billion_elements_are_addressed():
    """Rows of 0, and of -1 and 1, are their own norm; those at the end differ from the others."""
    D, rows = 2**13, 2**18 + 3
    x = huge_zeros((rows, D), torch.bfloat16)
    x[-2:] = torch.tensor([-1.0, 1.0]).repeat(D // 2)
    x[-1] *= -1
    y = BF.layer_norm(x, (D,), eps=1e-6)
    assert y.numel() > 2**31
    assert torch.equal(y[-3:], x[-3:])
    assert y[:-2, 0].eq(0).all()
