"""patch(): torch.nn.functional's norms are ours in the block, and torch's before and after."""

from __future__ import annotations

import inspect
import threading

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from torch import nn
from torch.autograd import forward_ad
from torch.utils import _pytree as pytree

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


def left_to_torch():
    """Calls that torch refuses, or judges by rules of its own: (norm, arguments, keywords)."""
    x, row, channel = torch.randn(4, 3, 8), torch.rand(8), torch.rand(3)
    mean, var = torch.zeros(3), torch.ones(3)
    low, wide = x.bfloat16(), x.double()
    layer, group, batch, instance = "layer_norm", "group_norm", "batch_norm", "instance_norm"
    return {
        # signatures
        "layer, too few": (layer, (x,), {}),
        "group, too few": (group, (x,), {}),
        "batch, too few": (batch, (x,), {}),
        "instance, none": (instance, (), {}),
        "layer, too many": (layer, (x, (8,), row, row, 1e-5, True), {}),
        "layer, twice": (layer, (x, (8,)), {"input": x}),
        "a keyword of ours, activation": (group, (x, 3), {"activation": "relu"}),
        "a keyword of ours, residual": (layer, (x, (8,)), {"residual": x}),
        "a keyword of ours, cast_output": (layer, (x, (8,)), {"cast_output": True}),
        "a keyword of ours, ghost_batch_size": (batch, (x, mean, var), {"ghost_batch_size": 2}),
        # types
        "normalized_shape as a number": (layer, (x, 8), {}),
        "normalized_shape as a set": (layer, (x, {8}), {}),
        "normalized_shape as an array": (layer, (x, np.array([8])), {}),
        "normalized_shape as a tensor": (layer, (x, torch.tensor([8])), {}),
        "normalized_shape of floats": (layer, (x, (8.0,)), {}),
        "normalized_shape of nothing": (layer, (x, ()), {}),
        "normalized_shape that is longer": (layer, (x, (1, 4, 3, 8)), {}),
        "num_groups as a bool": (group, (x, True), {}),
        "num_groups as a float": (group, (x, 3.0), {}),
        "num_groups as a string": (group, (x, "3"), {}),
        "num_groups of 0": (group, (x, 0), {}),
        "weight as a list": (batch, (x, mean, var, [1.0] * 3), {"training": True}),
        "statistics as lists": (batch, (x, [0.0] * 3, [1.0] * 3), {"training": True}),
        "input as a list": (layer, ([1.0, 2.0], (2,)), {}),
        "training as a number": (batch, (x, mean, var), {"training": 1}),
        "use_input_stats as None": (instance, (x,), {"use_input_stats": None}),
        "momentum as a string, of no use": (
            batch,
            (x, None, None),
            {"training": True, "momentum": "a"},
        ),
        "momentum as None, of no use": (instance, (x,), {"momentum": None}),
        "eps as None": (layer, (x, (8,)), {"eps": None}),
        "eps as a bool": (layer, (x, (8,)), {"eps": True}),
        "eps as a string": (batch, (x, mean, var), {"eps": "a"}),
        # values
        "eps that is NaN": (batch, (x, mean, var), {"training": True, "eps": float("nan")}),
        "eps of 0": (batch, (x, mean, var), {"training": True, "eps": 0.0}),
        "eps below 0": (group, (x, 3), {"eps": -1.0}),
        "groups that do not divide": (group, (x, 2, torch.ones(4)), {}),
        "a running_mean that requires a gradient": (
            batch,
            (x, mean.clone().requires_grad_(), var),
            {"training": True},
        ),
        # dtypes
        "float32 weight for float64": (layer, (wide, (8,), row), {}),
        "float32 statistics for float64": (batch, (wide, mean, var), {}),
        "bfloat16 weight for float32": (group, (x, 3, channel.bfloat16()), {}),
        "bfloat16 weight, float32 bias": (
            batch,
            (low, None, None, channel.bfloat16(), mean, True),
            {},
        ),
        "bfloat16 weight, float32 statistics": (batch, (low, mean, var, channel.bfloat16()), {}),
    }


@pytest.mark.parametrize("case", left_to_torch())
def test_calls_that_are_left_to_torch(case):
    """The same result to the last bit, or the same error to the last character."""

    def outcome():
        torch.manual_seed(0)
        name, arguments, keywords = left_to_torch()[case]
        try:
            y = getattr(F, name)(*arguments, **keywords)
        except Exception as error:
            return type(error), str(error), arguments
        return y, arguments

    def equal(a, b):
        if torch.is_tensor(a):
            return torch.equal(a.nan_to_num(7), b.nan_to_num(7)) and a.dtype == b.dtype
        return str(a) == str(b)

    expected = outcome()
    with batchops.patch():
        got = outcome()
        assert not ran_ours(outcome)
    assert len(got) == len(expected)
    for a, b in zip(pytree.tree_leaves(got), pytree.tree_leaves(expected), strict=True):
        assert equal(a, b)


SERVED = {
    # what is not left to torch of the dtypes and types above
    "bfloat16, float32 parameters": lambda x: F.batch_norm(
        x.bfloat16(), torch.zeros(3), torch.ones(3), torch.ones(3), training=True
    ),
    "bfloat16, all of them": lambda x: F.layer_norm(x.bfloat16(), [8], torch.ones(8).bfloat16()),
    "float64, all of them": lambda x: F.group_norm(x.double(), 3, torch.ones(3).double()),
    "keywords alone": lambda x: F.instance_norm(weight=torch.ones(3), input=x, eps=1),
    "a size": lambda x: F.layer_norm(x, x.shape[1:]),
    "a parameter": lambda x: F.group_norm(nn.Parameter(x), 1, nn.Parameter(torch.ones(3))),
}


@pytest.mark.parametrize("case", SERVED)
def test_calls_that_are_ours(case):
    x = torch.randn(4, 3, 8)
    expected = SERVED[case](x)
    with batchops.patch():
        assert ran_ours(lambda: SERVED[case](x))
        torch.testing.assert_close(SERVED[case](x), expected)


@pytest.mark.parametrize("name", NAMES)
def test_signatures_are_torchs(name):
    with batchops.patch():
        ours = getattr(F, name)
        parameters = inspect.signature(ours, follow_wrapped=False).parameters.values()
    stock = inspect.signature(STOCK[name]).parameters.values()
    assert [(p.name, p.default, p.kind) for p in parameters] == [
        (p.name, p.default, p.kind) for p in stock
    ]


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
