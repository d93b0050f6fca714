"""batchops.data.DataLoader beyond a TensorDataset: sources, threads, slots, devices, resuming.

The oracle is torch's DataLoader over the same dataset, seed for seed.
"""

from __future__ import annotations

import collections
import collections.abc
import contextlib
import contextvars
import copy
import gc
import multiprocessing
import os
import pickle
import random
import signal
import sys
import threading
import time
import types
import warnings
import weakref
from collections.abc import Callable, Iterator
from typing import Any

import numpy as np
import pytest
import torch
from torch.utils.data import (
    BatchSampler,
    ConcatDataset,
    Dataset,
    IterableDataset,
    RandomSampler,
    StackDataset,
    Subset,
    SubsetRandomSampler,
    TensorDataset,
    WeightedRandomSampler,
)
from torch.utils.data import DataLoader as TorchLoader
from torch.utils.data.distributed import DistributedSampler

from batchops import _C, data
from batchops.data import Columns, DataLoader
from batchops.data._iterators import (
    GatherIter,
    LocalIter,
    ProcessIter,
    SharedFlag,
    ThreadIter,
    WorkerGatherIter,
)
from batchops.data._memory import RING_BYTES, Memory
from batchops.data._metrics import Depth, batch_length
from batchops.data._own import memory_of, transfer_of
from batchops.data._threads import Modes, _crews
from batchops.data._transfer import Transfer
from batchops.data._tree import tensor_bytes

from .test_collate import seen


@pytest.fixture(autouse=True)
def _two_threads(threads: Any) -> None:
    threads(2)


@pytest.fixture(autouse=True)
def _quiet() -> Iterator[None]:
    with warnings.catch_warnings():
        warnings.filterwarnings("ignore", message=".*worker processes in total.*")
        yield


def epoch(loader: Any) -> list[Any]:
    torch.manual_seed(7)
    return [seen(batch) for batch in loader]


# --- sources -------------------------------------------------------------------------------------


def rows(n: int, *shape: int, dtype: Any = torch.float32) -> torch.Tensor:
    return torch.arange(n * int(np.prod(shape, dtype=int))).reshape(n, *shape).to(dtype)


N = 50
SOURCES: dict[str, Callable[[], Any]] = {
    "tensor": lambda: rows(N, 3, 4),
    "vector": lambda: rows(N),
    "array": lambda: rows(N, 3, 4).numpy(),
    "array of bytes": lambda: (rows(N, 5, 5, 3) % 256).numpy().astype(np.uint8),
    "array transposed": lambda: rows(N, 4, 3).numpy().transpose(0, 2, 1),
    "array of every other row": lambda: rows(2 * N, 3).numpy()[::2],
    "vector of int16": lambda: np.arange(N, dtype=np.int16),
    "vector of float32": lambda: np.arange(N, dtype=np.float32),
    "vector of bool": lambda: np.arange(N) % 3 == 0,
    "columns": lambda: Columns(image=rows(N, 3, 4), label=np.arange(N), wide=rows(N, 9000)),
    "concat": lambda: ConcatDataset([TensorDataset(rows(n, 3), rows(n)) for n in (10, 1, 39)]),
    "concat of arrays": lambda: ConcatDataset([rows(20, 3).numpy(), rows(30, 3).numpy()]),
    "concat, strided": lambda: ConcatDataset(
        [TensorDataset(rows(25, 3, 4)), TensorDataset(rows(25, 4, 3).transpose(1, 2))]
    ),
    "subset of concat": lambda: Subset(
        ConcatDataset([TensorDataset(rows(20, 3)), TensorDataset(rows(30, 3))]),
        list(range(N - 1, -1, -1)),
    ),
    "stack": lambda: StackDataset(rows(N, 3), TensorDataset(rows(N), rows(N, 2)), rows(N).numpy()),
    "stack by name": lambda: StackDataset(a=rows(N, 3), b=TensorDataset(rows(N))),
    "stack of stacks": lambda: StackDataset(a=StackDataset(rows(N, 2), rows(N)), b=rows(N)),
}
# What is left to Python: not everything that looks alike collates alike.
PYTHON: dict[str, Callable[[], Any]] = {
    "vector of float64": lambda: np.arange(N, dtype=np.float64),
    "big-endian": lambda: np.arange(N * 3, dtype=">f4").reshape(N, 3),
    "reversed": lambda: rows(N, 3).numpy()[::-1],
    "masked": lambda: np.ma.masked_array(np.ones((N, 2)), np.zeros((N, 2))),
    "list": lambda: [(rows(3), i) for i in range(N)],
    "concat of unequal rows": lambda: ConcatDataset(
        [TensorDataset(rows(25, 3)), TensorDataset(rows(25, 4))]
    ),
    "concat of a tensor and an array": lambda: ConcatDataset([rows(25, 3), rows(25, 3).numpy()]),
    "stack with a subset": lambda: StackDataset(rows(5, 3), Subset(rows(9, 3), [5, 4, 3, 2, 1])),
    "own columns": lambda: type("Mine", (Columns,), {})(a=rows(N)),
}


def _typed(name: str) -> bool:
    return name != "vector of float64" or torch.as_tensor([np.float64(1)]).dtype != torch.float64


@pytest.mark.parametrize("workers", [0, 2])
@pytest.mark.parametrize("name", SOURCES)
def test_sources_are_gathered_natively(name: str, workers: int) -> None:
    for arguments in ({"shuffle": True}, {"drop_last": True}):
        arguments = {"batch_size": 8, "num_workers": workers, **arguments}
        ours = DataLoader(SOURCES[name](), **arguments)
        assert epoch(ours) == epoch(TorchLoader(SOURCES[name](), **{**arguments, "num_workers": 0}))
        assert isinstance(iter(ours), GatherIter | WorkerGatherIter)


@pytest.mark.parametrize("name", PYTHON)
def test_other_sources_are_left_to_python(name: str) -> None:
    def run(cls: Any) -> Any:
        try:
            return epoch(cls(PYTHON[name](), 8, shuffle=True))
        except Exception as error:
            return (type(error), str(error).split("\n  in the batch")[0])

    assert run(DataLoader) == run(TorchLoader)
    if _typed(name):
        assert isinstance(iter(DataLoader(PYTHON[name](), 8)), LocalIter)


def test_indices_out_of_range_and_negative() -> None:
    for make in (SOURCES["concat"], SOURCES["array"], SOURCES["stack by name"]):
        for batch in ([0, -1, 5], [49, -50], [50], [-51], [3, 1000]):
            logs = []
            for cls in (TorchLoader, DataLoader):
                try:
                    logs.append([seen(b) for b in cls(make(), batch_sampler=[batch])])
                except Exception as error:
                    logs.append((type(error), str(error)))
            assert logs[0] == logs[1]


def test_columns() -> None:
    table = Columns({"a": rows(4, 2)}, b=np.arange(4))
    assert table.column_names == ["a", "b"]
    assert len(table) == 4
    assert table["b"][2] == 2
    assert table[1]["a"].tolist() == [2.0, 3.0]
    with pytest.raises(ValueError, match="expected at least one column"):
        Columns()
    with pytest.raises(ValueError, match=r"the same size for every column, got \{'a': 2, 'b': 3\}"):
        Columns(a=rows(2), b=rows(3))
    with pytest.raises(TypeError, match="b: expected a tensor or an array of at least one"):
        Columns(b=[1, 2])


@pytest.mark.parametrize("workers", [0, 2])
def test_memmaps_and_truncated_ones(tmp_path: Any, workers: int) -> None:
    file = tmp_path / "rows"
    content = rows(400, 5000)
    content.numpy().tofile(file)
    for offset in (0, 5000 * 4 * 3):
        mapped = np.memmap(file, np.float32, "r", offset, (397, 5000))
        loader = DataLoader(Columns(x=mapped, i=np.arange(397)), 10, num_workers=workers)
        skipped = offset // 20_000
        got = torch.cat([batch["x"] for batch in loader])
        assert torch.equal(got, content[skipped : skipped + 397])
        iterator = iter(loader)
        assert isinstance(iterator, GatherIter | WorkerGatherIter)
        next(iterator)
    # A file that is cut while it is being read is beyond help: nothing is under way here.
    assert gone(lambda: all(b.done for b in getattr(iterator, "_under_way", [])))
    with open(file, "r+b") as f:
        f.truncate(100_000)
    with pytest.raises(RuntimeError, match=r"memmap .*rows: expected a file of .* it has 100"):
        for _ in iterator:
            pass
    with pytest.raises(RuntimeError, match="truncated"):
        data.collate([mapped[0], mapped[390]])


def test_arrays_written_between_batches() -> None:
    """Nobody counts writes to an array: none of its rows is read before its batch is asked for."""
    array = np.zeros((64, 20_000), np.float32)
    loader = DataLoader(array, 8)
    for k, batch in enumerate(loader):
        assert (batch == k).all()
        array += 1


# --- threads -------------------------------------------------------------------------------------


class Samples(Dataset):
    def __init__(self, n: int = 60, delay: float = 0.0, fail: int | None = None) -> None:
        self.n, self.delay, self.fail = n, delay, fail
        self.seen_in: set[str] = set()

    def __len__(self) -> int:
        return self.n

    def __getitem__(self, i: int) -> Any:
        if self.delay:
            time.sleep(self.delay)
        if i == self.fail:
            raise ValueError(f"sample {i} is bad")
        self.seen_in.add(threading.current_thread().name)
        return {"x": torch.full((3, 4), i), "i": i, "text": str(i)}


class Numbers(IterableDataset):
    def __init__(self, n: int = 53) -> None:
        self.n = n

    def __iter__(self) -> Iterator[Any]:
        for i in range(self.n):
            yield i, torch.full((2,), i)


@pytest.mark.parametrize("threads_", [1, 3])
def test_threads_give_the_same_batches(threads_: int) -> None:
    for make, arguments in (
        (Samples, {"batch_size": 7, "shuffle": True}),
        (Samples, {"batch_size": None}),
        (Samples, {"batch_size": 7, "drop_last": True}),
        (lambda: TensorDataset(rows(N, 3)), {"batch_size": 7, "shuffle": True}),
        (Numbers, {"batch_size": 5}),
        (Numbers, {"batch_size": 5, "drop_last": True}),
        (Numbers, {"batch_size": None}),
        (lambda: Numbers(0), {"batch_size": 4}),
    ):
        loader = DataLoader(make(), threads=threads_, **arguments)
        assert isinstance(iter(loader), ThreadIter)
        for _ in range(2):
            assert epoch(loader) == epoch(TorchLoader(make(), **arguments))


def test_threads_know_themselves() -> None:
    found: dict[int, Any] = {}
    barrier = threading.Barrier(3)

    class Asks(Dataset):
        def __len__(self) -> int:
            return 12

        def __getitem__(self, i: int) -> int:
            info = data.get_worker_info()
            found[info.id] = info
            if i < 3:
                barrier.wait(10)
            return i

    started: list[int] = []
    dataset = Asks()
    torch.manual_seed(5)
    base = torch.empty((), dtype=torch.int64).random_().item()
    torch.manual_seed(5)
    loader = DataLoader(dataset, 1, threads=3, worker_init_fn=started.append)
    assert len(list(loader)) == 12
    assert sorted(started) == [0, 1, 2] == sorted(found)
    for k, info in found.items():
        assert (info.num_workers, info.seed, info.dataset) == (3, base + k, dataset)
        assert info.generator.initial_seed() == base + k
    assert data.get_worker_info() is None


def test_threads_fetch_at_once_and_stop() -> None:
    dataset = Samples(40, delay=0.005)
    begun = time.perf_counter()
    assert len(list(DataLoader(dataset, 5, threads=4))) == 8
    assert time.perf_counter() - begun < 0.19  # 0.2 s one after the other
    assert len(dataset.seen_in) > 1
    assert gone(lambda: not named_threads())


def started_threads() -> list[threading.Thread]:
    """Of those that Ctrl-C kept from starting, Python keeps a record for ever."""
    return [t for t in threading.enumerate() if t.ident is not None]


def named_threads() -> list[str]:
    return [t.name for t in started_threads() if t.name.startswith("batchops-data")]


def gone(condition: Callable[[], bool], seconds: float = 2.0) -> bool:
    deadline = time.monotonic() + seconds
    while not condition():
        if time.monotonic() > deadline:
            return False
        time.sleep(0.005)
    return True


def test_iterators_whose_last_reference_a_thread_of_their_own_has(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    class SlowReference(weakref.ref):
        """Who calls it holds the iterator long enough that it is dropped meanwhile."""

        def __call__(self) -> Any:
            strong = super().__call__()
            time.sleep(0.02)
            return strong

    monkeypatch.setattr("batchops.data._threads.weakref", types.SimpleNamespace(ref=SlowReference))
    for _ in range(10):
        iterator = iter(DataLoader(Samples(), 2, threads=2))
        next(iterator)
        del iterator
    assert gone(lambda: not named_threads()), named_threads()


def test_a_stream_that_never_returns_keeps_one_thread() -> None:
    entered, leave = threading.Event(), threading.Event()

    class Blocks(IterableDataset):
        def __iter__(self) -> Iterator[int]:
            yield from range(4)
            entered.set()
            leave.wait(20)

    iterator = iter(DataLoader(Blocks(), 2, threads=4))
    assert next(iterator).tolist() == [0, 1]
    assert entered.wait(10)
    del iterator
    assert gone(lambda: len(named_threads()) == 1), named_threads()
    leave.set()
    assert gone(lambda: not named_threads(), 0.2)


@pytest.mark.parametrize("in_order", [True, False])
def test_batches_go_on_after_an_interrupt_in_the_loader(in_order: bool) -> None:
    """At any step: what comes after it is right, comes once, and nobody waits for what was lost."""
    files = tuple(f"data{os.sep}{name}.py" for name in ("_iterators", "_threads"))
    samples, size = list(range(60)), 2
    want = [batch.tolist() for batch in DataLoader(samples, size)]
    interrupted = 0
    for step in range(0, 400, 3):
        left = step

        def trace(frame: Any, event: str, _: Any) -> Any:
            nonlocal left
            if not frame.f_code.co_filename.endswith(files):
                return None
            frame.f_trace_opcodes = True
            if event == "opcode":
                left -= 1
                if left == 0:
                    raise KeyboardInterrupt
            return trace

        iterator = iter(DataLoader(samples, size, threads=2, in_order=in_order, timeout=10))
        seen = [next(iterator).tolist()]
        sys.settrace(trace)
        try:
            seen.append(next(iterator).tolist())
        except KeyboardInterrupt:
            interrupted += 1
        finally:
            sys.settrace(None)
        seen += [batch.tolist() for batch in iterator]
        assert len(seen) >= len(want) - 2
        assert all(seen.count(batch) == 1 for batch in seen)
        assert all(batch in want for batch in seen)
        assert not in_order or seen == [batch for batch in want if batch in seen]
    assert interrupted > 50
    del iterator
    assert gone(lambda: not named_threads()), named_threads()


def test_threads_end_after_an_interrupt_while_they_are_started() -> None:
    """At any step of Python's own threading: one between taking a lock and the block that gives it
    back would leave it taken."""
    interrupted = 0
    for step in range(1, 200):
        left = step

        def trace(frame: Any, event: str, _: Any) -> Any:
            nonlocal left
            if frame.f_code.co_filename != threading.__file__:
                return trace  # what it calls is looked at
            left -= 1
            if left == 0:
                raise KeyboardInterrupt
            return trace

        sys.settrace(trace)
        try:
            iter(DataLoader(Samples(20), 2, threads=2))
        except KeyboardInterrupt:
            interrupted += 1
        finally:
            sys.settrace(None)
    assert interrupted > 50
    assert gone(lambda: not named_threads()), named_threads()
    assert all(crew.join(2) for crew in _crews)  # as at the end of the process


def test_a_thread_that_cannot_be_started_is_an_error(monkeypatch: pytest.MonkeyPatch) -> None:
    started, start = [], threading.Thread.start

    def second_fails(thread: threading.Thread) -> None:
        if started:
            raise RuntimeError("can't start new thread")
        started.append(thread)
        start(thread)

    monkeypatch.setattr(threading.Thread, "start", second_fails)
    with pytest.raises(RuntimeError, match="can't start new thread"):
        iter(DataLoader(Samples(20), 2, threads=2))
    assert gone(lambda: not named_threads()), named_threads()


def test_threads_out_of_order_timeout_and_arguments() -> None:
    class Slow(Samples):
        def __getitem__(self, i: int) -> Any:
            time.sleep(0.2 if i == 0 else 0)
            return i

    got = [int(b) for b in DataLoader(Slow(6), 1, threads=2, in_order=False)]
    assert sorted(got) == list(range(6))
    assert got[0] != 0
    with pytest.raises(RuntimeError, match=r"DataLoader timed out after 0\.05 seconds"):
        next(iter(DataLoader(Slow(6), 1, threads=1, timeout=0.05)))
    for wrong, text in (
        ({"threads": 0}, "threads: expected an integer >= 1, got 0"),
        ({"threads": 2, "num_workers": 1}, "expected num_workers=0 beside it, got 1"),
        ({"ring_bytes": -1}, "ring_bytes: expected an integer >= 0, got -1"),
        ({"ring_bytes": True}, "ring_bytes: expected an integer >= 0, got True"),
        ({"collator": data.collate, "collate_fn": list}, "expected no other collate_fn"),
    ):
        with pytest.raises(ValueError, match=text):
            DataLoader(Samples(), 2, **wrong)


# --- worker processes and errors -----------------------------------------------------------------


WAYS = {
    "local": {},
    "threads": {"threads": 2},
    "processes": {"num_workers": 2},
    "threads, any order": {"threads": 2, "in_order": False},
    "processes, any order": {"num_workers": 2, "in_order": False},
}


class Odd(Dataset):
    """One sample is unlike the others: longer, without a key, or not to be had."""

    def __init__(self, kind: str) -> None:
        self.kind = kind

    def __len__(self) -> int:
        return 12

    def __getitem__(self, i: int) -> Any:
        if i != 9:
            return {"x": torch.ones(3)}
        if self.kind == "fails":
            raise ValueError("no such file")
        if self.kind == "KeyError":
            raise KeyError("file")
        return {"x": torch.ones(4)} if self.kind == "shape" else {"y": torch.ones(3)}


def _error(loader: Any) -> Exception:
    """The first that comes: in which place is left open by in_order=False."""
    iterator = iter(loader)
    try:
        for _ in range(3):
            next(iterator)
    except Exception as error:
        # Without the frames, which would keep the iterator and its workers.
        return error.with_traceback(None)
    finally:
        del iterator
    raise AssertionError("nothing raised")


@pytest.mark.parametrize("way", WAYS)
def test_errors_name_the_dataset_index(way: str) -> None:
    batches = [[0, 1, 2], [3, 9, 4], [5, 6]]
    error = _error(DataLoader(Odd("shape"), batch_sampler=batches, **WAYS[way]))
    text = str(error)
    assert type(error) is RuntimeError
    assert (
        "stack expects each tensor to be equal size, but got [3] at entry 0 and [4] at entry 1"
        in (text)
    )
    assert "position 1, sample['x']: Tensor of shape (4,)" in text
    assert "(dataset index 9)" in text
    error = _error(DataLoader(Odd("key"), batch_sampler=batches, **WAYS[way]))
    text = str(error)
    assert isinstance(error, KeyError)
    assert "\\n" not in text, "lines, not their repr"
    assert "'x'\n  in the batch: position 1, sample: dict with keys ['y']" in text
    assert text.endswith("(dataset index 9)")
    if way == "local":
        assert error.args == ("x",)
    else:
        assert text.startswith("Caught KeyError in DataLoader ")


class CollatesItself(Odd):
    """Views of a sample, made one tensor; of the third that fails at position 1."""

    def __getitem__(self, i: int) -> Any:
        views = [torch.ones(3), torch.ones(4 if i == 2 else 3)]
        return data.collate(views)


def _without_nothing(batch: list[Any]) -> Any:
    return data.collate([sample for sample in batch if sample is not None])


class Holes(Odd):
    def __getitem__(self, i: int) -> Any:
        return None if i == 0 else torch.ones(i)


@pytest.mark.parametrize("way", WAYS)
@pytest.mark.parametrize(
    ("dataset", "collate_fn"),
    [(CollatesItself(""), None), (Holes(""), _without_nothing)],
    ids=["in the dataset", "after samples were left out"],
)
def test_positions_in_other_lists_are_no_index(way: str, dataset: Any, collate_fn: Any) -> None:
    loader = DataLoader(
        dataset, batch_sampler=[[0, 1, 2, 3]] * 3, collate_fn=collate_fn, **WAYS[way]
    )
    text = str(_error(loader))
    assert "position 1, sample: Tensor" in text
    assert "(dataset index" not in text
    assert way == "local" or text.endswith("dataset indices 0, 1, 2, 3")


@pytest.mark.parametrize("kind", ["fails", "KeyError"])
@pytest.mark.parametrize("way", WAYS)
def test_errors_of_samples_name_their_batch(way: str, kind: str) -> None:
    """Which sample it was is known to nobody but the dataset; in this process its error is its
    own, untouched."""
    error = _error(DataLoader(Odd(kind), batch_sampler=[[3, 9, 4]] * 2, **WAYS[way]))
    stock = _error(TorchLoader(Odd(kind), batch_sampler=[[3, 9, 4]]))
    assert type(error) is type(stock)
    if way == "local":
        assert error.args == stock.args
    else:
        assert str(stock) in str(error)
        assert str(error).endswith("\n  in the batch: dataset indices 3, 9, 4")
    many = DataLoader(Odd(kind), batch_sampler=[[9] * 40], **WAYS[way])
    alone = DataLoader(Odd(kind), batch_size=None, sampler=[9], **WAYS[way])
    if way != "local":
        assert str(_error(many)).endswith(", 9, 9, and 24 more")
        assert str(_error(alone)).endswith("in the batch: dataset index 9")


@pytest.mark.parametrize("arguments", [{"threads": 2}, {"num_workers": 1}], ids=str)
def test_errors_of_streams_name_no_index(arguments: dict[str, Any]) -> None:
    text = str(_error(DataLoader(Failing(), 2, **arguments)))
    assert "lost the line" in text
    assert "dataset ind" not in text


class Uneven(IterableDataset):
    def __iter__(self) -> Iterator[Any]:
        return iter([torch.zeros(3), torch.zeros(4)])


@pytest.mark.parametrize("way", WAYS)
def test_collation_of_a_stream_names_the_position_alone(way: str) -> None:
    with pytest.raises(RuntimeError) as caught:
        next(iter(DataLoader(Uneven(), 2, **WAYS[way])))
    assert "position 1, sample: Tensor of shape (4,)" in str(caught.value)
    assert "dataset ind" not in str(caught.value)


def test_explained_errors_keep_notes_and_attributes(monkeypatch: pytest.MonkeyPatch) -> None:
    def stack(batch: Any, **_: Any) -> Any:
        error = RuntimeError("no such shape")
        error.add_note("seen at noon")
        error.code = 7
        raise error from ZeroDivisionError("before")

    monkeypatch.setitem(torch.utils.data._utils.collate.default_collate_fn_map, Tiny, stack)
    with pytest.raises(RuntimeError) as caught:
        next(iter(DataLoader([Tiny(), Tiny()], 2)))
    error = caught.value
    assert str(error).startswith("no such shape\n  in the batch: position 0")
    assert "dataset index 0" in str(error)
    assert error.__notes__ == ["seen at noon"]
    assert error.code == 7
    assert isinstance(error.__cause__, ZeroDivisionError)


class Tiny:
    pass


class Stops(Dataset):
    def __len__(self) -> int:
        return 8

    def __getitem__(self, i: int) -> int:
        if i == 3:
            raise StopIteration
        return i


@pytest.mark.parametrize("way", ["local", "threads", "processes"])
def test_stop_iteration_of_a_sample_ends_the_loop_as_in_torch(way: str) -> None:
    workers = {"num_workers": WAYS[way].get("num_workers", 0)}
    want = [batch.tolist() for batch in TorchLoader(Stops(), 2, **workers)]
    assert want == [[0, 1]]
    assert [batch.tolist() for batch in DataLoader(Stops(), 2, **WAYS[way])] == want


@pytest.mark.parametrize("arguments", [{"num_workers": 1}, {"threads": 2}], ids=str)
def test_stop_iteration_of_a_collate_fn_ends_a_stream_as_in_torch(arguments: Any) -> None:
    workers = {"num_workers": arguments.get("num_workers", 1)}
    want = list(TorchLoader(Counted(12), 2, collate_fn=stops_at_four, **workers))
    assert want == [[0, 1], [2, 3]]
    assert list(DataLoader(Counted(12), 2, collate_fn=stops_at_four, **arguments)) == want


class Counted(IterableDataset):
    def __init__(self, n: int) -> None:
        self.n = n

    def __iter__(self) -> Iterator[int]:
        return iter(range(self.n))


def stops_at_four(batch: list[int]) -> list[int]:
    if 4 in batch:
        raise StopIteration
    return batch


class Failing(IterableDataset):
    def __iter__(self) -> Iterator[Any]:
        yield 1
        raise OSError("lost the line")


@pytest.mark.parametrize("arguments", [{"threads": 2}, {"num_workers": 2}], ids=str)
def test_an_error_does_not_keep_the_iterator_alive(arguments: dict[str, Any]) -> None:
    iterator = iter(DataLoader(Samples(9, fail=5), 3, **arguments))
    next(iterator)
    with contextlib.suppress(ValueError):
        next(iterator)
    alive = weakref.ref(iterator)
    gc.disable()
    try:
        begun = time.perf_counter()
        del iterator
        assert alive() is None
        assert time.perf_counter() - begun < 2
    finally:
        gc.enable()


NO_CYCLES: dict[str, Callable[[], Any]] = {
    "the end of a stream": lambda: list(DataLoader(Counted(12), 5)),
    "an error of collation": lambda: list(DataLoader(Odd("shape"), 4)),
    "an error of a sample": lambda: list(DataLoader(Odd("fails"), 4)),
    "an error of a stream": lambda: list(DataLoader(Failing(), 4)),
    "collate": lambda: data.collate([torch.zeros(2), torch.zeros(3)]),
    "Collator": lambda: data.Collator()([torch.zeros(2), torch.zeros(3)]),
    "Collator, as it was": lambda: data.Collator(pad=data.Pad({"x": 0}))([{"y": [1]}]),
}


@pytest.mark.parametrize("name", NO_CYCLES)
def test_errors_are_in_no_cycle_with_the_frames_they_went_through(name: str) -> None:
    """Those hold batches, and iterators with their workers."""

    def attempt() -> None:
        with contextlib.suppress(Exception):
            NO_CYCLES[name]()

    attempt()
    gc.collect()
    gc.disable()
    try:
        attempt()
        gc.set_debug(gc.DEBUG_SAVEALL)
        gc.collect()
        assert not [value for value in gc.garbage if isinstance(value, types.FrameType)]
    finally:
        gc.set_debug(0)
        gc.garbage.clear()
        gc.enable()


@pytest.mark.parametrize("persistent", [False, True])
def test_workers_of_an_iterator_in_a_cycle_end_at_once(persistent: bool) -> None:
    """As that of an error which the user keeps: the garbage collector takes their queues first."""
    loader = DataLoader(Samples(9), 3, num_workers=2, persistent_workers=persistent)
    iterator = iter(loader)
    next(iterator)
    workers = list(iterator._workers)
    iterator.itself = iterator
    del loader, iterator
    begun = time.perf_counter()
    gc.collect()
    assert time.perf_counter() - begun < 4, "torch waits for five seconds"
    assert gone(lambda: not any(worker.is_alive() for worker in workers))


def test_worker_processes_collate_into_shared_memory() -> None:
    for method in ("fork", "spawn"):
        loader = DataLoader(
            SharedAndNot(),
            4,
            num_workers=1,
            multiprocessing_context=method,
            persistent_workers=True,
        )
        for _ in range(2):
            batches = list(loader)
            assert isinstance(loader._iterator, ProcessIter)
            assert all(b["x"].is_shared() for b in batches)
            assert torch.equal(torch.cat([b["x"] for b in batches]), rows(10, 40_000))
            assert all(b["native"].all() for b in batches)
        loader._iterator._shutdown_workers()


class SharedAndNot(Dataset):
    def __len__(self) -> int:
        return 10

    def __getitem__(self, i: int) -> Any:
        torch.stack = None  # nothing here may need it
        return {"x": rows(10, 40_000)[i], "native": data.get_worker_info() is not None}


@pytest.mark.parametrize("seed", range(4))
def test_worker_processes_match_torch(seed: int) -> None:
    def run(cls: Any) -> Any:
        torch.manual_seed(seed)
        loader = cls(
            Samples(30),
            4,
            shuffle=True,
            num_workers=2,
            persistent_workers=seed % 2 == 1,
            prefetch_factor=1 + seed % 3,
            generator=torch.Generator() if seed > 1 else None,
        )
        got = [seen(b) for _ in range(2) for b in loader]
        return got, torch.get_rng_state().numpy().tobytes()

    assert run(DataLoader) == run(TorchLoader)


# --- slots ---------------------------------------------------------------------------------------


class Pages:
    """Stands in for CUDA's page locking: remembers what is locked, and can refuse."""

    def __init__(self, most: int = 1 << 60) -> None:
        self.most = most
        self.locked: dict[int, int] = {}

    def lock(self, address: int, nbytes: int) -> bool:
        assert address % 4096 == 0
        if sum(self.locked.values()) + nbytes > self.most:
            return False
        self.locked[address] = nbytes
        return True

    def unlock(self, address: int, nbytes: int) -> None:
        assert self.locked.pop(address) == nbytes


class Event:
    def __init__(self) -> None:
        self.over = False
        self.recorded: Any = None

    def record(self, stream: Any) -> None:
        self.recorded = stream

    def query(self) -> bool:
        return self.over

    def synchronize(self) -> None:
        self.over = True


def test_a_slot_waits_for_views_and_for_copies() -> None:
    pages = Pages()
    memory = Memory(1 << 30, pages=pages)
    first = memory.empty((RING_BYTES,), torch.uint8)
    address = first.data_ptr()
    assert pages.locked.get(address, 0) >= RING_BYTES
    event = Event()
    memory.hold(first, event)
    view = first[5:9]
    del first
    assert memory.stats()["leased"] == 1
    del view
    assert (memory.stats()["leased"], memory.stats()["in_flight"]) == (0, 1)
    second = memory.empty((RING_BYTES,), torch.uint8)
    assert second.data_ptr() != address
    event.over = True
    third = memory.empty((RING_BYTES,), torch.uint8)
    assert third.data_ptr() == address
    stats = memory.stats()
    assert (stats["slots"], stats["leased"], stats["reuses"], stats["allocations"]) == (2, 2, 1, 2)
    del second, third
    memory.trim()
    assert memory.stats()["bytes"] == 0
    assert not pages.locked


def test_capacity_falls_back_to_pageable_with_one_warning() -> None:
    for memory in (Memory(3 << 20), Memory(1 << 30, pages=Pages(most=3 << 20))):
        kept = [memory.empty((1 << 20,), torch.uint8) for _ in range(2)]
        with pytest.warns(UserWarning, match="no slot for a batch of 2097152 bytes") as caught:
            kept += [memory.empty((2 << 20,), torch.uint8) for _ in range(3)]
        assert len(caught) == 1
        assert memory.stats()["bytes"] <= 3 << 20
        assert memory.stats()["refusals"] >= 1
        assert len({t.data_ptr() for t in kept}) == 5
    memory = Memory(1 << 30, pages=Refuses())
    with pytest.raises(RuntimeError, match="locking failed"):
        memory.empty((1 << 20,), torch.uint8)
    assert memory.stats()["bytes"] == 0


class Refuses:
    def lock(self, address: int, nbytes: int) -> bool:
        raise RuntimeError("locking failed")

    def unlock(self, address: int, nbytes: int) -> None:
        raise AssertionError


def test_slots_of_other_sizes_make_room() -> None:
    memory = Memory(8 << 20)
    for size in (1 << 20, 2 << 20, 3 << 20, 6 << 20, 7 << 20, 1 << 20) * 3:
        tensor = memory.empty((size,), torch.uint8)
        tensor.fill_(1)
        assert memory.stats()["bytes"] <= 8 << 20
        del tensor


@pytest.mark.parametrize("width", [9, 9000], ids=["small", "in a slot"])
@pytest.mark.parametrize("way", ["local", "gather", "threads"])
def test_batches_can_be_resized_as_torchs(way: str, width: int) -> None:
    dataset: Any = TensorDataset(rows(32, width)) if way == "gather" else list(rows(32, width))
    loader = DataLoader(dataset, 8, **WAYS.get(way, {}))
    iterator = iter(loader)
    batch = next(iterator)
    batch = batch[0] if way == "gather" else batch
    other = next(iterator)
    batch.resize_(16, width)[8:] = 7
    assert torch.equal(batch[:8], rows(32, width)[:8])
    assert (batch[8:] == 7).all()
    batch.untyped_storage().resize_(0)
    del batch
    other = other[0] if way == "gather" else other
    assert torch.equal(other, rows(32, width)[8:16])
    assert loader.metrics["ring"]["leased"] <= 4, "what it does not need any more is free"


def test_warnings_point_at_the_users_line() -> None:
    loader = DataLoader(TensorDataset(rows(32, 9000)), 8, ring_bytes=0)
    with pytest.warns(UserWarning, match="no slot for a batch") as caught:
        next(iter(loader))
    assert caught[0].filename == __file__


def test_checked_slots_are_poisoned_and_watched() -> None:
    memory = Memory(1 << 30, checked=True)
    tensor = memory.empty((RING_BYTES // 4,), torch.float32)
    tensor.fill_(1.0)
    alias = torch.from_numpy(
        np.ctypeslib.as_array(
            (np.ctypeslib.ctypes.c_uint8 * RING_BYTES).from_address(tensor.data_ptr())
        )
    )
    del tensor
    assert (alias == 255).all()
    assert alias.view(torch.float32).isnan().all()
    again = memory.empty((RING_BYTES // 4,), torch.float32)
    assert again.data_ptr() == alias.data_ptr()
    del again
    alias[77] = 3
    with pytest.raises(RuntimeError, match="was written to at byte 77 after it was released"):
        memory.empty((RING_BYTES // 4,), torch.float32)


@pytest.mark.parametrize("arguments", [{}, {"num_workers": 2}, {"threads": 2}], ids=str)
def test_checked_loaders_give_the_same_batches(arguments: dict[str, Any]) -> None:
    source = rows(256, 9000)
    loader = DataLoader(TensorDataset(source), 16, shuffle=True, checked=True, **arguments)
    for _ in range(3):
        assert epoch(loader) == epoch(TorchLoader(TensorDataset(source), 16, shuffle=True))


def test_ten_thousand_batches_in_the_same_memory() -> None:
    """As many slots as batches are under way, and not one more; no growth of the process."""

    def resident() -> int:
        with open("/proc/self/statm") as file:
            return int(file.read().split()[1]) * 4096

    source = TensorDataset(rows(80, 4096), torch.arange(80))
    loader = DataLoader(source, 8, sampler=RandomSampler(source, True, 80_000))
    before = 0
    for k, batch in enumerate(loader):
        if k == 500:
            before = resident()
        del batch
    assert k == 9_999
    ring = loader.metrics["ring"]
    assert ring["allocations"] <= GatherIter.MOST_AHEAD + 2
    assert ring["allocations"] + ring["reuses"] >= 10_000
    assert resident() - before < 4 << 20


def test_batches_kept_alive_are_never_overwritten() -> None:
    source = TensorDataset(rows(300, 9000))
    for arguments in ({}, {"num_workers": 2}, {"threads": 2}):
        loader = DataLoader(source, 10, ring_bytes=2 << 20, **arguments)
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")
            kept = [batch[0][rng % 10 :] for rng, batch in enumerate(loader)]
        for k, part in enumerate(kept):
            assert torch.equal(part, source.tensors[0][k * 10 + k % 10 : k * 10 + 10])


# --- devices -------------------------------------------------------------------------------------


class Streams:
    """Stands in for torch.cuda: writes down what is asked of it, copies when told to."""

    def __init__(self) -> None:
        self.log: list[Any] = []
        self.events: list[Event] = []
        self.stack = ["main"]

    def new_stream(self, device: torch.device) -> Any:
        return "side"

    def current_stream(self, device: torch.device) -> Any:
        return self

    def wait_event(self, event: Event) -> None:
        self.log.append(("wait", self.events.index(event)))

    @contextlib.contextmanager
    def on(self, stream: Any) -> Iterator[None]:
        self.stack.append(stream)
        yield
        self.stack.pop()

    def new_event(self) -> Event:
        self.events.append(Event())
        return self.events[-1]

    def to_device(self, tensor: torch.Tensor, device: torch.device) -> torch.Tensor:
        self.log.append(("copy", self.stack[-1]))
        moved = tensor.clone().as_subclass(OnDevice)
        moved.streams = self
        return moved


class OnDevice(torch.Tensor):
    def record_stream(self, stream: Any) -> None:
        self.streams.log.append("record")


def test_transfers_are_ordered_by_events_and_hold_their_slots() -> None:
    memory = Memory(1 << 30)
    streams = Streams()
    transfer = Transfer(torch.device("cuda"), memory.hold, streams)
    batch = {"x": memory.empty((RING_BYTES,), torch.uint8).fill_(7), "names": ["a"]}
    address = batch["x"].data_ptr()
    moved = transfer(batch)
    assert streams.log == [("copy", "side"), ("wait", 0), "record"]
    assert streams.events[0].recorded == "side"
    assert moved["x"].eq(7).all()
    assert moved["names"] == ["a"]
    del batch
    assert memory.empty((RING_BYTES,), torch.uint8).data_ptr() != address
    streams.events[0].over = True
    assert memory.stats()["in_flight"] == 0


def test_a_transfer_that_fails_half_way_holds_what_it_has_begun() -> None:
    class Full(Streams):
        def to_device(self, tensor: torch.Tensor, device: torch.device) -> torch.Tensor:
            if "copy" in [what for what, *_ in self.log]:
                raise RuntimeError("out of memory")
            return super().to_device(tensor, device)

    memory = Memory(1 << 30)
    streams = Full()
    transfer = Transfer(torch.device("cuda"), memory.hold, streams)
    batch = [memory.empty((RING_BYTES,), torch.uint8) for _ in range(2)]
    with pytest.raises(RuntimeError, match="out of memory"):
        transfer(batch)
    del batch
    assert memory.stats()["in_flight"] == 2
    streams.events[0].over = True
    assert memory.stats()["in_flight"] == 0


def test_pages_are_not_unlocked_under_a_copy() -> None:
    event = Event()

    class Watched(Pages):
        def unlock(self, address: int, nbytes: int) -> None:
            assert event.over, "the copy is under way"
            super().unlock(address, nbytes)

    pages = Watched()
    memory = Memory(1 << 30, pages=pages)
    memory.hold(memory.empty((RING_BYTES,), torch.uint8), event)
    assert memory.stats()["in_flight"] == 1
    del memory
    assert event.over
    assert not pages.locked


def test_loader_moves_to_the_device(monkeypatch: pytest.MonkeyPatch) -> None:
    streams = Streams()
    monkeypatch.setattr("batchops.data._transfer.CudaStreams", lambda: streams)
    monkeypatch.setattr(torch.cuda, "current_device", lambda: 3)
    monkeypatch.setattr("batchops.data._own._locks_pages", lambda device: device == 3)
    monkeypatch.setattr("batchops.data._own.CudaPages", lambda device: Pages())
    for arguments in ({}, {"threads": 2}, {"num_workers": 1}):
        loader = DataLoader(TensorDataset(rows(64, 9000)), 16, device="cuda", **arguments)
        got = []
        for (x,) in loader:
            assert type(x) is OnDevice
            got.append(x.as_subclass(torch.Tensor))
            for event in streams.events[:-1]:
                event.over = True
        assert torch.equal(torch.cat(got), rows(64, 9000))
        assert memory_of(loader).pages.locked
        assert transfer_of(loader) is transfer_of(loader), "one stream for all epochs"
        assert transfer_of(loader).device == torch.device("cuda:3")
    meta = DataLoader(TensorDataset(rows(4, 3)), 2, device="meta")
    assert [b[0].device.type for b in meta] == ["meta", "meta"]


@pytest.mark.reduced
@pytest.mark.cuda
@pytest.mark.parametrize("arguments", [{}, {"threads": 2}, {"num_workers": 2}], ids=str)
def test_cuda_batches(arguments: dict[str, Any]) -> None:
    source = rows(4096, 3000)
    loader = DataLoader(TensorDataset(source), 128, device="cuda", checked=True, **arguments)
    total = torch.zeros((), device="cuda", dtype=torch.float64)
    for _ in range(3):
        for (x,) in loader:
            torch.cuda._sleep(1_000_000)
            total += x.double().sum()
    assert total.item() == 3 * source.double().sum().item()
    pinned = next(iter(DataLoader(TensorDataset(source), 128, pin_memory=True, **arguments)))
    assert pinned[0].is_pinned()


# --- metrics -------------------------------------------------------------------------------------


@pytest.mark.parametrize("arguments", [{}, {"num_workers": 2}, {"threads": 2}], ids=str)
def test_metrics(arguments: dict[str, Any]) -> None:
    loader = DataLoader(TensorDataset(rows(250, 9000), torch.arange(250)), 16, **arguments)
    assert loader.metrics["samples"] == 0
    held = list(loader)
    metrics = loader.metrics
    assert (metrics["samples"], metrics["batches"]) == (250, 16) == (250, len(held))
    assert metrics["samples_per_second"] > 0
    assert 0 < metrics["wait_fraction"] <= 1
    assert metrics["bytes_written_per_batch_byte"] == 1.0
    assert 0 < metrics["ring_occupancy"] <= 1
    assert metrics["ring"]["leased"] == 16
    del held
    assert loader.metrics["ring_occupancy"] == 0


def test_worker_processes_write_at_most_twice() -> None:
    loader = DataLoader(Samples(30), 5, num_workers=1)
    assert len(list(loader)) == 6
    assert 1.0 <= loader.metrics["bytes_written_per_batch_byte"] <= 2.0


def test_depth_follows_waiting() -> None:
    depth = Depth(2, 5)
    for _ in range(9):
        depth.waited(0.5, 1.0)
    assert depth.value == 5
    for _ in range(Depth.CALM):
        depth.waited(0.0, 1.0)
    assert depth.value == 4
    for _ in range(20 * Depth.CALM):
        depth.waited(0.0, 1.0)
    assert depth.value == 2
    slow = DataLoader(Samples(40, delay=0.002), 4, threads=2)
    list(slow)
    assert slow.metrics["prefetch_depth"] > 3


# --- resuming ------------------------------------------------------------------------------------


def samplings(dataset: Any, kind: str) -> dict[str, Any]:
    g = torch.Generator().manual_seed(11)
    n = len(dataset)
    return {
        "in order": dict,
        "shuffle": lambda: {"shuffle": True},
        "generator": lambda: {"shuffle": True, "generator": g},
        "replacement": lambda: {"sampler": RandomSampler(dataset, True, 77)},
        "sampler's generator": lambda: {"sampler": RandomSampler(dataset, generator=g)},
        "subset": lambda: {"sampler": SubsetRandomSampler(range(0, n, 2))},
        "weighted": lambda: {"sampler": WeightedRandomSampler([1.0] * n, 70)},
        "distributed": lambda: {"sampler": DistributedSampler(dataset, 2, 1, seed=3)},
        "batches": lambda: {"batch_sampler": BatchSampler(RandomSampler(dataset), 6, True)},
        "budget": lambda: {
            "batch_sampler": data.TokenBudgetBatchSampler([1 + i % 9 for i in range(n)], 40, seed=2)
        },
        "list": lambda: {"sampler": list(range(n - 1, -1, -1))},
    }[kind]()


KINDS = [
    *("in order", "shuffle", "generator", "replacement", "sampler's generator", "subset"),
    *("weighted", "distributed", "batches", "budget", "list"),
]


@pytest.mark.parametrize("kind", KINDS)
def test_resume_is_exact_and_small(kind: str) -> None:
    variants: list[tuple[Any, dict[str, Any]]] = [
        (lambda: TensorDataset(rows(60, 5)), {}),
        (lambda: TensorDataset(rows(60, 9000)), {}),
        (lambda: TensorDataset(rows(60, 5)), {"num_workers": 2}),
        (Samples, {}),
        (Samples, {"threads": 3}),
    ]
    if kind in ("shuffle", "generator"):
        variants.append((Samples, {"num_workers": 2}))
    for make, arguments in variants:
        dataset = make()

        def build(dataset: Any = dataset, arguments: Any = arguments, **more: Any) -> DataLoader:
            given = samplings(dataset, kind)
            size = {} if "batch_sampler" in given else {"batch_size": 7}
            return DataLoader(dataset, **given, **size, **arguments, **more)

        torch.manual_seed(3)
        loader = build()
        if kind == "distributed":
            loader.sampler.set_epoch(4)
        list(loader)  # an epoch before: not only first epochs are resumed
        iterator = iter(loader)
        for _ in range(3):
            next(iterator)
            torch.rand(2)  # the user draws too
        state = loader.state_dict()
        # 5 KB for a generator's state, where there is one
        has_rng = kind in ("generator", "sampler's generator", "subset", "weighted")
        assert len(pickle.dumps(state)) <= 1024 + 5 * 1024 * has_rng * (1 + (kind == "generator"))
        rng = torch.get_rng_state()
        rest = [seen(b) for b in iterator]
        after = [seen(b) for b in loader]

        torch.manual_seed(99)
        again = build()
        again.load_state_dict(pickle.loads(pickle.dumps(state)))
        torch.set_rng_state(rng)
        assert again.state_dict()["yielded"] == 3
        assert [seen(b) for b in again] == rest
        assert [seen(b) for b in again] == after, "the epoch after"


def test_resume_does_not_depend_on_threads() -> None:
    dataset = TensorDataset(rows(60, 9000))
    torch.manual_seed(1)
    first = DataLoader(dataset, 7, shuffle=True, num_workers=2)
    iterator = iter(first)
    for _ in range(4):
        next(iterator)
    state = first.state_dict()
    rest = [seen(b) for b in iterator]
    for arguments in ({}, {"num_workers": 1}, {"threads": 1}, {"threads": 4}):
        again = DataLoader(dataset, 7, shuffle=True, **arguments)
        again.load_state_dict(state)
        assert [seen(b) for b in again] == rest


def test_resume_between_epochs_and_before_the_first() -> None:
    loader = DataLoader(Samples(), 7, shuffle=True, generator=torch.Generator().manual_seed(2))
    fresh = loader.state_dict()
    first = [seen(b) for b in loader]
    between = loader.state_dict()
    second = [seen(b) for b in loader]
    for state, want in ((fresh, first), (between, second)):
        other = DataLoader(Samples(), 7, shuffle=True, generator=torch.Generator())
        other.load_state_dict(state)
        assert [seen(b) for b in other] == want


class Counting(Numbers):
    """An iterable dataset that can be asked where it is."""

    def __init__(self, n: int = 53) -> None:
        super().__init__(n)
        self.at = 0
        self.given = 0

    def __iter__(self) -> Iterator[Any]:
        while self.at < self.n:
            self.at += 1
            self.given += 1
            yield self.at
        self.at = 0

    def state_dict(self) -> dict[str, int]:
        return {"at": self.at}

    def load_state_dict(self, state: dict[str, int]) -> None:
        self.at = state["at"]


@pytest.mark.parametrize("make", [Numbers, Counting])
@pytest.mark.parametrize("arguments", [{}, {"threads": 2}, {"num_workers": 2}], ids=str)
def test_resume_of_iterable_datasets(make: Any, arguments: dict[str, Any]) -> None:
    loader = DataLoader(make(), 5, **arguments)
    iterator = iter(loader)
    for _ in range(4):
        next(iterator)
    state = loader.state_dict()
    rest = [seen(b) for b in iterator]
    assert rest
    again = DataLoader(make(), 5, **arguments)
    again.load_state_dict(state)
    assert [seen(b) for b in again] == rest
    if make is Counting and not arguments:
        assert again.dataset.given == 33, "asked, not replayed"


def test_states_that_do_not_fit() -> None:
    loader = DataLoader(Samples(), 7)
    for state, text in (
        ({}, "expected a state of format 1, got None"),
        (3, "got int"),
        ({"format": 1, "yielded": -1}, "yielded: expected an integer >= 0, got -1"),
    ):
        with pytest.raises(ValueError, match=text):
            loader.load_state_dict(state)
    shuffled = DataLoader(Samples(), 7, shuffle=True, generator=torch.Generator())
    with pytest.raises(ValueError, match="the state has 1 generators, and this loader has 0"):
        loader.load_state_dict(shuffled.state_dict())


# --- copies, and several threads ------------------------------------------------------------------


def test_loaders_are_copied_and_pickled_before_use() -> None:
    loader = DataLoader(TensorDataset(rows(20, 3)), 4, collator=data.Collator())
    again = pickle.loads(pickle.dumps(loader))
    assert epoch(again) == epoch(loader)


class Meeting(DataLoader):
    """Two epochs begin at once, each in its thread."""

    def __init__(self, *arguments: Any, **named: Any) -> None:
        super().__init__(*arguments, **named)
        self.both = threading.Barrier(2, timeout=30)

    def _get_iterator(self) -> Any:
        self.both.wait()
        return super()._get_iterator()


@pytest.mark.parametrize("arguments", [{}, {"threads": 1}], ids=str)
def test_two_threads_begin_epochs_of_their_own(arguments: dict[str, Any]) -> None:
    loader = Meeting(TensorDataset(torch.arange(500)), 500, shuffle=True, **arguments)
    orders: list[list[int]] = []

    def run() -> None:
        ((batch,),) = list(loader)
        orders.append(batch.tolist())

    runners = [threading.Thread(target=run) for _ in range(2)]
    for runner in runners:
        runner.start()
    for runner in runners:
        runner.join()
    assert [sorted(order) for order in orders] == [list(range(500))] * 2
    assert orders[0] != orders[1]


class Crowded(DataLoader):
    """Of names that a loader of ours might want for itself."""

    _epoch = _pending = _current = _memory = _transfer = _metrics = _counts = _own = "the user's"
    _resume_at = _resume = _gather_source = _memory_for_batches = "the user's"


@pytest.mark.parametrize("way", ["local", "threads", "processes"])
def test_names_of_subclasses_are_their_own(way: str) -> None:
    loader = Crowded(list(range(20)), 4, **WAYS[way])
    first = next(iter(loader)).tolist()
    again = Crowded(list(range(20)), 4, **WAYS[way])
    again.load_state_dict({**loader.state_dict(), "yielded": 1})
    assert [first, *(batch.tolist() for batch in again)] == np.arange(20).reshape(5, 4).tolist()
    assert loader.metrics["batches"] == 1


def test_iterators_are_made_without_iter() -> None:
    loader = DataLoader(TensorDataset(rows(20, 3)), 4)
    iterator = loader._get_iterator()
    assert [seen(next(iterator)) for _ in range(5)] == epoch(loader)


# --- failure -------------------------------------------------------------------------------------


class Moody(Dataset):
    """Fails, or takes its time, at random places."""

    def __init__(self, rng: random.Random, n: int) -> None:
        self.bad = {rng.randrange(n) for _ in range(rng.choice([0, 0, 1, 3]))}
        self.kind = rng.choice(
            [ValueError, KeyError, RuntimeError, StopIteration, KeyboardInterrupt]
        )
        self.delay = rng.choice([0, 0, 0.0005])
        self.n = n

    def __len__(self) -> int:
        return self.n

    def __getitem__(self, i: int) -> Any:
        if self.delay:
            time.sleep(self.delay)
        if i in self.bad:
            raise self.kind("bad sample")
        return torch.full((10,), i), i


EXPECTED = (ValueError, KeyError, RuntimeError, KeyboardInterrupt, ZeroDivisionError)
# A killed worker's tensors cannot be received any more, in torch either.
EXPECTED += (OSError, EOFError)


def _forked(loader: Any) -> None:
    """A child that iterates anew, whatever its parent is in the middle of, and is gone."""
    child = os.fork()
    if child == 0:
        status = 1
        try:
            with contextlib.suppress(*EXPECTED):
                for _ in loader:
                    pass
            status = 0
        finally:
            os._exit(status)
    assert os.waitpid(child, 0)[1] == 0


def _trial(seed: int) -> str:
    rng = random.Random(seed)
    n = rng.choice([1, 8, 40])
    batch = rng.choice([1, 4, 16])
    ways = ["threads", "threads", "local", "gather", "ahead"]
    way = "processes" if rng.random() < 0.03 else rng.choice(ways)
    arguments: dict[str, Any] = {"shuffle": rng.random() < 0.5, "drop_last": rng.random() < 0.3}
    if way == "threads":
        dataset: Any = Moody(rng, n)
        arguments["threads"] = rng.choice([1, 2, 4])
        arguments["in_order"] = rng.random() < 0.8
    elif way == "processes":
        dataset = Moody(rng, n)
        arguments["num_workers"] = rng.choice([1, 2])
        arguments["in_order"] = rng.random() < 0.8
        arguments["persistent_workers"] = rng.random() < 0.3
    elif way == "local":
        dataset = Moody(rng, n)
    else:
        dataset = TensorDataset(rows(n, rng.choice([3, 9000])))
        arguments["num_workers"] = 2 if way == "ahead" else 0
    loader = DataLoader(dataset, batch, **arguments)
    fates = ["end", "break", "drop", "raise", "error in loop", "resume", "Ctrl-C"]
    fates += ["killed"] if way == "processes" else ["interrupted"]
    if way != "processes" and rng.random() < 0.1:
        fates = ["fork"]
    for _ in range(rng.choice([1, 2])):
        fate = rng.choice(fates)
        stop = rng.randrange(6)
        with contextlib.suppress(*EXPECTED):
            try:
                if fate == "interrupted":  # wherever it is by then
                    signal.setitimer(signal.ITIMER_REAL, rng.uniform(1e-5, 2e-3))
                iterator = iter(loader)
                for k, _ in enumerate(iterator):
                    if k == stop:
                        if fate == "break":
                            break
                        if fate == "drop":
                            del iterator
                            break
                        if fate == "error in loop":
                            raise ZeroDivisionError
                        if fate == "Ctrl-C":
                            signal.raise_signal(signal.SIGINT)
                        if fate == "killed":
                            os.kill(rng.choice(iterator._workers).pid, signal.SIGKILL)
                        if fate == "fork":
                            _forked(loader)
                        if fate == "resume":
                            loader.load_state_dict(loader.state_dict())
                            break
            finally:
                signal.setitimer(signal.ITIMER_REAL, 0)
        iterator = None
    return way


def _raise_interrupt(*_: Any) -> None:
    raise KeyboardInterrupt


def test_a_thousand_random_failures_leave_nothing_behind(monkeypatch: pytest.MonkeyPatch) -> None:
    # How long torch waits before it looks whether a worker is alive.
    monkeypatch.setattr(torch.utils.data._utils, "MP_STATUS_CHECK_INTERVAL", 0.1)
    monkeypatch.setattr(ProcessIter._try_get_data, "__defaults__", (0.1,))
    # An interrupt that comes in a destructor is dropped; kept, its frames would keep the iterator.
    monkeypatch.setattr(sys, "unraisablehook", lambda _: None)
    before = started_threads()
    handlers = {signal.SIGALRM: _raise_interrupt, signal.SIGINT: signal.default_int_handler}
    handlers = {number: signal.signal(number, to) for number, to in handlers.items()}
    try:
        ways = collections.Counter(_trial(seed) for seed in range(1000))
    finally:
        for number, handler in handlers.items():
            signal.signal(number, handler)
    assert min(ways.values()) >= 20, ways
    gc.collect()
    assert gone(lambda: not named_threads()), named_threads()
    assert gone(lambda: not multiprocessing.active_children()), multiprocessing.active_children()
    assert gone(lambda: set(started_threads()) <= set(before)), started_threads()


def test_shutdown_follows_the_users_code_at_once() -> None:
    entered, leave = threading.Event(), threading.Event()

    class Blocks(Samples):
        def __getitem__(self, i: int) -> Any:
            if i >= 4:
                entered.set()
                leave.wait(10)
            return i

    iterator = iter(DataLoader(Blocks(), 4, threads=2))
    next(iterator)
    entered.wait(10)
    alive = weakref.ref(iterator)
    begun = time.perf_counter()
    del iterator
    assert time.perf_counter() - begun < 0.2, "dropping waits for nobody"
    assert alive() is None
    leave.set()
    assert gone(lambda: not named_threads(), 0.2)


PROGRAM = """
import os, signal, sys, threading, time
import torch
from torch.utils.data import Dataset, TensorDataset
from batchops import data
torch.set_num_threads(2)

class Slow(Dataset):
    def __len__(self): return 1000
    def __getitem__(self, i):
        time.sleep(0.001)
        return torch.full((100,), i)
"""


def run_program(body: str, expected: int = 0) -> str:
    import subprocess
    import sys
    import textwrap

    begun = time.monotonic()
    done = subprocess.run(
        [sys.executable, "-c", PROGRAM + textwrap.dedent(body)],
        capture_output=True,
        text=True,
        timeout=60,
        check=False,
    )
    assert done.returncode == expected, (time.monotonic() - begun, done.stdout, done.stderr)
    return done.stdout + done.stderr


@pytest.mark.parametrize("start", ["fork", "spawn"])
def test_the_flag_that_ends_workers_has_no_lock_for_a_killed_one_to_keep(start: str) -> None:
    """torch's event has: with it, this waits for ever at about the second process."""
    context = multiprocessing.get_context(start)
    for _ in range(20 if start == "fork" else 2):
        flag = SharedFlag(context)
        process = context.Process(target=_look_for_ever, args=(flag,), daemon=True)
        process.start()
        time.sleep(0.01 if start == "fork" else 1)
        process.kill()
        process.join()
        assert not flag.is_set()
        flag.set()
        assert flag.is_set()
    iterator = iter(DataLoader(Samples(8), 2, num_workers=1, multiprocessing_context="fork"))
    assert type(iterator._workers_done_event) is SharedFlag
    assert len(list(iterator)) == 4


def test_a_flag_is_seen_by_other_processes() -> None:
    context = multiprocessing.get_context("fork")
    flag = SharedFlag(context)
    process = context.Process(target=_look_for_ever, args=(flag,), daemon=True)
    process.start()
    flag.set()
    process.join(20)
    assert process.exitcode == 0


def _look_for_ever(flag: Any) -> None:
    while not flag.is_set():
        pass


def test_an_error_of_a_killed_worker_at_the_end_of_the_program() -> None:
    words = run_program(
        """
        iterator = iter(data.DataLoader(Slow(), 10, num_workers=2))
        next(iterator)
        os.kill(iterator._workers[0].pid, signal.SIGKILL)
        time.sleep(30)
        """,
        expected=1,
    )
    assert "killed by signal" in words
    assert "Exception ignored" not in words


def test_exit_with_batches_in_flight_and_forks() -> None:
    run_program("""
        loader = data.DataLoader(Slow(), 10, threads=3)
        iterator = iter(loader)
        next(iterator)
        wide = iter(data.DataLoader(TensorDataset(torch.zeros(500, 20000)), 50))
        kept = next(wide)
        processes = iter(data.DataLoader(Slow(), 10, num_workers=1))
        next(processes)

        # A forked child has no threads of its parent's, and makes its own.
        child = os.fork()
        if child == 0:
            torch.set_num_threads(1)  # OpenMP does not survive a fork
            try:
                while True:
                    next(iterator)
            except RuntimeError as error:
                assert "iterate over the loader anew" in str(error)
            del iterator
            for arguments in ({"threads": 2}, {}):
                got = torch.cat(list(data.DataLoader(Slow(), 100, **arguments)))
                assert got[:, 0].tolist() == list(range(1000))
            wide = TensorDataset(torch.ones(500, 20000))
            assert len(list(data.DataLoader(wide, 50, num_workers=2))) == 10
            assert data.collate([torch.ones(100_000)] * 2).sum() == 200_000
            del kept
            os._exit(0)
        assert os.waitpid(child, 0)[1] == 0
        assert next(iterator)[0, 0] == 10
        begun = time.monotonic()
        import atexit
        atexit.register(lambda: print("left", time.monotonic() - begun < 5))
        """)


def test_ctrl_c_in_a_loop_over_threads() -> None:
    text = run_program(
        """
        # A shell's background jobs inherit a SIGINT that is ignored.
        signal.signal(signal.SIGINT, signal.default_int_handler)
        threading.Timer(0.3, lambda: os.kill(os.getpid(), signal.SIGINT)).start()
        try:
            for _ in range(100):
                for batch in data.DataLoader(Slow(), 10, threads=2):
                    pass
        except KeyboardInterrupt:
            print("interrupted", end=" ")
        time.sleep(0.2)
        print([t.name for t in threading.enumerate() if t.name.startswith("batchops")])
        """
    )
    assert "interrupted []" in text


def test_a_killed_worker_is_an_error_as_in_torch() -> None:
    run_program("""
        class Dies(Slow):
            def __getitem__(self, i):
                if i == 3:
                    os.kill(os.getpid(), signal.SIGKILL)
                return i

        for cls in (torch.utils.data.DataLoader, data.DataLoader):
            try:
                # Without tensors: a dead worker's cannot be received, which is an error of its own.
                for _ in cls(Dies(), 1, num_workers=1, collate_fn=list):
                    pass
            except RuntimeError as error:
                assert "DataLoader worker (pid" in str(error), error
            else:
                raise AssertionError("nothing raised")
        # and the next one works
        assert len(list(data.DataLoader(Slow(), 500, num_workers=1))) == 2
        """)


def test_native_threads_are_made_late_and_bounded() -> None:
    run_program("""
        from batchops import _C
        assert _C.collate_threads() == 0
        data.collate([torch.ones(3)] * 2)
        assert _C.collate_threads() == 0
        large = [torch.ones(100_000)] * 8
        data.collate(large)
        assert _C.collate_threads() == 0  # torch's own threads helped
        thread = threading.Thread(target=data.collate, args=(large,))
        thread.start()
        thread.join()
        assert 0 < _C.collate_threads() <= 2
        """)


def test_concat_and_ring_refuse_nonsense() -> None:
    table = _C.Table([(4096, 5, 8, 8, [], [])])
    with pytest.raises(ValueError, match="the same columns in each"):
        _C.Concat([table, _C.Table([(4096, 5, 4, 4, [], [])])])
    with pytest.raises(ValueError, match="expected at least one, got none"):
        _C.Concat([])
    assert _C.Concat([table, table]).resolve([9, -1, 4]) is not None
    assert _C.Concat([table, table]).resolve([10]) is None


# --- what users of torch's loader do to it -------------------------------------------------------

USED = {
    "local": lambda: DataLoader(Samples(6), 2),
    "gathered": lambda: DataLoader(TensorDataset(torch.arange(6)), 2, shuffle=True),
    "gathered ahead": lambda: DataLoader(TensorDataset(torch.arange(6)), 2, num_workers=2),
    "threads": lambda: DataLoader(Samples(6), 2, threads=2),
    "collator": lambda: DataLoader(Samples(6), 2, collator=data.Collator()),
}


@pytest.mark.parametrize("make", USED.values(), ids=USED)
@pytest.mark.parametrize("when", ["during an epoch", "after one"])
def test_a_used_loader_is_pickled_and_copied(make: Callable[[], Any], when: str) -> None:
    loader = make()
    iterator = iter(loader)
    next(iterator)
    if when == "after one":
        list(iterator)
    for again in (pickle.loads(pickle.dumps(loader)), copy.deepcopy(loader), copy.copy(loader)):
        assert again.metrics["batches"] == 0
        assert len(list(again)) == 3
        assert again.metrics["batches"] == 3
    assert len(list(iterator)) == (0 if when == "after one" else 2)
    assert len(list(loader)) == 3


def test_a_state_that_waits_to_be_resumed_is_copied() -> None:
    loader = USED["gathered"]()
    iterator = iter(loader)
    next(iterator)
    loader.load_state_dict(loader.state_dict())
    again = pickle.loads(pickle.dumps(loader))
    assert [b[0].tolist() for b in again] == [b[0].tolist() for b in iterator]


def test_loaders_that_no_constructor_of_ours_made() -> None:
    swapped = TorchLoader(list(range(6)), 2)
    swapped.__class__ = DataLoader
    bare = DataLoader.__new__(DataLoader)
    bare.__dict__.update(TorchLoader(list(range(6)), 2).__dict__)
    for loader in (swapped, bare):
        assert [batch.tolist() for batch in loader] == [[0, 1], [2, 3], [4, 5]]
        assert loader.metrics["batches"] == 3
        assert loader.state_dict()["between_epochs"]


def test_a_subclass_may_make_its_own_iterator_and_attributes() -> None:
    class Doubled(DataLoader):
        def __init__(self, *args: Any, **kwargs: Any) -> None:
            super().__init__(*args, **kwargs)
            self.metrics = {"mine": 1}

        def _get_iterator(self) -> Any:
            return iter([2 * batch for batch in super()._get_iterator()])  # no weak references

    loader = Doubled(list(range(4)), 2)
    assert [batch.tolist() for batch in loader] == [[0, 2], [4, 6]]
    assert loader.metrics == {"mine": 1}


def test_gathers_take_the_call_that_ends_worker_processes() -> None:
    iterator = iter(USED["gathered ahead"]())
    iterator._shutdown_workers()
    del iterator


def test_a_sampler_with_another_state_dict_than_ours_is_left_alone() -> None:
    class Resumable(torch.utils.data.SequentialSampler):
        def state_dict(self, consumed: int) -> dict[str, int]:
            return {"consumed": consumed}

        def load_state_dict(self, state: dict[str, int]) -> None:
            raise AssertionError("it was not asked for one")

    dataset = TensorDataset(torch.arange(4))
    loader = DataLoader(dataset, 2, sampler=Resumable(dataset))
    iterator = iter(loader)
    next(iterator)
    again = DataLoader(dataset, 2, sampler=Resumable(dataset))
    again.load_state_dict(loader.state_dict())
    assert [batch[0].tolist() for batch in again] == [[2, 3]]


class Frame(tuple):
    """A tuple that is made another way than tuples are."""

    def __new__(cls, a: Any, b: Any) -> Frame:
        return super().__new__(cls, (a, b))

    def __getnewargs__(self) -> Any:
        return tuple(tuple.__iter__(self))

    def __iter__(self) -> Any:
        raise AssertionError("read for a metric")


class Sealed(list):
    def __setitem__(self, *_: Any) -> None:
        raise AssertionError("written for a metric")


class Lazy(collections.abc.Sequence):
    def __len__(self) -> int:
        raise AssertionError("asked for its length for a metric")

    def __getitem__(self, _: Any) -> Any:
        raise AssertionError("decoded for a metric")


def _frame(_: Any) -> Any:
    return Frame(torch.ones(2), 1)


def _sealed(_: Any) -> Any:
    return Sealed([torch.ones(2)])


def _cyclic(_: Any) -> Any:
    batch: list[Any] = [torch.ones(2)]
    batch.insert(0, batch)
    return batch


@pytest.mark.parametrize("workers", [0, 1])
@pytest.mark.parametrize("collate", [_frame, _sealed, _cyclic])
def test_counting_leaves_the_users_containers_alone(collate: Any, workers: int) -> None:
    loader = DataLoader([0], collate_fn=collate, num_workers=workers)
    (batch,) = list(loader)
    assert isinstance(batch, Frame | list)
    assert loader.metrics["batches"] == 1


def test_counting_asks_nothing_of_what_it_does_not_know() -> None:
    (batch,) = list(DataLoader([Lazy()], batch_size=None, collate_fn=lambda sample: sample))
    assert type(batch) is Lazy


def test_strided_nested_batches() -> None:
    def nested(batch: list[int]) -> torch.Tensor:
        return torch.nested.nested_tensor([torch.ones(n) for n in batch])

    loader = DataLoader([1, 2, 3, 4], 2, collate_fn=nested)
    assert [batch.size(0) for batch in loader] == [2, 2]
    assert loader.metrics["samples"] == 4


def test_samples_are_counted_in_containers() -> None:
    mapping = collections.UserDict(a=torch.ones(3, 2))
    for data_, want in (
        ({"a": torch.ones(4), "b": 1}, 4),
        ([torch.ones(5), torch.ones(5)], 5),
        (["x", "y"], 2),
        ({}, 0),
        (mapping, 3),
        (torch.tensor(1.0), 1),
        (3, 1),
    ):
        assert batch_length(data_) == want
    assert tensor_bytes([torch.ones(3), {"x": (torch.ones(2),)}, mapping]) == 12 + 8 + 24


def test_threads_have_the_modes_of_who_began_the_epoch() -> None:
    w = torch.ones(2, 2, requires_grad=True)

    def seen_modes(_: Any) -> Any:
        return (w @ w).dtype, (w * 2).requires_grad, torch.is_inference_mode_enabled()

    def first() -> Any:
        return next(iter(DataLoader([1], collate_fn=seen_modes, threads=1)))

    assert first() == (torch.float32, True, False)
    with torch.no_grad(), torch.autocast("cpu", dtype=torch.bfloat16):
        assert first() == (torch.bfloat16, False, False)
    with torch.inference_mode():
        assert first() == (torch.float32, False, True)


def test_threads_make_tensors_on_the_default_device_of_who_began_the_epoch() -> None:
    # As parts: a base seed cannot be drawn on the one other device that is everywhere.
    with torch.device("meta"):
        modes = Modes.now()
    made: list[str] = []

    def run() -> None:
        with modes.entered():
            made.append(torch.empty(2).device.type)
        made.append(torch.empty(2).device.type)

    thread = threading.Thread(target=run)
    thread.start()
    thread.join()
    assert made == ["meta", "cpu"]


def test_threads_have_the_context_of_who_began_the_epoch() -> None:
    tenant: contextvars.ContextVar[str] = contextvars.ContextVar("tenant", default="nobody")

    class Samples(Dataset):
        def __len__(self) -> int:
            return 6

        def __getitem__(self, _: int) -> str:
            found = tenant.get()
            tenant.set("changed in a thread")
            return found

    loader = DataLoader(Samples(), 6, threads=2)
    token = tenant.set("someone")
    iterator = iter(loader)
    tenant.reset(token)
    assert next(iterator)[0] == "someone"
    assert tenant.get() == "nobody"
    (batch,) = list(loader)
    assert batch[0] == "nobody"


def test_threads_do_not_keep_the_loader() -> None:
    """Not by the context that they were given a copy of."""
    loader = DataLoader(list(range(64)), 2, threads=2)
    gone = weakref.ref(loader)
    iterator = iter(loader)
    next(iterator)
    del loader
    gc.collect()
    assert gone() is None
    assert next(iterator).tolist() == [2, 3]


def test_an_iterable_dataset_is_begun_after_the_threads_are_set_up() -> None:
    class Stream(IterableDataset):
        n = 0

        def __iter__(self) -> Any:
            return iter(range(self.n))

    def set_up(_: int) -> None:
        data.get_worker_info().dataset.n = 4

    loader = DataLoader(Stream(), 2, threads=1, worker_init_fn=set_up)
    assert [batch.tolist() for batch in loader] == [[0, 1], [2, 3]]


def test_datapipes_are_shared_out_among_ranks(monkeypatch: pytest.MonkeyPatch) -> None:
    pipes = pytest.importorskip("torch.utils.data.datapipes.iter")
    module = torch.utils.data.dataloader
    monkeypatch.setattr(module, "_get_distributed_settings", lambda: (2, 1))
    pipe = pipes.IterableWrapper(list(range(4))).sharding_filter()
    for arguments in ({}, {"threads": 2}):
        assert [int(x) for x in DataLoader(pipe, batch_size=None, **arguments)] == [1, 3]


class Graph:
    """A batch of the user's own kind, as geometric libraries have them."""

    def __init__(self, x: torch.Tensor) -> None:
        self.x = x

    def to(self, device: torch.device) -> Graph:
        return Graph(self.x.to(device))


def as_graphs(samples: list[torch.Tensor]) -> dict[str, Any]:
    packed = torch.nn.utils.rnn.pack_sequence([s[: 4 - i] for i, s in enumerate(samples)])
    return {"graph": Graph(torch.stack(samples)), "packed": packed, "names": ["a", "b"]}


def test_what_moves_itself_is_moved() -> None:
    loader = DataLoader(list(torch.rand(2, 4)), 2, collate_fn=as_graphs, device="meta")
    (batch,) = loader
    assert batch["graph"].x.device.type == "meta"
    assert batch["packed"].data.device.type == "meta"
    assert batch["packed"].batch_sizes.device.type == "cpu"
    assert batch["names"] == ["a", "b"]
    streams = Streams()
    transfer = Transfer(torch.device("meta"), Memory().hold, streams)
    batch = transfer(as_graphs(list(torch.rand(2, 4))))
    assert batch["graph"].x.device.type == batch["packed"].data.device.type == "meta"
    assert ("copy", "side") not in streams.log
