"""batchops.data.collate against torch.utils.data.default_collate on the same batch.

Everything about the result is compared: types of containers, dtypes, shapes, strides, bytes, and
for errors the type and the beginning of the text.
"""

from __future__ import annotations

import collections
import pickle
import re
import warnings
from array import array
from collections.abc import Callable
from types import MappingProxyType
from typing import Any

import numpy as np
import pytest
import torch
from torch.utils.data import default_collate
from torch.utils.data._utils.collate import default_collate_fn_map

from batchops import _C
from batchops.data import collate
from batchops.data._collate import ARRAY_DTYPES
from batchops.data._memory import RING_BYTES

Point = collections.namedtuple("Point", ["x", "y"])


class MyDict(dict):
    """A mapping with more to it than its items."""

    def __init__(self, *args: Any, **kwargs: Any) -> None:
        super().__init__(*args, **kwargs)
        self.extra = "kept"


class MyList(list):
    pass


class MyTuple(tuple):
    pass


class NoCopy(dict):
    def __copy__(self) -> Any:
        raise TypeError("not copied")


class ReadOnly(collections.abc.Mapping):
    def __init__(self, items: Any) -> None:
        self.items_ = dict(items)

    def __getitem__(self, key: Any) -> Any:
        return self.items_[key]

    def __iter__(self) -> Any:
        return iter(self.items_)

    def __len__(self) -> int:
        return len(self.items_)


class Labelled(torch.Tensor):
    pass


def seen(value: Any) -> Any:
    if isinstance(value, torch.Tensor):
        raw = value.detach().resolve_conj().resolve_neg().contiguous().reshape(-1)
        return (
            *(type(value), value.dtype, tuple(value.shape), value.stride()),
            *(value.storage_offset(), value.requires_grad, value.device, value.is_inference()),
            value.untyped_storage().nbytes() if value.layout is torch.strided else None,
            raw.view(torch.uint8).numpy().tobytes() if raw.numel() else b"",
        )
    if isinstance(value, collections.abc.Mapping):
        return (
            type(value),
            vars(value) if type(value) is MyDict else None,
            [(key, seen(item)) for key, item in value.items()],
        )
    if isinstance(value, list | tuple | array | collections.deque):
        return (type(value), [seen(item) for item in value])
    return (type(value), value)


def outcome(fn: Callable[[Any], Any], batch: Any) -> Any:
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        try:
            return seen(fn(batch))
        except Exception as error:
            return error


def same(make: Callable[[], Any]) -> None:
    want, got = outcome(default_collate, make()), outcome(collate, make())
    if isinstance(want, Exception):
        assert isinstance(got, type(want)), got
        assert str(got).startswith(str(want))
    else:
        assert got == want


def g(*shape: int, dtype: torch.dtype = torch.float32) -> torch.Tensor:
    n = int(np.prod(shape, dtype=np.int64))
    return (torch.arange(n) % 117).reshape(shape).to(dtype)


TENSOR_DTYPES = [
    *(torch.bool, torch.uint8, torch.int8, torch.int16, torch.int32, torch.int64),
    *(torch.uint16, torch.uint32, torch.uint64, torch.float16, torch.bfloat16, torch.float32),
    *(torch.float64, torch.complex64, torch.complex128, torch.float8_e4m3fn, torch.float8_e5m2),
]


@pytest.mark.parametrize("dtype", TENSOR_DTYPES, ids=str)
def test_tensor_dtypes(dtype: torch.dtype) -> None:
    for shape in [(), (1,), (3, 5), (2, 3, 4), (2, 1, 3, 4)]:
        same(lambda shape=shape: [(g(*shape) + i).to(dtype) for i in range(5)])


@pytest.mark.parametrize("dtype", ARRAY_DTYPES, ids=str)
def test_array_dtypes(dtype: np.dtype) -> None:
    for shape in [(), (1,), (3, 5), (2, 3, 4), (2, 1, 3, 4)]:
        same(
            lambda shape=shape: [np.asarray(g(*shape).numpy() + i).astype(dtype) for i in range(5)]
        )
    same(lambda: [dtype.type(1), dtype.type(0), dtype.type(1)])


def test_arrays_that_torch_refuses() -> None:
    for dtype in ("U3", "S3", "O", "M8[s]", ">f4", "f16"):
        same(lambda dtype=dtype: [np.zeros(3, dtype=dtype) for _ in range(3)])
    same(lambda: [np.arange(6)[::-1] for _ in range(3)])
    same(lambda: [np.array("text") for _ in range(3)])


BATCHES: dict[str, Callable[[], Any]] = {
    "numbers": lambda: [0, 1, 2, 3],
    "many integers": lambda: list(range(100)),
    "many floats": lambda: [i / 7 for i in range(100)],
    "one float": lambda: [0.5],
    "booleans": lambda: [True, False] * 20,
    "integers, booleans": lambda: [1, True] * 20,
    "booleans, integers": lambda: [True, 3] * 20,
    "integers, floats": lambda: [1, 2.5] * 20,
    "floats, integers": lambda: [2.5, 1] * 20,
    "integers beyond 64 bits": lambda: [1 << 70] * 20,
    "integers and nothing": lambda: [1, None] * 10,
    "largest and smallest": lambda: [2**63 - 1, -(2**63)] * 10,
    "nan and inf": lambda: [float("nan"), float("inf"), -0.0] * 10,
    "complex": lambda: [1j, 2.0],
    "strings": lambda: ["a", "bc"],
    "bytes": lambda: [b"a", b"bc"],
    "tuple of strings": lambda: ("a", "b"),
    "none": lambda: [None, None],
    "sets": lambda: [{1}, {2}],
    "nothing": list,
    "no batch": lambda: 3,
    "tuples": lambda: [(0, 1.5, "a"), (2, 3.5, "b")],
    "lists": lambda: [[0, 1], [2, 3]],
    "lists of tensors": lambda: [[g(2), g(3)], [g(2), g(3)]],
    "empty tuples": lambda: [(), ()],
    "empty lists": lambda: [[], []],
    "ranges": lambda: [range(3), range(3, 6)],
    "arrays of the standard library": lambda: [array("i", [1, 2]), array("i", [3, 4])],
    "deques": lambda: [collections.deque([1, 2]), collections.deque([3, 4])],
    "namedtuples": lambda: [Point(g(2), 1), Point(g(2), 2)],
    "namedtuples of namedtuples": lambda: [Point(Point(1, 2), [3]), Point(Point(4, 5), [6])],
    "dicts": lambda: [{"a": g(2), "b": 1}, {"b": 2, "a": g(2)}],
    "more keys later": lambda: [{"a": 1}, {"a": 2, "b": 3}],
    "empty dicts": lambda: [{}, {}],
    "ordered": lambda: [collections.OrderedDict([("b", 1), ("a", 2)])] * 2,
    "default": lambda: [collections.defaultdict(int, a=1), collections.defaultdict(int, b=1)],
    "own mapping": lambda: [MyDict(a=g(3), b=[1, 2]), MyDict(a=g(3), b=[1, 2])],
    "own list": lambda: [MyList([g(3), 1]), MyList([g(3), 2])],
    "own tuple": lambda: [MyTuple([g(3), 1]), MyTuple([g(3), 2])],
    "mapping not copied": lambda: [NoCopy(a=1), NoCopy(a=2)],
    "immutable mapping": lambda: [ReadOnly({"a": 1}), ReadOnly({"a": 2})],
    "mapping proxy": lambda: [MappingProxyType({"a": g(2)}), MappingProxyType({"a": g(2)})],
    "nested": lambda: [{"a": {"b": (g(2), [1.5, {"c": "x"}])}} for _ in range(3)],
    "lengths differ": lambda: [(1, 2), (3,)],
    "key missing": lambda: [{"a": 1}, {"b": 1}],
    "shapes differ": lambda: [g(3, 4), g(3, 5)],
    "ranks differ": lambda: [g(3, 4), g(12)],
    "dtypes differ": lambda: [g(3), g(3, dtype=torch.float64)],
    "integers promote": lambda: [g(3, dtype=torch.uint8), g(3, dtype=torch.int16)],
    "array shapes differ": lambda: [np.ones((2, 2)), np.ones((2, 3))],
    "array dtypes differ": lambda: [np.ones(3, np.float32), np.ones(3)],
    "tensor, then number": lambda: [g(2), 1],
    "number, then tensor": lambda: [1, g(1)],
    "array, then tensor": lambda: [np.ones(2, np.float32), torch.ones(2)],
    "tensor, then array": lambda: [torch.ones(2), np.ones(2, np.float32)],
    "array, then number": lambda: [np.ones(2), 3.0],
    "zero items": lambda: [torch.empty(0, 3), torch.empty(0, 3)],
    "zero items, arrays": lambda: [np.empty((0, 3)), np.empty((0, 3))],
    "grad": lambda: [torch.ones(2, requires_grad=True), torch.ones(2)],
    "grad later": lambda: [torch.ones(2), torch.ones(2, requires_grad=True)],
    "parameters": lambda: [torch.nn.Parameter(torch.ones(2)) for _ in range(2)],
    "subclass": lambda: [torch.ones(2).as_subclass(Labelled) for _ in range(2)],
    "subclass later": lambda: [torch.ones(2), torch.ones(2).as_subclass(Labelled)],
    "sparse": lambda: [torch.eye(2).to_sparse() for _ in range(2)],
    "sparse rows": lambda: [torch.eye(2).to_sparse_csr() for _ in range(2)],
    "nested tensors": lambda: [torch.nested.nested_tensor([g(2), g(3)]) for _ in range(2)],
    "conjugate": lambda: [torch.ones(2, dtype=torch.complex64).mul(1j).conj() for _ in range(2)],
    "negative": lambda: [torch.ones(2, dtype=torch.complex64).mul(1j).conj().imag for _ in "ab"],
    "quantized": lambda: [torch.quantize_per_tensor(g(4), 0.1, 0, torch.quint8) for _ in "ab"],
    "meta": lambda: [torch.ones(2, device="meta") for _ in range(2)],
    "zero-d": lambda: [torch.tensor(i) for i in range(4)],
    "transposed": lambda: [g(4, 5).t() for _ in range(3)],
    "permuted images": lambda: [g(6, 5, 3).permute(2, 0, 1) for _ in range(3)],
    "slices": lambda: [g(8, 9)[::2, 1::3] for _ in range(3)],
    "one dense, one strided": lambda: [g(4, 5), g(5, 4).t(), g(4, 5)],
    "expanded": lambda: [g(1, 5).expand(4, 5) for _ in range(3)],
    "channels_last": lambda: [g(2, 3, 4, 5).to(memory_format=torch.channels_last) for _ in "ab"],
    "strided arrays": lambda: [np.arange(60.0).reshape(5, 12)[:, ::2] for _ in range(3)],
    "transposed arrays": lambda: [np.arange(60.0).reshape(5, 12).T for _ in range(3)],
    "broadcast arrays": lambda: [np.broadcast_to(np.arange(3.0), (4, 3)) for _ in range(3)],
    "masked arrays": lambda: [np.ma.masked_array([1.0, 2.0], [0, 1]) for _ in range(2)],
    "matrices": lambda: [np.asmatrix("1 2; 3 4") for _ in range(2)],
    "numpy scalars": lambda: [np.int32(1), np.int32(2)],
    "numpy scalars mixed": lambda: [np.float32(1), np.float64(2), 3],
    "large tensors": lambda: [g(3, 80, 90) + i for i in range(8)],
    "large arrays": lambda: [(g(80, 90, 3) + i).numpy().astype(np.uint8) for i in range(8)],
    "larger than a chunk": lambda: [g(300, 301) + i for i in range(3)],
    "past the caches": lambda: [g(1024, 1025) + i for i in range(3)],
}


@pytest.mark.parametrize("name", BATCHES)
def test_batches(name: str) -> None:
    same(BATCHES[name])
    with torch.inference_mode():
        same(BATCHES[name])


def test_arrays_of_items_larger_than_any_of_torchs() -> None:
    for rows in (np.zeros((4, 4), np.clongdouble), np.zeros((4, 4), np.longdouble)):
        same(lambda rows=rows: [rows, rows])
        same(lambda rows=rows: [rows[:, ::2], rows[:, ::2]])


def test_memmaps(tmp_path: Any) -> None:
    file = tmp_path / "rows"
    np.arange(60.0).tofile(file)
    for mode in ("r", "r+", "c"):
        rows = np.memmap(file, np.float64, mode, shape=(6, 10))
        same(lambda rows=rows: [rows[i] for i in range(6)])


def test_readonly_arrays_warn_as_torch() -> None:
    """Once in a process, so each side has one of its own."""
    import subprocess
    import sys

    script = """
import sys, warnings, numpy as np
from torch.utils.data import default_collate
from batchops.data import collate
rows = np.ones((4, 3)); rows.flags.writeable = False
with warnings.catch_warnings(record=True) as caught:
    warnings.simplefilter("always")
    for _ in range(2):
        {"torch": default_collate, "ours": collate}[sys.argv[1]](list(rows))
print([str(w.message)[:40] for w in caught])
"""
    said = [
        subprocess.run(
            [sys.executable, "-c", script, side], capture_output=True, text=True, check=True
        ).stdout
        for side in ("torch", "ours")
    ]
    assert said[0] == said[1]
    assert "not writable" in said[0]


def test_threads_and_native_are_used(monkeypatch: pytest.MonkeyPatch) -> None:
    """Plain samples never reach torch.stack."""
    monkeypatch.setattr(torch, "stack", None)
    for name in ("large tensors", "large arrays", "permuted images", "nested"):
        collate(BATCHES[name]())


def test_forward_mode_tangents_reach_torch() -> None:
    import torch.autograd.forward_ad as fwAD

    with fwAD.dual_level():
        x = fwAD.make_dual(torch.ones(2), torch.full((2,), 3.0))
        out = collate([x, torch.ones(2)])
        assert fwAD.unpack_dual(out).tangent.tolist() == [[3.0, 3.0], [0.0, 0.0]]


def test_under_vmap_and_modes() -> None:
    x = torch.randn(3, 4)
    out = torch.func.vmap(lambda row: collate([row, row * 2]))(x)
    assert torch.equal(out, torch.stack([x, x * 2], 1))

    class Log(torch.utils._python_dispatch.TorchDispatchMode):
        names: list[str] = []  # noqa: RUF012

        def __torch_dispatch__(self, func, types, args=(), kwargs=None):
            self.names.append(str(func))
            return func(*args, **(kwargs or {}))

    with Log() as log:
        collate([torch.ones(2), torch.ones(2)])
    assert any("stack" in name or "cat" in name for name in log.names)


# --- default_collate_fn_map, read live ----------------------------------------------------------


@pytest.fixture
def fn_map() -> Any:
    before = dict(default_collate_fn_map)
    yield default_collate_fn_map
    default_collate_fn_map.clear()
    default_collate_fn_map.update(before)


def test_custom_functions(fn_map: dict[Any, Any]) -> None:
    def keep(batch: Any, *, collate_fn_map: Any = None) -> Any:
        assert collate_fn_map is fn_map
        return ("kept", len(batch), type(batch).__name__)

    cases = [
        lambda: [{1}, {2}],
        lambda: [{"a": {1}, "b": g(2)}, {"a": {2}, "b": g(2)}],
        lambda: [g(2), g(2)],
        lambda: [np.ones(2), np.ones(2)],
        lambda: [1, 2],
        lambda: [(1, 2), (3, 4)],
        lambda: [MyDict(a=1), MyDict(a=2)],
    ]
    for key in (set, torch.Tensor, int, tuple, dict, collections.abc.Mapping, object):
        before = dict(fn_map)
        fn_map[key] = keep
        for make in cases:
            same(make)
        fn_map.clear()
        fn_map.update(before)
    fn_map.pop(torch.Tensor)
    for make in cases:
        same(make)


# --- errors say where ----------------------------------------------------------------------------


def text_of(batch: Any) -> str:
    with pytest.raises(Exception) as caught:  # noqa: PT011
        collate(batch)
    return str(caught.value)


def test_errors_name_position_path_shapes_and_dtypes() -> None:
    text = text_of(
        [
            {"image": [g(2), g(3, 4)]},
            {"image": [g(2), g(3, 4)]},
            {"image": [g(2), g(3, 5, dtype=torch.int64)]},
        ]
    )
    assert text.startswith("stack expects each tensor to be equal size")
    assert "position 2, sample['image'][1]: Tensor of shape (3, 5), torch.int64" in text
    assert "position 0: Tensor of shape (3, 4), torch.float32" in text

    text = text_of([(np.ones(3), "a"), (np.ones(4, np.float32), "b")])
    assert "position 1, sample[0]: ndarray of shape (4,), float32" in text

    text = text_of([Point(1, (1, 2)), Point(1, (1, 2, 3))])
    assert text.startswith("each element in list of batch should be of equal size")
    assert "position 1, sample[1]: tuple of length 3" in text

    text = text_of([{"a": {"b": 1}}, {"a": {"c": 1}}])
    assert text.startswith("'b'")
    assert "position 1, sample['a']: dict with keys ['c']" in text

    text = text_of([{"a": None}])
    assert text.startswith("default_collate: batch must contain tensors, numpy arrays, numbers")
    assert "sample['a']: NoneType" in text


def test_missing_key_is_a_key_error_that_travels() -> None:
    with pytest.raises(KeyError) as caught:
        collate([{"a": 1}, {}])
    assert caught.value.args == ("a",)
    copy = pickle.loads(pickle.dumps(caught.value))
    assert str(copy) == str(caught.value)
    assert isinstance(copy, KeyError)


class OddError(Exception):
    def __init__(self, a: int, b: int) -> None:
        super().__init__(a, b)


def test_errors_of_others_stay_theirs(fn_map: dict[Any, Any]) -> None:
    def fail(batch: Any, *, collate_fn_map: Any = None) -> Any:
        raise OddError(1, 2)

    fn_map[set] = fail
    with pytest.raises(OddError) as caught:
        collate([{1}])
    assert caught.value.args == (1, 2)


def test_one_error_object_raised_twice_tells_of_the_second_time(fn_map: dict[Any, Any]) -> None:
    error = ValueError("mine")

    def fail(batch: Any, *, collate_fn_map: Any = None) -> Any:
        raise error

    fn_map[set] = fail
    assert "sample['a']: set" in text_of([{"a": {1}}, {"a": {2}}])
    text = text_of([[{1}, {2}], [{1}, {2, 3}]])
    assert "sample[0]: set" in text
    assert "'a'" not in text


# --- memory --------------------------------------------------------------------------------------


def test_the_default_device_is_that_of_tensors_that_are_made() -> None:
    """Stacks stay where the samples are; numbers and arrays become tensors there."""
    samples = [1, 1.5, True, np.float32(2), np.ones(3), torch.ones(3), {"a": 3, "b": torch.ones(2)}]
    with torch.device("meta"):
        for sample in samples:
            batch = [sample] * 20
            for got, want in zip(
                _leaves(collate(batch)), _leaves(default_collate(batch)), strict=True
            ):
                assert (got.device, got.dtype, got.shape) == (want.device, want.dtype, want.shape)


def _leaves(value: Any) -> list[torch.Tensor]:
    return list(value.values()) if isinstance(value, dict) else [value]


def test_memory_is_used_again_only_when_nobody_sees_it() -> None:
    samples = [torch.full((RING_BYTES,), i, dtype=torch.uint8) for i in range(4)]
    first = collate(samples)
    address = first.data_ptr()
    row = first[2]
    as_array = first.numpy()[3:]
    del first
    second = collate(samples[::-1])
    assert second.data_ptr() != address
    assert row.eq(2).all()
    del row
    third = collate(samples[::-1])
    assert third.data_ptr() != address
    assert (as_array == 3).all()
    del as_array
    assert collate(samples).data_ptr() == address


def test_results_behave_as_torchs_own() -> None:
    out = collate([torch.zeros(RING_BYTES) for _ in range(2)])
    assert out._base is None
    assert out.is_leaf
    out.requires_grad_()
    out.detach_()
    assert torch.equal(pickle.loads(pickle.dumps(out[:, :3])), out[:, :3])
    assert out.share_memory_().is_shared()


def test_native_reader_refuses_what_is_not_plain() -> None:
    ok = torch.ones(2)
    assert len(_C.Samples.of_tensors([ok, ok])) == 2
    for odd in (
        torch.ones(2, requires_grad=True),
        torch.ones(3),
        ok.double(),
        ok.to("meta"),
        1,
        ok.as_subclass(Labelled),
        np.ones(2),
        torch.ones(2, dtype=torch.cfloat).conj(),
    ):
        assert _C.Samples.of_tensors([ok, odd]) is None
    assert _C.Samples.of_tensors([]) is None
    with pytest.raises(ValueError, match=re.escape("stack: expected 16 bytes, got 8")):
        _C.Samples.of_tensors([ok, ok]).copy_to(ok.data_ptr(), 8, 1)
