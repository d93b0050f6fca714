"""convert() and revert(): what is swapped, what is fused, and that everything else survives."""

from __future__ import annotations

import collections
import contextlib
import copy
import functools
import inspect
import pickle
import random
import subprocess
import sys
import warnings

import pytest
import torch
import torch.nn.functional as F
from torch import nn
from torch.nn.functional import relu as imported_relu
from torch.nn.utils import parametrize

import batchops
from batchops import nn as bnn
from batchops._convert.methods import InstanceMethod, Replicate
from batchops._convert.tables import STOCK

from . import models


class Block(nn.Module):
    """conv-bn-relu-conv-bn, * x, relu by function."""

    def __init__(self, channels=4):
        super().__init__()
        self.conv1 = nn.Conv2d(channels, channels, 3, padding=1)
        self.bn1 = nn.BatchNorm2d(channels)
        self.relu = nn.ReLU(inplace=True)
        self.dropout = nn.Dropout(0.5)
        self.conv2 = nn.Conv2d(channels, channels, 3, padding=1)
        self.bn2 = nn.BatchNorm2d(channels)

    def forward(self, x):
        h = self.dropout(self.relu(self.bn1(self.conv1(x))))
        return torch.relu(self.bn2(self.conv2(h)) * x)


@contextlib.contextmanager
def recorded():
    """The fused norms that are called in the block with an activation to do, of their own or of
    the module behind them."""
    with pytest.MonkeyPatch.context() as patch:
        seen = []
        for kind in [k for k in STOCK if k.__base__ not in STOCK]:

            def forward(self, *args, original=kind.forward, activation=None, **kwargs):
                if activation is not None or self.activation is not None:
                    seen.append(self)
                return original(self, *args, activation=activation, **kwargs)

            patch.setattr(kind, "forward", forward)
        yield seen


def fused_calls(model, *inputs, method="__call__"):
    """The names of these norms, when the model is called, or a method of it."""
    model = copy.deepcopy(model)
    name_of = {m: name for name, m in model.named_modules()}
    with recorded() as seen, torch.no_grad():
        getattr(model, method)(*inputs)
    return [name_of[m] for m in seen]


def outputs_and_grads(model, x):
    torch.manual_seed(1)
    model.zero_grad()
    x = x.clone().requires_grad_()
    y = model(x)
    y.pow(2).sum().backward()
    # of parameters that are not used there is none
    return [y, x.grad, *(p.grad for p in model.parameters() if p.grad is not None)]


def assert_same_behaviour(model, reference, x):
    """In float64: in fewer bits, a relu that flips next to zero changes all that follows."""
    model, reference, x = model.double(), reference.double(), x.double()
    for mode in (True, False):
        model.train(mode)
        reference.train(mode)
        ours, theirs = outputs_and_grads(model, x), outputs_and_grads(reference, x)
        for a, b in zip(ours, theirs, strict=True):
            assert (a - b).norm() <= 1e-10 * max(1.0, b.norm())
    for (key, a), b in zip(
        model.state_dict().items(), reference.state_dict().values(), strict=True
    ):
        torch.testing.assert_close(a, b, rtol=1e-10, atol=1e-10, msg=key)


def test_swaps_in_place_and_fuses():
    model = nn.Sequential(nn.Conv2d(3, 4, 3), nn.BatchNorm2d(4), nn.ReLU(), Block(), Block())
    reference = copy.deepcopy(model)
    parameters = list(model.parameters())
    keys = list(model.state_dict())
    assert batchops.convert(model) is model
    assert type(model[1]) is bnn.BatchNorm2d
    assert fused_calls(model, torch.randn(4, 3, 8, 8)) == ["1", "3.bn1", "4.bn1"]
    assert model[1].fused_with == model[3].bn1.fused_with == "relu"
    assert "fused_with='relu'" in repr(model[1])
    assert model[3].bn2.fused_with is None
    assert type(model[2]) is nn.ReLU
    assert all(a is b for a, b in zip(model.parameters(), parameters, strict=True))
    assert list(model.state_dict()) == keys
    assert type(model[3]) is Block
    assert_same_behaviour(model, reference, torch.randn(4, 3, 8, 8))


def test_revert_restores_everything():
    model = nn.Sequential(nn.Conv2d(3, 4, 3), nn.BatchNorm2d(4), nn.ReLU(inplace=True), Block())
    model(torch.randn(4, 3, 8, 8))
    reference = copy.deepcopy(model)
    x = torch.randn(4, 3, 8, 8)
    batchops.revert(batchops.convert(model))
    assert [type(m) for m in model.modules()] == [type(m) for m in reference.modules()]
    assert [repr(m) for m in model.modules()] == [repr(m) for m in reference.modules()]
    assert [set(m.__dict__) for m in model.modules()] == [
        set(m.__dict__) for m in reference.modules()
    ]
    for (k, a), (j, b) in zip(
        model.state_dict().items(), reference.state_dict().items(), strict=True
    ):
        assert k == j
        assert torch.equal(a, b)
    torch.manual_seed(0)
    ours = model(x)
    torch.manual_seed(0)
    assert torch.equal(ours, reference(x))


def test_deepcopy_of_a_converted_model_reverts():
    model = copy.deepcopy(batchops.convert(nn.Sequential(nn.BatchNorm2d(4), nn.ReLU())))
    batchops.revert(model)
    assert type(model[1]) is nn.ReLU
    assert type(model[0]) is nn.BatchNorm2d


def test_any_part_reverts():
    model = batchops.convert(nn.Sequential(nn.BatchNorm2d(4), nn.ReLU()))
    reference = nn.Sequential(nn.BatchNorm2d(4), nn.ReLU())
    batchops.revert(model[0])
    assert type(model[0]) is nn.BatchNorm2d
    assert fused_calls(model, torch.randn(3, 4, 5, 5)) == []
    assert_same_behaviour(model, reference, torch.randn(3, 4, 5, 5))


def test_revert_refuses_what_it_cannot_express():
    model = nn.Sequential(nn.BatchNorm2d(4), bnn.BatchNorm2d(4, activation="relu"))
    batchops.convert(model, fuse=False)
    with pytest.raises(ValueError, match="'1' was built with activation='relu'"):
        batchops.revert(model)
    assert type(model[0]) is bnn.BatchNorm2d


def test_converting_twice_changes_nothing():
    model = batchops.convert(nn.Sequential(nn.BatchNorm2d(4), nn.ReLU(), nn.ReLU()))
    before = repr(model)
    assert repr(batchops.convert(model)) == before
    assert fused_calls(model, torch.randn(3, 4, 5, 5)) == ["0"]


def test_fuse_false_only_swaps():
    model = batchops.convert(Block(), fuse=False)
    assert type(model.bn1) is bnn.BatchNorm2d
    assert unfused(model)
    assert fused_calls(model, torch.randn(2, 4, 8, 8)) == []


def test_subclasses_are_left_alone():
    class Special(nn.BatchNorm2d):
        def forward(self, x):
            return x

    model = batchops.convert(nn.Sequential(Special(4), nn.ReLU()))
    assert type(model[0]) is Special
    assert type(model[1]) is nn.ReLU


def unfused(model):
    """Whether convert() has put no methods on the model."""
    return not any(isinstance(v, InstanceMethod) for m in model.modules() for v in vars(m).values())


REGISTER = ("register_forward_hook", "register_forward_pre_hook", "register_full_backward_hook")


@pytest.mark.parametrize("before", [True, False], ids=["before convert", "after convert"])
@pytest.mark.parametrize("register", REGISTER)
@pytest.mark.parametrize("name", ["0", "1", "2"])
def test_nothing_fuses_across_hooks(name, register, before):
    model = nn.Sequential(nn.BatchNorm2d(4), nn.Identity(), nn.ReLU())
    x = torch.randn(3, 4, 5, 5, requires_grad=True)
    if not before:
        batchops.convert(model)
    seen, expected = [], []
    for into, of in ((seen, model), (expected, copy.deepcopy(model))):

        def hook(module, *tensors, into=into):
            flat = [t for ts in tensors for t in (ts if isinstance(ts, tuple) else (ts,))]
            into.append([t.detach().clone() for t in flat])

        handle = getattr(of.get_submodule(name), register)(hook)
        if of is not model:
            of = batchops.revert(of)
        elif before:
            batchops.convert(of)
        of(x).pow(2).sum().backward()
        assert of is not model or fused_calls(of, x) == []
        handle.remove()
    del seen[1:]  # fused_calls ran hooks too
    torch.testing.assert_close(seen, expected)
    # since nobody watches; an identity that was watched was not taken for one
    assert fused_calls(model, x) == ["0"] * (name != "1" or not before)


@pytest.mark.parametrize("before", [True, False], ids=["before convert", "after convert"])
def test_nothing_fuses_under_global_hooks(before):
    models.timm()
    from timm.layers import BatchNormAct2d

    model, seen = nn.Sequential(nn.BatchNorm2d(4), nn.ReLU(), BatchNormAct2d(4)), []
    x = torch.randn(3, 4, 5, 5)
    if not before:
        batchops.convert(nn.Sequential(*model[:2]))

    def hook(module, args, output):
        seen.append((type(module).__name__, float(output.detach().min()) < 0))

    handle = nn.modules.module.register_module_forward_hook(hook)
    try:
        batchops.convert(model)
        model(x)
    finally:
        handle.remove()
    assert seen[:2] == [("BatchNorm2d", True), ("ReLU", False)]
    assert ("Identity", False) in seen or ("ReLU", False) in seen[2:]  # inside timm's
    assert fused_calls(model, x)[0] == "0"


class SharedReLU(nn.Module):
    def __init__(self):
        super().__init__()
        self.bn1, self.bn2 = nn.BatchNorm2d(4), nn.BatchNorm2d(4)
        self.relu = nn.ReLU()

    def forward(self, x):
        return self.relu(self.bn2(self.relu(self.bn1(x))))


class OtherUser(nn.Module):
    def __init__(self):
        super().__init__()
        self.bn, self.relu = nn.BatchNorm2d(4), nn.ReLU()

    def forward(self, x):
        h = self.bn(x)
        return self.relu(h) + h


class OnlyInTraining(nn.Module):
    """The norm's output leaves the model in eval mode."""

    def __init__(self):
        super().__init__()
        self.bn, self.relu = nn.BatchNorm2d(4), nn.ReLU()

    def forward(self, x):
        h = self.bn(x)
        return self.relu(h) if self.training else h


class OnlyWithoutMask(nn.Module):
    """An argument that defaults to None chooses the path."""

    def __init__(self):
        super().__init__()
        self.bn, self.relu = nn.BatchNorm2d(4), nn.ReLU()

    def forward(self, x, mask=None):
        h = self.bn(x)
        return self.relu(h) if mask is None else self.relu(h * mask)


class RegisteredTwice(nn.Module):
    def __init__(self):
        super().__init__()
        self.bn, self.relu = nn.BatchNorm2d(4), nn.ReLU()
        self.alias = self.relu

    def forward(self, x):
        return self.relu(self.bn(x))


class OnlyWithGradients(nn.Module):
    def __init__(self):
        super().__init__()
        self.bn, self.relu = nn.BatchNorm2d(4), nn.ReLU()

    def forward(self, x):
        h = self.bn(x)
        return self.relu(h) if torch.is_grad_enabled() else h


class OwnMethod(nn.Module):
    """The norm is the end of a method that users call as well."""

    def __init__(self):
        super().__init__()
        self.bn, self.relu = nn.BatchNorm2d(4), nn.ReLU()

    def embed(self, x):
        return self.bn(x)

    def forward(self, x):
        return self.relu(self.embed(x))


class DirectForward(nn.Module):
    def __init__(self):
        super().__init__()
        self.bn, self.relu = nn.BatchNorm2d(4), nn.ReLU()

    def forward(self, x):
        return self.relu(self.bn(x)) + self.relu.forward(-x)


class NestedEnds(nn.Sequential):
    """The norm ends one container, the ReLU stands outside: each may be run or watched alone."""

    def __init__(self):
        super().__init__(nn.Sequential(nn.Conv2d(4, 4, 1), nn.BatchNorm2d(4)), nn.ReLU())


class KeepsOutput(nn.Module):
    """The norm's output stays on the module."""

    def __init__(self):
        super().__init__()
        self.bn, self.relu = nn.BatchNorm2d(4), nn.ReLU()

    def forward(self, x):
        self.kept = self.bn(x)
        return self.relu(self.kept)


class KeepsName(KeepsOutput):
    def forward(self, x):
        h = self.bn(x)
        y = self.relu(h)
        self.kept = h
        return y


class KeepsInList(KeepsOutput):
    def forward(self, x):
        h = self.bn(x)
        self.kept = [h]
        return self.relu(h)


class KeepsInClosure(KeepsOutput):
    def forward(self, x):
        def later():
            return h

        h = self.bn(x)
        self.kept = later
        return self.relu(h)


class KeepsInFinally(KeepsOutput):
    def forward(self, x):
        h = x
        try:
            h = self.bn(x)
            return self.relu(h)
        finally:
            self.kept = h


class KeepsLocals(KeepsOutput):
    def forward(self, x):
        h = self.bn(x)
        y = self.relu(h)
        self.kept = locals()["h"]
        return y


class NextRound(KeepsOutput):
    """The norm's output is the next round's input."""

    def forward(self, x):
        total = 0
        for _ in range(2):
            x = self.bn(x)
            y = self.relu(x)
            total = total + y
        return total


class InPlace(KeepsOutput):
    """The name keeps the norm's output, which the ReLU changes."""

    def __init__(self):
        super().__init__()
        self.relu = nn.ReLU(inplace=True)

    def forward(self, x):
        h = self.bn(x)
        self.relu(h)
        return h


class AddsTo(KeepsOutput):
    def forward(self, x):
        h = self.bn(x)
        h += self.relu(h)
        return h


class ChangesInPlace(KeepsOutput):
    """The name is not read again, and yet what it stands for changes."""

    def forward(self, x):
        h = self.bn(x)
        y = self.relu(h)
        h += 1
        return y


class OnlySometimes(KeepsOutput):
    def forward(self, x):
        h = self.bn(x)
        y = self.relu(h) if x.dim() == 4 else x
        return y


class AnotherModule(KeepsOutput):
    """What the name stands for when the activation is called was put there in between."""

    def forward(self, x):
        act = self.relu
        h = self.bn((act := nn.Tanh())(x))
        h = act(h)
        return h


class RegisteredByNumber(nn.Module):
    def __init__(self):
        super().__init__()
        self.layers = nn.ModuleList([nn.BatchNorm2d(4), nn.ReLU()])

    def forward(self, x):
        outputs = []
        for layer in self.layers:
            x = layer(x)
            outputs.append(x)
        return sum(outputs)


class ByLoops(nn.Module):
    """Names in loops that stand for a convolution, a norm or an activation."""

    def __init__(self):
        super().__init__()
        self.convs = nn.ModuleList(nn.Conv2d(4, 4, 1) for _ in range(2))
        self.bns = nn.ModuleDict({"a": nn.BatchNorm2d(4), "b": nn.BatchNorm2d(4)})
        self.acts = nn.ModuleList([nn.ReLU(), nn.SiLU()])

    def forward(self, x):
        for i, (conv, bn) in enumerate(zip(self.convs, self.bns.values(), strict=True)):
            h = conv(x) if i else x
            h = conv(h)
            h = bn(h)
            h = self.acts[0](h)
            x = x + h
        for c, b, a in zip(self.convs, self.bns.values(), self.acts, strict=True):
            x = a(b(c(x)))
        return x


class ByNamesThatSayNothing(ByLoops):
    """Each call might be a norm's or an activation's."""

    def layers(self):
        return zip(self.convs, self.bns.values(), self.acts, strict=True)

    def forward(self, x):
        for conv, bn, act in self.layers():
            x = act(bn(conv(x)))
        for conv, bn, act in self.layers():
            x = conv(x)
            x = bn(x)
            x = act(x)
        return x


def kept(model):
    value = getattr(model, "kept", None)
    value = value() if callable(value) else value
    return value[0] if isinstance(value, list) else value


@pytest.mark.parametrize(
    "kind",
    [
        OtherUser,  # the sum needs both
        OnlyInTraining,  # conditions of every sort
        OnlyWithoutMask,
        OnlyWithGradients,
        OnlySometimes,
        OwnMethod,  # two functions
        NestedEnds,
        KeepsOutput,  # ways in which an output is seen after its statement
        KeepsName,
        KeepsInList,
        KeepsInClosure,
        KeepsInFinally,
        KeepsLocals,
        NextRound,
        InPlace,
        AddsTo,
        ChangesInPlace,
        AnotherModule,  # what is looked up early is another module later
        ByNamesThatSayNothing,
        RegisteredByNumber,  # one call in the source, of all layers
    ],
)
def test_not_fused_where_it_would_change_the_result(kind):
    model = kind()
    reference = copy.deepcopy(model)
    batchops.convert(model)
    x = torch.randn(3, 4, 5, 5)
    assert fused_calls(model, x) == []
    assert_same_behaviour(model, reference, x)
    if kept(reference) is not None:
        torch.testing.assert_close(kept(model), kept(reference))


class Conditional(nn.Module):
    """The paths are told by what only a real run shows."""

    def __init__(self):
        super().__init__()
        self.bn, self.relu = nn.BatchNorm2d(4), nn.ReLU()

    def forward(self, x):
        if not isinstance(x, torch.Tensor) or x.sum() > 0:
            return self.relu(self.bn(x))
        return self.bn(x)


class Recurrent(nn.Module):
    def __init__(self):
        super().__init__()
        self.bn, self.relu = nn.BatchNorm2d(4), nn.ReLU()

    def forward(self, x):
        for number in range(3):
            x = self.relu(self.bn(x)) if number < 2 else self.bn(x)
        return x


class ByName(nn.Module):
    """Modules found by getattr, in lists and in dicts, and by variables."""

    def __init__(self):
        super().__init__()
        self.bn0, self.act0 = nn.BatchNorm2d(4), nn.ReLU()
        self.norms = nn.ModuleList([nn.BatchNorm2d(4), nn.BatchNorm2d(4)])
        self.acts = nn.ModuleDict({"a": nn.ReLU(), "1": nn.ReLU()})

    def forward(self, x):
        x = getattr(self, f"act{0}")(getattr(self, f"bn{0}")(x))
        for norm, act in zip(self.norms, self.acts.values(), strict=True):
            x = act(norm(x))
        index = 1
        x = self.norms[index](x)
        x = self.acts["a"](x)
        norm = self.norms[0] if x.dim() == 4 else self.bn0
        return self.act0(norm(x))


class ByStatements(nn.Module):
    def __init__(self):
        super().__init__()
        self.bn1, self.bn2, self.bn3 = (nn.BatchNorm2d(4) for _ in range(3))
        self.relu, self.silu = nn.ReLU(inplace=True), nn.SiLU()
        self.drop, self.conv = nn.Identity(), nn.Conv2d(4, 4, 1)

    def forward(self, x):
        x = self.conv(x)
        x = self.bn1(x)
        x = self.drop(x)
        x = self.relu(x)
        h = self.bn2(self.conv(x))
        y = x + self.conv(self.silu(h))
        with contextlib.suppress(ZeroDivisionError):
            z = self.bn3(y)
            return self.relu(self.drop(z))


class PrivateNames(nn.Module):
    """Names that the class takes in, its own name, its base's methods, defaults, a closure."""

    def __init__(self):
        super(PrivateNames, self).__init__()  # noqa: UP008
        self.__scale = 2.0
        self.bn, self.relu = nn.BatchNorm2d(4), nn.ReLU()

    @staticmethod
    def twice(x):
        return 2 * x

    def forward(
        self,
        x,
        *,
        power=1,
        text="""
  indented
""",
    ):
        scale = [self.__scale for _ in range(1)]
        text += """
  by two"""
        extra = super().extra_repr() + text.replace("\n  indented\n\n  by two", "")
        return PrivateNames.twice(self.relu(self.bn(x)) * scale[0] ** power) + len(extra)


def decorated(function):
    @functools.wraps(function)
    def run(*args):
        return 3 * function(*args)

    return run


class Decorated(nn.Module):
    def __init__(self):
        super().__init__()
        self.bn, self.relu = nn.BatchNorm2d(4), nn.ReLU()

    @decorated
    def forward(self, x):
        return self.relu(self.bn(x))


class Helper(nn.Module):
    """In a method that forward calls, in a function inside it."""

    def __init__(self):
        super().__init__()
        self.bn, self.relu = nn.BatchNorm2d(4), nn.ReLU()

    def _run(self, x):
        def inner(x):
            return self.relu(self.bn(x))

        return inner(x)

    def forward(self, x):
        return self._run(x)


class SlopeOf(nn.Module):
    """Reads its activation's attribute."""

    def __init__(self):
        super().__init__()
        self.bn, self.act = nn.BatchNorm2d(4), nn.LeakyReLU(0.1)

    def forward(self, x):
        return self.act(self.bn(x)) * (1 + self.act.negative_slope)


@pytest.mark.parametrize(
    ("kind", "calls"),
    [
        (SharedReLU, ["bn1", "bn2"]),  # one activation after two norms
        (RegisteredTwice, ["bn"]),  # under two names
        (DirectForward, ["bn"]),  # another use of it, past hooks
        (Conditional, ["bn"]),  # only on this path
        (Recurrent, ["bn", "bn"]),  # not in the last round
        (ByName, ["bn0", "norms.0", "norms.1", "norms.1", "norms.0"]),
        (ByLoops, ["bns.a", "bns.b"] * 2),
        (ByStatements, ["bn1", "bn2", "bn3"]),
        (PrivateNames, ["bn"]),  # what a method has from around it
        (Decorated, ["bn"]),
        (Helper, ["bn"]),
        (SlopeOf, ["bn"]),  # the activation is still there
    ],
)
def test_fused_where_one_call_follows_the_other(kind, calls):
    model = kind()
    reference = copy.deepcopy(model)
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        batchops.convert(model)
    x = torch.rand(3, 4, 5, 5) + 1
    assert fused_calls(model, x) == calls
    assert_same_behaviour(model, reference, x)
    other = pickle.loads(pickle.dumps(model)).float()
    assert fused_calls(other, x) == calls
    names = [
        name
        for name, value in vars(other).items()
        if isinstance(value, InstanceMethod) and not isinstance(value, Replicate)
    ]
    assert names == ["_run" if kind is Helper else "forward"]
    assert all(vars(other)[name].module is other for name in names)
    assert inspect.signature(model.forward) == inspect.signature(reference.forward)
    batchops.revert(model)
    assert [set(vars(m)) for m in model.modules()] == [set(vars(m)) for m in reference.modules()]


@pytest.mark.parametrize(
    ("kind", "calls"),
    [
        (ByLoops, 4),  # rewritten
        (lambda: nn.Sequential(nn.BatchNorm2d(4), nn.LeakyReLU(0.2), ByStatements()), 4),
    ],
    ids=["methods", "a Sequential"],
)
def test_compiled_and_exported_in_one_graph_and_fused(kind, calls):
    torch._dynamo.reset()
    model = batchops.convert(kind()).eval()
    x = torch.randn(2, 4, 5, 5)
    expected = model(x)
    graphs = []

    def backend(graph, inputs):
        graphs.append(graph)
        return graph.forward

    compiled = torch.compile(model, fullgraph=True, backend=backend)
    torch.testing.assert_close(compiled(x), expected)
    fused = [
        node
        for node in graphs[0].graph.nodes
        if any(name in node.args for name in ("relu", "leaky_relu", "silu"))
    ]
    assert (len(graphs), len(fused)) == (1, calls)
    for strict in (True, False):
        exported = torch.export.export(model, (x,), strict=strict)
        torch.testing.assert_close(exported.module()(x), expected)


def test_a_graph_module_of_torch_fx():
    """Its source is text in memory, with statements that drop what is not needed any more."""
    stock = nn.Sequential(Block(), Calls(Sums(), "nested"), nn.BatchNorm2d(4), nn.SiLU()).eval()
    model = batchops.convert(torch.fx.symbolic_trace(stock))
    x = torch.randn(2, 4, 8, 8)
    with recorded() as seen:
        torch.testing.assert_close(model(x), stock(x))
    assert len(seen) == 3
    model.graph.output_node().args[0].replace_all_uses_with(next(iter(model.graph.nodes)))
    model.recompile()
    assert torch.equal(model(x), x)


def test_errors_name_the_line_they_come_from():
    class Fails(ByStatements):
        def forward(self, x):
            x = self.relu(self.bn1(x))
            raise ZeroDivisionError

    model = batchops.convert(Fails())
    with pytest.raises(ZeroDivisionError) as caught:
        model(torch.randn(3, 4, 5, 5))
    last = caught.traceback[-1]
    assert str(last.statement).strip() == "raise ZeroDivisionError"
    assert last.path.name == "test_convert.py"


# ------------------------------------------------------- parts of a converted model, called alone


def conv_bn_relu():
    return collections.OrderedDict(
        conv=nn.Conv2d(4, 4, 3, padding=1), bn=nn.BatchNorm2d(4), relu=nn.ReLU()
    )


class Parts(nn.Module):
    """conv, bn, relu as children, in a Sequential by name and by number."""

    names = "conv", "bn"

    def __init__(self):
        super().__init__()
        for name, module in conv_bn_relu().items():
            setattr(self, name, module)
        self.named = nn.Sequential(conv_bn_relu())
        self.numbered = nn.Sequential(*conv_bn_relu().values())
        self.before = False

    def features(self, x):
        return self.bn(self.conv(x))

    def whole(self, x):
        h = self.bn(self.conv(x))
        return h if self.before else self.relu(h)

    def forward(self, x):
        return self.numbered(self.named(self.relu(self.bn(self.conv(x)))))


def by_helper(m, x):
    return m.bn(m.conv(x))


def outputs(modules, x):
    results = []
    for module in modules:
        x = module(x)
        results.append(x)
    return results


def after_relus(modules, x):
    results = []
    for module in modules:
        x = module(x)
        if isinstance(module, nn.ReLU):
            results.append(x)
    return results


def unpacked(m, x):
    conv, bn, _ = m.named
    return bn(conv(x))


def in_another_list(m, x):
    return nn.Sequential(*list(m.named.children())[:2], nn.Sigmoid())(x)


def with_flag(m, x):
    m.before = True
    return m.whole(x)


WAYS = {
    "another method": lambda m, x: m.features(x),
    "a helper": by_helper,
    "a flag that is set later": with_flag,
    "a module alone": lambda m, x: m.named.bn(x),
    "a slice by name": lambda m, x: m.named[:2](x),
    "a slice by number": lambda m, x: m.numbered[:2](x),
    "items": lambda m, x: m.named[1](m.named[0](x)),
    "unpacked": unpacked,
    "in another container": in_another_list,
    "a loop over names": lambda m, x: outputs((getattr(m, name) for name in m.names), x),
    "a loop over a Sequential": lambda m, x: outputs(m.named, x),
    "a loop over children": lambda m, x: outputs(m.children(), x),
    "a loop that looks at types": lambda m, x: after_relus(m.named, x),
}


class Reaches(nn.Module):
    """Uses a part's modules in one of these ways; no symbolic trace gets through it."""

    def __init__(self, way):
        super().__init__()
        self.part = Parts()
        self.way = way

    def forward(self, x):
        return WAYS[self.way](self.part, x / 2 if x.mean() > 100 else x)


@pytest.mark.parametrize("way", WAYS)
@pytest.mark.parametrize("inside", [True, False], ids=["by a model", "by its user"])
def test_parts_do_alone_what_they_did(way, inside):
    stock = (Reaches(way) if inside else Parts()).eval()
    model = batchops.convert(copy.deepcopy(stock))
    x = torch.randn(2, 4, 8, 8)
    run = (lambda m: m(x)) if inside else (lambda m: WAYS[way](m, x))
    torch.testing.assert_close(run(model), run(stock))
    part = model.part if inside else model
    part.before = False
    assert fused_calls(part, x) == ["bn", "named.bn", "numbered.1"]


@pytest.mark.parametrize("number", range(4))
@pytest.mark.parametrize(
    "arguments", [{}, {"a": 1}, {"b": 1}, {"a": 1, "b": 1}], ids=lambda a: "+".join(a) or "none"
)
def test_arguments_that_default_to_none(arguments, number):
    """All combinations of two, under each condition on them."""

    class Optional(nn.Module):
        def __init__(self):
            super().__init__()
            self.bn, self.relu = nn.BatchNorm2d(4), nn.ReLU()

        def forward(self, x, a=None, b=None):
            if (a is not None) + 2 * (b is not None) == number:
                return self.bn(x)
            return self.relu(self.bn(x))

    stock = Optional().eval()
    x = torch.randn(2, 4, 5, 5)
    torch.testing.assert_close(
        batchops.convert(copy.deepcopy(stock))(x, **arguments), stock(x, **arguments)
    )


def test_a_path_taken_at_random(monkeypatch):
    class Random(nn.Module):
        def __init__(self):
            super().__init__()
            self.bn, self.relu = nn.BatchNorm2d(4), nn.ReLU()

        def forward(self, x):
            h = self.bn(x)
            if self.training and random.random() < 0.05:
                return h
            return self.relu(h)

    monkeypatch.setattr(random, "random", lambda: 0.5)
    model = batchops.convert(Random())
    x = torch.randn(2, 4, 5, 5)
    assert model(x).min() == 0
    monkeypatch.setattr(random, "random", lambda: 0.0)
    assert model(x).min() < 0


def test_a_module_that_takes_the_place_of_another():
    for name, other in (("bn", nn.BatchNorm2d(4)), ("bn", nn.Identity()), ("relu", nn.Tanh())):
        model = batchops.convert(nn.Sequential(conv_bn_relu()))
        wrapped = batchops.convert(Parts())
        for m in (model, wrapped):
            setattr(m, name, other)
            stock = batchops.revert(copy.deepcopy(m))
            x = torch.randn(2, 4, 5, 5)
            torch.testing.assert_close(m.eval()(x), stock.eval()(x))
    model = batchops.convert(nn.Sequential(conv_bn_relu()))
    model.append(nn.BatchNorm2d(4))
    assert model(torch.randn(2, 4, 5, 5)).min() < 0
    model = batchops.convert(nn.Sequential(nn.BatchNorm2d(4), nn.LeakyReLU(0.1)))
    model[1].negative_slope = 0.5
    x = torch.randn(2, 4, 5, 5)
    torch.testing.assert_close(model(x), F.leaky_relu(model[0](x), 0.5))
    model[1].negative_slope = torch.tensor(0.2, requires_grad=True)
    assert fused_calls(batchops.convert(nn.Sequential(nn.BatchNorm2d(4), nn.GELU("tanh"))), x)
    assert fused_calls(nn.Sequential(model[0], nn.GELU("tanh")), x) == []


def test_a_method_that_the_class_gets_later(monkeypatch):
    model = batchops.convert(Helper())
    monkeypatch.setattr(Helper, "_run", lambda self, x: x + 1)
    x = torch.randn(2, 4, 5, 5)
    assert torch.equal(model(x), x + 1)


def test_a_forward_that_someone_puts_on_later():
    stock = Parts().eval()
    model = batchops.convert(copy.deepcopy(stock))
    before = model.forward
    model.forward = own = lambda x: before(x) + 1
    x = torch.randn(2, 4, 5, 5)
    torch.testing.assert_close(model(x), stock(x) + 1)
    batchops.revert(model)
    assert vars(model)["forward"] is own
    assert torch.equal(model(x), stock(x) + 1)


def test_a_base_behind_torchs_own_is_not_taken_for_the_class():
    class Mixin:
        def forward(self, x):
            return self.relu(self.bn(x)) + 1

    class Both(nn.Sequential, Mixin):
        pass

    model = batchops.convert(Both(conv_bn_relu()))
    assert model(torch.randn(2, 4, 5, 5)).min() == 0


@pytest.mark.parametrize("value", ["silu", nn.ReLU(), nn.Parameter(torch.ones(1))], ids=repr)
@pytest.mark.parametrize("name", ["activation", "ghost_batch_size", "fused_with"])
def test_a_norm_with_an_attribute_of_ours_is_somebody_elses(name, value):
    model = nn.Sequential(nn.BatchNorm2d(4), nn.ReLU(), nn.GroupNorm(2, 4))
    setattr(model[0], name, value)
    batchops.convert(model)
    assert type(model[0]) is nn.BatchNorm2d
    assert type(model[2]) is bnn.GroupNorm
    assert getattr(batchops.revert(model)[0], name) is value


def test_not_fused_where_an_instance_has_a_forward_of_its_own():
    x = torch.randn(2, 4, 5, 5)
    for name in ("0", "1"):
        model = nn.Sequential(nn.BatchNorm2d(4), nn.ReLU())
        module = model.get_submodule(name)
        module.forward = functools.partial(type(module).forward, module)
        assert fused_calls(batchops.convert(model), x) == [], name
    model = nn.Sequential(nn.BatchNorm2d(4), nn.ReLU())
    model.forward = own = lambda x: x
    assert vars(batchops.convert(model))["forward"] is own


def test_hooks_of_containers_see_what_they_saw_and_no_proxies():
    seen = []
    inner = nn.Sequential(nn.Conv2d(4, 4, 1), nn.BatchNorm2d(4), nn.ReLU())
    model = nn.Sequential(inner, nn.Conv2d(4, 4, 1))
    inner.register_forward_hook(lambda m, i, o: seen.append(type(o)))
    batchops.convert(model)
    assert not seen
    assert fused_calls(inner, torch.randn(2, 4, 5, 5)) == ["1"]
    seen.clear()
    model(torch.randn(2, 4, 5, 5))
    assert seen == [torch.Tensor]


def test_what_is_shared_with_another_model_does_there_what_it_did():
    norm, relu = nn.BatchNorm2d(4), nn.ReLU()
    one, other = batchops.convert(nn.Sequential(norm, relu)), nn.Sequential(norm, nn.Sigmoid())
    x = torch.randn(2, 4, 5, 5)
    assert fused_calls(one, x) == ["0"]
    assert other(x).min() < 0.5
    assert nn.Sequential(relu)(x).min() == 0


@pytest.mark.filterwarnings("ignore::DeprecationWarning")
def test_eval_mode_survives_a_scripted_part():
    model = nn.Sequential(torch.jit.script(nn.Linear(5, 5)), nn.BatchNorm2d(4), nn.ReLU()).eval()
    batchops.convert(model)
    assert not any(m.training for m in model.modules())
    assert model[1].fused_with == "relu"


def from_text(text, name):
    """What ``text`` defines; no file has it."""
    space = {"nn": nn}
    exec(text, space)
    return space[name]


TEXT = """
class Typed(nn.Module):
    def __init__(self):
        super().__init__()
        self.bn, self.relu = nn.BatchNorm2d(4), nn.ReLU()

    def forward(self, x):
        return self.relu(self.bn(x))
"""


def test_one_warning_where_the_source_is_not_at_hand():
    model = nn.Sequential(from_text(TEXT, "Typed")(), from_text(TEXT, "Typed")())
    with pytest.warns(UserWarning, match=r"Typed.forward cannot be read \(OSErr") as caught:
        batchops.convert(model)
    assert len(caught) == 1
    assert caught[0].filename == __file__
    assert type(model[0].bn) is bnn.BatchNorm2d
    assert fused_calls(model, torch.randn(2, 4, 5, 5)) == []


def test_one_warning_where_a_forward_is_no_function():
    class Partial(nn.Module):
        forward = functools.partialmethod(lambda self, n, x: self.relu(self.bn(x)) * n, 2)

        def __init__(self):
            super().__init__()
            self.bn, self.relu = nn.BatchNorm2d(4), nn.ReLU()

    with pytest.warns(UserWarning, match="Partial.forward is not a function") as caught:
        model = batchops.convert(Partial())
    assert len(caught) == 1
    assert unfused(model)


def test_no_warning_where_nothing_could_fuse():
    text = TEXT.replace("self.relu(self.bn(x))", "self.bn(x)")
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        model = batchops.convert(from_text(text, "Typed")())
    assert type(model.bn) is bnn.BatchNorm2d


@pytest.mark.parametrize(
    ("number", "change"),
    [
        (0, lambda text: text),  # the same: read
        (1, lambda text: text.replace("self.relu(self.bn(x))", "self.bn(self.relu(x))")),
        (2, lambda text: text.replace("+ 2", "+ 3")),  # another constant
        (3, lambda text: text.replace("x", "y")),
        (4, lambda text: text.replace("    def forward", "    # one line more\n    def forward")),
        (5, lambda text: "(\n" + text),  # no Python
        (6, lambda text: text[:20]),  # shorter
    ],
)
def test_a_file_that_has_changed_is_not_believed(number, change, tmp_path):
    path = tmp_path / "typed.py"
    text = TEXT.replace("(x))", f"(x)) + {number}")  # another code each time
    space = {"nn": nn}
    exec(compile(text, str(path), "exec"), space)
    path.write_text(change(text))
    model = space["Typed"]()
    if number == 0:
        assert fused_calls(batchops.convert(model), torch.randn(2, 4, 5, 5)) == ["bn"]
        return
    with pytest.warns(UserWarning, match="cannot be read"):
        batchops.convert(model)
    assert unfused(model)


@pytest.mark.parametrize(
    ("between", "fused"),
    [
        (nn.Identity(), True),
        (nn.Sequential(), True),
        (nn.Sequential(nn.Identity(), nn.Sequential()), True),
        (nn.Dropout(0.5), False),
        (nn.Dropout(0.0), False),  # its p may change later
        (nn.Sequential(nn.Dropout(0.5)), False),
        (nn.Flatten(), False),
    ],
    ids=str,
)
def test_what_may_stand_between_norm_and_activation(between, fused):
    model = nn.Sequential(nn.BatchNorm2d(4), between, nn.ReLU())
    reference = copy.deepcopy(model)
    batchops.convert(model)
    assert fused_calls(model, torch.randn(3, 4, 5, 5)) == ["0"] * fused
    assert_same_behaviour(model, reference, torch.randn(3, 4, 5, 5))


@pytest.mark.parametrize(
    ("activation", "name"),
    [
        (nn.ReLU(), "relu"),
        (nn.LeakyReLU(0.2), ("leaky_relu", 0.2)),
        (nn.SiLU(inplace=True), "silu"),
        (nn.GELU(), "gelu"),
        (nn.GELU(approximate="tanh"), "gelu_tanh"),
        (nn.Hardswish(), "hardswish"),
        (nn.Tanh(), None),
        (nn.PReLU(), None),
        (nn.LeakyReLU(-0.5), ("leaky_relu", -0.5)),
    ],
    ids=str,
)
@pytest.mark.parametrize("norm", ["BatchNorm2d", "GroupNorm", "LayerNorm", "InstanceNorm2d"])
def test_every_norm_with_every_activation(norm, activation, name):
    arguments = {"GroupNorm": (2, 4), "LayerNorm": ((4, 5, 5),)}.get(norm, (4,))
    model = nn.Sequential(getattr(nn, norm)(*arguments), activation, nn.Conv2d(4, 4, 1))
    reference = copy.deepcopy(model)
    batchops.convert(model)
    assert type(model[0]) is getattr(bnn, norm)
    assert model[0].fused_with == name
    assert fused_calls(model.double(), torch.randn(3, 4, 5, 5).double()) == ["0"] * bool(name)
    assert_same_behaviour(model, reference, torch.randn(3, 4, 5, 5))
    batchops.revert(model)
    assert [type(m) for m in model] == [type(m) for m in reference]
    assert model[1] is activation


def test_a_converted_model_pickles():
    model = batchops.convert(nn.Sequential(nn.BatchNorm2d(4), nn.LeakyReLU(0.3)))
    other = pickle.loads(pickle.dumps(model))
    assert fused_calls(other, torch.randn(2, 4, 5, 5)) == ["0"]
    batchops.revert(other)
    assert repr(other[1]) == repr(nn.LeakyReLU(0.3))


class Meter:
    def __init__(self):
        self.values = []


class Remembers(nn.Module):
    """Writes to all sorts of things when it runs."""

    def __init__(self):
        super().__init__()
        self.bn, self.relu = nn.BatchNorm2d(4), nn.ReLU()
        self.calls = 0
        self.kept, self.deque = [], collections.deque(maxlen=3)
        self.nested = {"c": [[]]}
        self.defaults, self.counter = collections.defaultdict(int), collections.Counter()
        self.tensor, self.meter = torch.zeros(()), Meter()
        self.generator = torch.Generator().manual_seed(1)
        self.register_buffer("seen", torch.zeros(()))

    def forward(self, x):
        self.calls += 1
        self.seen.add_(1)
        self.tensor.add_(1)
        self.last = x
        self.kept.append(x)
        self.deque.append(x)
        self.nested["c"][0].append(x)
        self.defaults["n"] += 1
        self.counter["n"] += 1
        self.meter.values.append(x)
        x = x + torch.rand((), generator=self.generator)
        return self.relu(self.bn(x + torch.rand(())))


def test_analysis_has_no_side_effects():
    model = Remembers()
    model.bn.eval()
    state, own = torch.get_rng_state(), model.generator.get_state()
    batchops.convert(model)
    assert (model.calls, float(model.seen), float(model.tensor)) == (0, 0.0, 0.0)
    assert not hasattr(model, "last")
    for value in (model.kept, model.deque, model.nested["c"][0], model.meter.values):
        assert len(value) == 0
    assert not model.defaults
    assert not model.counter
    assert torch.equal(model.generator.get_state(), own)
    assert model.training
    assert not model.bn.training
    assert torch.equal(torch.get_rng_state(), state)
    with recorded() as seen:
        model(torch.randn(2, 4, 5, 5))
    assert seen == [model.bn]
    assert model.calls == 1


class Doubled(nn.Module):
    def forward(self, x):
        return 2 * x


def test_a_norm_that_got_parametrizations_reverts():
    model = batchops.convert(nn.Sequential(conv_bn_relu()))
    x = torch.randn(2, 4, 5, 5)
    parametrize.register_parametrization(model.bn, "weight", Doubled())
    assert fused_calls(model, x) == []
    expected = model.eval()(x)
    batchops.revert(model)
    assert isinstance(model.bn, nn.BatchNorm2d)
    assert not isinstance(model.bn, bnn.BatchNorm2d)
    torch.testing.assert_close(model(x), expected)
    parametrize.remove_parametrizations(model.bn, "weight")
    assert type(model.bn) is nn.BatchNorm2d
    torch.testing.assert_close(model(x), expected)


def test_hooks_put_on_later_survive_revert():
    model, seen = batchops.convert(nn.Sequential(nn.BatchNorm2d(4), nn.ReLU())), []
    model[1].register_forward_hook(lambda m, i, o: seen.append(float(o.detach().min())))
    batchops.revert(model)(torch.randn(3, 4, 5, 5))
    assert seen == [0.0]


def test_a_hand_built_norm_survives_being_reverted_and_converted():
    model = nn.Sequential(bnn.BatchNorm2d(4), nn.ReLU())
    assert fused_calls(batchops.convert(model), torch.randn(3, 4, 5, 5)) == ["0"]
    assert set(vars(batchops.revert(model)[0])) == set(vars(nn.BatchNorm2d(4)))
    assert type(batchops.convert(model)[0]) is bnn.BatchNorm2d


def test_an_activation_in_the_call():
    x = torch.randn(3, 4, 5, 5)
    for name in ("BatchNorm2d", "GroupNorm", "LayerNorm", "InstanceNorm2d"):
        arguments = {"GroupNorm": (2, 4), "LayerNorm": (5,)}.get(name, (4,))
        norm = getattr(bnn, name)(*arguments, activation="silu")
        plain = getattr(bnn, name)(*arguments)
        torch.testing.assert_close(norm(x, activation="relu"), F.relu(plain(x)))
        torch.testing.assert_close(norm(x), F.silu(plain(x)))


def test_needs_a_module():
    for f in (batchops.convert, batchops.revert):
        with pytest.raises(TypeError, match=r"expected a torch.nn.Module, got dict"):
            f({})


def test_a_norm_alone_is_swapped():
    norm = batchops.convert(nn.BatchNorm2d(4))
    assert type(norm) is bnn.BatchNorm2d
    assert type(batchops.revert(norm)) is nn.BatchNorm2d


def test_replicas_run_their_own_modules():
    """As nn.DataParallel makes them: copies of modules with other parameters."""

    def replica_of(module):
        made = module._replicate_for_data_parallel()
        for name, child in module._modules.items():
            made._modules[name] = replica_of(child)
            setattr(made, name, made._modules[name])
        for name, p in module._parameters.items():
            setattr(made, name, None if p is None else p.detach() * 2)
        return made

    torch.manual_seed(0)
    model = nn.Sequential(
        collections.OrderedDict(
            stem=nn.Conv2d(3, 4, 3), bn=nn.BatchNorm2d(4), act=nn.ReLU(), block=Block()
        )
    ).eval()
    x = torch.randn(2, 3, 8, 8)
    expected = replica_of(copy.deepcopy(model))(x)
    original = model(x)
    batchops.convert(model)
    replica = replica_of(model)
    with recorded() as seen:
        actual = replica(x)
    assert len(seen) == 2
    assert not set(map(id, seen)) & set(map(id, model.modules()))
    torch.testing.assert_close(actual, expected)
    torch.testing.assert_close(model(x), original)
    torch.testing.assert_close(
        replica_of(replica)(x), replica_of(replica_of(batchops.revert(model)))(x)
    )


class Later(nn.Module):
    """Between norm and activation something happens that decides which activation it is, or what it
    does: the activation is looked up and called where it stands."""

    def __init__(self):
        super().__init__()
        self.bn = nn.BatchNorm2d(3)
        self.act = nn.LeakyReLU(0.1)
        self.acts = nn.ModuleList([nn.ReLU(), nn.SiLU()])
        self.named = nn.ModuleDict({"relu": nn.ReLU(), "silu": nn.SiLU()})
        self.same = nn.Identity()

    def steeper(self, x):
        self.act.negative_slope = 0.9
        return x

    def by_index(self, x):
        i = 0
        x = self.bn(x)
        i = 1
        return self.acts[i](x)

    def by_name(self, x):
        x = self.bn(x)
        name = "silu"
        x = self.named[name](x)
        return x

    def further_on(self, x):
        i = 0
        x = self.bn(x)
        i = 1
        x = self.same(x)
        x = self.acts[i](x)
        return x

    def by_one_of_two_indices(self, x):
        i = 0
        x = self.bn(x)
        i = j = 1
        return self.acts[i](x) * j

    def called_before(self, x):
        h = self.bn(x)
        return self.steeper(x) + self.act(h)

    def inside_try(self, x):
        try:
            x = self.bn(x)
            x = self.act(self.same(x))
        except KeyError:
            pass
        return x


@pytest.mark.parametrize(
    "way",
    ["by_index", "by_one_of_two_indices", "by_name", "further_on", "called_before", "inside_try"],
)
def test_what_happens_between_norm_and_activation(way):
    torch.manual_seed(0)
    model, x = Later(), torch.randn(2, 3, 4, 4)
    if way == "inside_try":

        def stop(module, args):
            raise KeyError

        model.act.register_forward_pre_hook(stop)
    expected = getattr(copy.deepcopy(model), way)(x)
    torch.testing.assert_close(getattr(batchops.convert(model), way)(x), expected)


def test_a_constant_in_the_place_of_the_norms_output():
    class Overwrites(nn.Module):
        def __init__(self):
            super().__init__()
            self.bn = nn.BatchNorm2d(3)

        def forward(self, x):
            x = self.bn(x)
            x = 0.5
            return F.relu(x)

    for model in (Overwrites(), batchops.convert(Overwrites())):
        with pytest.raises(TypeError, match="float"):
            model(torch.randn(2, 3, 4, 4))


def test_names_of_the_users_for_converted_methods_stay():
    class Two(nn.Module):
        def __init__(self):
            super().__init__()
            self.bn, self.act = nn.BatchNorm2d(3), nn.ReLU()

        def forward(self, x):
            return self.act(self.bn(x))

        def other(self, x):
            return -self.act(self.bn(x))

    model, x = batchops.convert(Two().eval()), torch.randn(2, 3, 4, 4)
    model.forward = model.other
    batchops.convert(model)
    torch.testing.assert_close(model(x), model.other(x))
    batchops.revert(model)
    torch.testing.assert_close(model(x), model.other(x))

    wrapped = batchops.convert(Two().eval())
    expected = wrapped(x)
    wrapped._old_forward = wrapped.forward  # as accelerate does
    wrapped.forward = lambda x: wrapped._old_forward(x) + 1
    batchops.revert(wrapped)
    torch.testing.assert_close(wrapped(x), expected + 1)


def test_a_checkpoint_counts_batches_as_torch():
    """Its recomputation ends as soon as all is there that the backward needs."""

    def model():
        torch.manual_seed(0)
        return nn.Sequential(nn.Conv2d(3, 4, 1), nn.BatchNorm2d(4, momentum=None), nn.ReLU())

    stock, ours = model(), batchops.convert(model())
    for _ in range(3):
        x = torch.randn(2, 3, 4, 4)
        for m in (stock, ours):
            torch.utils.checkpoint.checkpoint(m, x, use_reentrant=False).sum().backward()
    assert ours[1].num_batches_tracked == stock[1].num_batches_tracked
    torch.testing.assert_close(ours[1].running_mean, stock[1].running_mean)


def test_each_method_has_compiled_code_of_its_own():
    """torch.compile gives a code object up after some compilations (8)."""
    x = torch.randn(2, 3, 4, 4)
    for k in range(10):

        class One(nn.Module):
            def __init__(self):
                super().__init__()
                self.bn, self.act = nn.BatchNorm2d(3), nn.ReLU()

            def forward(self, x, k=k):
                return self.act(self.bn(x)) + k

        model = batchops.convert(One().eval())
        compiled = torch.compile(model, backend="eager", fullgraph=True)
        torch.testing.assert_close(compiled(x), model(x))


def test_functions_keep_what_is_written_on_them():
    def counted(function):
        function.calls = 0

        @functools.wraps(function)
        def wrapper(self, x):
            function.calls += 1
            return function(self, x)

        wrapper.factor = 3
        return wrapper

    class Counted(nn.Module):
        def __init__(self):
            super().__init__()
            self.bn, self.act = nn.BatchNorm2d(3), nn.ReLU()

        @counted
        def forward(self, x):
            return self.act(self.bn(x)) * self.forward.factor

    model, x = Counted().eval(), torch.randn(2, 3, 4, 4)
    expected = model(x)
    torch.testing.assert_close(batchops.convert(model)(x), expected)


def test_a_name_of_what_was_fused_does_not_outlive_a_parametrization():
    class Double(nn.Module):
        def forward(self, weight):
            return 2 * weight

    model = batchops.convert(nn.Sequential(nn.BatchNorm2d(3), nn.ReLU()))
    parametrize.register_parametrization(model[0], "weight", Double())
    batchops.revert(model)
    parametrize.remove_parametrizations(model[0], "weight")
    assert type(batchops.convert(model)[0]) is bnn.BatchNorm2d


# ---------------------------------------------------------------- activations called by function


class Functions(nn.Module):
    """Each method calls one function, or one method of tensors, on the norm's output."""

    def __init__(self):
        super().__init__()
        self.bn = nn.BatchNorm2d(4)
        self.same = nn.Identity()
        self.act = F.silu
        self.slope, self.options = 0.3, {"negative_slope": 0.4}

    def relu(self, x):
        return F.relu(self.bn(x))

    def relu_by_position(self, x):
        return F.relu(self.bn(x), True)

    def relu_by_keyword(self, x):
        return F.relu(self.bn(x), inplace=True)

    def relu_in_place(self, x):
        return F.relu_(self.bn(x))

    def relu_of_torch(self, x):
        return torch.relu(self.bn(x))

    def relu_of_torch_in_place(self, x):
        return torch.relu_(self.bn(x))

    def relu_by_its_path(self, x):
        return torch.nn.functional.relu(self.bn(x))

    def relu_by_its_name(self, x):
        return imported_relu(self.bn(x))

    def relu_of_a_module(self, x):
        return nn.functional.relu(self.same(self.bn(x)), inplace=False)

    def silu(self, x):
        return F.silu(self.bn(x), inplace=True)

    def silu_by_attribute(self, x):
        return self.act(self.bn(x))

    def gelu(self, x):
        return F.gelu(self.bn(x))

    def gelu_exact(self, x):
        return F.gelu(self.bn(x), approximate="none")

    def gelu_tanh(self, x):
        return F.gelu(self.bn(x), approximate="tanh")

    def leaky(self, x):
        return F.leaky_relu(self.bn(x))

    def leaky_by_position(self, x):
        return F.leaky_relu(self.bn(x), 0.2, True)

    def leaky_by_keyword(self, x):
        return F.leaky_relu(self.bn(x), negative_slope=-0.2)

    def leaky_in_place(self, x):
        return F.leaky_relu_(self.bn(x), 1)

    def hardswish(self, x):
        return F.hardswish(self.bn(x), True)

    def method(self, x):
        return self.bn(x).relu()

    def method_in_place(self, x):
        return self.same(self.bn(x)).relu_()

    def statements(self, x):
        x = self.bn(x)
        x = self.same(x)
        x = F.leaky_relu(x, 0.2, inplace=True)
        return x

    def statements_of_two_names(self, x):
        h = self.bn(x)
        return 2 * F.relu(h)

    def method_in_statements(self, x):
        x = self.bn(x)
        x = x.relu()
        return x

    def inside(self, x):
        return (lambda x: F.relu(self.bn(x)))(x)

    def forward(self, x):
        return x


FUNCTIONS = {
    **dict.fromkeys(("relu", "relu_by_position", "relu_by_keyword", "relu_in_place"), "relu"),
    **dict.fromkeys(("relu_of_torch", "relu_of_torch_in_place", "relu_by_its_path"), "relu"),
    **dict.fromkeys(("relu_by_its_name", "relu_of_a_module", "method", "method_in_place"), "relu"),
    **dict.fromkeys(("statements_of_two_names", "method_in_statements", "inside"), "relu"),
    **dict.fromkeys(("silu", "silu_by_attribute"), "silu"),
    **dict.fromkeys(("gelu", "gelu_exact"), "gelu"),
    "gelu_tanh": "gelu_tanh",
    "hardswish": "hardswish",
    "leaky": ("leaky_relu", 0.01),
    "leaky_by_position": ("leaky_relu", 0.2),
    "leaky_by_keyword": ("leaky_relu", -0.2),
    "leaky_in_place": ("leaky_relu", 1.0),
    "statements": ("leaky_relu", 0.2),
}


class Calls(nn.Module):
    """One method of a module, as a module."""

    def __init__(self, inner, method):
        super().__init__()
        self.inner, self.method = inner, method

    def forward(self, x):
        return getattr(self.inner, self.method)(x)


def ops_of(model, x):
    """The names of the operators that a call runs, with how often."""
    seen = collections.Counter()

    class Count(torch.utils._python_dispatch.TorchDispatchMode):
        def __torch_dispatch__(self, func, types, args=(), kwargs=None):
            seen[func._schema.name.removeprefix("aten::")] += 1
            return func(*args, **kwargs or {})

    with torch.no_grad(), Count():
        model(x)
    return seen


@pytest.mark.parametrize("method", FUNCTIONS)
def test_functions_are_fused(method):
    torch.manual_seed(0)
    model = Calls(Functions(), method)
    reference = copy.deepcopy(model)
    batchops.convert(model)
    x = torch.randn(3, 4, 5, 5)
    assert fused_calls(model, x) == ["inner.bn"]
    ops = ops_of(copy.deepcopy(model).train(), x)
    assert {name for name in ops if "::" in name or "elu" in name or "swish" in name} == {
        "batchops::batch_norm_update"
    }
    assert_same_behaviour(model, reference, x)
    for other in (pickle.loads(pickle.dumps(model)), copy.deepcopy(model)):
        assert fused_calls(other.float(), x) == ["inner.bn"]
    batchops.revert(model)
    assert [set(vars(m)) for m in model.modules()] == [set(vars(m)) for m in reference.modules()]


@pytest.mark.parametrize("method", FUNCTIONS)
def test_functions_that_are_fused_are_named(method):
    model = type("One", (nn.Module,), {"forward": vars(Functions)[method]})()
    model.bn, model.same, model.act = nn.BatchNorm2d(4), nn.Identity(), F.silu
    assert batchops.convert(model).bn.fused_with == FUNCTIONS[method]
    batchops.revert(model)
    batchops.convert(model).bn.register_forward_hook(lambda m, i, o: None)
    assert batchops.convert(model).bn.fused_with is None


class Tanh:
    """Has a ReLU of its own."""

    relu = torch.tanh


class NotFunctions(Functions):
    """Calls that are not those functions', or whose arguments are not there beforehand."""

    def shadowed_by_a_local(self, x):
        F = Tanh
        return F.relu(self.bn(x))

    def shadowed_by_a_parameter(self, x, F=Tanh):
        return F.relu(self.bn(x))

    def computed_argument(self, x):
        return F.relu(self.bn(x), inplace=self.bn.num_batches_tracked > 0)

    def argument_by_lookup(self, x):
        return F.leaky_relu(self.bn(x), self.slope)

    def arguments_in_a_dict(self, x):
        return F.leaky_relu(self.bn(x), **self.options)

    def arguments_in_a_list(self, x):
        return F.leaky_relu(self.bn(x), *[0.4])

    def argument_by_keyword(self, x):
        return F.relu(input=self.bn(x))

    def slope_that_is_a_flag(self, x):
        return F.leaky_relu(self.bn(x), True)

    def another_function(self, x):
        return F.relu6(self.bn(x))

    def another_method(self, x):
        return self.bn(x).tanh()

    def used_twice(self, x):
        h = self.bn(x)
        return F.relu(h) + h

    def in_place_without_a_name(self, x):
        h = self.bn(x)
        F.relu_(h)
        return h

    def method_in_place_without_a_name(self, x):
        h = self.bn(x)
        h.relu_()
        return h

    def rebound_between(self, x):
        act = F.silu
        h = self.bn((act := F.relu)(x))
        return act(h)

    def attribute_of_the_output(self, x):
        return F.relu(self.bn(x).T.contiguous())


NOT_FUNCTIONS = [name for name in vars(NotFunctions) if not name.startswith("_")]


@pytest.mark.filterwarnings("ignore:The use of `x.T`")
@pytest.mark.parametrize("method", NOT_FUNCTIONS)
def test_calls_that_are_not_functions_that_are_known(method):
    torch.manual_seed(0)
    model = Calls(NotFunctions(), method)
    reference = copy.deepcopy(model)
    batchops.convert(model)
    x = torch.randn(3, 4, 5, 5)
    assert fused_calls(model, x) == []
    assert_same_behaviour(model, reference, x)


@pytest.mark.parametrize("method", ["shadowed_by_a_local", "shadowed_by_a_parameter"])
def test_a_name_of_the_methods_own_is_not_named(method):
    model = type("One", (nn.Module,), {"forward": vars(NotFunctions)[method]})()
    model.bn = nn.BatchNorm2d(4)
    assert batchops.convert(model).bn.fused_with is None
    assert unfused(model)


REPLACED = """
import torch, torch.nn.functional as F
from torch import nn

stock = F.relu
F.relu = lambda x: stock(x) + 1

import batchops
from tests.test_convert import Functions

x = torch.randn(3, 4, 5, 5)
model = Functions().eval()
expected = model.relu(x)
torch.testing.assert_close(batchops.convert(model).relu(x), expected)
assert expected.min() == 1
"""


def test_a_function_that_was_replaced_before_batchops_was_imported():
    subprocess.run([sys.executable, "-c", REPLACED], check=True, timeout=100)


def functions(method="relu"):
    """A converted model and the same without."""
    torch.manual_seed(0)
    stock = Calls(Functions(), method)
    return batchops.convert(copy.deepcopy(stock)), stock


@pytest.mark.parametrize(
    ("method", "place", "name"),
    [
        ("relu", F, "relu"),
        ("relu_by_keyword", F, "relu"),
        ("statements", F, "leaky_relu"),
        ("relu_of_torch", torch, "relu"),
        ("gelu_tanh", F, "gelu"),
        ("method", torch.Tensor, "relu"),
        ("method_in_place", torch.Tensor, "relu_"),
    ],
)
def test_what_somebody_has_put_in_a_functions_place_is_called_as_written(
    monkeypatch, method, place, name
):
    model, stock = functions(method)
    x, calls = torch.randn(3, 4, 5, 5), []
    before = getattr(place, name)

    @functools.wraps(before)
    def mine(*args, **kwargs):
        calls.append((args[1:], kwargs))
        return before(*args, **kwargs) + 1

    assert fused_calls(model, x) == ["inner.bn"]
    monkeypatch.setattr(place, name, mine)
    torch.testing.assert_close(model(x), stock(x))
    assert len(calls) == 2
    assert calls[0] == calls[1]
    assert fused_calls(batchops.convert(copy.deepcopy(stock)), x) == []
    monkeypatch.undo()
    assert fused_calls(model, x) == ["inner.bn"]


def test_a_global_that_means_something_else_by_now(monkeypatch):
    x = torch.randn(3, 4, 5, 5)
    for new, fused in ((F.silu, True), (F.gelu, True), (F.tanh, False), (nn.Tanh(), False)):
        model, stock = functions("relu_by_its_name")
        monkeypatch.setitem(globals(), "imported_relu", new)
        assert fused_calls(model, x) == ["inner.bn"] * fused
        torch.testing.assert_close(model(x), stock(x))
        monkeypatch.undo()


def test_arguments_that_a_function_does_not_take(monkeypatch):
    """Another function that is known, which refuses what is written for the one before."""
    model, stock = functions("leaky_by_position")
    monkeypatch.setattr(F, "leaky_relu", F.gelu)
    x = torch.randn(3, 4, 5, 5)
    messages = []
    for m in (model, stock):
        with pytest.raises(TypeError) as caught:
            m(x)
        messages.append(str(caught.value))
    assert messages[0] == messages[1]
    assert model.inner.bn.num_batches_tracked == stock.inner.bn.num_batches_tracked == 1


@pytest.mark.parametrize("method", ["relu", "statements", "method"])
@pytest.mark.parametrize("dtype", [torch.int64, torch.complex64])
def test_dtypes_that_norms_refuse(method, dtype):
    model, stock = functions(method)
    x = torch.ones(3, 4, 5, 5, dtype=dtype)
    errors = []
    for m in (model, stock):
        with pytest.raises((RuntimeError, NotImplementedError)) as caught:
            m(x)
        errors.append((type(caught.value), str(caught.value)))
    assert errors[0] == errors[1]
    assert model.inner.bn.num_batches_tracked == stock.inner.bn.num_batches_tracked


class NegativeSlope(Functions):
    def in_place(self, x):
        return F.leaky_relu(self.bn(x), -0.5, inplace=True)

    def operator(self, x):
        return F.leaky_relu_(self.bn(x), -0.5)


@pytest.mark.parametrize("method", ["in_place", "operator"])
def test_a_negative_slope_in_place_has_no_backward(method):
    model = batchops.convert(Calls(NegativeSlope(), method))
    with pytest.raises(RuntimeError, match="negative slope"):
        model(torch.randn(3, 4, 5, 5)).sum().backward()


class Watches(torch.overrides.TorchFunctionMode):
    """A mode that adds one to what an activation or a sum gives."""

    def __init__(self):
        super().__init__()
        self.seen = []

    def __torch_function__(self, func, types, args=(), kwargs=None):
        y = func(*args, **kwargs or {})
        # but for the one that counts batches
        if func.__name__ in ("relu", "leaky_relu", "add", "add_") and args[0].dim() == 4:
            self.seen.append((func.__name__, len(args), kwargs))
            return y + 1
        return y


@pytest.mark.parametrize("method", ["relu", "relu_by_keyword", "statements", "method"])
def test_a_mode_sees_the_functions_that_are_written(method):
    model, stock = functions(method)
    x = torch.randn(3, 4, 5, 5)
    seen = []
    for m in (model, stock):
        with Watches() as mode:
            seen.append((m(x), mode.seen))
    torch.testing.assert_close(seen[0][0], seen[1][0])
    assert seen[0][1] == seen[1][1]
    assert seen[0][1]


@pytest.mark.parametrize("method", ["relu", "method"])
def test_a_default_device_is_no_such_mode(method):
    model, stock = functions(method)
    x = torch.randn(3, 4, 5, 5)
    with torch.device("cpu"):
        assert fused_calls(model, x) == ["inner.bn"]
        torch.testing.assert_close(model(x), stock(x))
        with Watches() as mode:
            model(x)
        assert mode.seen


class Shifted(torch.Tensor):
    """A class of tensors with another ReLU."""

    @classmethod
    def __torch_function__(cls, func, types, args=(), kwargs=None):
        y = super().__torch_function__(func, types, args, kwargs or {})
        return y + 1 if func is F.relu else y

    def relu(self):
        return self - 5


@pytest.mark.parametrize("device", [None, "cpu"])
@pytest.mark.parametrize("where", ["x", "weight", "running_mean"])
@pytest.mark.parametrize("method", ["relu", "method"])
def test_a_class_of_tensors_has_its_own_functions(method, where, device):
    model, stock = functions(method)
    x = torch.randn(3, 4, 5, 5)
    if where == "x":
        x = x.as_subclass(Shifted)
    for m in (model, stock):
        bn = m.inner.bn.eval()
        if where == "weight":
            bn._parameters["weight"] = torch.ones(4).as_subclass(Shifted)
        if where == "running_mean":
            bn._buffers["running_mean"] = torch.zeros(4).as_subclass(Shifted)
    with torch.device(device) if device else contextlib.nullcontext(), recorded() as seen:
        ours, theirs = model(x), stock(x)
    assert not seen
    assert type(ours) is type(theirs)
    torch.testing.assert_close(ours.as_subclass(torch.Tensor), theirs.as_subclass(torch.Tensor))


@pytest.mark.parametrize("method", ["relu", "statements_of_two_names", "method"])
@pytest.mark.parametrize("register", REGISTER)
def test_no_function_fuses_across_hooks(register, method):
    model, stock = functions(method)
    x = torch.randn(3, 4, 5, 5, requires_grad=True)
    seen = []
    for m in (model, stock):

        def hook(module, *tensors, into=seen):
            flat = [t for ts in tensors for t in (ts if isinstance(ts, tuple) else (ts,))]
            into.append([t.detach().clone() for t in flat])

        getattr(m.inner.bn, register)(hook)
        m(x).pow(2).sum().backward()
    assert fused_calls(model, x.detach()) == []
    torch.testing.assert_close(seen[0], seen[1])


@pytest.mark.parametrize("method", ["relu", "statements", "method"])
def test_a_hook_that_keeps_a_norms_output(method):
    """Which the function then changes in place, or not."""
    kept = []
    for m in functions(method):
        m.inner.bn.register_forward_hook(lambda m, i, o: kept.append(o))
        m(torch.ones(3, 4, 5, 5) * torch.arange(-1.0, 2.0).view(3, 1, 1, 1))
    torch.testing.assert_close(*kept)


@pytest.mark.parametrize("method", ["relu", "method"])
def test_no_function_fuses_under_global_hooks_or_with_another_norm(method):
    model, stock = functions(method)
    x, seen = torch.randn(3, 4, 5, 5), []
    handle = nn.modules.module.register_module_forward_hook(
        lambda module, args, output: seen.append(float(output.detach().min()))
    )
    try:
        model.inner.bn(x)
        model(x)
    finally:
        handle.remove()
    assert seen[0] == seen[1] < 0
    for other in (nn.Tanh(), nn.BatchNorm2d(4), bnn.BatchNorm2d(4, activation="silu")):
        model.inner.bn = stock.inner.bn = other.eval()
        torch.testing.assert_close(model(x), stock(x))
    model, stock = functions("relu_of_a_module")
    model.inner.same = stock.inner.same = nn.Sigmoid()
    torch.testing.assert_close(model(x), stock(x))
    model, stock = functions("silu_by_attribute")
    for other in (F.relu, F.tanh, nn.ReLU(), nn.Tanh(), lambda y: y + 3):
        for m in (model, stock):
            with contextlib.suppress(AttributeError):
                del m.inner.act
            m.inner.act = other
        torch.testing.assert_close(model(x), stock(x))


def test_what_is_no_tensor_meets_the_function():
    """A norm takes cupy's arrays; torch's functions do not."""
    model, _ = functions()

    class Array:
        dtype = torch.float32

    model.inner.bn.__class__ = kind = type("Mine", (bnn.BatchNorm2d,), {})
    STOCK[kind] = nn.BatchNorm2d
    kind.forward = lambda self, x, activation=None: (x, activation)
    try:
        assert model.inner.bn(torch.ones(1), activation="relu")[1] == "relu"
        with pytest.raises(TypeError, match="tuple"):
            model(Array())
    finally:
        del STOCK[kind]


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("norm", ["BatchNorm2d", "GroupNorm", "LayerNorm", "InstanceNorm2d"])
@pytest.mark.parametrize("method", ["relu", "silu", "gelu", "leaky", "hardswish", "method"])
def test_functions_under_autocast(method, norm, dtype):
    arguments = {"GroupNorm": (2, 4), "LayerNorm": ((4, 5, 5),)}.get(norm, (4,))
    stock = Functions()
    stock.bn = getattr(nn, norm)(*arguments)
    model = batchops.convert(copy.deepcopy(stock))
    x = torch.randn(3, 4, 5, 5, dtype=dtype)
    with torch.autocast("cpu", torch.bfloat16):
        ours, theirs = getattr(model, method)(x), getattr(stock, method)(x)
        assert fused_calls(model, x, method=method) == ["bn"]
    assert ours.dtype == theirs.dtype
    # a step of bfloat16 next to 4
    torch.testing.assert_close(ours, theirs, rtol=0, atol=1e-5 if ours.itemsize == 4 else 2**-6)


class Chain(nn.Module):
    """Functions and methods of all sorts, one behind the other."""

    def __init__(self):
        super().__init__()
        self.bns = nn.ModuleList(nn.BatchNorm2d(4) for _ in range(4))

    def forward(self, x):
        x = F.relu(self.bns[0](x))
        x = F.leaky_relu(self.bns[1](x), negative_slope=0.2, inplace=True)
        x = self.bns[2](x)
        x = torch.relu(x)
        return self.bns[3](x).relu()


@pytest.mark.parametrize("training", [True, False])
def test_functions_compile_in_one_graph_and_once(training):
    torch._dynamo.reset()
    model = batchops.convert(Chain()).train(training)
    expected = copy.deepcopy(model)(torch.full((2, 4, 5, 5), 0.5).cumsum(0))
    graphs = []

    def backend(graph, inputs):
        graphs.append(graph)
        return graph.forward

    compiled = torch.compile(model, fullgraph=True, backend=backend)
    torch.testing.assert_close(compiled(torch.full((2, 4, 5, 5), 0.5).cumsum(0)), expected)
    for _ in range(3):
        compiled(torch.randn(2, 4, 5, 5))
    fused = [n for n in graphs[0].graph.nodes if {"relu", "leaky_relu"}.intersection(n.args)]
    assert (len(graphs), len(fused)) == (1, 4)
    with Watches() as mode:
        compiled(torch.randn(2, 4, 5, 5))
        assert len(mode.seen) == 4


def test_functions_are_exported():
    model = batchops.convert(Chain()).eval()
    x = torch.randn(2, 4, 5, 5)
    for strict in (True, False):
        exported = torch.export.export(model, (x,), strict=strict)
        torch.testing.assert_close(exported.module()(x), model(x))
        fused = {"relu", "leaky_relu"}
        assert sum(not fused.isdisjoint(node.args) for node in exported.graph.nodes) == 4


def test_functions_under_vmap_and_differentiated_twice():
    torch.manual_seed(0)
    stock = Chain().double().eval()
    model = batchops.convert(copy.deepcopy(stock))
    x = torch.randn(2, 3, 4, 5, 5, dtype=torch.float64)
    torch.testing.assert_close(torch.vmap(model)(x), torch.vmap(stock)(x))
    x = x[0].requires_grad_()
    second = []
    for m in (model, stock):
        (g,) = torch.autograd.grad(m(x).pow(2).sum(), x, create_graph=True)
        second.append(torch.autograd.grad(g.pow(2).sum(), x)[0])
    torch.testing.assert_close(*second)


def test_functions_in_replicas_and_in_patch():
    torch.manual_seed(0)
    model = batchops.convert(Chain()).eval()
    x = torch.randn(2, 4, 5, 5)
    expected = model(x)
    replica = model._replicate_for_data_parallel()
    replica.bns = copy.deepcopy(model.bns)
    with recorded() as seen:
        torch.testing.assert_close(replica(x), expected)
    assert [id(m) for m in seen] == [id(m) for m in replica.bns]
    with batchops.patch():
        assert len(fused_calls(model, x)) == 4
        torch.testing.assert_close(model(x), expected)


def test_one_warning_where_a_function_is_called_in_what_cannot_be_read():
    text = TEXT.replace("self.relu(self.bn(x))", "torch.relu(self.bn(x))").replace(
        "self.bn, self.relu = nn.BatchNorm2d(4), nn.ReLU()", "self.bn = nn.BatchNorm2d(4)"
    )
    with pytest.warns(UserWarning, match="Typed.forward cannot be read") as caught:
        batchops.convert(from_text(text, "Typed")())
    assert len(caught) == 1


def test_a_name_of_the_childs_is_no_function():
    """self.relu is a module that no norm knows."""
    text = TEXT.replace("nn.ReLU()", "nn.ReLU6()")
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        batchops.convert(from_text(text, "Typed")())


# --------------------------------------------------------------------- sums with a shortcut


class Sums(nn.Module):
    """Each method adds something to the norm's output, and calls an activation on that."""

    def __init__(self):
        super().__init__()
        self.conv, self.bn, self.relu = nn.Conv2d(4, 4, 1), nn.BatchNorm2d(4), nn.ReLU(inplace=True)
        self.leaky = nn.LeakyReLU(0.2)
        self.shortcut = nn.Sequential(nn.Conv2d(4, 4, 1, bias=False), nn.BatchNorm2d(4))
        self.empty, self.pool = nn.Sequential(), nn.AvgPool2d(1)
        self.nothing = self.gate = None
        self.stride = 1

    def nested(self, x):
        return F.relu(self.bn(self.conv(x)) + x)

    def nested_module(self, x):
        return self.relu(self.bn(self.conv(x)) + x)

    def nested_after_it(self, x):
        return F.relu(x + self.bn(self.conv(x)))

    def nested_after_anything(self, x):
        return F.relu(self.conv(x).tanh() + self.bn(x))

    def nested_call(self, x):
        return torch.relu(self.bn(self.conv(x)) + self.shortcut(x))

    def nested_sum_of_torch(self, x):
        return F.relu_(torch.add(self.bn(self.conv(x)), self.shortcut(x)))

    def in_place(self, x):
        out = self.bn(self.conv(x))
        out += self.shortcut(x)
        out = F.relu(out)
        return out

    def in_place_module(self, x):
        identity = x
        out = self.bn(self.conv(x))
        out += identity
        return self.relu(out)

    def statements(self, x):
        out = self.bn(self.conv(x))
        out = out + x
        out = F.leaky_relu(out, 0.1, inplace=True)
        return 2 * out

    def statements_after_it(self, x):
        h = self.bn(self.conv(x))
        out = self.pool(self.empty(x)) + h
        return self.leaky(out)

    def one_statement(self, x):
        out = self.bn(self.conv(x))
        return F.relu(out + self.empty(x))

    def sum_of_torch(self, x):
        out = self.bn(self.conv(x))
        out = torch.add(out, x)
        out = F.relu(out)
        return out

    def sum_with_a_name(self, x):
        total = self.bn(self.conv(x)) + x
        return self.conv(F.relu(total))

    def choice(self, x):
        out = self.bn(self.conv(x))
        out += x if self.nothing is None else self.nothing(x)
        return F.relu(out)

    def choice_in_a_statement(self, x):
        identity = x
        out = self.bn(self.conv(x))
        if self.shortcut is not None and not self.stride > 1:
            identity = self.shortcut(x)
        else:
            identity = self.empty(x)
        unused = None  # noqa: F841
        out += identity
        return F.relu(out)

    def shortcut_of_a_closure(self, x):
        y = self.conv(x)
        out = self.bn(y)
        out += y
        out = F.relu(out)
        return torch.maximum(out, (lambda: 0 * y)())

    def gated(self, x):
        out = self.bn(self.conv(x))
        if self.gate is not None:
            out = self.gate(out)
        identity = self.shortcut(x)
        out += identity
        out = F.relu(out)
        return out

    def in_a_loop(self, x):
        for _ in range(2):
            y = self.bn(self.conv(x))
            y += x
            x = self.relu(y)
        return x

    def forward(self, x):
        return x


SUMS = [name for name in vars(Sums) if not name.startswith("_") and name != "forward"]


def of_sums(method, kind=Sums):
    """A converted model, and the same without."""
    torch.manual_seed(0)
    stock = Calls(kind(), method)
    return batchops.convert(copy.deepcopy(stock)), stock


@pytest.mark.parametrize("method", SUMS)
def test_sums_are_fused(method):
    model, stock = of_sums(method)
    x = torch.randn(3, 4, 5, 5)
    calls = ["inner.bn"] * (1 + (method == "in_a_loop"))
    assert fused_calls(model, x) == calls
    ops = ops_of(copy.deepcopy(model).train(), x)
    assert not {"add", "add_", "relu", "relu_", "leaky_relu"}.intersection(
        name.split("::")[-1] for name in ops if name != "add_" or ops[name] > 2
    )
    assert_same_behaviour(model, stock, x)
    for other in (pickle.loads(pickle.dumps(model)), copy.deepcopy(model)):
        assert fused_calls(other.float(), x) == calls
    batchops.revert(model)
    assert [set(vars(m)) for m in model.modules()] == [set(vars(m)) for m in stock.modules()]


def test_a_norm_in_a_sum_names_its_activation():
    model = batchops.convert(models.SmallBlock(4, 4))
    assert (model.bn1.fused_with, model.bn2.fused_with) == ("relu", "relu")


class NotSums(Sums):
    """What is something else, or shows what the norm has given."""

    def __init__(self):
        super().__init__()
        self.kept, self.wrong = None, nn.Conv2d(5, 4, 1)
        self.acts = nn.ModuleList([nn.ReLU(), nn.LeakyReLU(0.3)])

    @property
    def counted(self):
        return self.bn.num_batches_tracked % 2 == 0

    def count(self, x):
        return x * self.bn.num_batches_tracked

    def into_the_shortcut(self, x):
        y = x * 1
        out = self.bn(self.conv(x))
        y += out
        return F.relu(y)

    def shortcut_changed_and_kept(self, x):
        y = x * 1
        out = self.bn(self.conv(x))
        y += out
        return F.relu(y) * y

    def scaled(self, x):
        out = self.bn(self.conv(x))
        return F.relu(torch.add(out, x, alpha=2))

    def difference(self, x):
        return F.relu(self.bn(self.conv(x)) - x)

    def difference_in_place(self, x):
        out = self.bn(self.conv(x))
        out -= x
        return F.relu(out)

    def product(self, x):
        out = self.bn(self.conv(x))
        out = out * x
        return F.relu(out)

    def number(self, x):
        return F.relu(self.bn(self.conv(x)) + 1)

    def read_between(self, x):
        out = self.bn(self.conv(x))
        y = out.mean()
        out += x
        return F.relu(out) * y

    def read_by_the_shortcut(self, x):
        out = self.bn(self.conv(x))
        y = self.empty(out)
        out = out + y
        return F.relu(out)

    def read_afterwards(self, x):
        out = self.bn(self.conv(x))
        y = out + x
        return F.relu(y) * out

    def sum_read_afterwards(self, x):
        out = self.bn(self.conv(x))
        out += x
        y = F.relu(out)
        return y * out

    def added_twice(self, x):
        out = self.bn(self.conv(x))
        out += out
        return F.relu(out)

    def added_to_what_comes_of_it(self, x):
        out = self.bn(self.conv(x))
        return F.relu(out + self.empty(out))

    def kept_in_a_closure(self, x):
        later = lambda: out  # noqa: E731
        out = self.bn(self.conv(x))
        return F.relu(out + x) * later()

    def kept_in_a_closure_inside(self, x):
        out = 1

        def inner(x):
            later = lambda: out  # noqa: E731
            out = self.bn(self.conv(x))
            return F.relu(out + x) * later()

        return inner(x) * out

    def steeper(self, x):
        self.leaky.negative_slope = 0.9
        return x

    def changed_before(self, x):
        out = self.bn(self.conv(x))
        out += x
        return self.steeper(x) + self.leaky(out)

    def kept_in_locals(self, x):
        out = self.bn(self.conv(x))
        return F.relu(out + x) * locals()["out"]

    def kept_after_an_error(self, x):
        out = x
        with contextlib.suppress(KeyError):
            try:
                out = self.bn(self.conv(x))
                out += self.wrong(x)
                out = F.relu(out)
            except RuntimeError:
                pass
        return out

    def overwritten(self, x):
        y = 2 * x
        out = self.bn(self.conv(x))
        out = y
        out += x
        return F.relu(out)

    def counted_between(self, x):
        out = self.bn(self.conv(x))
        y = self.count(x)
        out += y
        return F.relu(out)

    def counted_by_the_shortcut(self, x):
        out = self.bn(self.conv(x))
        out += self.count(x)
        return F.relu(out)

    def counted_by_the_shortcut_nested(self, x):
        return F.relu(self.bn(self.conv(x)) + self.count(x))

    def counted_first(self, x):
        out = self.bn(self.conv(x))
        return self.count(x) + F.relu(out + x)

    def counted_by_a_condition(self, x):
        y = x
        out = self.bn(self.conv(x))
        if self.counted:
            y = self.shortcut(x)
        out += y
        return F.relu(out)

    def counted_by_a_choice(self, x):
        out = self.bn(self.conv(x))
        out += x if self.counted else self.shortcut(x)
        return F.relu(out)

    def only_sometimes(self, x):
        out = self.bn(self.conv(x))
        if self.stride == 2:
            out += x
        out = F.relu(out)
        return out

    def carried(self, x):
        out = x
        for _ in range(2):
            y = F.relu(out + x)
            out = self.bn(self.conv(y))
        return out

    def carried_on(self, x):
        """The sum is the next round's."""
        out, y = x, x
        for _ in range(2):
            y = y + out
            out = self.bn(self.conv(y))
            y = F.relu(out + x)
        return y

    def smooth(self, x):
        return F.silu(self.bn(self.conv(x)) + x)

    def something_on_the_way(self, x):
        return F.relu(self.conv(self.bn(self.conv(x)) + x))

    def in_place_elsewhere(self, x):
        self.kept = self.bn(self.conv(x))
        self.kept += x
        return F.relu(self.kept)

    def looked_up_by_a_variable(self, x):
        acts = [self.relu]
        i = 0
        out = self.bn(self.conv(x))
        out += x
        i -= 1
        return acts[i](out)

    def looked_up_by_a_number(self, x):
        i = 0
        out = self.bn(self.conv(x))
        i = 1
        out += x
        return self.acts[i](out)

    def by_method(self, x):
        return (self.bn(self.conv(x)) + x).relu()


NOT_SUMS = [
    name
    for name, value in vars(NotSums).items()
    if not name.startswith("_") and name not in ("count", "counted", "steeper")
]


@pytest.mark.parametrize("method", NOT_SUMS)
def test_what_is_no_sum_or_shows_the_norms_output(method):
    model, stock = of_sums(method, NotSums)
    x = torch.randn(3, 4, 5, 5)
    assert fused_calls(model, x) == []
    assert_same_behaviour(model, stock, x)


class Peeks(nn.Module):
    """A shortcut that looks at the norm."""

    def __init__(self, norm):
        super().__init__()
        self.norms = [norm]

    def forward(self, x):
        return x * self.norms[0].num_batches_tracked


def sharing_statistics(model):
    model.shortcut[1].running_mean = model.bn.running_mean
    model.shortcut[1].running_var = model.bn.running_var


def as_shortcut(make):
    def change(model):
        model.shortcut = make(model)

    return change


def with_hook(model):
    model.shortcut[1].register_forward_hook(lambda m, i, o: o * model.bn.num_batches_tracked)


def with_pre_hook(model):
    model.shortcut.register_forward_pre_hook(lambda m, i: i[0] * model.bn.num_batches_tracked)


def with_forward(model):
    model.shortcut.forward = lambda x: x * model.bn.num_batches_tracked


CHANGES = {
    "the same norm": as_shortcut(lambda model: model.bn),
    "the same norm inside": as_shortcut(lambda model: nn.Sequential(nn.Identity(), model.bn)),
    "the same statistics": sharing_statistics,
    "a module of another kind": as_shortcut(lambda model: Peeks(model.bn)),
    "such a module inside": as_shortcut(lambda model: nn.Sequential(Peeks(model.bn))),
    "in place": as_shortcut(lambda model: nn.ReLU(inplace=True)),
    "a function": as_shortcut(
        lambda model: (delattr(model, "shortcut"), lambda x: x * model.bn.num_batches_tracked)[1]
    ),
    "a hook": with_hook,
    "a hook before": with_pre_hook,
    "a forward": with_forward,
}


@pytest.mark.parametrize("before", [True, False], ids=["before convert", "after convert"])
@pytest.mark.parametrize("change", CHANGES)
@pytest.mark.parametrize("method", ["nested_call", "in_place", "choice_in_a_statement", "gated"])
def test_a_shortcut_that_must_not_run_before_the_norm(method, change, before):
    model, stock = of_sums(method)
    if before:
        batchops.revert(model)
    for m in (model, stock):
        CHANGES[change](m.inner)
    if before:
        batchops.convert(model)
    x = torch.randn(3, 4, 5, 5)
    for _ in range(2):
        torch.testing.assert_close(model(x * 1), stock(x * 1))
    for (key, a), b in zip(model.state_dict().items(), stock.state_dict().values(), strict=True):
        torch.testing.assert_close(a, b, msg=key)
    with recorded() as seen:
        model(x)
    assert not seen


@pytest.mark.parametrize("method", ["nested_module", "in_place"])
def test_sums_of_a_class_of_tensors_and_with_a_default_device(method):
    model, stock = of_sums(method)
    x = torch.randn(3, 4, 5, 5)
    with torch.device("cpu"):
        assert fused_calls(model, x) == ["inner.bn"]
        torch.testing.assert_close(model(x), stock(x))
    for m in (model, stock):  # so that the norm's input is of it, and the shortcut is not
        m.inner.conv.register_forward_hook(lambda m, i, o: o.as_subclass(Shifted))
    with recorded() as seen:
        ours, theirs = model(x), stock(x)
    assert not seen
    assert type(ours) is type(theirs)
    torch.testing.assert_close(ours.as_subclass(torch.Tensor), theirs.as_subclass(torch.Tensor))


def test_a_gate_that_comes_later():
    model, stock = of_sums("gated")
    x = torch.randn(3, 4, 5, 5)
    assert fused_calls(model, x) == ["inner.bn"]
    for m in (model, stock):
        m.inner.gate = nn.Sigmoid()
    assert fused_calls(model, x) == []
    torch.testing.assert_close(model(x), stock(x))


class TwoInputs(nn.Module):
    def __init__(self):
        super().__init__()
        self.bn = nn.BatchNorm2d(4)

    def left(self, x, z):
        return F.relu(self.bn(x) + z)

    def right(self, x, z):
        return F.relu(z + self.bn(x))

    def in_place(self, x, z):
        x = self.bn(x)
        x += z
        x = F.relu(x)
        return x

    def by_torch(self, x, z):
        return F.relu(torch.add(self.bn(x), z))


WAYS_TO_ADD = ["left", "right", "in_place", "by_torch"]


@pytest.mark.parametrize("way", WAYS_TO_ADD)
@pytest.mark.parametrize(
    ("z", "fused"),
    [
        (torch.randn(3, 4, 5, 5), True),
        (torch.randn(3, 4, 5, 5).to(memory_format=torch.channels_last), False),
        (torch.randn(3, 4, 5, 5).transpose(2, 3), False),
        (torch.randn(3, 4, 5, 1), False),
        (torch.randn(4, 1, 1), False),
        (torch.randn(2, 3, 4, 5, 5), False),
        (torch.randn(()), False),
        (torch.randn(3, 4, 5, 5, dtype=torch.float64), False),
        (torch.randn(3, 4, 5, 5, dtype=torch.bfloat16), False),
        (torch.ones(3, 4, 5, 5, dtype=torch.int64), False),
        (torch.randn(3, 4, 5, 5).to_sparse(), False),
        (2.5, False),
        (None, False),
        (torch.randn(3, 4, 5, 5).as_subclass(Shifted), False),
    ],
    ids=lambda z: str(getattr(z, "dtype", z)) + str(tuple(getattr(z, "shape", ()))),
)
def test_shortcuts_that_do_not_fit_are_added_as_written(way, z, fused):
    torch.manual_seed(0)
    stock = TwoInputs()
    model = batchops.convert(copy.deepcopy(stock))
    x = torch.randn(3, 4, 5, 5)
    results = []
    for m in (model, stock):
        try:
            y = getattr(m, way)(x, z)
            results.append((type(y), y.dtype, y.stride(), y.detach().as_subclass(torch.Tensor)))
        except (RuntimeError, TypeError, NotImplementedError) as error:
            results.append((type(error), str(error)))
    assert results[0][:-1] == results[1][:-1]
    if isinstance(results[1][-1], torch.Tensor):
        # in float64, too, the norm's output has float32's places
        rough = results[1][-1].dtype == torch.bfloat16
        close = {"rtol": 2**-6, "atol": 2**-6} if rough else {"rtol": 1e-5, "atol": 1e-5}
        torch.testing.assert_close(results[0][-1], results[1][-1], **close)
    assert model.bn.num_batches_tracked == stock.bn.num_batches_tracked
    if fused:
        assert fused_calls(model, x, z, method=way) == ["bn"]


@pytest.mark.parametrize("way", WAYS_TO_ADD)
def test_layouts_of_sums(way):
    stock = TwoInputs()
    model = batchops.convert(copy.deepcopy(stock))
    last = torch.channels_last
    for x, fused in (
        (torch.randn(3, 4, 5, 6).to(memory_format=last), True),
        (torch.randn(3, 4, 6, 5).transpose(2, 3), False),
        (torch.randn(3, 4, 5, 12)[..., ::2], False),
    ):
        z = torch.empty_strided(x.size(), x.stride()).normal_()
        ours, theirs = getattr(model, way)(x, z), getattr(stock, way)(x, z)
        torch.testing.assert_close(ours, theirs)
        assert ours.stride() == theirs.stride()
        assert fused_calls(model, x, z, method=way) == ["bn"] * fused


@pytest.mark.parametrize("way", WAYS_TO_ADD)
def test_a_shortcut_changed_in_place_after_the_sum(way):
    """torch's sum saves neither of its operands, and a ReLU not either."""
    stock = TwoInputs()
    model = batchops.convert(copy.deepcopy(stock))
    grads = []
    for m in (model, stock):
        torch.manual_seed(0)
        x, z = (torch.randn(3, 4, 5, 5, requires_grad=True) for _ in range(2))
        other = z * 1
        y = getattr(m, way)(x, other)
        other.mul_(3)
        y.pow(2).sum().backward()
        grads.append((x.grad, z.grad))
    torch.testing.assert_close(*grads)


@pytest.mark.parametrize("before", [True, False], ids=["before convert", "after convert"])
def test_a_smooth_activation_keeps_no_shortcut(before):
    """As torch's sum, whose operands may change after it."""

    class Smooth(nn.Module):
        def __init__(self):
            super().__init__()
            self.bn, self.act = nn.BatchNorm2d(4), nn.SiLU() if before else nn.ReLU()

        def forward(self, x, z):
            y = self.act(self.bn(x) + z)
            z.mul_(3)
            return y

    class ByFunction(Smooth):
        def forward(self, x, z):
            return F.silu(self.bn(x) + z)

    assert batchops.convert(ByFunction()).bn.fused_with is None
    model = batchops.convert(Smooth())
    assert model.bn.fused_with == (None if before else "relu")
    model.act = nn.SiLU()
    x, z = (torch.randn(3, 4, 5, 5, requires_grad=True) for _ in range(2))
    model(x, z * 1).sum().backward()


@pytest.mark.parametrize("way", WAYS_TO_ADD)
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_sums_under_autocast(way, dtype):
    """The norm's input is in bfloat16, the shortcut not always."""
    stock = TwoInputs()
    model = batchops.convert(copy.deepcopy(stock))
    x, z = torch.randn(3, 4, 5, 5, dtype=torch.bfloat16), torch.randn(3, 4, 5, 5, dtype=dtype)
    with torch.autocast("cpu", torch.bfloat16):
        ours, theirs = getattr(model, way)(x, z), getattr(stock, way)(x, z)
    assert ours.dtype == theirs.dtype
    torch.testing.assert_close(ours, theirs, rtol=2**-6, atol=2**-6)


@pytest.mark.parametrize("method", ["in_place", "in_place_module", "nested_module", "sum_of_torch"])
def test_what_is_watched_in_a_sum_runs_as_written(method):
    x = torch.randn(3, 4, 5, 5, requires_grad=True)
    for name in ("bn", "relu"):
        if name == "relu" and "module" not in method:
            continue
        for register in REGISTER:
            model, stock = of_sums(method)
            seen = []
            for m in (model, stock):

                def hook(module, *tensors, into=seen):
                    flat = [t for ts in tensors for t in (ts if isinstance(ts, tuple) else (ts,))]
                    into.append([t.detach().clone() for t in flat])

                with contextlib.suppress(RuntimeError):  # the sum is in place, on a view of a hook
                    getattr(m.inner.get_submodule(name), register)(hook)
                    m(x * 1).pow(2).sum().backward()
            assert len(seen) % 2 == 0
            torch.testing.assert_close(seen[: len(seen) // 2], seen[len(seen) // 2 :])
            assert fused_calls(model, x.detach()) == []


@pytest.mark.parametrize("method", ["nested", "nested_module", "in_place", "sum_of_torch"])
def test_what_has_taken_a_functions_place_in_a_sum(monkeypatch, method):
    model, stock = of_sums(method)
    x = torch.randn(3, 4, 5, 5)
    seen = []
    for m in (model, stock):
        with Watches() as mode:
            seen.append((m(x), mode.seen))
    torch.testing.assert_close(seen[0][0], seen[1][0])
    assert seen[0][1] == seen[1][1]
    assert len(seen[0][1]) == 2
    before = torch.add
    monkeypatch.setattr(torch, "add", lambda a, b: before(a, b, alpha=2))
    torch.testing.assert_close(model(x), stock(x))
    assert fused_calls(model, x) == ["inner.bn"] * (method != "sum_of_torch")
    if method == "nested_module":
        return
    monkeypatch.setattr(F, "relu", torch.tanh)
    torch.testing.assert_close(model(x), stock(x))
    assert fused_calls(model, x) == []


@pytest.mark.parametrize("method", SUMS)
def test_sums_compile_and_are_exported(method):
    torch._dynamo.reset()
    model, _ = of_sums(method)
    model.eval()
    x = torch.randn(2, 4, 5, 5)
    expected = model(x)
    graphs = []

    def backend(graph, inputs):
        graphs.append(graph)
        return graph.forward

    compiled = torch.compile(model, fullgraph=True, backend=backend)
    for _ in range(3):
        torch.testing.assert_close(compiled(x), expected)
    fused = [n for n in graphs[0].graph.nodes if {"relu", "leaky_relu"}.intersection(n.args)]
    assert (len(graphs), len(fused)) == (1, 1 + (method == "in_a_loop"))
    for strict in (True, False):
        exported = torch.export.export(model, (x,), strict=strict)
        torch.testing.assert_close(exported.module()(x), expected)
        assert not any("add" in str(node.target) for node in exported.graph.nodes)


@pytest.mark.parametrize("layout", [torch.contiguous_format, torch.channels_last])
def test_sums_compile_no_more_often(layout):
    """For batches and images of several sizes."""

    def compilations(fuse):
        torch._dynamo.reset()
        graphs = []

        def backend(graph, inputs):
            graphs.append(graph)
            return graph.forward

        model = batchops.convert(models.SmallBlock(4, 4).eval(), fuse=fuse)
        compiled = torch.compile(model, backend=backend, fullgraph=True)
        for n, size in ((2, 8), (3, 8), (3, 12), (5, 16)):
            x = torch.randn(n, 4, size, size).to(memory_format=layout)
            torch.testing.assert_close(compiled(x), model(x))
        return len(graphs)

    assert compilations(True) == compilations(False)


class Suppresses(nn.Module):
    """What goes wrong between norm and activation ends in the ``with``."""

    def __init__(self):
        super().__init__()
        self.bn = nn.BatchNorm2d(4)
        self.act = nn.ReLU()
        self.short = nn.Conv2d(4, 4, 1)

    def sum(self, x, z):
        out = x
        with contextlib.suppress(RuntimeError):
            out = self.bn(x)
            out += self.short(z)
            out = F.relu(out)
        return out

    def chain(self, x, z):
        with contextlib.suppress(RuntimeError):
            x = self.bn(x)
            x = self.act(x)
        return x


@pytest.mark.parametrize("method", ["sum", "chain"])
def test_errors_that_are_suppressed(method):
    def fails(module, args, output):
        raise RuntimeError

    stock = Suppresses()
    stock.act.register_forward_hook(fails)
    ours = batchops.convert(copy.deepcopy(stock))
    x, z = torch.randn(2, 4, 3, 3), torch.randn(2, 3, 3, 3)  # channels that the shortcut refuses
    expected, got = getattr(stock, method)(x, z), getattr(ours, method)(x, z)
    torch.testing.assert_close(got, expected)
    assert ours.bn.num_batches_tracked == stock.bn.num_batches_tracked == 1


class Warm:
    def __init__(self, bn):
        self.bn = bn

    @property
    def up(self):
        return bool(self.bn.num_batches_tracked > 1)


class WarmsUp(nn.Module):
    """A shortcut that depends on what the norm has written."""

    def __init__(self):
        super().__init__()
        self.bn = nn.BatchNorm2d(4)
        self.short = nn.Conv2d(4, 4, 1)
        self.warm = Warm(self.bn)

    def by_counter(self, x):
        out = self.bn(x)
        z = x
        if self.bn.num_batches_tracked > 1:
            z = self.short(x)
        out += z
        return F.relu(out)

    def by_helper(self, x):
        out = self.bn(x)
        z = x
        if self.warm.up:
            z = self.short(x)
        out += z
        return F.relu(out)

    def in_an_expression(self, x):
        out = self.bn(x)
        out = out + (x if self.bn.num_batches_tracked < 2 else self.short(x))
        return F.relu(out)

    def of_the_mean(self, x):
        mean = self.bn.running_mean
        out = self.bn(x)
        out += self.short(mean.view(1, 4, 1, 1).expand(x.shape))
        return F.relu(out)


@pytest.mark.parametrize("method", ["by_counter", "by_helper", "in_an_expression", "of_the_mean"])
def test_shortcuts_that_depend_on_the_norms_statistics(method):
    stock = WarmsUp()
    ours = batchops.convert(copy.deepcopy(stock))
    for _ in range(3):
        x = torch.randn(2, 4, 3, 3)
        with torch.no_grad():
            expected, got = getattr(stock, method)(x), getattr(ours, method)(x)
        torch.testing.assert_close(got, expected)


def test_norms_that_share_statistics_by_a_view():
    class Shares(nn.Module):
        def __init__(self):
            super().__init__()
            self.bn, self.other = nn.BatchNorm2d(4), nn.BatchNorm2d(4)
            self.other.running_mean = self.bn.running_mean.view(4)

        def forward(self, x):
            out = self.bn(x)
            out += self.other(x)
            return F.relu(out)

    stock, ours = Shares(), batchops.convert(Shares())
    for _ in range(2):
        x = torch.randn(2, 4, 3, 3)
        torch.testing.assert_close(ours(x), stock(x))
    for model in (stock, ours):
        model.eval()
    torch.testing.assert_close(ours(x), stock(x))
    torch.testing.assert_close(ours.other.running_mean, stock.other.running_mean)


def test_sums_of_nested_tensors_are_left_to_torch():
    class Sum(nn.Module):
        def __init__(self):
            super().__init__()
            self.ln = nn.LayerNorm(4)

        def forward(self, x):
            out = self.ln(x)
            out = out + x
            return F.relu(out)

    x = torch.nested.nested_tensor([torch.randn(2, 4), torch.randn(3, 4)])
    stock, ours = Sum(), batchops.convert(Sum())
    for got, expected in zip(ours(x).unbind(), stock(x).unbind(), strict=True):
        torch.testing.assert_close(got, expected)


def test_a_leaky_relu_that_torch_cannot_differentiate_is_left_to_it():
    model = batchops.convert(nn.Sequential(nn.BatchNorm2d(4), nn.LeakyReLU(-0.5, inplace=True)))
    with pytest.raises(RuntimeError, match="negative slope"):
        model(torch.randn(2, 4, 3, 3)).sum().backward()
