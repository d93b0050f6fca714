"""Bad input to batch norm: the type torch raises, the argument named, and no state changed."""

from __future__ import annotations

import contextlib
import types
import warnings

import pytest
import torch
import torch.nn.functional as F
from torch import nn

from batchops import functional as BF
from batchops import nn as bnn


def good():
    return {
        "input": torch.randn(4, 3, 5, 5),
        "running_mean": torch.zeros(3),
        "running_var": torch.ones(3),
        "weight": torch.ones(3),
        "bias": torch.zeros(3),
        "training": True,
    }


CASES = {
    # name: (changed arguments, error, text that must be in it)
    "1-D input": ({"input": torch.randn(4)}, RuntimeError, "2 or more dimensions"),
    "integer input": (
        {"input": torch.ones(4, 3, 5, 5, dtype=torch.int32)},
        RuntimeError,
        None,
    ),
    "complex input": (
        {"input": torch.ones(4, 3, 5, 5, dtype=torch.complex64)},
        RuntimeError,
        None,
    ),
    "sparse input": ({"input": torch.randn(4, 3).to_sparse()}, RuntimeError, None),
    "weight size": ({"weight": torch.ones(4)}, RuntimeError, "weight should contain 3"),
    "bias size": ({"bias": torch.ones(2)}, RuntimeError, "bias should contain 3"),
    "running_mean size": (
        {"running_mean": torch.zeros(4)},
        RuntimeError,
        "running_mean should contain 3",
    ),
    "running_var size": (
        {"running_var": torch.zeros(1)},
        RuntimeError,
        "running_var should contain 3",
    ),
    "weight dtype": (
        {"weight": torch.ones(3).half()},
        RuntimeError,
        "weight to be Float, like input, but got Half",
    ),
    "weight and bias differ": (
        {"input": torch.randn(4, 3, 5, 5).bfloat16(), "weight": torch.ones(3).bfloat16()},
        RuntimeError,
        "bias to be BFloat16",
    ),
    "running_var dtype": (
        {"running_var": torch.ones(3).double()},
        RuntimeError,
        "running_var to be Float",
    ),
    "weight device": ({"weight": torch.ones(3, device="meta")}, RuntimeError, "weight on cpu"),
    "residual size": ({"residual": torch.randn(4, 3, 5, 4)}, RuntimeError, "residual of input's"),
    "residual device": (
        {"residual": torch.empty(4, 3, 5, 5, device="meta")},
        RuntimeError,
        "residual on cpu",
    ),
    "one value per channel": (
        {"input": torch.randn(1, 3, 1, 1)},
        ValueError,
        r"Expected more than 1 value per channel when training, got input size "
        r"torch.Size\(\[1, 3, 1, 1\]\)",
    ),
    "eps when training": ({"eps": 0.0}, ValueError, r"eps must be positive .* but got 0\.0$"),
    "eps in eval": ({"eps": -1.0, "training": False}, ValueError, "eps must be non-negative"),
    "4-D weight": ({"weight": torch.ones(1, 3, 1, 1)}, RuntimeError, "weight to be 1-D"),
    "2-D running_mean": (
        {"running_mean": torch.zeros(1, 3)},
        RuntimeError,
        "running_mean to be 1-D",
    ),
    "list input": ({"input": [1.0]}, TypeError, "Tensor or a cupy.ndarray, got list"),
    "running_mean before weight": (
        {"running_mean": torch.zeros(4), "weight": torch.ones(4)},
        RuntimeError,
        "running_mean should contain 3 elements not 4",
    ),
    "list weight": ({"weight": [1.0] * 3}, TypeError, r"weight to be .*Tensor.*got \[1.0, .* list"),
    "no eps": ({"eps": None}, TypeError, "eps"),
    "number residual": ({"residual": 3.0}, TypeError, "batch_norm: expected residual .*got float"),
    "running_mean with a gradient": (
        {"running_mean": torch.zeros(3, requires_grad=True)},
        RuntimeError,
        "not differentiable with respect to argument 'running_mean'",
    ),
    "running_var with a gradient": (
        {"running_var": torch.ones(3, requires_grad=True)},
        RuntimeError,
        "not differentiable with respect to argument 'running_var'",
    ),
    "running_mean with a gradient in eval": (
        {"running_mean": torch.zeros(3, requires_grad=True), "training": False},
        RuntimeError,
        "not differentiable with respect to argument 'running_mean'",
    ),
    "no momentum": ({"momentum": None}, TypeError, "momentum to be a float"),
    "activation": ({"activation": "selu"}, ValueError, "'relu', .*'hardswish', got 'selu'"),
    "no statistics in eval": (
        {"running_mean": None, "running_var": None, "training": False},
        RuntimeError,
        "running_mean",
    ),
    "one statistic": (
        {"running_var": None},
        ValueError,
        "must either both be None or neither be None, .* running_var=None",
    ),
}


@pytest.mark.parametrize("name", CASES)
def test_error_names_the_argument_and_changes_nothing(name):
    changed, error, text = CASES[name]
    arguments = good() | changed
    before = {k: v.clone() for k, v in arguments.items() if torch.is_tensor(v)}
    with pytest.raises(error, match=text):
        BF.batch_norm(**arguments)
    for key, value in before.items():
        if value.device.type == "meta" or value.is_sparse:
            continue
        assert torch.equal(arguments[key], value), key
    stock = {k: v for k, v in arguments.items() if k not in ("activation", "residual")}
    if not {"activation", "residual"} & changed.keys() and not DIFFERS.get(name):
        with pytest.raises(error):
            F.batch_norm(**stock)


# Where torch lets something pass, or fails later or otherwise, and we say so at once.
DIFFERS = {
    "1-D input": "torch: IndexError or RuntimeError, by version",
    "weight device": "torch computes a meta result",
    "4-D weight": "torch fails in the backward, and not everywhere",
    "list input": "torch: AttributeError when training, TypeError in eval",
    "one statistic": "torch 2.11 updates the one that is given",
    "eps when training": "torch 2.11 takes 0",
    "eps in eval": "torch 2.11 takes negative values",
}


def test_nan_for_eps_is_nan_in_the_output():
    y, expected = (f(**good(), eps=float("nan")) for f in (BF.batch_norm, F.batch_norm))
    assert y.isnan().all()
    assert expected.isnan().all()


@pytest.mark.parametrize("name", ["batch_norm", "instance_norm"])
def test_no_gradient_of_running_statistics(name):
    """Neither by zeros, as torch.func would give, nor where no gradient is asked for an error."""
    norm, x = getattr(BF, name), torch.randn(4, 3, 5)
    for stats in (True, False):  # from the batch, as given
        mean, var = torch.zeros(3), torch.ones(3)
        with pytest.raises(RuntimeError, match="not differentiable with respect to argument"):
            torch.func.grad(lambda m, var=var, s=stats: norm(x, m, var, None, None, s).sum())(mean)
        mean.requires_grad_()
        with torch.no_grad():
            y = norm(x, mean, var, None, None, stats)
        expected = getattr(F, name)(x, torch.zeros(3), torch.ones(3), None, None, stats)
        torch.testing.assert_close(y, expected, rtol=1e-5, atol=1e-5)


STOCK_REFUSALS = {
    "activation": ({"activation": "selu"}, ValueError, "'hardswish', got 'selu'"),
    "residual that is larger": (
        {"residual": torch.randn(2, 4, 3, 5, 5)},
        RuntimeError,
        r"residual of input's size \[4, 3, 5, 5\], but got \[2, 4, 3, 5, 5\]",
    ),
    "residual that is smaller": (
        {"residual": torch.randn(3, 1, 1)},
        RuntimeError,
        r"residual of input's size",
    ),
    "residual elsewhere": (
        {"residual": torch.empty(4, 3, 5, 5, device="meta")},
        RuntimeError,
        "residual on cpu",
    ),
    "residual that is a number": ({"residual": 3.0}, TypeError, "residual to be a Tensor or None"),
}


@pytest.mark.parametrize("name", ["batch_norm", "group_norm", "layer_norm", "instance_norm"])
@pytest.mark.parametrize("case", STOCK_REFUSALS)
def test_refused_before_torchs_operators_run(name, case):
    """A residual of another dtype than the input's takes those. They know nothing of what follows
    them, and would have moved the running statistics."""
    changed, error, text = STOCK_REFUSALS[case]
    x = torch.randn(4, 3, 5, 5).bfloat16()
    mean, var = torch.zeros(3), torch.ones(3)
    norm = {
        "batch_norm": lambda **k: BF.batch_norm(x, mean, var, training=True, **k),
        "group_norm": lambda **k: BF.group_norm(x, 3, **k),
        "layer_norm": lambda **k: BF.layer_norm(x, (5,), **k),
        "instance_norm": lambda **k: BF.instance_norm(x, mean, var, **k),
    }[name]
    with pytest.raises(error, match=text):
        norm(**{"residual": torch.randn(4, 3, 5, 5), **changed})
    assert mean.eq(0).all()
    assert var.eq(1).all()


def test_module_checks_dimensions_like_torch():
    with pytest.raises(ValueError, match="expected 4D input"):
        bnn.BatchNorm2d(3)(torch.randn(4, 3, 5))
    with pytest.raises(ValueError, match="expected 2D or 3D input"):
        bnn.BatchNorm1d(3)(torch.randn(4, 3, 5, 5))
    with pytest.raises(ValueError, match="expected 5D input"):
        bnn.BatchNorm3d(3)(torch.randn(4, 3, 5, 5))


def test_module_refuses_an_unknown_activation_at_once():
    with pytest.raises(ValueError, match="got 'swish'"):
        bnn.BatchNorm2d(3, activation="swish")


def test_failed_forward_leaves_what_torch_leaves():
    """The statistics as they were; torch has counted the batch by then."""
    stock, norm = nn.BatchNorm2d(3), bnn.BatchNorm2d(3, activation="relu")
    for module in (stock, norm):
        with pytest.raises(RuntimeError, match="running_mean should contain 4 elements not 3"):
            module(torch.randn(2, 4, 3, 3))
    assert torch.equal(norm.running_mean, torch.zeros(3))
    assert norm.num_batches_tracked == 1
    state = norm.state_dict()
    assert all(torch.equal(state[key], value) for key, value in stock.state_dict().items())


def test_backward_operator_checks_what_it_is_given():
    x = torch.randn(4, 3, 5, 5)
    backward = torch.ops.batchops.batch_norm_backward
    stats = torch.zeros(3, 3)
    wanted = [True] * 4
    with pytest.raises(RuntimeError, match="expected dy of size"):
        backward(x[:2], x, None, None, None, stats, None, True, 1e-5, "none", 0.01, wanted)
    with pytest.raises(RuntimeError, match="expected stats"):
        backward(x, x, None, None, None, stats[:2], None, True, 1e-5, "none", 0.01, wanted)
    mask = torch.zeros(3, dtype=torch.uint8)
    with pytest.raises(RuntimeError, match="expected a mask of"):
        backward(x, x, None, None, None, stats, mask, True, 1e-5, "relu", 0.01, wanted)
    with pytest.raises(RuntimeError, match="contiguous Byte"):
        backward(x, x, None, None, None, stats, mask.float(), True, 1e-5, "relu", 0.01, wanted)


def test_a_device_without_code_is_left_to_torch_with_a_warning(monkeypatch):
    asked = []

    def problem(device: int) -> str | None:
        asked.append(device)
        return "this build has no code for CUDA device 1" if device == 1 else None

    class Somewhere:
        """What the norms look at of a tensor on a device that is not here."""

        layout, is_nested, dtype = torch.strided, False, torch.float32
        is_cpu, is_cuda = False, True

        def __init__(self, index: int) -> None:
            self.device = torch.device("cuda", index)

    monkeypatch.setattr(BF, "_CUDA", True)
    monkeypatch.setattr(BF, "_runs_on", {})
    monkeypatch.setattr(BF._binding, "core", types.SimpleNamespace(cuda_problem=problem))
    monkeypatch.setattr(torch.cuda, "device", contextlib.nullcontext)
    monkeypatch.setattr(torch.cuda, "is_initialized", lambda: False)
    assert BF._has_kernel(Somewhere(1)), "a description of a tensor is no reason to begin with CUDA"
    assert asked == []
    monkeypatch.setattr(torch.cuda, "is_initialized", lambda: True)
    with pytest.warns(UserWarning, match="torch's own norms serve CUDA device 1: this build has"):
        assert not BF._has_kernel(Somewhere(1))
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        assert not BF._has_kernel(Somewhere(1))
        assert BF._has_kernel(Somewhere(0))
        assert BF._has_kernel(Somewhere(0))
    assert asked == [1, 0]


@pytest.mark.parametrize("name", ["weight", "bias", "residual", "running_mean", "input"])
def test_tensors_whose_memory_was_freed(name):
    """A kernel takes no memory for no tensor: weight 1, bias 0."""
    arguments = good() | {"residual": torch.randn(4, 3, 5, 5)}
    arguments[name].untyped_storage().resize_(0)
    with pytest.raises(RuntimeError, match=f"batch_norm: expected {name} with memory"):
        BF.batch_norm(**arguments)


def test_a_weight_that_was_freed_before_the_backward():
    arguments = good()
    arguments["input"].requires_grad_()
    y = BF.batch_norm(**arguments)
    arguments["weight"].untyped_storage().resize_(0)
    with pytest.raises(RuntimeError, match="batch_norm_backward: expected weight with memory"):
        y.sum().backward()


@pytest.mark.parametrize("parameters", [torch.float32, torch.bfloat16, torch.float16])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_parameters_that_autocast_makes_fit(monkeypatch, dtype, parameters):
    """On CUDA, where group norm and layer norm are on its list."""

    class There:
        is_cuda = True

    There.dtype = dtype
    weight, bias = torch.ones(3, dtype=parameters), torch.zeros(3, dtype=parameters)
    assert BF._cast_parameters(There, weight, None) == (weight, None)
    monkeypatch.setattr(torch, "is_autocast_enabled", lambda kind: kind == "cuda")
    w, b = BF._cast_parameters(There, weight, bias)
    fits = parameters in (dtype, torch.float32)
    assert w.dtype == b.dtype == (parameters if fits else torch.float32)
    assert BF._cast_parameters(torch.ones(3, dtype=dtype), weight, bias) == (weight, bias)
