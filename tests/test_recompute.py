"""recompute(): what autograd keeps, counted, and gradients that are the same bit for bit."""

from __future__ import annotations

import contextlib
import copy
import gc
import threading

import pytest
import torch
import torch.nn.functional as F
from torch import nn
from torch.utils.checkpoint import checkpoint

import batchops
from batchops import functional as BF
from batchops import nn as bnn

from . import models, tensors
from .threads import run_in_threads


def small_net(layout=torch.contiguous_format, **options):
    model = nn.Sequential(
        nn.Conv2d(3, 8, 3),
        bnn.BatchNorm2d(8, activation="relu", **options),
        nn.Conv2d(8, 8, 3),
        bnn.BatchNorm2d(8, **options),
        nn.Flatten(),
        nn.Linear(8 * 8 * 8, 5),
    )
    return model.to(memory_format=layout)


def image(layout=torch.contiguous_format):
    return torch.randn(4, 3, 12, 12).to(memory_format=layout)


def gradients(model, x, context=contextlib.nullcontext, forward=None):
    model = copy.deepcopy(model)
    x = x.clone().requires_grad_()
    with context():
        y = model(x) if forward is None else forward(model, x)
    y.float().square().sum().backward()
    return [y.detach(), x.grad, *(p.grad for p in model.parameters()), *model.buffers()]


def assert_same_bits(model, x, forward=None):
    plain = gradients(model, x, forward=forward)
    ours = gradients(model, x, batchops.recompute, forward)
    assert all(torch.equal(a, b) for a, b in zip(plain, ours, strict=True))


def saved_bytes(model, *inputs, context=contextlib.nullcontext):
    """Of one forward; parameters are not counted."""
    return tensors.saved_bytes(lambda: model(*inputs), model.parameters(), context)


# ------------------------------------------------------------------------------------- bytes


def test_bytes_of_a_resnet50_forward():
    """Per bottleneck of 12 units (4 wide, 2 x 1 narrow maps before and after the norm, 4 wide) the
    two narrow outputs go, and the bit mask of the sum comes."""
    stock = models.timm().create_model("resnet50").train()
    ours = batchops.convert(copy.deepcopy(stock))
    x = torch.randn(1, 3, 96, 96)
    before = saved_bytes(stock, x)
    assert saved_bytes(ours, x) <= 1.02 * before
    assert saved_bytes(ours, x, context=batchops.recompute) <= 0.88 * before


def test_bytes_of_a_group_norm_block():
    models.needs(nn.GroupNorm, "silu")
    stock = nn.Sequential(nn.GroupNorm(4, 32), nn.SiLU(), nn.Conv2d(32, 32, 3, padding=1))
    ours = batchops.convert(copy.deepcopy(stock))
    x = torch.randn(2, 32, 16, 16, requires_grad=True)
    before = saved_bytes(stock, x)  # x, the norm's output, the activation's
    assert saved_bytes(ours, x) <= 0.70 * before
    assert saved_bytes(ours, x, context=batchops.recompute) <= 0.40 * before


@pytest.mark.parametrize("layout", [torch.contiguous_format, torch.channels_last])
def test_bytes_of_a_small_net(layout):
    model, x = small_net(layout), image(layout)
    first, second = 4 * 8 * 10 * 10 * 4, 4 * 8 * 8 * 8 * 4  # maps, in bytes
    statistics = 2 * 3 * 8 * 4
    kept = x.nbytes + first + second + statistics
    if layout is torch.contiguous_format:
        assert saved_bytes(model, x) == kept + first + second
        assert saved_bytes(model, x, context=batchops.recompute) == kept
    else:  # flattening copies, and the copy is not the norm's output
        assert saved_bytes(model, x, context=batchops.recompute) == kept + second


def test_the_output_is_freed_in_the_forward():
    norm, conv = bnn.BatchNorm2d(8), nn.Conv2d(8, 8, 3)
    x = torch.randn(4, 8, 6, 6, requires_grad=True)
    with batchops.recompute():
        y = norm(x)
        z = conv(y)
        storage = torch.multiprocessing.reductions.StorageWeakRef(y.untyped_storage())
        del y
        assert storage.expired()
    z.sum().backward()


def test_nothing_of_a_finished_graph_is_kept():
    """Inputs are the graph's: dropping or running the graph frees them, in the block too."""
    norm, conv = bnn.BatchNorm2d(8), nn.Conv2d(8, 8, 3)

    def forward():
        x = torch.randn(4, 8, 6, 6, requires_grad=True) * 2
        storage = torch.multiprocessing.reductions.StorageWeakRef(x.untyped_storage())
        y = norm(x)
        return storage, y, conv(y)

    with batchops.recompute():
        storage, y, z = forward()
        assert not storage.expired()
        z.sum().backward()
        assert storage.expired()
        storage, y, z = forward()
        del z, y
        gc.collect()
        assert storage.expired()


# ------------------------------------------------------------------------------- gradients' bits


@pytest.mark.parametrize("layout", [torch.contiguous_format, torch.channels_last])
@pytest.mark.parametrize(
    "options",
    [{}, {"affine": False}, {"track_running_stats": False}, {"momentum": None}],
    ids=str,
)
def test_same_bits(options, layout):
    assert_same_bits(small_net(layout, **options), image(layout))


def test_same_bits_in_eval():
    assert_same_bits(small_net().eval(), image())


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float64])
def test_same_bits_in_another_dtype(dtype):
    assert_same_bits(small_net().to(dtype), image().to(dtype))


@pytest.mark.parametrize("name", ["leaky_relu", "silu", "gelu", "gelu_tanh", "hardswish"])
def test_same_bits_with_every_activation(name):
    models.needs(activation=name)
    model = nn.Sequential(bnn.BatchNorm2d(3, activation=name), nn.Conv2d(3, 4, 3))
    assert_same_bits(model, image())
    without = saved_bytes(model, image())
    assert without - saved_bytes(model, image(), context=batchops.recompute) == image().nbytes


def test_same_bits_of_a_converted_resnet():
    model = batchops.convert(models.timm().create_model("resnet18", num_classes=10)).train()
    assert_same_bits(model, torch.randn(2, 3, 48, 48))


@pytest.mark.parametrize("dims", [1, 2])
def test_layer_norm(dims):
    """Its output is found although the norm keeps its input as rows of another shape."""
    shape = (6, 7)[-dims:]
    model = nn.Sequential(bnn.LayerNorm(shape, activation="silu"), nn.Linear(7, 5))
    x = torch.randn(3, 6, 7)
    assert_same_bits(model, x)
    without = saved_bytes(model, x)
    assert without - saved_bytes(model, x, context=batchops.recompute) == x.nbytes


def test_layer_norm_with_input_and_weight_in_one_storage():
    """The input must be copied to rows, so what is saved there is the weight."""
    memory = torch.randn(12)
    x = memory[:6].view(1, 3, 2).transpose(1, 2).requires_grad_()
    weight = memory[:6].view(2, 3)

    def loss():
        return F.linear(BF.layer_norm(x, (2, 3), weight), torch.ones(1, 3)).square().sum()

    (expected,) = torch.autograd.grad(loss(), x)
    with batchops.recompute():
        again = loss()
    assert torch.equal(torch.autograd.grad(again, x)[0], expected)


def test_group_and_instance_norm():
    for norm in (bnn.GroupNorm(3, 6, activation="silu"), bnn.InstanceNorm2d(6, affine=True)):
        model, x = nn.Sequential(norm, nn.Conv2d(6, 4, 3)), torch.randn(3, 6, 9, 9)
        assert_same_bits(model, x)
        without = saved_bytes(model, x)
        assert without - saved_bytes(model, x, context=batchops.recompute) == x.nbytes


def test_a_norm_after_a_norm():
    """The second's saved input is the first's output: one recipe within the other."""
    model = nn.Sequential(
        bnn.BatchNorm2d(3, activation="relu"), bnn.BatchNorm2d(3), nn.Conv2d(3, 4, 3)
    )
    assert_same_bits(model, image())
    x = image().requires_grad_()
    kept = x.nbytes + 2 * 3 * 3 * 4
    assert saved_bytes(model, x, context=batchops.recompute) == kept


VIEWS = {
    "flatten": lambda y: y.flatten(1),
    "transpose": lambda y: y.transpose(1, 3),
    "slice": lambda y: y[1:, :, 2:5],
    "channels": lambda y: y[:, 1],
    "expand": lambda y: y[:, :1].expand(-1, 5, -1, -1),
}


@pytest.mark.parametrize("view", VIEWS.values(), ids=VIEWS)
def test_views(view):
    norm = bnn.BatchNorm2d(3, activation="relu")

    def forward(model, x):
        y = view(model(x))
        return y * y

    assert_same_bits(norm, image(), forward)
    x = image().requires_grad_()
    saved = saved_bytes(norm, x, context=batchops.recompute)

    class Squared(nn.Module):
        def forward(self, x):
            return forward(norm, x)

    assert saved_bytes(Squared(), x, context=batchops.recompute) == saved + 2 * 3 * 4


def test_several_consumers():
    norm = bnn.BatchNorm2d(3)
    kernels = [torch.randn(4, 3, 3, 3, requires_grad=True) for _ in range(3)]
    assert_same_bits(
        norm, image(), lambda model, x: sum(F.conv2d(y, k) for y in [model(x)] for k in kernels)
    )


def test_residuals():
    """An output with a residual is kept; a residual that is a norm's output is rebuilt."""
    a, b = bnn.BatchNorm2d(3, activation="relu"), bnn.BatchNorm2d(3, activation="relu")
    conv = nn.Conv2d(3, 3, 3, padding=1)

    class Net(nn.Module):
        def __init__(self):
            super().__init__()
            self.a, self.b, self.conv = a, b, conv

        def forward(self, x):
            h = self.a(x)
            return self.conv(self.b(self.conv(h), residual=h))

    model, x = Net(), image().requires_grad_()
    assert_same_bits(model, x.detach())
    plain = saved_bytes(model, x)
    assert plain - saved_bytes(model, x, context=batchops.recompute) == x.nbytes


# ----------------------------------------------------------------------------- changes in place


def test_an_output_changed_in_place_before_use_is_kept():
    assert_same_bits(bnn.BatchNorm2d(3), image(), lambda m, x: m(x).mul_(2).pow(2))
    assert_same_bits(bnn.BatchNorm2d(3), image(), lambda m, x: F.relu_(m(x)).pow(2))


def changes_output(x, y, norm):
    y.add_(1)


def changes_view(x, y, norm):
    y[0].zero_()


def changes_input(x, y, norm):
    x.add_(1)


def changes_bias(x, y, norm):
    with torch.no_grad():
        norm.bias.add_(1)


def changes_weight(x, y, norm):
    with torch.no_grad():
        norm.weight.add_(1)


@pytest.mark.parametrize(
    "change",
    [changes_output, changes_view, changes_input, changes_bias, changes_weight],
)
def test_a_change_in_place_after_use_raises(change):
    norm, conv = bnn.BatchNorm2d(3), nn.Conv2d(3, 4, 3)
    x = image().requires_grad_() * 1
    with batchops.recompute():
        y = norm(x)
        z = conv(y)
    change(x, y, norm)
    with pytest.raises(RuntimeError, match="modified by an inplace operation"):
        z.sum().backward()


def test_a_change_of_a_tensor_that_is_no_norms_output_raises():
    x = torch.randn(3, requires_grad=True) * 1
    with batchops.recompute():
        y = x * x
    x.add_(1)
    with pytest.raises(RuntimeError, match="modified by an inplace operation"):
        y.sum().backward()


@pytest.mark.parametrize("training", [True, False])
def test_running_statistics_may_change_between_forward_and_backward(training):
    """The output is rebuilt from the statistics that the forward used; the next batch changes the
    running ones."""
    model, x = small_net().train(training), image()
    expected = gradients(model, x)[1]
    other = copy.deepcopy(model)
    x = x.requires_grad_()
    with batchops.recompute():
        y = other(x)
        other.train()(image())
    y.square().sum().backward()
    assert torch.equal(x.grad, expected)
    assert other[1].num_batches_tracked == 1 + training


# --------------------------------------------------------------------------- in torch's machinery


def test_autocast():
    """A float32 output that the convolution saves a bfloat16 copy of is kept."""

    def forward(model, x):
        with torch.autocast("cpu", torch.bfloat16):
            return model(x)

    assert_same_bits(small_net(), image(), forward)
    first = nn.Sequential(bnn.BatchNorm2d(3), nn.Conv2d(3, 4, 3), nn.ReLU())
    assert_same_bits(first, image(), forward)


@pytest.mark.parametrize("use_reentrant", [False, True])
def test_around_checkpoint(use_reentrant):
    def forward(model, x):
        h = model[:2](x)
        return model[4:](checkpoint(model[2:4], h, use_reentrant=use_reentrant))

    assert_same_bits(small_net(momentum=0.0), image(), forward)


def test_inside_checkpoint():
    """The checkpoint's own hooks are around ours: nothing but its inputs is kept, and what it runs
    again in the backward is in a block again."""
    model, x = small_net(momentum=0.0), image()

    def block(t):
        with batchops.recompute():
            return model[2:4](t)

    def forward(m, x):
        return m[4:](checkpoint(block, m[:2](x), use_reentrant=False))

    class Net(nn.Module):
        def __init__(self):
            super().__init__()
            self.model = model

        def forward(self, x):
            return forward(self.model, x)

    plain = gradients(model, x)
    net = Net()
    x = x.requires_grad_()
    y = net(x)
    y.square().sum().backward()
    got = [y.detach(), x.grad, *(p.grad for p in net.parameters())]
    assert all(torch.equal(a, b) for a, b in zip(got, plain, strict=False))


@pytest.mark.parametrize("consumers", [1, 2])
def test_a_norms_input_inside_checkpoint_is_asked_for_once(consumers):
    """Both the rebuilt output and the norm's own backward need it; a checkpoint gives it once."""
    norm, convs = bnn.BatchNorm2d(3, momentum=0.0), [nn.Conv2d(3, 3, 1) for _ in range(consumers)]
    x = image().requires_grad_()

    def layers(t):
        y = norm(t)
        return sum(conv(y) for conv in convs)

    def block(t):
        with batchops.recompute():
            return layers(t)

    (expected,) = torch.autograd.grad(layers(x).square().sum(), x)
    for _ in range(2):
        y = checkpoint(block, x, use_reentrant=False)
        assert torch.equal(torch.autograd.grad(y.square().sum(), x)[0], expected)


def test_lazily_negated_views_are_kept():
    x, w = image().requires_grad_(), torch.randn(4, 3, 12, 6, requires_grad=True)

    def product():
        y = BF.batch_norm(x, None, None, training=True)
        return (torch.view_as_complex(y.unflatten(-1, (6, 2))).conj().imag * w).sum()

    (expected,) = torch.autograd.grad(product(), w)
    with batchops.recompute():
        again = product()
    assert torch.equal(torch.autograd.grad(again, w)[0], expected)


def test_hooks_around_get_what_is_not_rebuilt():
    model, x = small_net(), image()
    expected = gradients(model, x)

    @contextlib.contextmanager
    def both():
        with torch.autograd.graph.save_on_cpu(), batchops.recompute():
            yield

    got = gradients(model, x, both)
    assert all(torch.equal(a, b) for a, b in zip(got, expected, strict=True))


def test_hooks_inside_take_over():
    seen = []

    @contextlib.contextmanager
    def both():
        hooks = torch.autograd.graph.saved_tensors_hooks(
            lambda t: seen.append(t.shape) or t, lambda t: t
        )
        with batchops.recompute(), hooks:
            yield

    model, x = small_net(), image()
    got, expected = gradients(model, x, both), gradients(model, x)
    assert seen
    assert all(torch.equal(a, b) for a, b in zip(got, expected, strict=True))


def test_nested_blocks():
    @contextlib.contextmanager
    def twice():
        with batchops.recompute(), batchops.recompute():
            yield

    model, x = small_net(), image()
    assert saved_bytes(model, x, context=twice) == saved_bytes(model, x, context=batchops.recompute)
    got, expected = gradients(model, x, twice), gradients(model, x)
    assert all(torch.equal(a, b) for a, b in zip(got, expected, strict=True))


def test_double_backward():
    def second(context):
        torch.manual_seed(0)
        norm = bnn.BatchNorm2d(3, activation="relu").double()
        kernel = torch.randn(2, 3, 3, 3, dtype=torch.float64, requires_grad=True)
        x = image().double().requires_grad_()
        with context():
            y = F.conv2d(norm(x).pow(2), kernel)
            (g,) = torch.autograd.grad(y.pow(2).sum(), x, create_graph=True)
        return torch.autograd.grad(g.pow(2).sum(), [x, kernel, norm.weight])

    plain, ours = second(contextlib.nullcontext), second(batchops.recompute)
    assert all(torch.equal(a, b) for a, b in zip(plain, ours, strict=True))


def test_backward_twice():
    norm = bnn.BatchNorm2d(3)
    x = image().requires_grad_()
    with batchops.recompute():
        z = norm(x).pow(2).sum()
    first = torch.autograd.grad(z, x, retain_graph=True)[0]
    assert torch.equal(torch.autograd.grad(z, x)[0], first)


def test_without_gradients_nothing_is_recorded():
    norm, x = bnn.BatchNorm2d(3), image()
    with batchops.recompute():
        with torch.no_grad():
            y = norm(x)
        with torch.inference_mode():
            norm(x)
        w = torch.ones(3, 12, 12, requires_grad=True)
        (y * w).sum().backward()  # saves y, which has no graph to be rebuilt from
    assert torch.equal(w.grad, y.sum(0))


def test_compiled_functions():
    torch._dynamo.reset()
    model, x = small_net(), image()
    compiled = torch.compile(copy.deepcopy(model), backend="aot_eager", fullgraph=True)
    expected = gradients(model, x)[1]
    for context in (contextlib.nullcontext, batchops.recompute):
        t = x.clone().requires_grad_()
        with context():
            y = compiled(t)
        y.square().sum().backward()
        assert torch.equal(t.grad, expected)


def test_blocks_in_compiled_functions_do_nothing():
    torch._dynamo.reset()
    model, x = small_net(), image()

    def block(t):
        with batchops.recompute():
            return model(t)

    compiled = torch.compile(block, backend="aot_eager", fullgraph=True)
    expected = gradients(model, x)[1]
    x = x.requires_grad_()
    compiled(x).square().sum().backward()
    assert torch.equal(x.grad, expected)


def test_func_transforms_say_so():
    def loss(x):
        return BF.batch_norm(x, None, None, training=True).pow(2).sum()

    with batchops.recompute(), pytest.raises(RuntimeError, match="saved tensor hooks"):
        torch.func.grad(loss)(image())


def test_an_exception_ends_the_block():
    with pytest.raises(KeyError), batchops.recompute():
        raise KeyError
    seen = []
    x = torch.randn(3, requires_grad=True)
    with torch.autograd.graph.saved_tensors_hooks(lambda t: seen.append(1) or t, lambda t: t):
        (x * x).sum().backward()
    assert seen


def test_blocks_belong_to_their_thread():
    model, x = small_net(), image()
    plain, ours = saved_bytes(model, x), saved_bytes(model, x, context=batchops.recompute)
    inside, done, results = threading.Event(), threading.Event(), []

    def work():
        with batchops.recompute():
            inside.set()
            done.wait(30)
            results.append(saved_bytes(model, x, context=batchops.recompute))

    worker = threading.Thread(target=work)
    worker.start()
    inside.wait(30)
    results.append(saved_bytes(model, x))
    done.set()
    worker.join()
    assert results == [plain, ours]


def test_many_threads():
    model, x = small_net(momentum=0.0), image()
    expected = gradients(model, x)

    def work(_):
        for _ in range(10):
            got = gradients(model, x, batchops.recompute)
            assert all(torch.equal(a, b) for a, b in zip(got, expected, strict=True))

    run_in_threads(work)


@pytest.mark.parametrize("norm", ["batch", "group"])
def test_parameters_whose_memory_is_gone_meanwhile(norm):
    """As under FSDP, which frees what it has gathered after each forward and gathers it again
    before the norm's own backward, without a new version."""
    torch.manual_seed(0)
    layer = bnn.BatchNorm2d(8, activation="relu") if norm == "batch" else bnn.GroupNorm(2, 8)
    torch.nn.init.normal_(layer.weight)
    torch.nn.init.normal_(layer.bias)
    conv = nn.Conv2d(8, 4, 3)
    x = torch.randn(3, 8, 6, 6, requires_grad=True)
    leaves = [x, *layer.parameters(), *conv.parameters()]
    expected = torch.autograd.grad(conv(layer(x)).square().sum(), leaves)

    with batchops.recompute():
        y = layer(x)
        out = conv(y)
    values = [p.detach().clone() for p in layer.parameters()]
    sizes = [p.untyped_storage().size() for p in layer.parameters()]
    for p in layer.parameters():
        p.untyped_storage().resize_(0)

    def gather(grad):
        for p, size, value in zip(layer.parameters(), sizes, values, strict=True):
            if p.untyped_storage().size() == 0:
                p.untyped_storage().resize_(size)
                p.data.copy_(value)

    y.register_hook(gather)
    got = torch.autograd.grad(out.square().sum(), leaves)
    assert all(torch.equal(a, b) for a, b in zip(got, expected, strict=True))
