"""batchops.data.DataLoader stopped and taken up again, at every moment and by every way.

The oracle is the same run without a stop: the rest of its epoch, the two epochs after it, and the
state in which it leaves torch's global generator.
"""

from __future__ import annotations

import functools
import gc
import itertools
import pickle
import threading
import time
import warnings
import weakref
from collections.abc import Callable, Iterator
from typing import Any

import numpy as np
import pytest
import torch
from torch.utils.data import (
    BatchSampler,
    Dataset,
    IterableDataset,
    RandomSampler,
    Sampler,
    SubsetRandomSampler,
    TensorDataset,
    WeightedRandomSampler,
    get_worker_info,
)
from torch.utils.data._utils.pin_memory import pin_memory
from torch.utils.data.datapipes.iter import IterableWrapper
from torch.utils.data.distributed import DistributedSampler

from batchops import _C, data
from batchops.data import DataLoader
from batchops.data._streams import Start, Told

from .test_loader import gone, named_threads

N = 23


@pytest.fixture(autouse=True)
def _setting() -> Iterator[None]:
    before = torch.get_num_threads()
    torch.set_num_threads(2)
    with warnings.catch_warnings():
        warnings.filterwarnings("ignore", message=".*worker processes in total.*")
        yield
    torch.set_num_threads(before)


class Indices(Dataset):
    def __len__(self) -> int:
        return N

    def __getitem__(self, i: int) -> int:
        return i


class Own(Sampler[int]):
    """Of the user's: draws from the global generator when it gives its first index."""

    def __iter__(self) -> Iterator[int]:
        yield from torch.randperm(N).tolist()

    def __len__(self) -> int:
        return N


class Eager(Own):
    """Draws in __iter__ itself, before the loader draws its base seed."""

    def __iter__(self) -> Iterator[int]:
        return iter(torch.randperm(N).tolist())


class OwnBatches(BatchSampler):
    """Of the user's, around one of torch's."""


SAMPLINGS: dict[str, Callable[[Any], dict[str, Any]]] = {
    "in order": lambda d: {"batch_size": 3},  # draws a base seed alone
    "shuffle": lambda d: {"batch_size": 3, "shuffle": True},  # and a seed of the sampler's
    # Both from one generator of the user's.
    "generator": lambda d: {"batch_size": 3, "shuffle": True, "generator": seeded()},
    # The order from the user's, the base seed from the global one.
    "sampler's generator": lambda d: {
        "batch_size": 3,
        "sampler": RandomSampler(d, generator=seeded()),
    },
    # Drawn on the way: 32 at a time.
    "replacement": lambda d: {
        "batch_size": 4,
        "sampler": RandomSampler(d, True, 70, generator=seeded()),
    },
    # The global generator, by its name.
    "default generator": lambda d: {
        "batch_size": 3,
        "sampler": RandomSampler(d, generator=torch.default_generator),
    },
    # Drawn from it on the way, with the user's own draws in between.
    "replacement, default": lambda d: {
        "batch_size": 4,
        "sampler": RandomSampler(d, True, 70, generator=torch.default_generator),
    },
    "repetition, default": lambda d: {
        "batch_size": 3,
        "sampler": RandomSampler(d, False, 2 * N + 5, generator=torch.default_generator),
    },
    # Indices that are drawn from the global generator, not seeded by it.
    "subset": lambda d: {"batch_size": 3, "sampler": SubsetRandomSampler(range(0, N, 2))},
    "weighted": lambda d: {"batch_size": 3, "sampler": WeightedRandomSampler([1.0] * N, N)},
    # An order that has no generator, but an epoch.
    "distributed": lambda d: {"batch_size": 3, "sampler": DistributedSampler(d, 2, 1)},
    "own": lambda d: {"batch_size": 3, "sampler": Own()},
    "eager": lambda d: {"batch_size": 3, "sampler": Eager()},
    "own batches": lambda d: {"batch_sampler": OwnBatches(RandomSampler(d), 3, False)},
    # A state of the sampler's, with a position.
    "planned": lambda d: {
        "batch_sampler": data.TokenBudgetBatchSampler([1 + i % 5 for i in range(N)], 12, seed=2)
    },
    # No batches: the sampler itself gives what is fetched.
    "one by one": lambda d: {"batch_size": None, "shuffle": True},
    "one by one, subset": lambda d: {
        "batch_size": None,
        "sampler": SubsetRandomSampler(range(0, N, 2)),
    },
}
UNBATCHED = ("one by one", "one by one, subset")


def seeded() -> torch.Generator:
    return torch.Generator().manual_seed(11)


WIDE = torch.arange(N, dtype=torch.uint8)[:, None].repeat(1, _C.COLLATE_BACKGROUND_BYTES // 3 + 1)

# What takes different ways through the code: which draw what when is told in _resume.py.
KINDS: dict[str, tuple[type[Dataset] | Callable[[], Dataset], dict[str, Any]]] = {
    "local": (Indices, {}),
    "gathered": (lambda: TensorDataset(torch.arange(N)), {}),
    "gathered as vectors": (lambda: TensorDataset(WIDE), {}),  # and ahead, where batches are large
    "gathered ahead": (lambda: TensorDataset(torch.arange(N)), {"num_workers": 2}),
    "gathered, persistent": (
        lambda: TensorDataset(torch.arange(N)),
        {"num_workers": 1, "persistent_workers": True},
    ),
    "threads": (Indices, {"threads": 2}),
}
PROCESSES = {
    "processes": (Indices, {"num_workers": 2}),
    "processes, persistent": (Indices, {"num_workers": 1, "persistent_workers": True}),
}

# Where the loader is asked, after `epochs` whole ones: None is between two epochs, and a number is
# that of the batches that an iterator gave, which is kept, or dropped as a loop with `break` does.
MOMENTS: dict[str, tuple[int, int | None, bool]] = {
    "before the first": (0, None, False),
    "after iter()": (0, 0, False),  # single process: no sampler has drawn yet
    "on the way": (0, 3, False),
    "after a break": (0, 3, True),
    "after the last batch": (0, -1, False),  # whose end was not met yet
    "between two": (1, None, False),
    "on the way of the second": (1, 2, False),  # with persistent workers: without a base seed
    "after a break in the second": (1, 2, True),
}


def loader_for(kind: str, sampling: str, **more: Any) -> DataLoader:
    make, arguments = {**KINDS, **PROCESSES}[kind]
    dataset = make()
    return DataLoader(dataset, **SAMPLINGS[sampling](dataset), **arguments, **more)


def values(batches: Any) -> list[Any]:
    def of(batch: Any) -> Any:
        (batch,) = batch if isinstance(batch, list | tuple) else (batch,)
        if not isinstance(batch, torch.Tensor):
            return batch
        return batch[..., 0].tolist() if batch.dim() > 1 else batch.tolist()

    return [of(batch) for batch in batches]


def flat(batches: list[Any]) -> list[Any]:
    return [i for batch in batches for i in (batch if isinstance(batch, list) else [batch])]


def brought_to(loader: DataLoader, moment: str) -> Any:
    """What has the rest of the epoch: an iterator, or the loader between two epochs."""
    epochs, batches, _ = MOMENTS[moment]
    for _ in range(epochs):
        list(loader)
        torch.rand(1)  # the user draws too
    if batches is None:
        return loader
    iterator = iter(loader)
    for _ in range(batches if batches >= 0 else len(loader)):
        next(iterator)
        torch.rand(1)
    return iterator


def saved(loader: DataLoader) -> tuple[dict[str, Any], torch.Tensor]:
    return pickle.loads(pickle.dumps(loader.state_dict())), torch.get_rng_state()


def what_follows(rest: Any, loader: DataLoader) -> list[Any]:
    return [
        *(values(batches) for batches in (rest, loader, loader)),
        torch.get_rng_state().tolist(),
    ]


def resumed(make: Callable[[], DataLoader], state: Any, rng: torch.Tensor) -> DataLoader:
    torch.manual_seed(99)  # another process
    loader = make()
    loader.load_state_dict(state)
    torch.set_rng_state(rng)
    return loader


def check(make: Callable[[], DataLoader], moment: str) -> None:
    _, batches, dropped = MOMENTS[moment]
    torch.manual_seed(3)
    loader = make()
    rest = brought_to(loader, moment)
    if dropped:
        # The oracle goes on with an iterator; this loader has lost its own.
        del rest
        state, rng = saved(loader)
        torch.manual_seed(3)
        loader = make()
        rest = brought_to(loader, moment)
    else:
        state, rng = saved(loader)
    want = what_follows(rest, loader)
    again = resumed(make, state, rng)
    assert what_follows(again, again) == want

    # And once more, from what the second run says after one batch, or before any.
    for more in (0, 1) if batches is not None and want[0] else (0,):
        again = resumed(make, state, rng)
        if more:
            assert values([next(iter(again))]) == want[0][:1]
        third = resumed(make, *saved(again))
        assert what_follows(third, third) == [want[0][more:], *want[1:]]


@pytest.mark.parametrize(
    ("sampling", "kind"),
    # Gathers are of batches.
    [(s, k) for s in SAMPLINGS for k in KINDS if not (s in UNBATCHED and k.startswith("gathered"))],
)
def test_what_follows_is_as_without_a_stop(sampling: str, kind: str) -> None:
    for moment in MOMENTS:
        check(lambda: loader_for(kind, sampling), moment)


# Few, for processes are slow: what the two kinds draw differently, and samplers that draw twice.
@pytest.mark.parametrize("kind", PROCESSES)
@pytest.mark.parametrize(
    ("sampling", "moment"),
    [
        ("generator", "on the way of the second"),
        ("generator", "between two"),
        ("shuffle", "between two"),
        ("shuffle", "after a break in the second"),
        ("eager", "on the way"),
    ],
)
def test_what_follows_with_worker_processes(sampling: str, moment: str, kind: str) -> None:
    check(lambda: loader_for(kind, sampling), moment)


@pytest.mark.parametrize("moment", ["after iter()", "on the way"])
@pytest.mark.parametrize("sampling", ["shuffle", "generator", "subset", "own", "eager"])
def test_the_rest_does_not_depend_on_the_kind(sampling: str, moment: str) -> None:
    """Which has drawn the sampler's numbers when the state is taken, and which has not, differs."""
    for kind in ("local", "gathered as vectors", "gathered ahead", "threads"):
        torch.manual_seed(3)
        loader = loader_for(kind, sampling)
        rest = brought_to(loader, moment)
        state, rng = saved(loader)
        want = values(rest)
        for other in ("local", "gathered", "gathered ahead", "threads", "processes"):
            if other == "processes" and (sampling, moment) != ("shuffle", "after iter()"):
                continue  # slow, and of the same cause
            again = resumed(lambda other=other: loader_for(other, sampling), state, rng)
            assert values(again) == want, (kind, other)


def test_the_global_generator_may_be_restored_before_or_after() -> None:
    for sampling in ("shuffle", "subset", "own", "eager"):
        torch.manual_seed(3)
        loader = loader_for("threads", sampling)
        rest = brought_to(loader, "on the way")
        state, rng = saved(loader)
        want = what_follows(rest, loader)
        again = loader_for("threads", sampling)
        again.load_state_dict(state)
        iterator = iter(again)
        first = next(iterator)
        torch.set_rng_state(rng)
        got = what_follows(iterator, again)
        assert [values([first]) + got[0], *got[1:]] == want


def test_what_the_user_does_after_a_state_between_epochs_counts() -> None:
    def make() -> DataLoader:
        return loader_for("local", "distributed")

    loader = make()
    list(loader)
    state = loader.state_dict()
    loader.sampler.set_epoch(1)
    want = values(loader)
    again = make()
    again.load_state_dict(state)
    assert again.state_dict() == state
    again.sampler.set_epoch(1)
    assert again.state_dict()["epochs"] != state["epochs"]
    assert values(again) == want


def test_a_planned_sampler_begins_at_its_beginning_after_a_break() -> None:
    """Its own state says how far the iteration that was left had come."""
    loader = loader_for("local", "planned")
    next(iter(loader))
    iterator = iter(loader)
    next(iterator)
    again = loader_for("local", "planned")
    again.load_state_dict(loader.state_dict())
    rest = values(iterator)
    assert rest
    assert values(again) == rest


def test_data_pipes_are_shuffled_alike() -> None:
    """By a seed that the loader draws for them, before its own."""
    for arguments in ({}, {"threads": 2}):
        torch.manual_seed(1)
        loader = DataLoader(IterableWrapper(range(40)).shuffle(), 4, shuffle=True, **arguments)
        iterator = iter(loader)
        next(iterator)
        state, rng = saved(loader)
        rest = values(iterator)
        assert flat(rest) != sorted(flat(rest))

        def make(arguments: Any = arguments) -> DataLoader:
            return DataLoader(IterableWrapper(range(40)).shuffle(), 4, shuffle=True, **arguments)

        again = resumed(make, state, rng)
        assert values(again) == rest
        assert torch.equal(torch.get_rng_state(), rng)


# --- an iterator that was dropped -----------------------------------------------------------------


@pytest.mark.parametrize("kind", [*KINDS, "processes"])
def test_a_dropped_iterator_leaves_its_place_and_nothing_else(kind: str) -> None:
    loader = loader_for(kind, "shuffle")
    iterator = iter(loader)
    next(iterator)
    alive = weakref.ref(iterator)
    workers = list(getattr(iterator, "_workers", ()))
    assert bool(workers) == (kind == "processes")
    gc.disable()
    try:
        del iterator
        if "persistent" not in kind:  # torch keeps these
            assert alive() is None
        assert gone(lambda: not named_threads())
        assert not any(worker.is_alive() for worker in workers)
    finally:
        gc.enable()
    assert loader.state_dict()["yielded"] == 1
    assert len(values(loader)) == 8, "the next iter() begins anew"
    assert loader.state_dict()["between_epochs"]


def test_an_epoch_that_has_ended_is_none() -> None:
    loader = loader_for("local", "in order")
    iterator = iter(loader)
    list(iterator)
    assert loader.state_dict()["between_epochs"]
    again = loader_for("local", "in order")
    again.load_state_dict(loader.state_dict())
    assert len(values(again)) == 8


# --- batches that fail, are lost, or come out of order -------------------------------------------


class Bad(Indices):
    """Index 3 is an error, once or always."""

    def __init__(self, error: type[BaseException], always: bool = True) -> None:
        self.error, self.left = error, N if always else 1

    def __getitem__(self, i: int) -> int:
        if i == 3 and self.left:
            self.left -= 1
            raise self.error("index 3")
        return i


class BadStream(IterableDataset):
    """An iterator that goes on after an error."""

    def __init__(self, n: int = N) -> None:
        self.n = n

    def __iter__(self) -> Any:
        return self.Iterator(self.n)

    class Iterator:
        def __init__(self, n: int) -> None:
            self.at, self.n = -1, n

        def __iter__(self) -> Any:
            return self

        def __next__(self) -> int:
            self.at += 1
            if self.at == 3:
                raise OSError("index 3")
            if self.at >= self.n:
                raise StopIteration
            return self.at


def skipping(iterator: Any, batches: int = N) -> list[Any]:
    got: list[Any] = []
    for _ in range(batches):
        try:
            got += values([next(iterator)])
        except (OSError, KeyboardInterrupt) as error:
            got.append(type(error))
        except StopIteration:
            break
    return got


@pytest.mark.parametrize("arguments", [{}, {"threads": 2}, {"num_workers": 1}], ids=str)
@pytest.mark.parametrize("make", [lambda: Bad(OSError), BadStream], ids=["indices", "stream"])
def test_a_batch_whose_error_was_raised_is_done_with(make: Any, arguments: Any) -> None:
    loader = DataLoader(make(), 2, **arguments)
    iterator = iter(loader)
    start = skipping(iterator, 2)
    assert start == [[0, 1], OSError]
    for more in range(3):
        assert loader.state_dict()["yielded"] == 2 + more
        again = DataLoader(make(), 2, **arguments)
        again.load_state_dict(loader.state_dict())
        rest = skipping(iter(again))
        assert rest[0] == [4 + 2 * more, 5 + 2 * more]
        assert skipping(iterator, 1) == rest[:1]


def test_a_batch_that_an_interrupt_lost_comes_when_the_epoch_is_taken_up() -> None:
    """It was neither handed out nor is it bad."""
    loader = DataLoader(Bad(KeyboardInterrupt, always=False), 2)
    iterator = iter(loader)
    assert skipping(iterator, 2) == [[0, 1], KeyboardInterrupt]
    assert loader.state_dict()["yielded"] == 1
    assert skipping(iterator, 2) == [[4, 5], [6, 7]]
    state = loader.state_dict()
    assert state["yielded"] == 3
    for arguments in ({}, {"threads": 2}):
        again = DataLoader(Indices(), 2, **arguments)
        again.load_state_dict(state)
        assert values(again)[:2] == [[2, 3], [8, 9]]


def test_a_time_limit_takes_no_batch_away() -> None:
    may_go = threading.Event()

    class Waits(Indices):
        def __getitem__(self, i: int) -> int:
            assert may_go.wait(30)
            return i

    loader = DataLoader(Waits(), 2, threads=1, timeout=0.05)
    iterator = iter(loader)
    with pytest.raises(RuntimeError, match="timed out"):
        next(iterator)
    assert loader.state_dict()["yielded"] == 0
    may_go.set()
    again = DataLoader(Indices(), 2)
    again.load_state_dict(loader.state_dict())
    assert values(again)[0] == [0, 1]


class Late(Indices):
    """The first index takes as long as `wait`."""

    def __init__(self, wait: Callable[[], Any]) -> None:
        self.wait = wait

    def __getitem__(self, i: int) -> int:
        if i == 0:
            self.wait()
        return i


class Stream(IterableDataset):
    def __iter__(self) -> Iterator[int]:
        yield from range(N)


class ToldStream(IterableDataset):
    """A stream that can be asked where it is; counts what it gave."""

    def __init__(self) -> None:
        self.at = self.given = 0

    def __iter__(self) -> Iterator[int]:
        while self.at < N:
            self.at += 1
            self.given += 1
            yield self.at - 1
        self.at = 0

    def state_dict(self) -> dict[str, list[int]]:
        return {"at": [self.at]}

    def load_state_dict(self, state: dict[str, list[int]]) -> None:
        (self.at,) = state["at"]


def late(wait: Callable[[], Any]) -> Callable[[list[int]], torch.Tensor]:
    def collate(samples: list[int]) -> torch.Tensor:
        if samples[0] == 0:
            wait()
        return torch.tensor(samples)

    return collate


# The dataset and the arguments of a loader whose first batch comes late.
OUT_OF_ORDER: dict[str, Callable[[Callable[[], Any]], tuple[Any, dict[str, Any]]]] = {
    "threads": lambda wait: (Late(wait), {"threads": 2}),
    "processes": lambda wait: (Late(wait), {"num_workers": 2}),
    # Drawn in turn, so that batches have numbers here too.
    "a stream in threads": lambda wait: (Stream(), {"threads": 2, "collate_fn": late(wait)}),
    "its own state in threads": lambda wait: (
        ToldStream(),
        {"threads": 2, "collate_fn": late(wait)},
    ),
}


@pytest.mark.parametrize("name", OUT_OF_ORDER)
def test_out_of_order_no_batch_is_lost_or_repeated(name: str) -> None:
    go = threading.Event()
    wait = functools.partial(time.sleep, 2) if name == "processes" else lambda: go.wait(30)
    dataset, arguments = OUT_OF_ORDER[name](wait)
    loader = DataLoader(dataset, 2, in_order=False, **arguments)
    iterator = iter(loader)
    had = values(next(iterator) for _ in range(3))
    assert [0, 1] not in had
    state = loader.state_dict()
    go.set()
    del iterator
    assert state["yielded"] == 3
    assert len(pickle.dumps(state)) <= 1024

    for way in ("in order", "out of order", "in this thread"):

        def make(way: str = way) -> DataLoader:
            dataset, arguments = OUT_OF_ORDER[name](lambda: None)
            if way == "in this thread":
                arguments.update(threads=None, num_workers=0)
            return DataLoader(dataset, 2, in_order=way != "out of order", **arguments)

        again = make()
        again.load_state_dict(state)
        iterator = iter(again)
        # Once more, while what came late is yet to be handed out, or some of it.
        got = values([next(iterator)])
        third = make()
        third.load_state_dict(again.state_dict())
        got += values(third)
        assert sorted(flat(had + got)) == list(range(N)), way


# --- datasets with a state of their own -----------------------------------------------------------


@pytest.mark.parametrize("arguments", [{}, {"threads": 2}, {"num_workers": 1}], ids=str)
@pytest.mark.parametrize("dropped", [False, True])
def test_a_stream_goes_on_after_the_last_batch_that_was_handed_out(
    arguments: dict[str, Any], dropped: bool
) -> None:
    loader = DataLoader(ToldStream(), 2, **arguments)
    iterator = iter(loader)
    for _ in range(4):
        next(iterator)
    if dropped:
        del iterator
    # As text: what follows here must not reach into it.
    state = pickle.dumps(loader.state_dict())
    again = DataLoader(ToldStream(), 2, **arguments)
    again.load_state_dict(pickle.loads(state))
    assert pickle.loads(pickle.dumps(again.state_dict()["dataset"])) == {"at": [8]}
    second = iter(again)
    assert values([next(second)]) == [[8, 9]]
    third = DataLoader(ToldStream(), 2, **arguments)
    third.load_state_dict(again.state_dict())
    assert values(third) == [[i, i + 1] for i in range(10, N - 1, 2)] + [[N - 1]]
    if "num_workers" not in arguments:
        assert third.dataset.given == N - 10, "asked, not replayed"


@pytest.mark.parametrize("kind", ["goes on", "begins anew"])
@pytest.mark.parametrize("size", [2, 40])  # with other batches before it, and without
def test_a_stream_whose_end_came_with_its_last_batch_is_at_its_end(size: int, kind: str) -> None:
    """And not at the beginning of the next epoch, which its state may tell by then."""
    ways = ({}, {"threads": 1}, {"num_workers": 1}, {"num_workers": 1, "persistent_workers": True})
    for way in ways:
        loader = DataLoader(STREAMS[kind](), size, **way)
        iterator = iter(loader)
        for _ in range(-(-N // size)):
            next(iterator)
        state = loader.state_dict()
        assert not state.get("between_epochs")
        for other in ways[:3]:
            again = DataLoader(STREAMS[kind](), size, **other)
            again.load_state_dict(state)
            third = DataLoader(STREAMS[kind](), size, **other)
            second = iter(again)
            third.load_state_dict(again.state_dict())
            for each, rest in ((again, second), (third, third)):
                assert values(rest) == [], (way, other)
                assert flat(values(each)) == share(0), (way, other)


def test_threads_keep_a_state_that_later_draws_do_not_reach() -> None:
    class Shared(ToldStream):
        def __init__(self) -> None:
            super().__init__()
            self.kept = {"at": [0]}

        def state_dict(self) -> dict[str, list[int]]:
            self.kept["at"][0] = self.at
            return self.kept

    loader = DataLoader(Shared(), 2, threads=1)
    iterator = iter(loader)
    next(iterator)
    assert gone(lambda: loader.dataset.at > 2), "it is drawn from ahead"
    assert loader.state_dict()["dataset"] == {"at": [2]}


class Ends(ToldStream):
    """Tells its end until it is begun again, and begins where it was told, as Hugging Face's do."""

    def __iter__(self) -> Iterator[int]:
        start, self.start = getattr(self, "start", 0), 0
        for self.at in range(start + 1, N + 1):
            yield self.at - 1

    def load_state_dict(self, state: dict[str, list[int]]) -> None:
        (self.start,) = state["at"]


@pytest.mark.parametrize("arguments", [{}, {"threads": 2}], ids=str)
def test_between_epochs_a_stream_is_not_asked(arguments: dict[str, Any]) -> None:
    loader = DataLoader(Ends(), 4, **arguments)
    want = values(loader)
    assert len(want) == 6
    for state in (loader.state_dict(), (iter(loader), loader.state_dict())[1]):
        again = DataLoader(Ends(), 4, **arguments)
        again.load_state_dict(state)
        assert values(again) == want


class Counts(Indices):
    """A map-style dataset with a state: how often it was asked."""

    def __init__(self) -> None:
        self.asked = 0

    def __getitem__(self, i: int) -> int:
        self.asked += 1
        return i

    def state_dict(self) -> dict[str, int]:
        return {"asked": self.asked}

    def load_state_dict(self, state: dict[str, int]) -> None:
        self.asked = state["asked"]


def test_map_style_datasets_are_asked() -> None:
    loader = DataLoader(Counts(), 2)
    iterator = iter(loader)
    next(iterator)
    state = loader.state_dict()
    for arguments in ({}, {"threads": 2}):
        again = DataLoader(Counts(), 2, **arguments)
        again.load_state_dict(state)
        values(again)
        assert again.dataset.asked == N
    list(iterator)
    again = DataLoader(Counts(), 2)
    again.load_state_dict(loader.state_dict())
    assert again.dataset.asked == N, "between epochs"
    assert "dataset" not in DataLoader(Counts(), 2, threads=2).state_dict()
    with pytest.raises(ValueError, match="this loader's dataset has no load_state_dict: Indices"):
        DataLoader(Indices(), 2).load_state_dict(state)


def test_a_replay_leaves_the_global_generator_alone() -> None:
    class Noisy(IterableDataset):
        def __iter__(self) -> Iterator[torch.Tensor]:
            for i in range(N):
                yield i + torch.rand(())

    loader = DataLoader(Noisy(), 2)
    iterator = iter(loader)
    next(iterator)
    state, rng = saved(loader)
    want = values(iterator)
    assert values(resumed(lambda: DataLoader(Noisy(), 2), state, rng)) == want


# --- copies of a stream in worker processes -------------------------------------------------------


class Shares(IterableDataset):
    """Each worker has numbers of its own, the second one fewer, and its copy tells where it is.

    goes_on: an iteration begins where the last one was left, and not with the first number.
    """

    bad: int | None = None  # the place of a sample that is an error
    late = 0.0  # seconds that the first worker takes for its first sample

    def __init__(self, goes_on: bool = True) -> None:
        self.goes_on = goes_on
        self.at = self.begin = 0

    def __iter__(self) -> Iterator[int]:
        return Walk(self)

    def state_dict(self) -> dict[str, list[int]]:
        return {"at": [self.at]}

    def load_state_dict(self, state: dict[str, list[int]]) -> None:
        (self.begin,) = state["at"]
        self.at = self.begin


class Silent(Shares):
    """Without a state, and so from the beginning."""

    state_dict = None

    def __init__(self) -> None:
        super().__init__(goes_on=False)


class Walk:
    def __init__(self, copy: Shares) -> None:
        self.copy = copy
        self.begun = False

    def __iter__(self) -> Walk:
        return self

    def __next__(self) -> int:
        copy, info = self.copy, get_worker_info()
        worker = 0 if info is None else info.id
        if not self.begun:
            self.begun = True
            if not copy.goes_on:
                copy.at, copy.begin = copy.begin, 0
            if worker == 0:
                time.sleep(copy.late)
        if copy.at >= N - 9 * worker:
            if copy.goes_on:
                copy.at = 0
            raise StopIteration
        copy.at += 1
        if copy.at - 1 == copy.bad:
            raise OSError("bad")
        return 100 * worker + copy.at - 1


def share(worker: int) -> list[int]:
    return [100 * worker + i for i in range(N - 9 * worker)]


STREAMS: dict[str, Callable[[], Shares]] = {
    "goes on": Shares,
    "begins anew": lambda: Shares(False),
    "silent": Silent,
}


@pytest.mark.parametrize(
    ("workers", "breaks"),
    [
        (1, ()),
        (1, (5, 0)),  # an epoch that nothing was asked of comes in between
        (2, (1,)),  # where the second worker was asked and never heard
        (2, (5, 0)),
    ],
    ids=str,
)
@pytest.mark.parametrize("name", STREAMS)
def test_persistent_workers_go_on_with_their_copies(
    name: str, workers: int, breaks: tuple[int, ...]
) -> None:
    """From every batch of an epoch whose workers were left in the middle of the ones before."""

    def make() -> DataLoader:
        return DataLoader(STREAMS[name](), 2, num_workers=workers, persistent_workers=True)

    loader = make()
    for batches in breaks:
        values(itertools.islice(loader, batches))
    iterator = iter(loader)
    states = [loader.state_dict()]
    rest = []
    for batch in iterator:
        rest += values([batch])
        states.append(pickle.loads(pickle.dumps(loader.state_dict())))
    states += [loader.state_dict()]  # between two
    follows = [rest[k:] for k in range(len(rest))] + [[]]
    after = values(loader)
    used = make()
    for k in sorted({0, 1, 5, len(rest) - 1, len(rest)} & set(range(len(rest) + 1))):
        again = make()
        again.load_state_dict(states[k])
        assert again.state_dict() == states[k]
        assert [values(again), values(again)] == [follows[k], after], k
        # Workers that have gone elsewhere since, and a state of what was taken up.
        next(iter(used))
        used.load_state_dict(states[k])
        if follows[k]:
            assert values([next(iter(used))]) == follows[k][:1]
            again.load_state_dict(used.state_dict())
            assert values(again) == follows[k][1:]
    again.load_state_dict(states[-1])
    assert values(again) == after, "between two"


def test_copies_of_a_stream_are_asked_and_not_replayed() -> None:
    class Strict(Shares):
        least = 0

        def __iter__(self) -> Iterator[int]:
            assert self.at >= self.least
            return super().__iter__()

    loader = DataLoader(Strict(), 2, num_workers=2)
    iterator = iter(loader)
    for _ in range(6):
        next(iterator)
    again = DataLoader(Strict(), 2, num_workers=2)
    again.dataset.least = 6
    again.load_state_dict(loader.state_dict())
    assert values(again) == values(iterator)
    again.dataset.least = 0
    assert values(again)[0] == [0, 1], "the loader's own has not moved"


@pytest.mark.parametrize("name", ["goes on", "silent"])
def test_a_batch_of_a_workers_stream_that_failed_or_was_lost(
    name: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    def make() -> DataLoader:
        dataset = STREAMS[name]()
        dataset.bad = 4
        return DataLoader(dataset, 2, num_workers=2)

    whole = skipping(iter(make()))
    # Numbers come before and after the bad ones.
    assert whole[:6] == [[0, 1], [100, 101], [2, 3], [102, 103], OSError, OSError]
    assert whole[6:8] == [[5, 6], [105, 106]]
    for had in range(2, 9):
        loader = make()
        assert skipping(iter(loader), had) == whole[:had]
        again = make()
        again.load_state_dict(loader.state_dict())
        assert skipping(iter(again)) == whole[had:], had

    loader = make()
    iterator = iter(loader)
    assert skipping(iterator, 3) == whole[:3]
    with monkeypatch.context() as patch:
        patch.setattr(type(iterator), "_try_put_index", signal_interrupt)
        assert skipping(iterator, 1) == [KeyboardInterrupt]
    assert skipping(iterator, 3) == [*whole[4:6], whole[6]]
    assert loader.state_dict()["yielded"] == 6
    for _ in range(2):
        again = make()
        again.load_state_dict(loader.state_dict())
        loader = again
    assert skipping(iter(again)) == [whole[3], *whole[7:]]


def signal_interrupt(*_: Any) -> None:
    raise KeyboardInterrupt


@pytest.mark.parametrize("name", STREAMS)
def test_streams_out_of_order_in_worker_processes(name: str) -> None:
    """No batch is lost or repeated, and each worker's come in its order."""

    def make(late: float, in_order: bool) -> DataLoader:
        dataset = STREAMS[name]()
        dataset.late = late
        return DataLoader(dataset, 2, num_workers=2, in_order=in_order)

    loader = make(1.0, False)
    iterator = iter(loader)
    had = values(itertools.islice(iterator, 3))
    assert had == [[100, 101], [102, 103], [104, 105]]
    states = [loader.state_dict()]
    had += values(itertools.islice(iterator, 5))
    assert [0, 1] in had
    states.append(loader.state_dict())
    del iterator
    for before, state in zip((had[:3], had), states, strict=True):
        for in_order in (True, False):
            again = make(0.0, in_order)
            again.load_state_dict(state)
            iterator = iter(again)
            got = before + values([next(iterator)])
            third = make(0.0, in_order)
            third.load_state_dict(again.state_dict())
            got = flat(got + values(third))
            assert [i for i in got if i < 100] == share(0)
            assert [i for i in got if i >= 100] == share(1)


@pytest.mark.parametrize("name", STREAMS)
def test_one_worker_goes_on_where_threads_or_no_worker_were(name: str) -> None:
    ways = ({}, {"threads": 2}, {"num_workers": 1}, {"num_workers": 1, "in_order": False})
    want = [share(0)[i : i + 2] for i in range(0, N, 2)]
    for way in ways:
        loader = DataLoader(STREAMS[name](), 2, **way)
        iterator = iter(loader)
        assert values(itertools.islice(iterator, 4)) == want[:4]
        state = pickle.loads(pickle.dumps(loader.state_dict()))
        for other in ways:
            again = DataLoader(STREAMS[name](), 2, **other)
            again.load_state_dict(state)
            assert values(again) == want[4:], (way, other)


def test_where_a_single_workers_second_epoch_begins_is_told_to_every_kind() -> None:
    loader = DataLoader(Shares(), 2, num_workers=1, persistent_workers=True)
    values(itertools.islice(loader, 1))  # and two more are under way
    iter(loader)
    state = loader.state_dict()
    for way in ({}, {"threads": 1}, {"num_workers": 1}):
        again = DataLoader(Shares(), 2, **way)
        again.load_state_dict(state)
        iterator = iter(again)
        third = DataLoader(Shares(), 2, **way)
        third.load_state_dict(again.state_dict())
        assert values([next(iterator)]) == values(third)[:1] == [[6, 7]]


def test_states_of_other_numbers_of_workers_are_refused() -> None:
    def make(workers: int) -> DataLoader:
        return DataLoader(Shares(), 2, num_workers=workers)

    for there, here in ((2, 0), (2, 1), (1, 2), (0, 3)):
        loader = make(there)
        iterator = iter(loader)
        next(iterator)
        with pytest.raises(
            ValueError, match=f"workers = {max(here, 1)}, got one with {max(there, 1)}"
        ):
            make(here).load_state_dict(loader.state_dict())
    state = loader.state_dict()
    del state["loader"]
    with pytest.raises(ValueError, match="batches each of 2 workers has given, got 0"):
        make(2).load_state_dict(state)
    again = make(2)
    again.load_state_dict(make(0).state_dict())
    assert sorted(flat(values(again))) == share(0) + share(1)


def test_a_stream_in_workers_that_cannot_tell_its_state_is_an_error_when_asked() -> None:
    class Secret(Shares):
        def state_dict(self) -> Any:
            return lambda: None

    loader = DataLoader(Secret(), 2, num_workers=1, persistent_workers=True)
    assert flat(values(loader)) == share(0)
    iterator = iter(loader)
    with pytest.raises(RuntimeError, match=r"state_dict\(\) failed in a worker process: .*lambda"):
        loader.state_dict()
    next(iterator)
    with pytest.raises(RuntimeError, match=r"state_dict\(\) failed in a worker process: .*lambda"):
        loader.state_dict()


def test_batches_that_tell_a_state_are_page_locked_without_it(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    """torch's thread asks them, and not what is in them."""
    monkeypatch.setattr(torch.Tensor, "pin_memory", lambda tensor: tensor + 100)
    told = Told({"x": torch.arange(2)}, Start(pickle.dumps(torch.arange(3))))
    pinned = pin_memory(told, "cuda")
    assert pinned.data["x"].tolist() == [100, 101]
    assert pickle.loads(pinned.place.state).tolist() == [0, 1, 2]


@pytest.mark.cuda
def test_a_stream_in_workers_whose_batches_are_page_locked() -> None:
    loader = DataLoader(Shares(), 2, num_workers=1, pin_memory=True)
    iterator = iter(loader)
    assert next(iterator).is_pinned()
    again = DataLoader(Shares(), 2, num_workers=1, pin_memory=True)
    again.load_state_dict(loader.state_dict())
    assert values(again) == values(iterator)


def test_worker_init_fn_comes_before_a_copy_is_put_where_it_was() -> None:
    class Renewed(Shares):
        def renew(self) -> None:
            self.at = self.begin = 0

    def init(worker: int) -> None:
        torch.utils.data.get_worker_info().dataset.renew()

    def make() -> DataLoader:
        return DataLoader(Renewed(), 2, num_workers=1, worker_init_fn=init)

    loader = make()
    iterator = iter(loader)
    next(iterator)
    again = make()
    again.load_state_dict(loader.state_dict())
    assert values(again) == values(iterator)


# --- states that do not fit, and epochs that cannot begin -----------------------------------------


class Fails(Sampler[int]):
    """Its first iteration is an error."""

    def __init__(self, eager: bool) -> None:
        self.eager, self.failed = eager, False

    def __iter__(self) -> Iterator[int]:
        return self._begun() if self.eager else self._numbers()

    def _begun(self) -> Iterator[int]:
        return iter(list(self._numbers()))

    def _numbers(self) -> Iterator[int]:
        if not self.failed:
            self.failed = True
            raise OSError("not yet")
        yield from range(N)

    def __len__(self) -> int:
        return N


# In iter(), where the sampler fails: in its own __iter__, or as the threads are given their work.
@pytest.mark.parametrize(("eager", "arguments"), [(True, {}), (False, {"threads": 2})])
def test_a_state_outlives_an_iter_that_fails(eager: bool, arguments: dict[str, Any]) -> None:
    sampler = Fails(eager)
    sampler.failed = True
    loader = DataLoader(Indices(), None, sampler=sampler, **arguments)
    iterator = iter(loader)
    next(iterator)
    state = loader.state_dict()
    again = DataLoader(Indices(), None, sampler=Fails(eager), **arguments)
    again.load_state_dict(state)
    with pytest.raises(OSError, match="not yet"):
        iter(again)
    assert again.state_dict()["yielded"] == 1
    assert values(again) == [*range(1, N)]
    assert again.state_dict()["between_epochs"], "it is used up"


def test_an_epoch_that_fails_to_begin_leaves_the_last_ones_place() -> None:
    loader = DataLoader(Indices(), None, sampler=Fails(True))
    loader.sampler.failed = True
    next(iter(loader))
    loader.sampler.failed = False
    with pytest.raises(OSError, match="not yet"):
        iter(loader)
    assert loader.state_dict()["yielded"] == 1


def on_the_way(**arguments: Any) -> dict[str, Any]:
    loader = DataLoader(Indices(), **arguments)
    iterator = iter(loader)
    next(iterator)
    return loader.state_dict()


MISFITS: dict[str, tuple[dict[str, Any], dict[str, Any], str]] = {
    "batch size": (
        {"batch_size": 2},
        {"batch_size": 4},
        r"a state of a loader with batch_size = 4, got one with 2",
    ),
    "no batches": (
        {"batch_size": 2},
        {"batch_size": None},
        r"batch_size = None, got one with 2",
    ),
    "kind": (
        {"batch_size": 2, "shuffle": True},
        {"batch_size": 2},
        r"samplers = \['BatchSampler', 'SequentialSampler'\], got one with .*'RandomSampler'",
    ),
    "ranks": (
        {"batch_size": 2, "sampler": DistributedSampler(range(N), 2, 0)},
        {"batch_size": 2, "sampler": DistributedSampler(range(N), 3, 0)},
        r"num_replicas = \[None, 3\], got one with \[None, 2\]",
    ),
    "generators": (
        {"batch_size": 2, "shuffle": True, "generator": seeded()},
        {"batch_size": 2, "shuffle": True},
        "the state has 1 generators, and this loader has 0",
    ),
}


@pytest.mark.parametrize("name", MISFITS)
def test_states_of_other_loaders_are_refused_when_they_are_loaded(name: str) -> None:
    theirs, ours, text = MISFITS[name]
    loader = DataLoader(Indices(), **ours)
    with pytest.raises(ValueError, match=text):
        loader.load_state_dict(on_the_way(**theirs))
    ranks = 3 if name == "ranks" else 1
    assert len(flat(values(loader))) == -(-N // ranks), "it is as it was"


def test_a_dataset_of_another_length_is_refused_but_between_epochs() -> None:
    other = DataLoader(TensorDataset(torch.arange(9)), 2, shuffle=True)
    state = on_the_way(batch_size=2, shuffle=True)
    with pytest.raises(ValueError, match=r"len\(dataset\) = 9, got one with 23"):
        other.load_state_dict(state)
    other.load_state_dict(DataLoader(Indices(), 3, shuffle=True).state_dict())
    assert len(values(other)) == 5


def test_states_that_say_less_are_taken() -> None:
    """As those of before there was more to say."""
    torch.manual_seed(1)
    state = on_the_way(batch_size=2, shuffle=True)
    assert sorted(state) == ["base_seed", "format", "loader", "seed", "yielded"]
    del state["loader"]
    first = DataLoader(Indices(), 2, shuffle=True)
    first.load_state_dict(state)
    want = values(first)
    assert len(want) == 11
    for more in ({"threads": 3}, {"num_workers": 1}, {"drop_last": True}):
        again = DataLoader(Indices(), 2, shuffle=True, **more)
        again.load_state_dict(state)
        assert values(again) == want[: len(want) - ("drop_last" in more)]


def test_a_stream_with_a_state_takes_another_batch_size() -> None:
    """It goes on from a sample."""
    loader = DataLoader(ToldStream(), 2)
    next(iter(loader))
    again = DataLoader(ToldStream(), 5)
    again.load_state_dict(loader.state_dict())
    assert values(again)[0] == [2, 3, 4, 5, 6]
    replayed = DataLoader(Stream(), 2)
    next(iter(replayed))
    with pytest.raises(ValueError, match="batch_size = 5, got one with 2"):
        DataLoader(Stream(), 5).load_state_dict(replayed.state_dict())


@pytest.mark.parametrize("yielded", [True, -1, 1.0, None])
def test_yielded_is_a_count(yielded: Any) -> None:
    with pytest.raises(ValueError, match="yielded: expected an integer >= 0, got"):
        DataLoader(Indices(), 2).load_state_dict({"format": 1, "yielded": yielded})


# --- several threads of the user's ----------------------------------------------------------------


def test_threads_of_the_users_share_an_iterator() -> None:
    """Each batch goes to one of them, and at the end none waits for what another has."""

    class Quick(Indices):
        def __len__(self) -> int:
            return 400

        def __getitem__(self, i: int) -> int:
            time.sleep(0.0005)
            return i

    begun = time.perf_counter()
    for _ in range(3):
        loader = DataLoader(Quick(), 2, threads=2)
        iterator = iter(loader)
        got: list[list[int]] = []

        def run(iterator: Any = iterator, got: Any = got) -> None:
            for batch in iterator:
                got.append(batch.tolist())

        runners = [threading.Thread(target=run) for _ in range(4)]
        for runner in runners:
            runner.start()
        for runner in runners:
            runner.join()
        assert sorted(got) == [[i, i + 1] for i in range(0, 400, 2)]
        assert loader.state_dict()["between_epochs"]
    assert time.perf_counter() - begun < 4


@pytest.mark.parametrize("threads", [np.int64(2), np.uint8(2), torch.tensor(2)], ids=repr)
def test_threads_are_any_integer(threads: Any) -> None:
    loader = DataLoader(Indices(), 2, threads=threads)
    assert type(loader.threads) is int
    assert len(values(loader)) == 12


@pytest.mark.parametrize("threads", [True, np.True_, 2.0, "2", 0], ids=repr)
def test_threads_are_nothing_else(threads: Any) -> None:
    with pytest.raises(ValueError, match="threads: expected an integer >= 1, got "):
        DataLoader(Indices(), 2, threads=threads)
