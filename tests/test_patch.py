"""patch(): torch.nn.functional's norms are ours in the block, and torch's before and after."""

from __future__ import annotations

import threading

import pytest
import torch
import torch.nn.functional as F
from torch import nn
from torch.autograd import forward_ad

import batchops
from batchops import functional as BF

from .threads import run_in_threads

NAMES = ("batch_norm", "group_norm", "layer_norm", "instance_norm")
STOCK = {name: getattr(F, name) for name in NAMES}


def ran_ours(call):
    """Whether an operator of batchops ran in the call."""
    with torch.profiler.profile(activities=[torch.profiler.ProfilerActivity.CPU]) as profile:
        call()
    return any(event.key.startswith("batchops::") for event in profile.key_averages())


@pytest.fixture(autouse=True)
def _stock_afterwards():
    yield
    assert all(getattr(F, name) is STOCK[name] for name in NAMES)


MODULES = {
    "batch_norm": (lambda: nn.BatchNorm2d(8), (4, 8, 5, 5)),
    "batch_norm 1d": (lambda: nn.BatchNorm1d(8), (4, 8)),
    "group_norm": (lambda: nn.GroupNorm(4, 8), (4, 8, 5, 5)),
    "layer_norm": (lambda: nn.LayerNorm(8), (4, 3, 8)),
    "instance_norm": (lambda: nn.InstanceNorm2d(8, affine=True), (4, 8, 5, 5)),
}


@pytest.mark.parametrize("name", MODULES)
def test_modules_of_torch_run_ours(name):
    if name.split()[0] not in BF.__all__:
        pytest.skip(f"no fused {name} in this build")
    new, shape = MODULES[name]
    stock, ours, x = new(), new(), torch.randn(shape)
    for training in (True, False):
        expected = stock.train(training)(x)
        ours.train(training)
        with batchops.patch():
            assert ran_ours(lambda: ours(x))
            if training:  # once more from the same statistics
                ours.load_state_dict(new().state_dict())
            y = ours(x)
        assert not ran_ours(lambda: new()(x))
        torch.testing.assert_close(y, expected, rtol=1e-5, atol=1e-5)
        assert all(
            torch.allclose(a, b) for a, b in zip(ours.buffers(), stock.buffers(), strict=True)
        )


def test_nesting_and_exceptions():
    with batchops.patch():
        inner = F.batch_norm
        assert inner is not STOCK["batch_norm"]
        with pytest.raises(KeyError), batchops.patch():
            raise KeyError
        assert F.batch_norm is inner
    assert F.batch_norm is STOCK["batch_norm"]


def test_threads_that_overlap():
    """The first to enter is the first to leave; the name goes back with the last."""
    entered, left = threading.Event(), threading.Event()
    seen = []

    def first():
        with batchops.patch():
            entered.set()
        left.set()

    worker = threading.Thread(target=first)
    with batchops.patch():
        worker.start()
        entered.wait(30)
        left.wait(30)
        worker.join()
        seen.append(F.batch_norm is STOCK["batch_norm"])
    assert seen == [False]


def test_many_threads_enter_and_leave():
    def work(_):
        for _ in range(200):
            with batchops.patch():
                assert F.batch_norm is not STOCK["batch_norm"]

    run_in_threads(work)


def call_stock_cases():
    x = torch.randn(4, 5, 3)
    weight = torch.rand(5)
    mean, var = torch.zeros(5), torch.ones(5)
    return {
        "parameters of float64 for float32": (x, mean.double(), var.double(), None, None, True),
        "weight of bfloat16 for float32": (x, mean, var, weight.bfloat16(), None, True),
        "no statistics in eval": (x, None, None, weight, None, False),
        "one of two statistics": (x, mean, None, weight, None, True),
        "weight of the wrong size": (x, mean, var, weight[:3], None, True),
        "one value per channel": (x[:1, :, 0], mean, var, weight, None, True),
        "an integer input": (x.long(), mean, var, weight, None, True),
        "one dimension": (x[0, :, 0], mean, var, weight, None, True),
    }


@pytest.mark.parametrize("case", call_stock_cases())
def test_what_ours_do_not_take_behaves_as_stock(case):
    """The same result, or the same error with the same text."""

    def outcome(function):
        arguments = [t.clone() if torch.is_tensor(t) else t for t in call_stock_cases()[case]]
        torch.manual_seed(0)
        try:
            return function(*arguments).shape
        except Exception as error:
            return type(error), str(error)

    torch.manual_seed(0)
    expected = outcome(F.batch_norm)
    with batchops.patch():
        assert outcome(F.batch_norm) == expected


def test_forward_mode_takes_the_stock_path():
    x = torch.randn(4, 5, 3)
    with batchops.patch(), forward_ad.dual_level():
        dual = forward_ad.make_dual(x, torch.ones_like(x))
        tangent = forward_ad.unpack_dual(F.batch_norm(dual, None, None, training=True)).tangent
    assert tangent.shape == x.shape


def test_subclasses_take_the_stock_path():
    class Tagged(torch.Tensor):
        pass

    x = torch.randn(4, 5, 3).as_subclass(Tagged)
    with batchops.patch():
        assert type(F.batch_norm(x, None, None, training=True)) is Tagged


def test_keywords_and_gradients():
    x = torch.randn(4, 5, 3, requires_grad=True)
    weight = torch.rand(5, requires_grad=True)

    def gradients():
        y = F.batch_norm(
            running_mean=None, running_var=None, input=x, weight=weight, training=True, eps=1e-3
        )
        return torch.autograd.grad(y.pow(3).sum(), (x, weight))

    expected = gradients()
    with batchops.patch():
        assert ran_ours(gradients)
        got = gradients()
    for a, b in zip(got, expected, strict=True):
        torch.testing.assert_close(a, b, rtol=1e-4, atol=1e-4)


def test_compile_in_the_block():
    torch._dynamo.reset()
    norm, x = nn.BatchNorm2d(3), torch.randn(2, 3, 4, 4)
    compiled = torch.compile(norm, fullgraph=True, backend="aot_eager")
    expected = compiled(x)
    with batchops.patch():
        assert ran_ours(lambda: compiled(x))
        torch.testing.assert_close(compiled(x), expected)
    assert not ran_ours(lambda: compiled(x))
