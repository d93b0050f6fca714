"""The shorter way to the norms' operators: what it takes, and what it leaves to torch.ops."""

from __future__ import annotations

import gc
import sys
import threading
from typing import Any

import pytest
import torch
from torch.overrides import TorchFunctionMode
from torch.utils._python_dispatch import TorchDispatchMode

from batchops import _binding

AFFINE = ("weight", "bias", None)  # the last is the residual
ACT = ("relu", 0.01)
CALLS: dict[str, tuple[Any, ...]] = {
    "batch_norm": ("input", *AFFINE, 1e-5, *ACT),
    "batch_norm_update": ("input", "mean", "var", *AFFINE, 0.1, 1e-5, *ACT),
    "batch_norm_eval": ("input", "mean", "var", *AFFINE, 1e-5, *ACT),
    "group_norm": ("input", 2, *AFFINE, 1e-5, *ACT),
    "layer_norm": ("input", (5,), None, None, None, 1e-5, *ACT),
    "instance_norm": ("input", *AFFINE, 1e-5, *ACT),
    "instance_norm_update": ("input", "mean", "var", *AFFINE, 0.1, 1e-5, *ACT),
}
EACH = pytest.mark.parametrize("name", CALLS)


class Subclass(torch.Tensor):
    pass


def arguments(name: str) -> list[Any]:
    tensors = {
        "input": torch.randn(3, 4, 5),
        "weight": torch.nn.Parameter(torch.rand(4)),
        "bias": torch.randn(4),
        "mean": torch.randn(4),
        "var": torch.rand(4) + 0.5,
    }
    return [tensors.get(a, a) if isinstance(a, str) else a for a in CALLS[name]]


def operator(name: str) -> Any:
    return getattr(torch.ops.batchops, name).default


@EACH
def test_same_as_the_operator(name):
    mine = arguments(name)
    theirs = [a.clone() if isinstance(a, torch.Tensor) else a for a in mine]
    y = _binding.norms[name](*mine)
    expected = operator(name)(*theirs)[0]
    assert torch.equal(y, expected)
    assert type(y) is torch.Tensor
    if name != "layer_norm":  # of the weight
        assert y.requires_grad
    for one, other in zip(mine, theirs, strict=True):
        if isinstance(one, torch.Tensor):
            assert torch.equal(one, other)


def test_every_norm_is_there():
    assert set(_binding.norms) == {*CALLS, "count"}


@EACH
def test_leaves_out_what_is_zero(name):
    op = operator(name)
    extra = len(op._schema.arguments) - len(CALLS[name])
    zeros = [(False, 0)[i] for i in range(extra)]
    given = arguments(name)
    assert torch.equal(_binding.norms[name](*given), _binding.norms[name](*given, *zeros))
    with_too_many = (*given, *zeros, 0)
    assert _binding.norms[name](*with_too_many) is NotImplemented


@EACH
@pytest.mark.parametrize("count", [0, 1, -1], ids=["none", "one", "all but one"])
def test_too_few(name, count):
    assert _binding.norms[name](*arguments(name)[:count]) is NotImplemented


@EACH
@pytest.mark.parametrize(
    "other",
    [
        pytest.param(torch.randn(3, 4, 5).as_subclass(Subclass), id="a subclass"),
        pytest.param([1.0], id="a list"),
        pytest.param("none", id="text"),
        pytest.param(1, id="an integer"),
        pytest.param(2**70, id="a large integer"),
        pytest.param(True, id="a truth value"),
        pytest.param(1.5, id="a float"),
        pytest.param(b"relu", id="bytes"),
        pytest.param("\ud800", id="text that is no Unicode"),
    ],
)
def test_arguments_of_other_kinds(name, other):
    """In the place of each argument, but where it is of its kind."""
    kinds = {float: float, int: int, str: str, tuple: list}
    for i, argument in enumerate(arguments(name)):
        fits = kinds.get(type(argument)) is type(other)
        if fits and other not in (2**70, "\ud800", [1.0]):
            continue
        given = arguments(name)
        given[i] = other
        assert _binding.norms[name](*given) is NotImplemented, i


@EACH
def test_modes(name):
    """A mode for functions is asked by torch.ops; one for operators by the dispatcher."""

    class Functions(TorchFunctionMode):
        def __torch_function__(self, func, types, args=(), kwargs=None):
            return func(*args, **(kwargs or {}))

    seen = []

    class Operators(TorchDispatchMode):
        def __torch_dispatch__(self, func, types, args=(), kwargs=None):
            seen.append(str(func))
            return func(*args, **(kwargs or {}))

    given = arguments(name)
    with Functions():
        assert _binding.norms[name](*given) is NotImplemented
    with Operators():
        y = _binding.norms[name](*given)
    assert y.shape == (3, 4, 5)
    assert any(s.startswith("batchops.") for s in seen)


def test_errors_of_a_mode_come_through():
    class Fails(TorchDispatchMode):
        def __torch_dispatch__(self, func, types, args=(), kwargs=None):
            raise KeyError("of the mode")

    with Fails(), pytest.raises(KeyError, match="of the mode"):
        _binding.norms["batch_norm"](*arguments("batch_norm"))


@EACH
def test_holds_nothing(name):
    given = arguments(name)
    tensors = [a for a in given if isinstance(a, torch.Tensor)]

    def holders() -> list[tuple[int, int]]:
        return [(sys.getrefcount(t), t._use_count()) for t in tensors]

    before = holders()
    with torch.no_grad():
        for _ in range(10):
            _binding.norms[name](*given)
            with pytest.raises(ValueError, match="activation must be"):
                _binding.norms[name](*given[:-2], "unknown", 0.01)
    gc.collect()
    assert holders() == before


def test_other_threads_run_meanwhile():
    x = torch.randn(16, 64, 56, 56)
    counted, done = [0], threading.Event()

    def count() -> None:
        while not done.is_set():
            counted[0] += 1

    thread = threading.Thread(target=count)
    interval = sys.getswitchinterval()
    sys.setswitchinterval(0.5)  # longer than the call: nobody gets the lock who is not given it
    try:
        thread.start()
        with torch.no_grad():
            before = counted[0]
            _binding.norms["batch_norm"](x, None, None, None, 1e-5, "none", 0.01)
            after = counted[0]
        done.set()
    finally:
        sys.setswitchinterval(interval)
    thread.join()
    assert after > before


def test_counts_as_torch_does():
    counter = torch.tensor(41)
    version = counter._version
    assert _binding.norms["count"](counter) is None
    assert counter.item() == 42
    assert counter._version == version + 1
    shared = counter.view(1)
    assert _binding.norms["count"](counter) is None
    assert shared.item() == 43
    assert shared._version == version + 2
    copy = torch._lazy_clone(counter)  # shares memory until one of the two is written
    assert _binding.norms["count"](counter) is None
    assert (copy.item(), counter.item()) == (43, 44)


@pytest.mark.parametrize(
    "counter",
    [
        pytest.param(torch.tensor(1.0), id="a float"),
        pytest.param(torch.tensor(1, dtype=torch.int32), id="32 bits"),
        pytest.param(torch.tensor([1, 2]), id="two"),
        pytest.param(torch.tensor(1, device="meta"), id="no memory"),
        pytest.param(torch.tensor(1).as_subclass(Subclass), id="a subclass"),
        pytest.param(1, id="no tensor"),
    ],
)
def test_counts_nothing_else(counter):
    assert _binding.norms["count"](counter) is NotImplemented


def test_leaves_counting_to_who_stands_between():
    class Functions(TorchFunctionMode):
        def __torch_function__(self, func, types, args=(), kwargs=None):
            return func(*args, **(kwargs or {}))

    class Operators(TorchDispatchMode):
        def __torch_dispatch__(self, func, types, args=(), kwargs=None):
            return func(*args, **(kwargs or {}))

    counter, count = torch.tensor(1), _binding.norms["count"]
    for mode in (Functions(), Operators(), torch.inference_mode()):
        with mode:
            assert count(counter) is NotImplemented
    with torch.inference_mode():
        assert count(torch.tensor(1)) is NotImplemented
    batched = torch.vmap(lambda t: torch.tensor(count(t) is NotImplemented))(torch.zeros(3).long())
    assert batched.all()
    assert torch.func.functionalize(lambda t: torch.tensor(count(t) is NotImplemented))(counter)
    with torch.autocast("cpu", torch.bfloat16), torch.no_grad():
        assert count(counter) is None
    assert counter.item() == 2
