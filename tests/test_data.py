"""batchops.data.DataLoader against torch's own, driven alike.

The oracle is torch.utils.data.DataLoader itself: the same script runs over both and everything that
user code can see is compared bit for bit: batches, their types and strides, errors and their text,
the moments at which samplers run, and the state of every random number generator after each event.
"""

from __future__ import annotations

import contextlib
import functools
import gc
import itertools
import os
import pathlib
import random
import shutil
import subprocess
import sys
import textwrap
import threading
import time
import warnings
from collections.abc import Callable, Iterator
from typing import Any

import numpy as np
import pytest
import torch
from torch import nn
from torch.utils.data import (
    BatchSampler,
    Dataset,
    IterableDataset,
    RandomSampler,
    Sampler,
    Subset,
    SubsetRandomSampler,
    TensorDataset,
    WeightedRandomSampler,
    default_collate,
)
from torch.utils.data import DataLoader as TorchLoader
from torch.utils.data._utils.collate import default_collate_fn_map
from torch.utils.data.distributed import DistributedSampler

from batchops import _C
from batchops.data import DataLoader, _iterators
from batchops.data._iterators import GatherIter, WorkerGatherIter
from batchops.data._metrics import Depth

from .threads import run_in_threads

NATIVE = (GatherIter, WorkerGatherIter)


@pytest.fixture(autouse=True)
def _two_threads(threads: Any) -> None:
    """Two threads, so that batches are gathered ahead; with one they are not."""
    threads(2)


def fix_depth(monkeypatch: pytest.MonkeyPatch, batches: int) -> None:
    """How many batches are gathered ahead follows from waiting: here it is given."""
    monkeypatch.setattr(_iterators, "Depth", lambda start, most: Depth(batches, batches))


@pytest.fixture(params=[1, GatherIter.MOST_AHEAD], ids=lambda k: f"{k} ahead")
def depth(request: pytest.FixtureRequest, monkeypatch: pytest.MonkeyPatch) -> int:
    fix_depth(monkeypatch, request.param)
    return request.param


def digest(generator: torch.Generator | None) -> bytes:
    state = torch.get_rng_state() if generator is None else generator.get_state()
    return state.numpy().tobytes()


def seen(value: Any) -> Any:
    """Everything about a batch that a user could compare, as plain objects."""
    if isinstance(value, torch.Tensor):
        raw = value.detach().clone(memory_format=torch.contiguous_format).reshape(-1)
        return (
            type(value),
            value.dtype,
            tuple(value.shape),
            value.stride(),
            value.storage_offset(),
            value.requires_grad,
            value.is_inference(),
            value.device.type,
            raw.view(torch.uint8).numpy().tobytes() if raw.numel() else b"",
        )
    if isinstance(value, list | tuple):
        return (type(value), [seen(item) for item in value])
    return (type(value), value)


def drive(
    loader: Any,
    *,
    epochs: int = 1,
    stop_after: int | None = None,
    between: Callable[[int], Any] = lambda k: None,
    watched: tuple[torch.Generator | None, ...] = (None,),
    limit: int = 1000,
) -> list[Any]:
    """Iterates `loader` and writes down what happened, errors and generator states included."""
    log: list[Any] = []

    def states() -> None:
        log.append([digest(g) for g in watched])

    for _ in range(epochs):
        try:
            iterator = iter(loader)
        except Exception as error:
            log.append((type(error), str(error)))
            continue
        states()
        for k in range(limit):
            if k == stop_after:
                break
            try:
                batch = next(iterator)
            except StopIteration:
                log.append("end")
                states()
                with pytest.raises(StopIteration):
                    next(iterator)
                states()
                break
            except Exception as error:
                # A worker's traceback names files and lines; its last line is the error itself.
                # What ours says beyond that, about the place in the batch, is left out.
                text = str(error).split("\n  in the batch: ")[0]
                log.append((type(error), text.strip().splitlines()[-1]))
                states()
                continue
            log.append(seen(batch))
            states()
            log.append(seen(between(k)))
        del iterator
        states()
    return log


def same(make: Callable[[Any], tuple[Any, dict[str, Any]]], native: bool | None = True) -> None:
    """make(loader_class) -> (loader, drive's arguments), called afresh for each side."""
    logs = []
    for cls in (TorchLoader, DataLoader):
        torch.manual_seed(1234)
        loader, arguments = make(cls)
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")
            logs.append(drive(loader, **arguments))
            if cls is DataLoader and native is not None:
                torch.manual_seed(1234)
                loader, _ = make(cls)
                assert isinstance(iter(loader), NATIVE) is native
    expected, actual = logs
    assert len(actual) == len(expected)
    for position, (got, want) in enumerate(zip(actual, expected, strict=True)):
        assert got == want, f"event {position} of {len(expected)} differs"


@functools.lru_cache(maxsize=16)
def _wide(n: int) -> torch.Tensor:
    return torch.randn(n, 8192, generator=torch.Generator().manual_seed(n))


def images(n: int = 103, wide: bool = False) -> TensorDataset:
    """Rows of 60 float, 1 label, 3 odd bytes: long, one word, and no power of two.

    wide: 32 KB rows, so that a batch of two is gathered ahead in the background.
    """
    if wide:
        return TensorDataset(_wide(n), torch.arange(n))
    g = torch.Generator().manual_seed(n)
    return TensorDataset(
        torch.randn(n, 3, 4, 5, generator=g),
        torch.arange(n),
        torch.randint(0, 256, (n, 3), dtype=torch.uint8, generator=g),
    )


# --- the same batches, the same random numbers at the same moments ------------------------------


class LoggingSampler(Sampler[int]):
    """User code: draws from the global generator and writes down when it is run."""

    def __init__(self, n: int, log: list[Any]) -> None:
        self.n = n
        self.log = log

    def __iter__(self) -> Iterator[int]:
        self.log.append("start")
        for k in range(self.n):
            self.log.append(k)
            yield int(torch.randint(self.n, ()))
        self.log.append("end")

    def __len__(self) -> int:
        return self.n


SAMPLING = [
    *("plain", "shuffle", "shuffle", "random", "replacement", "more", "subset", "weighted"),
    *("weighted_once", "distributed", "user", "list", "batch_sampler", "batches"),
]


def random_case(rng: random.Random, workers: int) -> Callable[[Any], tuple[Any, dict[str, Any]]]:
    """One configuration drawn from everything that decides order and random numbers."""
    n = rng.choice([1, 2, 7, 31, 32, 33, 64, 100])
    batch_size = rng.choice([1, 2, 5, 32, 33, 200])
    drop_last = rng.random() < 0.4
    kind = rng.choice(SAMPLING)
    generator_kind = rng.choice(["none", "own", "shared", "default"])
    nest = rng.choice([0, 0, 0, 1, 2])
    epochs = rng.choice([1, 2, 3])
    stop_after = rng.choice([None, None, None, 1, 2])
    draws = rng.random() < 0.6
    shared_draws = rng.random() < 0.5
    num_samples = rng.choice([1, n, 2 * n, 2 * n + 3, 31, 32, 64, 65])
    seed = rng.randrange(1 << 30)
    wide = rng.random() < 0.5
    extra: dict[str, Any] = {}
    if workers:
        extra = {
            "num_workers": workers,
            "persistent_workers": rng.random() < 0.5,
            "prefetch_factor": rng.choice([None, 1, 3]),
        }

    def make(cls: Any) -> tuple[Any, dict[str, Any]]:
        dataset: Dataset = images(n, wide)
        local = random.Random(seed)
        for _ in range(nest):
            size = len(dataset)
            indices = [local.randrange(-size, size) for _ in range(n)]
            forms = [list, tuple, torch.tensor, np.array]
            dataset = Subset(dataset, local.choice(forms)(indices))
        own = torch.Generator().manual_seed(seed)
        generator = {
            "none": None,
            "own": own,
            "shared": own,
            "default": torch.default_generator,
        }[generator_kind]
        sampler_generator = generator if generator_kind != "own" else torch.Generator()
        if sampler_generator is not None and generator_kind == "own":
            sampler_generator.manual_seed(seed + 1)
        sampler: Any = None
        arguments: dict[str, Any] = {"batch_size": batch_size, "drop_last": drop_last}
        weights = [local.random() + 0.01 for _ in range(n)]
        if kind == "shuffle":
            arguments["shuffle"] = True
        elif kind == "random":
            sampler = RandomSampler(dataset, generator=sampler_generator)
        elif kind == "replacement":
            sampler = RandomSampler(dataset, True, num_samples, generator=sampler_generator)
        elif kind == "more":
            sampler = RandomSampler(dataset, False, num_samples, generator=sampler_generator)
        elif kind == "subset":
            chosen = local.sample(range(n), max(1, n // 2))
            sampler = SubsetRandomSampler(chosen, generator=sampler_generator)
        elif kind == "weighted":
            sampler = WeightedRandomSampler(weights, num_samples, generator=sampler_generator)
        elif kind == "weighted_once":
            sampler = WeightedRandomSampler(weights, n, False, generator=sampler_generator)
        elif kind == "distributed":
            sampler = DistributedSampler(
                dataset, num_replicas=3, rank=1, shuffle=local.random() < 0.5, drop_last=drop_last
            )
        elif kind == "user":
            sampler = LoggingSampler(n, [])
        elif kind == "list":
            sampler = [local.randrange(-n, n) for _ in range(num_samples)]
        elif kind == "batch_sampler":
            inner = RandomSampler(dataset, generator=sampler_generator)
            arguments = {"batch_sampler": BatchSampler(inner, batch_size, drop_last)}
        elif kind == "batches":
            arguments = {
                "batch_sampler": [
                    [local.randrange(n) for _ in range(local.randrange(1, 9))] for _ in range(5)
                ]
            }
        if sampler is not None:
            arguments["sampler"] = sampler
        loader = cls(dataset, generator=generator, **arguments, **extra)
        watched = (None, own, sampler_generator if sampler_generator is not None else None)

        def between(k: int) -> Any:
            drawn = []
            if draws:
                drawn.append(torch.rand(1 + k % 3))
            if shared_draws:
                drawn.append(torch.rand(2, generator=own))
            return drawn

        return loader, {
            "epochs": epochs,
            "stop_after": stop_after,
            "between": between,
            "watched": watched,
        }

    return make


@pytest.mark.parametrize("seed", range(300))
def test_random_configurations(seed: int, monkeypatch: pytest.MonkeyPatch) -> None:
    fix_depth(monkeypatch, 1 + seed % GatherIter.MOST_AHEAD)
    same(random_case(random.Random(seed), workers=0))


@pytest.mark.parametrize("seed", range(24))
def test_random_configurations_with_workers(seed: int) -> None:
    same(random_case(random.Random(10_000 + seed), workers=1 + seed % 3))


@pytest.mark.parametrize("seed", range(40))
def test_random_configurations_with_threads(seed: int) -> None:
    """Numbers are drawn when torch draws them for as many worker processes."""
    make = random_case(random.Random(20_000 + seed), workers=0)
    count = 1 + seed % 3

    def made(cls: Any) -> tuple[Any, dict[str, Any]]:
        many = {"threads": count} if cls is DataLoader else {"num_workers": count}
        return make(functools.partial(cls, **many))

    same(made, native=None)


@pytest.mark.parametrize("count", [1, 2], ids=["1-thread", "2-threads"])
@pytest.mark.parametrize("generator", [False, True])
def test_whole_epochs_of_background_size(
    count: int, generator: bool, threads: Callable[[int], None]
) -> None:
    """Batches of 400 KB go through the pool, in four chunks each; small ones never leave the
    calling thread."""
    threads(count)
    pixels = torch.randint(0, 256, (1000, 3, 32, 32), dtype=torch.uint8)

    def make(cls: Any) -> tuple[Any, dict[str, Any]]:
        g = torch.Generator().manual_seed(5) if generator else None
        dataset = TensorDataset(pixels, torch.arange(1000))
        return cls(dataset, 128, shuffle=True, generator=g), {"epochs": 3, "watched": (None, g)}

    same(make)


@pytest.mark.parametrize("workers", [0, 2])
@pytest.mark.parametrize("wide", [False, True])
def test_user_samplers_run_when_torch_runs_them(workers: int, wide: bool) -> None:
    logs = []
    for cls in (TorchLoader, DataLoader):
        log: list[Any] = []
        torch.manual_seed(0)
        sampler = LoggingSampler(40, log)
        loader = cls(images(40, wide), 4, sampler=sampler, num_workers=workers)
        log.append("iter")
        iterator = iter(loader)
        for k in range(5):
            log.append(("next", k))
            log.append(seen(next(iterator)))
        del iterator
        logs.append(log)
    assert logs[0] == logs[1]


def test_sampler_that_fails_midway() -> None:
    class Failing(Sampler[int]):
        def __iter__(self) -> Iterator[int]:
            yield from range(10)
            raise RuntimeError("no more")

        def __len__(self) -> int:
            return 20

    same(lambda cls: (cls(images(), 4, sampler=Failing()), {}))
    same(lambda cls: (cls(images(), 4, sampler=Failing(), num_workers=1, prefetch_factor=1), {}))
    # So many batches ahead that it fails in iter().
    same(lambda cls: (cls(images(), 4, sampler=Failing(), num_workers=2), {}), native=None)


@pytest.mark.parametrize("sizes", [[3, 10, 1, 20, 7], [5, None], [5, 0], [5, -1]], ids=str)
@pytest.mark.parametrize("wide", [False, True])
def test_batch_size_may_change_midway(wide: bool, sizes: list[Any], depth: int) -> None:
    def make(cls: Any) -> tuple[Any, dict[str, Any]]:
        loader = cls(images(200, wide), 8, shuffle=True)

        def between(k: int) -> None:
            loader.batch_sampler.batch_size = sizes[k % len(sizes)]

        return loader, {"epochs": 2, "between": between}

    same(make)


def test_length_and_attributes() -> None:
    for arguments in ({"batch_size": 10}, {"batch_size": 10, "drop_last": True}, {"shuffle": True}):
        ours, theirs = DataLoader(images(), **arguments), TorchLoader(images(), **arguments)
        assert len(ours) == len(theirs)
        assert len(iter(ours)) == len(iter(theirs))
    assert isinstance(ours, TorchLoader)
    assert ours.num_workers == 0
    assert ours.prefetch_factor is None
    with pytest.raises(ValueError, match="batch_size attribute should not be set after DataLoader"):
        ours.batch_size = 3


def test_dataset_without_rows() -> None:
    empty = TensorDataset(torch.empty(0, 3), torch.empty(0))
    assert len(DataLoader(empty, 4)) == 0
    assert list(DataLoader(empty, 4)) == []
    for cls in (TorchLoader, DataLoader):
        with pytest.raises(ValueError, match="num_samples should be a positive integer"):
            cls(empty, 4, shuffle=True)


def test_two_live_iterators() -> None:
    def run(cls: Any) -> list[Any]:
        torch.manual_seed(3)
        loader = cls(images(), 10, shuffle=True)
        return [seen(batch) for pair in zip(loader, loader, strict=True) for batch in pair]

    assert run(DataLoader) == run(TorchLoader)


@pytest.mark.parametrize(
    "arguments",
    [
        {"num_workers": -1},
        {"timeout": -1},
        {"prefetch_factor": 2},
        {"num_workers": 1, "prefetch_factor": -2},
        {"num_workers": 1, "prefetch_factor": 0},
        {"persistent_workers": True},
        {"timeout": 3},
        {"batch_size": 0},
        {"batch_size": 2.5},
        {"batch_size": None, "drop_last": True},
        {"shuffle": True, "sampler": [1, 2]},
        {"batch_sampler": [[1]], "batch_size": 3},
        {"multiprocessing_context": "fork"},
        {"num_workers": 1, "multiprocessing_context": "telepathy"},
        {"num_workers": 1, "multiprocessing_context": 3},
        {"no_such_option": 1},
    ],
    ids=str,
)
def test_arguments_are_refused_as_in_torch(arguments: dict[str, Any]) -> None:
    errors = []
    for cls in (TorchLoader, DataLoader):
        with pytest.raises((ValueError, TypeError, AssertionError)) as caught:
            next(iter(cls(images(), **arguments)))
        errors.append((caught.type, str(caught.value)))
    assert errors[0] == errors[1]


def test_accepted_arguments_of_worker_processes() -> None:
    arguments = {
        "num_workers": 2,
        "timeout": 5,
        "prefetch_factor": 3,
        "multiprocessing_context": "spawn",
        "pin_memory_device": "",
        "in_order": True,
        "persistent_workers": True,
    }
    loader = DataLoader(images(), 10, **arguments)
    for _ in range(2):
        expected = [seen(b) for b in TorchLoader(images(), 10)]
        assert [seen(b) for b in loader] == expected
    assert isinstance(loader._iterator, WorkerGatherIter)


# --- what a batch is made of --------------------------------------------------------------------

DTYPES = [
    *(torch.bool, torch.uint8, torch.int8, torch.int16, torch.int32, torch.int64),
    *(torch.uint16, torch.uint32, torch.uint64),
    *(torch.float16, torch.bfloat16, torch.float32, torch.float64),
    *(torch.complex32, torch.complex64, torch.complex128),
    *(torch.float8_e4m3fn, torch.float8_e5m2, torch.float8_e4m3fnuz, torch.float8_e5m2fnuz),
]


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_dtypes(dtype: torch.dtype) -> None:
    # Random bytes: NaNs with payloads, denormals and infinities must come through unchanged.
    size = torch.empty((), dtype=dtype).element_size()
    raw = torch.randint(0, 2 if dtype is torch.bool else 256, (50, 3 * size), dtype=torch.uint8)
    dataset = TensorDataset(raw.view(dtype))
    same(lambda cls: (cls(dataset, 8, shuffle=True), {}))


def _strided_like(offset: int) -> torch.Tensor:
    return torch.arange(4000.0)[offset : offset + 50 * 60].view(50, 60)


LAYOUTS = {
    "0-d samples": lambda: torch.arange(50),
    "0-d samples, strided": lambda: torch.arange(100)[::2],
    "one value expanded": lambda: torch.tensor(3.5).expand(50),
    "expanded rows": lambda: torch.arange(6.0).expand(50, 6),
    "expanded inside": lambda: torch.arange(50.0).view(50, 1, 1).expand(50, 4, 3),
    "every third row": lambda: torch.randn(150, 7)[::3],
    "offset into storage": lambda: _strided_like(17),
    "columns of a wider table": lambda: torch.randn(50, 20)[:, 3:9],
    "transposed": lambda: torch.randn(6, 50).t(),
    "samples transposed": lambda: torch.randn(50, 4, 6).transpose(1, 2),
    "HWC seen as CHW": lambda: torch.randint(0, 256, (50, 8, 6, 3)).byte().permute(0, 3, 1, 2),
    "HWC seen as CHW, doubles": lambda: torch.randn(50, 8, 6, 3).double().permute(0, 3, 1, 2),
    "channels_last": lambda: torch.randn(50, 3, 4, 5).to(memory_format=torch.channels_last),
    "every other pixel": lambda: torch.randn(50, 3, 8, 8)[:, :, ::2, ::2],
    "one channel, one pixel": lambda: torch.randn(50, 1, 1, 1),
    "4-D samples": lambda: torch.randn(50, 2, 3, 2, 2),
    "4-D samples, one pixel": lambda: torch.randn(50, 2, 3, 1, 1),
    "4-D samples, one channel": lambda: torch.randn(50, 2, 1, 3, 3),
    "6-D samples": lambda: torch.randn(50, 2, 1, 2, 1, 2, 2),
    "complex": lambda: torch.randn(50, 6, dtype=torch.complex64)[:, ::2],
    "16-byte items, transposed": lambda: torch.randn(50, 3, 4, dtype=torch.cdouble).mT,
}


@pytest.mark.parametrize("name", LAYOUTS)
@pytest.mark.parametrize("batch_size", [1, 7, 50])
def test_layouts(name: str, batch_size: int) -> None:
    torch.manual_seed(0)
    dataset = TensorDataset(LAYOUTS[name](), torch.arange(50))
    same(lambda cls: (cls(dataset, batch_size, shuffle=True), {}))


@pytest.mark.parametrize(
    "make",
    [
        lambda: torch.randn(20, 2, 3, 4, 5).to(memory_format=torch.channels_last_3d),
        lambda: torch.randn(20, 2, 4, 5, 3).permute(0, 1, 4, 2, 3),
        lambda: torch.randn(20, 2, 3, 4, 5, 2).permute(0, 1, 5, 2, 3, 4),
    ],
    ids=["channels_last_3d", "4-D channels_last samples", "5-D channels_last samples"],
)
def test_layouts_that_torch_keeps_in_the_batch(make: Callable[[], torch.Tensor]) -> None:
    """torch.cat takes 4-D and 5-D samples' channels_last on: whoever gathers, strides agree."""
    dataset = TensorDataset(make())
    same(lambda cls: (cls(dataset, 6), {}), native=None)


@pytest.mark.parametrize("workers", [0, 2])
def test_batches_share_no_memory(workers: int) -> None:
    pixels = torch.randint(0, 256, (600, 3, 32, 32), dtype=torch.uint8)
    loader = DataLoader(TensorDataset(pixels, torch.arange(600)), 64, num_workers=workers)
    kept = list(loader)
    spans = sorted((t.data_ptr(), t.data_ptr() + t.nbytes) for b in kept for t in b)
    assert all(a[1] <= b[0] for a, b in itertools.pairwise(spans))
    for k, (x, y) in enumerate(kept):
        assert torch.equal(x, pixels[64 * k : 64 * k + 64])
        x.fill_(7)
        y.zero_()
    assert torch.equal(torch.cat([b[0] for b in loader]), pixels)


def test_kept_views_outlive_the_loader() -> None:
    pixels = torch.randint(0, 256, (4096, 1024), dtype=torch.uint8)
    loader = DataLoader(TensorDataset(pixels), 256, shuffle=True, num_workers=2)
    views, expected = [], []
    for _ in range(3):
        for (x,) in loader:
            views.append(x[3:9, ::7])
            expected.append(x[3:9, ::7].clone())
    del loader
    gc.collect()
    for got, want in zip(views, expected, strict=True):
        assert torch.equal(got, want)


def test_inference_mode(depth: int) -> None:
    pixels = torch.arange(400 * 512).view(400, 512)
    stack = contextlib.ExitStack()

    def between(k: int) -> None:
        if k == 11:
            stack.close()
        elif k in (0, 3, 6, 9):
            stack.enter_context(torch.inference_mode(k % 2 == 0))

    with stack:  # a mode left on would fail every test after this one
        same(lambda cls: (cls(TensorDataset(pixels), 32), {"between": between}))


# --- what takes torch's path --------------------------------------------------------------------


class Doubled(TensorDataset):
    def __getitem__(self, index: int) -> Any:
        return tuple(2 * t for t in super().__getitem__(index))


class Plain(Dataset):
    def __getitem__(self, index: int) -> Any:
        return index, torch.full((3,), float(index))

    def __len__(self) -> int:
        return 30


class Stream(IterableDataset):
    def __iter__(self) -> Iterator[Any]:
        yield from torch.arange(30)


class Tagged(torch.Tensor):
    pass


def _with_getitems() -> Dataset:
    dataset = images(30)
    dataset.__getitems__ = lambda indices: [(torch.tensor(-1),) for _ in indices]
    return dataset


def _renamed(tensor: torch.Tensor) -> torch.Tensor:
    return tensor.rename("N", None) if hasattr(tensor, "rename") else Tagged(tensor)


OTHERS: dict[str, Callable[[], tuple[Any, dict[str, Any]]]] = {
    "subclass of TensorDataset": lambda: (Doubled(torch.arange(30.0)), {}),
    "subclass in a Subset": lambda: (Subset(Doubled(torch.arange(30.0)), range(9)), {}),
    "dataset with __getitems__": lambda: (_with_getitems(), {}),
    "map-style dataset": lambda: (Plain(), {}),
    "iterable dataset": lambda: (Stream(), {}),
    "batch_size=None": lambda: (images(30), {"batch_size": None}),
    "sampler of batches": lambda: (images(30), {"batch_size": None, "sampler": [[1, 2], [3]]}),
    "custom collate_fn": lambda: (images(30), {"collate_fn": lambda samples: samples[0]}),
    "requires grad": lambda: (TensorDataset(torch.randn(30, 2, requires_grad=True)), {}),
    "parameter": lambda: (TensorDataset(nn.Parameter(torch.randn(30, 2))), {}),
    "tensor subclass": lambda: (TensorDataset(torch.randn(30).as_subclass(Tagged)), {}),
    "named tensor": lambda: (TensorDataset(_renamed(torch.randn(30, 2))), {}),
    "sparse": lambda: (TensorDataset(torch.eye(30).to_sparse()), {}),
    "sparse compressed": lambda: (TensorDataset(torch.eye(30).to_sparse_csr()), {}),
    "quantized": lambda: (
        TensorDataset(torch.quantize_per_tensor(torch.randn(30, 2), 0.1, 0, torch.quint8)),
        {},
    ),
    "conjugate": lambda: (TensorDataset(torch.randn(30, 2, dtype=torch.cfloat).conj()), {}),
    "negative": lambda: (TensorDataset(torch.randn(30, dtype=torch.cfloat).conj().imag), {}),
    "empty rows": lambda: (TensorDataset(torch.empty(30, 0), torch.arange(30)), {}),
    "zero tensor": lambda: (TensorDataset(torch._efficientzerotensor(30)), {}),
    "inference tensor": lambda: (_inference_dataset(), {}),
}


def _inference_dataset() -> TensorDataset:
    with torch.inference_mode():
        return TensorDataset(torch.arange(30.0))


@pytest.mark.parametrize("name", OTHERS)
@pytest.mark.filterwarnings("ignore")
def test_everything_else_is_torchs(name: str) -> None:
    def make(cls: Any) -> tuple[Any, dict[str, Any]]:
        dataset, arguments = OTHERS[name]()
        return cls(dataset, **{"batch_size": 4, **arguments}), {}

    logs = []
    for cls in (TorchLoader, DataLoader):
        torch.manual_seed(0)
        loader, arguments = make(cls)
        log = drive(loader, limit=12, **arguments) if "quant" not in name else _values(loader)
        logs.append(log)
    assert logs[0] == logs[1]
    assert not isinstance(iter(loader), NATIVE)


def _values(loader: Any) -> list[Any]:
    return [[t.dequantize().tolist() for t in batch] for batch in loader]


def test_worker_init_fn_gets_its_processes(tmp_path: Any) -> None:
    mark = tmp_path / "started"
    loader = DataLoader(
        images(), 10, num_workers=1, worker_init_fn=lambda k: mark.write_text(str(os.getpid()))
    )
    assert [seen(b) for b in loader] == [seen(b) for b in DataLoader(images(), 10)]
    assert int(mark.read_text()) != os.getpid()


def test_default_collate_passed_explicitly_is_the_default() -> None:
    same(lambda cls: (cls(images(), 10, collate_fn=default_collate), {}))


@pytest.mark.parametrize("key", [tuple, torch.Tensor], ids=["tuple", "Tensor"])
@pytest.mark.parametrize("when", ["before", "between"])
def test_collate_fn_map_is_read_live(key: type, when: str) -> None:
    def collate(batch: Any, *, collate_fn_map: Any = None) -> Any:
        return ("mine", len(batch))

    original = dict(default_collate_fn_map)
    try:

        def make(cls: Any) -> tuple[Any, dict[str, Any]]:
            default_collate_fn_map.clear()
            default_collate_fn_map.update(original)

            def between(k: int) -> None:
                if when == "between" and k == 2:
                    default_collate_fn_map[key] = collate

            if when == "before":
                default_collate_fn_map[key] = collate
            return cls(images(), 10, shuffle=True), {"between": between}

        same(make, native=when != "before")
    finally:
        default_collate_fn_map.clear()
        default_collate_fn_map.update(original)


def test_default_device_mode() -> None:
    with torch.device("cpu"):
        same(lambda cls: (cls(images(), 10, shuffle=True), {}))


@pytest.mark.parametrize("native", [True, False], ids=["tensors", "arrays"])
def test_default_device_of_the_moment_of_delivery(native: bool) -> None:
    """Rows of arrays become tensors where torch makes tensors; those of tensors stay."""
    devices = []
    for cls in (TorchLoader, DataLoader):
        data = torch.arange(4096.0).view(64, 64)
        iterator = iter(cls(data if native else data.numpy(), 8))
        found = [next(iterator).device.type]
        with torch.device("meta"):
            found += [next(iterator).device.type for _ in range(2)]
        devices.append([*found, next(iterator).device.type])
    assert devices[0] == devices[1]
    assert ("meta" in devices[1]) is not native


# --- indices that only torch can judge ----------------------------------------------------------

N_ROWS = 103
INDEX_BATCHES = {
    "negative": [[-1, 0, -N_ROWS]],
    "past the end": [[0, 1], [0, N_ROWS], [2]],
    "before the start": [[0, -N_ROWS - 1], [3]],
    "huge": [[0, 1 << 70], [3]],
    "bool": [[True, False], [3]],
    "float": [[0.0], [3]],
    "string": [["a"], [3]],
    "None": [[None], [3]],
    "empty": [[], [3]],
    "tuple": [(1, 2), (3,)],
    "range": [range(5), range(9, 3, -2), range(N_ROWS - 1, N_ROWS + 1)],
    "int64 vector": [torch.tensor([5, 2]), torch.tensor([-1, 4])],
    "int64 vector, strided": [torch.arange(20)[::3]],
    "int32 vector": [torch.tensor([5, 2], dtype=torch.int32)],
    "uint8 vector": [torch.tensor([1, 0], dtype=torch.uint8)],
    "matrix": [torch.tensor([[5, 2]])],
    "0-d tensors": [[torch.tensor(4), torch.tensor(-2)]],
    "numpy vector": [np.array([5, 2, -1]), np.arange(20)[::-3]],
    "numpy int32 vector": [np.array([5, 2], dtype=np.int32)],
    "numpy bool vector": [np.array([True, False])],
    "numpy matrix": [np.array([[5, 2]])],
    "numpy scalars": [[np.int64(4), np.int32(-2), 5, np.uint8(7)]],
    "lists": [[[1, 2], [3, 4]]],
    "slices": [[slice(0, 3), slice(3, 6)]],
    "set": [{4, 5, 6}],
    "dict": [{4: "a", 5: "b"}],
    "mixed": [[1, np.int64(2), torch.tensor(3)]],
}


@pytest.mark.parametrize("name", INDEX_BATCHES)
@pytest.mark.parametrize("nested", [False, True], ids=["dataset", "subset"])
@pytest.mark.filterwarnings("ignore")
def test_indices(name: str, nested: bool) -> None:
    def make(cls: Any) -> tuple[Any, dict[str, Any]]:
        dataset: Dataset = images(N_ROWS)
        if nested:
            dataset = Subset(dataset, list(range(N_ROWS))[::-1])
        return cls(dataset, batch_sampler=INDEX_BATCHES[name]), {}

    same(make)


@pytest.mark.parametrize("name", ["past the end", "float", "empty", "negative", "0-d tensors"])
@pytest.mark.filterwarnings("ignore")
def test_indices_with_workers(name: str) -> None:
    same(lambda cls: (cls(images(), batch_sampler=INDEX_BATCHES[name], num_workers=2), {}))


def test_error_in_a_worker_reads_as_torchs(monkeypatch: pytest.MonkeyPatch) -> None:
    # How long torch's iterator waits for each of its workers when the error lets go of it.
    monkeypatch.setattr(torch.utils.data._utils, "MP_STATUS_CHECK_INTERVAL", 0.2)
    texts = []
    for cls in (TorchLoader, DataLoader):
        loader = cls(images(), batch_sampler=[[0], [N_ROWS]], num_workers=2)
        with pytest.raises(IndexError) as caught:
            list(loader)
        texts.append(str(caught.value).splitlines())
        del caught
        gc.collect()
    assert texts[0][:2] == texts[1][:2]
    assert texts[0][0] == "Caught IndexError in DataLoader worker process 1."
    assert texts[0][-1] == texts[1][-1]


def test_batches_that_can_be_iterated_once() -> None:
    def make(cls: Any) -> tuple[Any, dict[str, Any]]:
        return cls(images(), batch_sampler=[iter([4, 5]), iter([6, 7])]), {}

    same(make)


def test_iterated_batch_list_may_be_reused() -> None:
    class Reusing:
        def __iter__(self) -> Iterator[list[int]]:
            batch = [0, 1]
            for k in range(20):
                batch[:] = [k, k + 1]
                yield batch

        def __len__(self) -> int:
            return 20

    same(lambda cls: (cls(images(), batch_sampler=Reusing()), {}))


# --- a dataset that changes while it is iterated ------------------------------------------------


def _overwrite(dataset: TensorDataset, k: int) -> None:
    dataset.tensors[0].add_(k + 1)


def _write_through_view(dataset: TensorDataset, k: int) -> None:
    dataset.tensors[0][5:].mul_(2)


def _replace_tensors(dataset: TensorDataset, k: int) -> None:
    dataset.tensors = tuple(t.clone() for t in dataset.tensors)


def _swap_data(dataset: TensorDataset, k: int) -> None:
    dataset.tensors[0].data = torch.full_like(dataset.tensors[0], float(k))


def _set(dataset: TensorDataset, k: int) -> None:
    dataset.tensors[0].set_(torch.full_like(dataset.tensors[0], float(-k)))


def _swap_for_other_strides(dataset: TensorDataset, k: int) -> None:
    dataset.tensors[0].data = (dataset.tensors[0] + k).mT.contiguous().mT


def _start_requiring_grad(dataset: TensorDataset, k: int) -> None:
    dataset.tensors[0].requires_grad_(k % 4 == 1)


def _add_a_column(dataset: TensorDataset, k: int) -> None:
    dataset.tensors = (*dataset.tensors, torch.full((400,), k))


CHANGES = [
    _overwrite,
    _write_through_view,
    _replace_tensors,
    _swap_data,
    _set,
    _swap_for_other_strides,
    _start_requiring_grad,
    _add_a_column,
]


@pytest.mark.parametrize("change", CHANGES, ids=lambda f: f.__name__.strip("_"))
@pytest.mark.parametrize("nested", [False, True], ids=["dataset", "subset"])
def test_changes_between_batches(
    change: Callable[[Any, int], None], nested: bool, depth: int
) -> None:
    """Batches of 128 KB: the next one is under way in the pool while the change happens."""

    def make(cls: Any) -> tuple[Any, dict[str, Any]]:
        dataset = TensorDataset(torch.arange(400.0 * 32 * 32).view(400, 32, 32))
        source: Dataset = Subset(dataset, list(range(399, -1, -1))) if nested else dataset
        loader = cls(source, 32, shuffle=True)
        return loader, {"between": lambda k: change(dataset, k)}

    same(make)


@pytest.mark.parametrize("form", [list, np.array, torch.tensor])
def test_indices_of_a_subset_change_between_batches(form: Callable[[Any], Any], depth: int) -> None:
    def make(cls: Any) -> tuple[Any, dict[str, Any]]:
        dataset = TensorDataset(torch.arange(400.0 * 1024).view(400, 1024))
        subset = Subset(Subset(dataset, form(list(range(400)))), form(list(range(200))))

        def between(k: int) -> None:
            if k % 2:
                subset.indices[: 50 * k] = form([7] * len(subset.indices[: 50 * k]))
            else:
                subset.dataset.indices[100:] = form([k] * 300)

        return cls(subset, 32, shuffle=True), {"between": between}

    same(make)


def test_indices_of_a_sampler_change_between_batches(depth: int) -> None:
    def make(cls: Any) -> tuple[Any, dict[str, Any]]:
        dataset = TensorDataset(torch.arange(400.0 * 1024).view(400, 1024))
        sampler = SubsetRandomSampler(list(range(300)))

        def between(k: int) -> None:
            sampler.indices[: 60 * k] = [k] * len(sampler.indices[: 60 * k])
            if k == 7:
                sampler.indices[:] = [torch.tensor(3)] * 300
            if k == 8:
                sampler.indices.clear()

        return cls(dataset, 32, sampler=sampler), {"between": between}

    same(make)


# --- threads, forks, exits ----------------------------------------------------------------------


def run_script(script: str, timeout: float = 60, **arguments: Any) -> subprocess.CompletedProcess:
    prelude = """
        import os, signal, sys, threading, time
        import torch
        from torch.utils.data import TensorDataset
        from batchops import _C
        from batchops.data import DataLoader
        torch.set_num_threads(2)
        pixels = torch.randint(0, 256, (2048, 3, 32, 32), dtype=torch.uint8)
        dataset = TensorDataset(pixels, torch.arange(2048))
    """
    code = textwrap.dedent(prelude) + textwrap.dedent(script)
    return subprocess.run(
        [sys.executable, "-c", code],
        capture_output=True,
        text=True,
        timeout=timeout,
        check=False,
        **arguments,
    )


def assert_succeeds(script: str, **arguments: Any) -> str:
    done = run_script(script, **arguments)
    assert done.returncode == 0, f"exit status {done.returncode}\n{done.stdout}\n{done.stderr}"
    return done.stdout


def test_forked_children_do_not_hang() -> None:
    """Forks at all moments of an iteration: batches in flight, threads asleep and awake.

    NumPy compares: torch's own parallel operators do not survive a fork of a process that has used
    them.
    """
    assert_succeeds("""
        import numpy as np

        def check(loader, iterator, first):
            batches = list(iterator)
            got = np.concatenate([first.numpy()] + [y.numpy() for _, y in batches])
            assert np.array_equal(np.sort(got), np.arange(2048)), got
            for x, y in batches + list(loader):
                assert np.array_equal(x.numpy(), pixels.numpy()[y.numpy()])

        for trial in range(40):
            loader = DataLoader(dataset, 128, shuffle=True, num_workers=(0, 2)[trial % 2])
            iterator = iter(loader)
            x, y = next(iterator)
            if trial % 3 == 0:
                time.sleep(0.001 * (trial % 5))
            pid = os.fork()
            if pid == 0:
                try:
                    check(loader, iterator, y)
                    # and a fork of the fork
                    it = iter(loader); next(it)
                    inner = os.fork()
                    if inner == 0:
                        next(it); os._exit(0)
                    os._exit(os.waitpid(inner, 0)[1] != 0)
                except BaseException as error:
                    print(repr(error), file=sys.stderr)
                    os._exit(1)
            check(loader, iterator, y)
            assert os.waitpid(pid, 0)[1] == 0
    """)


def test_torchs_own_workers_beside_ours() -> None:
    assert_succeeds("""
        ours = DataLoader(dataset, 128, shuffle=True)
        class Mine(TensorDataset): pass
        theirs = DataLoader(Mine(pixels), 128, num_workers=2)
        for (x, y), (z,) in zip(ours, theirs, strict=True):
            assert torch.equal(x, pixels[y])
        iterator = iter(ours); next(iterator)
        # A loader that gathers inside a worker process of torch's.
        class Nested(TensorDataset):
            def __getitem__(self, index):
                return torch.cat([y for _, y in DataLoader(dataset, 256)])
        for batch in DataLoader(Nested(torch.arange(4)), 2, num_workers=2):
            assert torch.equal(batch, torch.arange(2048).expand(2, 2048))
        next(iterator)
    """)


@pytest.mark.parametrize("workers", [0, 2])
def test_interpreter_exit_with_batches_in_flight(workers: int) -> None:
    for _ in range(2):
        start = time.perf_counter()
        assert_succeeds(f"""
            import atexit
            loader = DataLoader(dataset, 512, shuffle=True, num_workers={workers})
            kept = iter(loader)
            batch = next(kept)
            cycle = [kept]; cycle.append(cycle)
            atexit.register(lambda: next(kept))
        """)
        assert time.perf_counter() - start < 30


def test_interpreter_exit_while_a_daemon_thread_waits() -> None:
    """The thread is ended when it asks for the GIL; unwinding it must not abort. Only our own
    calls in it: torch's do abort there."""
    for _ in range(3):
        assert_succeeds("""
            column = (pixels.data_ptr(), 2048, 3072, 1, [3072], [1])
            table = _C.Table([column])
            rows = table.resolve(range(2047, -1, -1))
            out = torch.empty_like(pixels)
            def gather():
                while True:
                    table.gather(rows, [(out.data_ptr(), out.nbytes)], (pixels, out), 1).wait()
            for _ in range(3):
                threading.Thread(target=gather, daemon=True).start()
            time.sleep(0.05)
        """)


def test_iterating_after_the_pool_has_stopped() -> None:
    assert_succeeds("""
        next(iter(DataLoader(dataset, 512)))
        assert _C.collate_threads() > 0
        _C.collate_shutdown()
        assert _C.collate_threads() == 0
        for workers in (0, 2):
            for x, y in DataLoader(dataset, 512, shuffle=True, num_workers=workers):
                assert torch.equal(x, pixels[y])
        assert _C.collate_threads() == 0
        _C.collate_shutdown()
    """)


def test_torchs_threads_help_the_thread_that_trains_and_no_other() -> None:
    """In another thread, and in a forked child, they would not: the pool does."""
    assert_succeeds("""
        import numpy as np
        from batchops.data import collate
        samples = [torch.randn(3, 224, 224) for _ in range(8)]
        want = np.stack([sample.numpy() for sample in samples])

        def right(pool_threads):
            assert np.array_equal(collate(samples).numpy(), want)
            assert _C.collate_threads() == pool_threads, _C.collate_threads()
            done.append(pool_threads)

        done = []
        right(0)
        thread = threading.Thread(target=right, args=(1,))
        thread.start()
        thread.join()
        assert done == [0, 1]
        child = os.fork()
        if child == 0:
            try:
                right(1)
            finally:
                os._exit(len(done) != 3)
        assert os.waitpid(child, 0)[1] == 0
        right(1)
    """)


def test_keyboard_interrupt() -> None:
    assert_succeeds("""
        # A shell starts background jobs with the signal ignored, and children inherit that.
        signal.signal(signal.SIGINT, signal.default_int_handler)

        def interrupt():
            time.sleep(0.3)
            os.kill(os.getpid(), signal.SIGINT)
        for workers in (0, 2):
            thread = threading.Thread(target=interrupt)
            thread.start()
            try:
                while True:
                    for batch in DataLoader(dataset, 512, shuffle=True, num_workers=workers):
                        pass
            except KeyboardInterrupt:
                pass
            else:
                raise AssertionError("not interrupted")
            thread.join()
        for x, y in DataLoader(dataset, 512, shuffle=True):
            assert torch.equal(x, pixels[y])
    """)


def test_threads_are_bounded_and_shared() -> None:
    pixels = torch.randint(0, 256, (512, 3, 32, 32), dtype=torch.uint8)
    loaders = [
        DataLoader(TensorDataset(pixels), 64, shuffle=True, num_workers=k % 5) for k in range(40)
    ]
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        iterators = [iter(loader) for loader in loaders]
        for _ in range(4):
            for iterator in iterators:
                next(iterator)
        before = _C.collate_threads()
        assert 0 < before <= _C.COLLATE_MAX_THREADS
        for loader in loaders:
            next(iter(loader))
        assert _C.collate_threads() == before
        many = DataLoader(TensorDataset(pixels), 64, num_workers=60)
        assert len(list(many)) == 8
    assert _C.collate_threads() <= _C.COLLATE_MAX_THREADS


def test_iterators_dropped_at_any_moment() -> None:
    pixels = torch.randint(0, 256, (1024, 3, 32, 32), dtype=torch.uint8)
    rng = random.Random(0)
    for _ in range(300):
        # The dataset goes with the iterator: what threads still read must not be freed first.
        dataset = TensorDataset(pixels.clone() if rng.random() < 0.2 else pixels)
        loader = DataLoader(dataset, 128, shuffle=True, num_workers=rng.choice([0, 1, 3]))
        iterator = iter(loader)
        for _ in range(rng.randrange(4)):
            next(iterator)
        del dataset, loader, iterator


def test_many_python_threads() -> None:
    pixels = torch.randint(0, 256, (512, 3, 32, 32), dtype=torch.uint8)

    def work(seed: int) -> None:
        g = torch.Generator().manual_seed(seed)
        loader = DataLoader(
            TensorDataset(pixels, torch.arange(512)),
            64,
            num_workers=seed % 3,
            sampler=RandomSampler(range(512), generator=g),
            generator=g,
        )
        for _ in range(5):
            for x, y in loader:
                assert torch.equal(x, pixels[y])

    run_in_threads(work, 8)


def test_python_runs_while_a_batch_is_gathered() -> None:
    """A batch of 256 MB takes some 50 ms: a thread that holds the GIL would let nobody count."""
    big = torch.ones(64, 1 << 20)
    loader = DataLoader(TensorDataset(big.expand(64, 1 << 20)), 64)
    count, done = 0, threading.Event()

    def tick() -> None:
        nonlocal count
        while not done.is_set():
            time.sleep(0.001)
            count += 1

    thread = threading.Thread(target=tick)
    thread.start()
    try:
        iterator = iter(loader)
        before = count
        start = time.perf_counter()
        next(iterator)
        elapsed, ticks = time.perf_counter() - start, count - before
    finally:
        done.set()
        thread.join()
    # A tick takes 1 ms and what the scheduler adds; a fifth of them is far from none.
    assert elapsed > 5e-3
    assert ticks >= elapsed / 5e-3 - 1


# --- page-locked memory -------------------------------------------------------------------------


@pytest.mark.skipif(torch.accelerator.is_available(), reason="there is an accelerator")
@pytest.mark.parametrize("workers", [0, 2])
def test_pin_memory_without_an_accelerator_warns_as_torch(workers: int) -> None:
    texts = []
    for cls in (TorchLoader, DataLoader):
        loader = cls(images(), 10, pin_memory=True, num_workers=workers, pin_memory_device="cuda")
        with warnings.catch_warnings(record=True) as caught:
            warnings.simplefilter("always")
            batches = [seen(b) for b in loader]
        texts.append(([str(w.message) for w in caught], batches))
    assert texts[0] == texts[1]
    assert any("no accelerator is found" in text for text in texts[1][0])


@pytest.mark.cuda
@pytest.mark.parametrize("workers", [0, 2])
def test_pin_memory(workers: int) -> None:
    pixels = torch.randint(0, 256, (1000, 3, 32, 32), dtype=torch.uint8)
    loader = DataLoader(
        TensorDataset(pixels, torch.arange(1000)),
        100,
        shuffle=True,
        pin_memory=True,
        num_workers=workers,
    )
    on_device = []
    for x, y in loader:
        assert x.is_pinned()
        assert y.is_pinned()
        # The copies wait while the host goes on, and lets go of what they are from.
        torch.cuda._sleep(20_000_000)
        on_device.append((x.to("cuda", non_blocking=True), y.to("cuda", non_blocking=True)))
        del x, y
    torch.cuda.synchronize()
    for x, y in on_device:
        assert torch.equal(x.cpu(), pixels[y.cpu()])
    fallback = DataLoader(
        TensorDataset(pixels), batch_sampler=[[True]], pin_memory=True, num_workers=workers
    )
    assert all(t.is_pinned() for b in fallback for t in b)


# --- the native layer itself --------------------------------------------------------------------


def table_of(*tensors: torch.Tensor) -> Any:
    return _C.Table(
        [
            (
                t.data_ptr(),
                t.shape[0],
                t.stride(0) * t.element_size(),
                t.element_size(),
                list(t.shape[1:]),
                [s * t.element_size() for s in t.stride()[1:]],
            )
            for t in tensors
        ]
    )


# Every row size that has a loop of its own (1 to 16), those between and beyond (memcpy; prefetch of
# up to 512 bytes; a chunk of 128 KB exactly, one less and one more), and several rows a chunk.
ROW_BYTES = [1, 2, 3, 4, 7, 8, 12, 16, 17, 63, 64, 65, 500, 3072, 131071, 131072, 131073]


@pytest.mark.parametrize("row_bytes", ROW_BYTES)
@pytest.mark.parametrize("count", [0, 1, 3])
def test_gather_bytes(row_bytes: int, count: int) -> None:
    rows = max(4, min(1000, (4 << 20) // row_bytes))
    source = torch.randint(0, 256, (rows * row_bytes + 1,), dtype=torch.uint8)[1:]
    source = source.view(rows, row_bytes)  # on an odd address
    expected = source.numpy()
    indices = np.random.default_rng(0).integers(-rows, rows, size=2 * rows)
    indices[rows // 2 : rows] = np.arange(rows - rows // 2)  # a run of consecutive rows
    table = table_of(source)
    out = torch.full((2 * rows * row_bytes + 64,), 99, dtype=torch.uint8)
    body = out[31 : 31 + 2 * rows * row_bytes]
    job = table.gather(
        table.resolve(indices), [(body.data_ptr(), body.numel())], (source, out), count
    )
    job.wait()
    assert job.done
    assert np.array_equal(body.view(-1, row_bytes).numpy(), expected[indices])
    assert (out[:31] == 99).all()
    assert (out[31 + body.numel() :] == 99).all()


@pytest.mark.parametrize("row_bytes", [24, 100, 3072, 1 << 20])
def test_gather_past_the_caches(row_bytes: int) -> None:
    """Above 8 MB stores bypass the cache: heads, tails and fences of that path."""
    rows = (9 << 20) // row_bytes + 1
    source = torch.randint(0, 256, (rows, row_bytes), dtype=torch.uint8)
    indices = torch.randperm(rows).tolist()
    out = torch.empty(rows * row_bytes + 3, dtype=torch.uint8)[3:]
    table = table_of(source)
    table.gather(table.resolve(indices), [(out.data_ptr(), out.numel())], (source, out), 2).wait()
    assert np.array_equal(out.view(rows, row_bytes).numpy(), source.numpy()[indices])


def test_resolve() -> None:
    table = table_of(torch.arange(10))
    assert len(table.resolve([0, -10, 9])) == 3
    assert table.resolve([1, 2]) == table.resolve((-9, 2))
    assert table.resolve([1, 2]) != None  # noqa: E711
    assert table.resolve([1, 2]) != table.resolve([2, 1])
    assert table.resolve([0, 1], ([9, 8], range(9, -1, -1))) == table.resolve([0, 1])
    for refused in ([10], [-11], [True], [1.0], [None], [1 << 64], "12", {1: 2}, {1}, iter([1])):
        assert table.resolve(refused) is None
    assert table.resolve([0], ([True],)) is None
    assert table.resolve([1], ([5],)) is None
    assert table.resolve([0], ([10],)) is None
    assert table.resolve(range(1 << 62, (1 << 62) + 3)) is None
    assert table.resolve(np.arange(3, dtype=np.float64)) is None


def test_native_errors_name_what_came() -> None:
    column = (4096, 5, 8, 8, [], [])
    with pytest.raises(ValueError, match=r"columns: expected at least one, got none"):
        _C.Table([])
    with pytest.raises(ValueError, match=r"same number of rows in each, got 5 and 4"):
        _C.Table([column, (4096, 4, 8, 8, [], [])])
    with pytest.raises(ValueError, match=r"item_bytes: expected 1, 2, 4, 8 or 16, got 3"):
        _C.Table([(4096, 5, 8, 3, [], [])])
    with pytest.raises(ValueError, match=r"strides: expected one for each of 2 sizes, got 1"):
        _C.Table([(4096, 5, 8, 8, [1, 2], [8])])
    with pytest.raises(ValueError, match=r"expected no negative, got -5, 8"):
        _C.Table([(4096, -5, 8, 8, [], [])])
    with pytest.raises(ValueError, match=r"data: expected an address, got null"):
        _C.Table([(0, 5, 8, 8, [], [])])
    table = table_of(torch.arange(5))
    rows = table.resolve([1, 2])
    out = torch.zeros(2, dtype=torch.int64)
    with pytest.raises(ValueError, match=r"expected one for each of 1 columns, got 2"):
        table.gather(rows, [(out.data_ptr(), 16)] * 2, None, 1)
    with pytest.raises(ValueError, match=r"output 0: expected 16 bytes \(2 rows of 8\), got 8"):
        table.gather(rows, [(out.data_ptr(), 8)], None, 1)
    with pytest.raises(ValueError, match=r"got 16 at 0"):
        table.gather(rows, [(0, 16)], None, 1)
    other = table_of(torch.arange(500)).resolve([1, 400])
    with pytest.raises(IndexError, match=r"rows: expected in \[0, 5\), got 400"):
        table.gather(other, [(out.data_ptr(), 16)], None, 1)
    with pytest.raises(ValueError, match=r"IndexSpan: expected an address and a size >= 0"):
        _C.IndexSpan(0, 3)
    assert not out.any()


@pytest.mark.sanitizer
@pytest.mark.parametrize("sanitizer", ["thread", "address,undefined"])
def test_pool_and_gather_under_sanitizers(sanitizer: str, tmp_path: Any) -> None:
    """The collate library alone, no Python and no torch on the include path, under stress."""
    compiler = shutil.which("g++") or shutil.which("clang++")
    if compiler is None:
        pytest.skip("no C++ compiler")
    root = pathlib.Path(__file__).parents[1]
    sources = [*sorted((root / "csrc/collate").glob("*.cpp")), root / "tests/collate_stress.cpp"]
    together, binary = tmp_path / "together.cpp", tmp_path / "stress"
    together.write_text("".join(f'#include "{source}"\n' for source in sources))
    flags = ["-std=c++20", "-O1", "-g1", f"-fsanitize={sanitizer}", "-fno-sanitize-recover=all"]

    built = subprocess.run(
        [compiler, *flags, f"-I{root / 'csrc'}", "-pthread", together, "-o", binary],
        capture_output=True,
        text=True,
        check=False,
    )
    if "cannot find -l" in built.stderr:
        pytest.skip(f"the compiler has no runtime for -fsanitize={sanitizer}")
    assert built.returncode == 0, built.stderr
    done = subprocess.run([binary], capture_output=True, text=True, timeout=300, check=False)
    if "unexpected memory mapping" in done.stderr:
        pytest.skip("the sanitizer cannot map its shadow memory on this kernel")
    assert done.returncode == 0, done.stderr
    assert done.stdout == "ok\n"


def test_signals_do_not_reach_pool_threads() -> None:
    assert_succeeds("""
        next(iter(DataLoader(dataset, 512)))
        blocked = 0
        for task in os.listdir("/proc/self/task"):
            with open(f"/proc/self/task/{task}/status") as file:
                lines = dict(line.split(":", 1) for line in file)
            if lines["Name"].strip().startswith("batchops-"):
                assert int(lines["SigBlk"], 16) >> (signal.SIGINT - 1) & 1
                blocked += 1
        assert blocked == _C.collate_threads() > 0
    """)


class OnlyGetItem:
    """A sampler by the old protocol: no __iter__."""

    def __len__(self):
        return 6

    def __getitem__(self, i):
        if i >= 6:
            raise IndexError
        return 5 - i


@pytest.mark.parametrize("workers", [0, 1])
def test_sampler_without_iter(workers):
    dataset = TensorDataset(torch.arange(6.0))
    ours = DataLoader(dataset, batch_size=4, sampler=OnlyGetItem(), num_workers=workers)
    assert [b[0].tolist() for b in ours] == [[5.0, 4.0, 3.0, 2.0], [1.0, 0.0]]


@pytest.mark.parametrize("workers", [0, 2])
def test_inference_mode_is_that_of_the_moment_of_delivery(workers):
    dataset = TensorDataset(torch.randn(1000, 64))
    iterator = iter(DataLoader(dataset, batch_size=100, num_workers=workers))
    seen = []
    for step in range(6):
        with torch.inference_mode(step % 2 == 0):
            (x,) = next(iterator)
        seen.append(x.is_inference())
        assert torch.equal(x, dataset.tensors[0][step * 100 : (step + 1) * 100])
    assert seen == [True, False] * 3


def test_no_memory_for_the_batch_ahead_loses_nothing(monkeypatch, depth):
    dataset = TensorDataset(torch.arange(1000 * 128.0).view(1000, 128))
    real, calls = torch.empty, []

    def scarce(*args, **kwargs):
        calls.append(args)
        if len(calls) % 2 == 0:
            raise RuntimeError("not enough memory")
        return real(*args, **kwargs)

    loader = DataLoader(dataset, batch_size=200)
    iterator = iter(loader)
    monkeypatch.setattr(torch, "empty", scarce)
    got = list(iterator)
    monkeypatch.undo()
    assert len(calls) > len(got)  # batches ahead were tried, and failed
    assert torch.equal(torch.cat([x for (x,) in got]), dataset.tensors[0])


@pytest.mark.parametrize("moment", ["before the first batch", "after the first batch"])
@pytest.mark.parametrize("workers", [0, 1])
def test_sampler_replaced_under_a_running_epoch(workers, moment):
    dataset = TensorDataset(torch.arange(1000))

    def rows(kind):
        sampler = torch.utils.data.SubsetRandomSampler(list(range(200, 1000)))
        loader = kind(dataset, batch_size=200, sampler=sampler, num_workers=workers)
        torch.manual_seed(3)
        iterator = iter(loader)
        got = [next(iterator)[0]] if moment == "after the first batch" else []
        loader.batch_sampler.sampler = torch.utils.data.SequentialSampler(range(700))
        return [b.tolist() for b in got] + [b.tolist() for (b,) in iterator]

    assert rows(DataLoader) == rows(torch.utils.data.DataLoader)


def test_indexing_patched_under_a_running_epoch(monkeypatch):
    dataset = TensorDataset(torch.arange(100_000.0).view(1000, 100))
    iterator = iter(DataLoader(dataset, batch_size=100))
    next(iterator)
    monkeypatch.setattr(TensorDataset, "__getitem__", lambda self, i: (torch.tensor(i),))
    assert next(iterator)[0].tolist() == list(range(100, 200))
