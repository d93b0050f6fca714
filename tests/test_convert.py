"""convert() and revert(): what is swapped, what is fused, and that everything else survives."""

from __future__ import annotations

import copy
import pickle
import threading
import warnings

import pytest
import torch
from torch import nn

import batchops
from batchops import nn as bnn
from batchops._convert.tables import FusedActivation


class Block(nn.Module):
    """conv-bn-relu-conv-bn, + x, relu by function."""

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
        return torch.relu(self.bn2(self.conv2(h)) + x)


def outputs_and_grads(model, x):
    torch.manual_seed(1)
    model.zero_grad()
    x = x.clone().requires_grad_()
    y = model(x)
    y.pow(2).sum().backward()
    return [y, x.grad, *(p.grad for p in model.parameters())]


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
    assert model[1].activation == "relu"
    assert isinstance(model[2], nn.Identity)
    assert isinstance(model[3].relu, nn.Identity)
    assert model[3].bn1.activation == "relu"
    assert model[3].bn2.activation is None
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


def test_revert_of_a_part_is_refused_where_it_would_lose_an_activation():
    model = batchops.convert(nn.Sequential(nn.BatchNorm2d(4), nn.ReLU()))
    for part in (model[0], model[1]):
        with pytest.raises(ValueError, match="both parts of every fused pair"):
            batchops.revert(part)
    assert model[0].activation == "relu"
    model[0] = copy.deepcopy(model[0])
    batchops.revert(model)
    assert type(model[0]) is nn.BatchNorm2d
    assert type(model[1]) is nn.ReLU


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
    assert type(model[2]) is nn.ReLU


def test_fuse_false_only_swaps():
    model = batchops.convert(Block(), fuse=False)
    assert type(model.bn1) is bnn.BatchNorm2d
    assert model.bn1.activation is None
    assert type(model.relu) is nn.ReLU


def test_subclasses_are_left_alone():
    class Special(nn.BatchNorm2d):
        def forward(self, x):
            return x

    model = batchops.convert(nn.Sequential(Special(4), nn.ReLU()))
    assert type(model[0]) is Special
    assert type(model[1]) is nn.ReLU


def unfused(model):
    return not any(isinstance(m, FusedActivation) for m in model.modules())


def test_nothing_fuses_across_hooks():
    for name in ("0", "1"):
        for register in (
            "register_forward_hook",
            "register_forward_pre_hook",
            "register_full_backward_hook",
        ):
            model = nn.Sequential(nn.BatchNorm2d(4), nn.ReLU())
            getattr(model.get_submodule(name), register)(lambda *a: None)
            batchops.convert(model)
            assert unfused(model), (name, register)
            assert type(model[0]) is bnn.BatchNorm2d


def test_hooks_survive_and_fire():
    seen = []
    model = nn.Sequential(nn.BatchNorm2d(4), nn.ReLU())
    model[0].register_forward_hook(lambda m, i, o: seen.append(float(o.detach().min())))
    batchops.convert(model)(torch.randn(3, 4, 5, 5))
    assert seen[0] < 0  # the norm's own output, before the relu


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


@pytest.mark.parametrize(
    "kind",
    [
        SharedReLU,
        OtherUser,
        OnlyInTraining,
        OnlyWithoutMask,
        OnlyWithGradients,
        OwnMethod,
        DirectForward,
        NestedEnds,
        RegisteredTwice,
    ],
)
@pytest.mark.filterwarnings("ignore:.*cannot be traced")
def test_not_fused_where_it_would_change_the_result(kind):
    model = kind()
    reference = copy.deepcopy(model)
    batchops.convert(model)
    assert unfused(model)
    assert_same_behaviour(model, reference, torch.randn(3, 4, 5, 5))


def test_not_fused_where_an_instance_has_a_forward_of_its_own():
    for name in ("0", "1"):
        model = nn.Sequential(nn.BatchNorm2d(4), nn.ReLU())
        module = model.get_submodule(name)
        module.forward = module.forward
        batchops.convert(model)
        assert unfused(model), name


def test_hooks_of_containers_see_what_they_saw_and_no_proxies():
    seen = []
    inner = nn.Sequential(nn.Conv2d(4, 4, 1), nn.BatchNorm2d(4), nn.ReLU())
    model = nn.Sequential(inner, nn.Conv2d(4, 4, 1))
    inner.register_forward_hook(lambda m, i, o: seen.append(type(o)))
    batchops.convert(model)
    assert not seen
    assert isinstance(inner[2], FusedActivation)
    model(torch.randn(2, 4, 5, 5))
    assert seen == [torch.Tensor]


def test_an_activation_shared_with_another_model_stays_there():
    relu = nn.ReLU()
    one = batchops.convert(nn.Sequential(nn.BatchNorm2d(4), relu))
    other = nn.Sequential(nn.Conv2d(4, 4, 1), relu)
    assert isinstance(one[1], FusedActivation)
    assert other(torch.randn(2, 4, 5, 5)).min() >= 0
    assert batchops.revert(one)[1] is relu


@pytest.mark.filterwarnings("ignore::DeprecationWarning")
def test_eval_mode_survives_a_scripted_part():
    model = nn.Sequential(torch.jit.script(nn.Linear(5, 5)), nn.BatchNorm2d(4), nn.ReLU()).eval()
    batchops.convert(model)
    assert not any(m.training for m in model.modules())
    assert isinstance(model[2], FusedActivation)


def test_other_threads_run_their_models_meanwhile():
    other, x = Block(), torch.randn(1, 4, 4, 4)
    errors, stop = [], threading.Event()

    def work():
        try:
            while not stop.is_set():
                other(x)
        except Exception as error:
            errors.append(error)

    worker = threading.Thread(target=work)
    worker.start()
    for _ in range(20):
        assert not unfused(batchops.convert(Block()))
    stop.set()
    worker.join()
    assert not errors


class Untraceable(nn.Module):
    def __init__(self):
        super().__init__()
        self.bn, self.relu = nn.BatchNorm2d(4), nn.ReLU()
        self.calls = 0
        self.register_buffer("seen", torch.zeros(()))

    def forward(self, x):
        self.calls += 1
        self.seen += 1
        if x.sum() > 0:
            return self.relu(self.bn(x))
        return self.bn(x)


class Holder(nn.Module):
    """Cannot be traced; its parts can."""

    def __init__(self, *parts):
        super().__init__()
        self.parts = nn.ModuleList(parts)

    def forward(self, x):
        for part in self.parts:
            if x.sum() < 0:
                x = -x
            x = part(x)
        return x


def test_parts_of_an_untraceable_model_are_fused_without_a_warning():
    model = Holder(Block(), Block())
    reference = copy.deepcopy(model)
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        batchops.convert(model)
    assert all(isinstance(part.relu, FusedActivation) for part in model.parts)
    assert_same_behaviour(model, reference, torch.randn(4, 4, 8, 8))


class Taps(Holder):
    """Runs a part's modules one by one and uses what is between them."""

    def forward(self, x):
        total = 0
        for part in self.parts:
            for module in part:
                x = module(x)
                total = total + x if x.abs().sum() > 0 else total
        return total


class Names(Holder):
    def forward(self, x):
        if x.sum() == 0:
            return x
        return self.peek(self.parts[0](x))

    def peek(self, x):
        return self.parts[0].bn1(x)


class NamesByString(Names):
    def peek(self, x):
        return getattr(self.parts[0], "bn1")(x)  # noqa: B009


@pytest.mark.parametrize(
    ("kind", "part"),
    [
        (Taps, lambda: nn.Sequential(nn.BatchNorm2d(4), nn.ReLU())),
        (Names, Block),
        (NamesByString, Block),
    ],
)
def test_parts_that_an_untraceable_model_reaches_into_are_not_fused(kind, part):
    model = kind(part())
    reference = copy.deepcopy(model)
    batchops.convert(model)
    assert unfused(model)
    assert_same_behaviour(model, reference, torch.randn(3, 4, 5, 5))


def test_one_warning_for_what_remains():
    class Mixed(Holder):
        def __init__(self):
            super().__init__(Block())
            self.bn, self.relu = nn.BatchNorm2d(4), nn.ReLU()

        def forward(self, x):
            return self.relu(self.bn(super().forward(x)))

    model = Mixed()
    with pytest.warns(UserWarning, match="cannot be traced") as caught:
        batchops.convert(model)
    assert len(caught) == 1
    assert caught[0].filename == __file__
    assert type(model.relu) is nn.ReLU
    assert type(model.bn) is bnn.BatchNorm2d


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
    assert unfused(model) is not fused
    assert_same_behaviour(model, reference, torch.randn(3, 4, 5, 5))


def test_an_identity_with_a_hook_sees_what_it_saw():
    model, seen = nn.Sequential(nn.BatchNorm2d(4), nn.Identity(), nn.ReLU()), []
    model[1].register_forward_hook(lambda m, i, o: seen.append(float(o.detach().min())))
    batchops.convert(model)(torch.randn(3, 4, 5, 5))
    assert seen[0] < 0


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
    assert model[0].activation == name
    assert unfused(model) is (name is None)
    assert_same_behaviour(model, reference, torch.randn(3, 4, 5, 5))
    batchops.revert(model)
    assert [type(m) for m in model] == [type(m) for m in reference]
    assert model[1] is activation


def test_a_converted_model_pickles():
    model = batchops.convert(nn.Sequential(nn.BatchNorm2d(4), nn.LeakyReLU(0.3)))
    other = batchops.revert(pickle.loads(pickle.dumps(model)))
    assert repr(other[1]) == repr(nn.LeakyReLU(0.3))


def test_untraceable_models_are_converted_unfused_with_one_warning():
    model = Untraceable()
    with pytest.warns(UserWarning, match="cannot be traced") as caught:
        batchops.convert(model)
    assert len(caught) == 1
    assert type(model.bn) is bnn.BatchNorm2d
    assert unfused(model)
    assert model.calls == 0
    assert model.seen == 0
    assert model.training


def test_no_warning_where_nothing_could_fuse():
    class Dynamic(nn.Module):
        def __init__(self):
            super().__init__()
            self.bn = nn.BatchNorm2d(4)

        def forward(self, x):
            return self.bn(x) if x.sum() > 0 else x

    with warnings.catch_warnings():
        warnings.simplefilter("error")
        batchops.convert(Dynamic())


def test_analysis_has_no_side_effects():
    class Counting(nn.Module):
        def __init__(self):
            super().__init__()
            self.bn, self.relu = nn.BatchNorm2d(4), nn.ReLU()
            self.calls = 0
            self.kept = []
            self.register_buffer("seen", torch.zeros(()))

        def forward(self, x):
            self.calls += 1
            self.seen.add_(1)
            self.last = x
            self.kept.append(x)
            return self.relu(self.bn(x + torch.rand(())))

    model = Counting()
    model.bn.eval()
    state = torch.get_rng_state()
    batchops.convert(model)
    assert isinstance(model.relu, FusedActivation)
    assert (model.calls, float(model.seen)) == (0, 0.0)
    assert not hasattr(model, "last")
    assert model.kept == []
    assert model.training
    assert not model.bn.training
    assert torch.equal(torch.get_rng_state(), state)


def test_needs_a_module():
    for f in (batchops.convert, batchops.revert):
        with pytest.raises(TypeError, match=r"expected a torch.nn.Module, got dict"):
            f({})


def test_a_norm_alone_is_swapped():
    norm = batchops.convert(nn.BatchNorm2d(4))
    assert type(norm) is bnn.BatchNorm2d
    assert type(batchops.revert(norm)) is nn.BatchNorm2d
