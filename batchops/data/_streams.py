"""Where worker processes are in their copies of an iterable dataset, and how to be there again.

Each worker draws from a copy of its own, batch after batch, and its batches arrive in that order,
whatever the order among workers is. So the place of an epoch is, of each worker, where its copy
began and how many of its batches were handed out::

    worker 0   start ─ batch ─ batch ─ batch ┊ batch that is under way
    worker 1   start ─ batch ─ batch ┊
                       had = 3 and 2

A dataset that has a state tells it with each batch, and the starts move on to it. The way from a
start is gone once more when an epoch is taken up: what was handed out is dropped when it arrives.
"""

from __future__ import annotations

import contextlib
import pickle
from collections.abc import Callable, Iterable
from typing import Any, NamedTuple

import torch
from torch.utils.data import dataloader as torch_dataloader
from torch.utils.data._utils.pin_memory import pin_memory as pin

_Kind = torch_dataloader._DatasetKind


class Start(NamedTuple):
    """What a copy of the dataset is before it is iterated.

    state: its own, pickled; None: as it is in the loader. again: the iterations that came between
    that and this one, as the number of batches that were asked for in each. Of an iteration that
    was left on the way, or that has ended, the dataset's own state need not tell: some go on with
    the next sample, and others begin anew. So the last steps are gone again.
    """

    state: bytes | None = None
    again: tuple[int, ...] = ()

    def put(self, dataset: Any, loader: Loads) -> None:
        if self.state is not None:
            dataset.load_state_dict(pickle.loads(self.state))
        for count in self.again:
            fetcher = _Kind.create_fetcher(
                _Kind.Iterable, dataset, loader.batches, _nothing, loader.drop_last
            )
            for _ in range(count):
                with contextlib.suppress(Exception):  # an end, or a batch's error once more
                    fetcher.fetch(loader.index)

    def as_dict(self) -> dict[str, Any]:
        found: dict[str, Any] = {}
        if self.state is not None:
            found["dataset"] = pickle.loads(self.state)
        if self.again:
            found["dataset_again"] = list(self.again)
        return found

    @classmethod
    def of(cls, saved: dict[str, Any]) -> Start:
        state = pickle.dumps(saved["dataset"]) if "dataset" in saved else None
        return cls(state, tuple(saved.get("dataset_again", ())))


def _nothing(_: Any) -> None:
    """In the place of a collate_fn."""


class Loads(NamedTuple):
    """How a loader asks an iterable dataset for a batch."""

    batches: bool  # of samples, or single ones
    drop_last: bool
    index: Any

    @classmethod
    def of(cls, loader: Any) -> Loads:
        index = [None] * loader.batch_size if loader._auto_collation else None
        return cls(loader._auto_collation, loader.drop_last, index)


class BeginsAt:
    """A worker_init_fn: the user's, and then each worker's copy is put where it begins."""

    def __init__(self, init: Callable[[int], Any] | None, starts: list[Start], loads: Loads):
        self._init = init
        self._starts = starts
        self._loads = loads

    def __call__(self, worker: int) -> None:
        if self._init is not None:
            self._init(worker)
        self._starts[worker].put(torch.utils.data.get_worker_info().dataset, self._loads)


class Told(NamedTuple):
    """A worker's batch, with the dataset's state after it; or what kept it from telling that."""

    data: Any
    place: Start | None = None
    last: bool = False  # the end came with the batch, and the state may be the next iteration's
    problem: str = ""

    def pin_memory(self) -> Told:
        return self._replace(data=pin(self.data))


class Tells:
    """A collate_fn in worker processes: batches come with the state of the dataset."""

    def __init__(self, collate: Callable[[Any], Any], loads: Loads) -> None:
        self._collate = collate
        self._loads = loads

    def __call__(self, samples: Any) -> Told:
        data = self._collate(samples)
        if self._loads.batches and len(samples) < len(self._loads.index):
            return Told(data, last=True)
        try:
            # Now, and not when the batch is sent: what is drawn next must not reach into it.
            state = pickle.dumps(torch.utils.data.get_worker_info().dataset.state_dict())
        except Exception as error:
            return Told(data, problem=f"{type(error).__name__}: {error}")
        return Told(data, Start(state))


class History:
    """One worker's iteration, as far as the next one's start depends on it."""

    def __init__(self, start: Start) -> None:
        self.problem = ""
        self._from = start
        self._asked = 0  # batches after that
        self._last: Start | None = None  # told by the last of them

    def answered(self, batch: Told | None) -> None:
        """With a batch, or with an error or the end."""
        if self._last is not None:
            self._from, self._asked = self._last, 0
        self._asked += 1
        self._last = None if batch is None else batch.place
        if batch is not None and not batch.last:
            self.problem = batch.problem

    def next_start(self) -> Start:
        """Of the iteration after this one."""
        return Start(self._from.state, (*self._from.again, self._asked))


class Streams:
    """How far an epoch is in the copies of all workers."""

    def __init__(
        self,
        starts: Iterable[Start],
        first: int = 0,
        had: Iterable[int] | None = None,
        lost: Iterable[tuple[int, int]] = (),
    ) -> None:
        self.starts = list(starts)
        self.first = first  # the worker whose batch came first after the starts
        self.had = [0] * len(self.starts) if had is None else list(had)
        self.lost = set(lost)  # of those (worker, number) that are not done with
        self.problem = ""
        self._arrived = [0] * len(self.starts)
        self._now: tuple[int, int] | None = None
        # Of each worker the last known place, and the batches that came after it: one at most.
        self._known: list[tuple[Start, int] | None] = [(start, 0) for start in self.starts]

    def arrived(self, worker: int, told: Told | None) -> bool:
        """Whether the worker's next batch is to be handed out; it may have been before."""
        number = self._arrived[worker]
        self._arrived[worker] += 1
        if number >= self.had[worker]:
            self.had[worker] += 1
            self.lost.add((worker, number))  # until it is done with
        known = self._known[worker]
        self._known[worker] = None
        if told is not None:
            self.problem = self.problem if told.last else told.problem
            if told.place is not None:
                self._known[worker] = (told.place, 0)
            elif told.last and known is not None:
                self._known[worker] = (known[0], 1)
        self._now = (worker, number)
        if self._now in self.lost:
            return True
        self._move_on()
        return False

    def done(self) -> None:
        """The batch that arrived last was handed out, or its error was raised."""
        if self._now is not None:
            self.lost.discard(self._now)
            self._move_on()

    def _move_on(self) -> None:
        known = [each for each in self._known if each is not None]
        if self.lost or len(known) < len(self.starts) or self._arrived != self.had:
            return
        self.starts = [start for start, _ in known]
        # Only of workers at their end: what of theirs comes once more has no place among others.
        self.had = [count for _, count in known]
        self._arrived = self.had.copy()
        self.first = (self._now[0] + 1) % len(self.starts)
        self._now = None

    def as_dict(self, reached: int) -> dict[str, Any]:
        """For the state of a loader that has handed out, or lost, so many batches."""
        if self.problem:
            raise RuntimeError(
                "DataLoader.state_dict: the dataset's own state_dict() failed in a worker process: "
                f"{self.problem}"
            )
        if len(self.starts) == 1:
            found = self.starts[0].as_dict()  # as that of a dataset in this process
            if found and self.had[0]:
                found["dataset_at"] = reached - self.had[0]
            return found
        found = {"first": self.first, "had": self.had.copy()}
        if self.lost:
            found["lost"] = [list(each) for each in sorted(self.lost)]
        if any(start != Start() for start in self.starts):
            found["starts"] = [start.as_dict() for start in self.starts]
        return {"workers": found} if any(self.had) or "starts" in found else {}

    @classmethod
    def of(cls, state: dict[str, Any], workers: int) -> Streams:
        """As a loader's state has them, which as_dict gave or a loader without processes."""
        saved = state.get("workers")
        if saved is None:
            start = Start.of(state)
            if workers > 1:
                return cls([Start()] * workers)  # nothing was handed out
            missing = state.get("missing", ())
            reached = state["yielded"] + len(missing)
            at = state.get("dataset_at", reached if "dataset" in state else 0)
            return cls([start], had=[reached - at], lost=[(0, number - at) for number in missing])
        starts = [Start.of(each) for each in saved.get("starts", [{}] * workers)]
        lost = [(worker, number) for worker, number in saved.get("lost", ())]
        return cls(starts, saved["first"], saved["had"], lost)
