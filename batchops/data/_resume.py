"""Where in an epoch a loader is, as a small dict, and how to be there again.

An epoch draws random numbers at these moments, top to bottom. G is the generator of the loader, S
that of the sampler: the user's, or the global one where there is none.

::

                                  num_workers=0      threads, workers,    persistent workers from
                                                     gathers of these     their second epoch on
    seed of an IterDataPipe       G, in iter()       G, in iter()         G, in iter()
    a sampler's __iter__ itself   S, in iter()       S, in iter()         S, in iter()
    base seed                     G, in iter()       G, in iter()         kept from their first
    a sampler's first batch       S, in first next   S, in iter()         S, in iter()

What was drawn when a state is taken has to come out again, and what was not has to be drawn anew,
whichever of these ways goes on from the state. So

*   generators of the user's are kept as they were before the first of these. An epoch that is taken
    up sets them back and draws again, in the same order. But for a base seed that was kept: it was
    drawn in an earlier epoch, and so that draw is undone where workers are new, and made where an
    epoch drew one and the workers are there already.
*   the global generator is never set back: its numbers are kept themselves (a seed, or the state
    that a draw met), and given again. All that taking up an epoch does for the second time leaves
    the global generator as it is, so a user may restore it before or after; only what was never
    done draws from it, as a sampler whose first batch was yet to come.
*   between two epochs nothing has been drawn, except the base seed of persistent workers. Such a
    state is put into the generators, samplers and dataset at once: what the user then does to them
    (``set_epoch``, ``manual_seed``) counts, as it would have without a stop.

Batches are numbered in the order in which the sampler gives them. A batch is done with when it was
handed out or when its error was raised. ``reached`` is one more than the furthest that is done
with, ``missing`` are those before it that are not: under way where batches come out of order, or
lost by an interrupt. They come first when the epoch is taken up.
"""

from __future__ import annotations

import contextlib
import inspect
from collections.abc import Iterator
from contextvars import Context, ContextVar, copy_context
from typing import Any, NamedTuple

import torch
from torch.utils.data import Sampler
from torch.utils.data.dataloader import _DatasetKind
from torch.utils.data.distributed import DistributedSampler

from batchops.data._arguments import as_integer
from batchops.data._sampling import Draws, users_generator
from batchops.data._streams import Loads, Start, Streams
from batchops.data.samplers import _Planned

FORMAT = 1

# Where the copies of an iterable dataset begin.
_OF_STREAMS = ("dataset", "dataset_again", "workers")


def _samplers(loader: Any) -> list[Any]:
    """The objects that decide the order, outermost first, each once."""
    found: list[Any] = []
    for sampler in (
        loader.batch_sampler,
        getattr(loader.batch_sampler, "sampler", None),
        loader.sampler,
    ):
        if sampler is not None and not any(sampler is other for other in found):
            found.append(sampler)
    return found


def _generators(loader: Any) -> list[torch.Generator]:
    """The user's, each once."""
    found: list[torch.Generator] = []
    for owner in (loader, *_samplers(loader)):
        generator = users_generator(owner)
        if generator is not None and not any(generator is g for g in found):
            found.append(generator)
    return found


def has_state(thing: Any) -> bool:
    """Whether it has a state_dict() that takes no argument, and a load_state_dict."""
    save = getattr(thing, "state_dict", None)
    if not callable(save) or not callable(getattr(thing, "load_state_dict", None)):
        return False
    try:
        inspect.signature(save).bind()
    except TypeError:
        return False
    except ValueError:  # a builtin, which tells no signature
        pass
    return True


def _state_before(sampler: Any) -> Any:
    """The state from which the sampler's next iteration begins, or None."""
    if not has_state(sampler):
        return None
    state = sampler.state_dict()
    if isinstance(sampler, _Planned):
        # An iteration that was left on the way has a position; the next one begins elsewhere.
        state = {**state, "position": sampler._start}
    return state


class Epoch:
    """One epoch of a loader: all that its order depends on, and how far it is.

    Of the iterator's it holds nothing, so that it may outlive it.
    """

    def __init__(self, loader: Any) -> None:
        self.generators = [g.get_state() for g in _generators(loader)]
        self.samplers = [_state_before(s) for s in _samplers(loader)]
        self.epochs = [
            s.epoch if isinstance(s, DistributedSampler) else None for s in _samplers(loader)
        ]
        self.draws = Draws()
        self.shared_seed: int | None = None
        self.base_seed: int | None = None
        self.base_seed_kept = False  # from an earlier epoch
        workers = loader._iterator if loader.persistent_workers else None
        seed = getattr(workers, "_base_seed", None)
        if seed is not None:
            self.keep_base_seed(seed)
        self.finished = False
        self.reached = 0
        self.missing: set[int] = set()
        self._again: list[int] = []  # the numbers that an iterator begins with
        self._from = 0  # and the one that it goes on with
        # A stream's, by the number of the batch that is next.
        self._dataset_states: dict[int, dict[str, Any]] = {}
        # The last batch was short: a stream that tells its state has met its end, and may tell
        # where it begins again.
        self.ended = False
        # Of worker processes, which would go on with their copies of an iterable dataset.
        next_streams = getattr(workers, "next_streams", None)
        self.streams: Streams | None = None if next_streams is None else next_streams()
        self._source = users_generator(loader)
        size = getattr(loader.batch_sampler, "batch_size", 1)
        self._indices_of_a_batch = size if type(size) is int else 1
        self._before_draw: torch.Tensor | None = None
        self._workers_are_there = False

    # --- seeds --------------------------------------------------------------------------------

    def keep_base_seed(self, seed: int) -> None:
        self.base_seed = seed
        self.base_seed_kept = True

    def begins_with_workers(self) -> None:
        """They were seeded in an earlier epoch: torch draws no base seed in this one."""
        self._workers_are_there = True

    def sampler_begun(self) -> None:
        """After the sampler's __iter__; torch draws the base seed next, unless workers have it."""
        if self._workers_are_there:
            if self._source is not None and self.base_seed is not None and not self.base_seed_kept:
                _draw(self._source)
        elif self.base_seed is not None:
            self._note_generator()

    def base_seed_drawn(self, seed: int) -> None:
        if self.base_seed is None:
            self.base_seed = seed
        elif self._source is None or self.base_seed_kept:
            self._undo_draw()

    def shared_seed_drawn(self, seed: int) -> None:
        if self.shared_seed is None:
            self.shared_seed = seed
        elif self._source is None:
            self._undo_draw()

    def _note_generator(self) -> None:
        self._before_draw = (self._source or torch.default_generator).get_state()

    def _undo_draw(self) -> None:
        (self._source or torch.default_generator).set_state(self._before_draw)

    # --- how far ------------------------------------------------------------------------------

    def number(self, turn: int) -> int:
        """Of the batch that is the turn-th of an iterator over the rest of the epoch."""
        again = len(self._again)
        return self._again[turn] if turn < again else self._from + turn - again

    def done(self, number: int) -> None:
        """The batch was handed out, or its error was raised."""
        self.finished = False
        if number < self.reached:
            self.missing.discard(number)
        else:
            if number > self.reached:
                self.missing.update(range(self.reached, number))
            self.reached = number + 1
        if self._dataset_states:
            first = self._first()
            for old in [n for n in self._dataset_states if n < first]:
                del self._dataset_states[old]
        if self.draws.pieces:
            self.draws.forget(self._first() * self._indices_of_a_batch)
        if self.streams is not None:
            self.streams.done()

    def _first(self) -> int:
        """The number of the first batch that is not done with."""
        return min(self.missing, default=self.reached)

    def dataset_was(self, number: int, state: Any) -> None:
        """An iterable dataset's state when batch `number` had been drawn from it, and no more."""
        if number + 1 >= self._first():
            self._dataset_states[number + 1] = {"dataset": state}

    # --- as a dict ----------------------------------------------------------------------------

    def as_dict(self) -> dict[str, Any]:
        yielded = self.reached - len(self.missing)
        state: dict[str, Any] = {"format": FORMAT, "yielded": yielded}
        for key, value in (
            ("base_seed", self.base_seed),
            ("shared_seed", self.shared_seed),
            ("seed", self.draws.seed),
            ("rng", self.draws.state),
            ("rng_in_iter", self.draws.state_in_iter),
        ):
            if value is not None:
                state[key] = value
        if self.draws.pieces:
            state["pieces"] = [list(piece) for piece in self.draws.pieces]
        if self.base_seed_kept:
            state["base_seed_kept"] = True
        if self.missing:
            state["missing"] = sorted(self.missing)
        if self.generators:
            state["generators"] = self.generators
        if any(s is not None for s in self.samplers):
            state["samplers"] = self.samplers
        if any(e is not None for e in self.epochs):
            state["epochs"] = self.epochs
        first = self._first()
        if self.ended and not self.missing:
            state["ended"] = True
        elif first in self._dataset_states:
            state.update(self._dataset_states[first])
            if first != self.reached:
                state["dataset_at"] = first
        if self.streams is not None:
            state.update(self.streams.as_dict(self.reached))
        return state


def _draw(generator: torch.Generator | None) -> None:
    """As torch draws a base seed."""
    torch.empty((), dtype=torch.int64).random_(generator=generator)


class Beginning(NamedTuple):
    """The epoch that iter(loader) is about to begin."""

    loader: Any
    epoch: Epoch


# Not the loader's: several threads may begin epochs of one loader.
_beginning: ContextVar[Beginning | None] = ContextVar("batchops_beginning", default=None)


@contextlib.contextmanager
def begins(loader: Any, epoch: Epoch) -> Iterator[None]:
    token = _beginning.set(Beginning(loader, epoch))
    try:
        yield
    finally:
        _beginning.reset(token)


def beginning_of(loader: Any) -> Epoch:
    """For an iterator that is made or made ready for another epoch, by iter(loader) or without."""
    now = _beginning.get()
    return now.epoch if now is not None and now.loader is loader else Epoch(loader)


def users_context() -> Context:
    """The current context but for what begins, which would keep the loader alive."""
    context = copy_context()
    context.run(_beginning.set, None)
    return context


# --- states --------------------------------------------------------------------------------------


def state_of(
    loader: Any, epoch: Epoch | None, loaded: dict[str, Any] | None = None
) -> dict[str, Any]:
    """Of the loader in `epoch`, or between two where that is None or at its end; `loaded`: the
    state between two that the next one begins with."""
    between = epoch is None or epoch.finished
    loaded = {} if loaded is None else loaded
    if epoch is None or between:
        epoch = Epoch(loader)
        if "base_seed" in loaded and epoch.base_seed is None:
            epoch.keep_base_seed(loaded["base_seed"])
    state = {**epoch.as_dict(), "loader": _made_with(loader)}
    if is_iterable(loader):
        state.update({key: loaded[key] for key in _OF_STREAMS if key in loaded})
    if between:
        state["between_epochs"] = True
    # Threads are ahead of what was handed out. Before its first sample an iterable dataset is left
    # as it is: some still tell the end of their last epoch then, and begin there if given it.
    asks = loader.num_workers == 0 and loader.threads is None
    if is_iterable(loader):
        asks = asks and not between and epoch.reached > 0 and "ended" not in state
    if asks and "dataset" not in state and has_state(loader.dataset):
        state["dataset"] = loader.dataset.state_dict()
    return state


def is_iterable(loader: Any) -> bool:
    return loader._dataset_kind == _DatasetKind.Iterable


def _made_with(loader: Any) -> dict[str, Any]:
    """What the batches that a state counts depend on."""
    found: dict[str, Any] = {}
    batch_size = getattr(loader.batch_sampler, "batch_size", loader.batch_size)
    if batch_size is None or type(batch_size) is int:
        found["batch_size"] = batch_size
    if is_iterable(loader):
        found["workers"] = max(loader.num_workers, 1)  # each has a copy of the dataset
    else:
        found["samplers"] = [
            type(s).__name__ if isinstance(s, Sampler) else None for s in _samplers(loader)
        ]
        ranks = [getattr(s, "num_replicas", None) for s in _samplers(loader)]
        if any(type(n) is int for n in ranks):
            found["num_replicas"] = [n if type(n) is int else None for n in ranks]
        for sampler in _samplers(loader):
            if isinstance(sampler, _Planned):
                found = {**sampler.made_with(), **found}
        with contextlib.suppress(Exception):  # not every dataset has a length
            found["len(dataset)"] = len(loader.dataset)
    return found


def _error(text: str) -> ValueError:
    return ValueError(f"DataLoader.load_state_dict: {text}")


def checked(loader: Any, state: Any) -> dict[str, Any]:
    """The state, if it is one and the loader can go on from it."""
    if not isinstance(state, dict) or state.get("format") != FORMAT:
        found = state.get("format") if isinstance(state, dict) else type(state).__name__
        raise _error(f"expected a state of format {FORMAT}, got {found}")
    as_integer("DataLoader.load_state_dict: yielded", state.get("yielded"), 0)
    told = "dataset" in state or "starts" in state.get("workers", ())
    if told and not callable(getattr(loader.dataset, "load_state_dict", None)):
        raise _error(
            "the state has one of the dataset's, and this loader's dataset has no load_state_dict: "
            f"{type(loader.dataset).__name__}"
        )
    generators, samplers = _generators(loader), _samplers(loader)
    for kind, saved, here in (
        ("generators", state.get("generators", ()), generators),
        ("samplers", state.get("samplers", samplers), samplers),
        ("samplers", state.get("epochs", samplers), samplers),
    ):
        if len(saved) != len(here):
            raise _error(
                f"the state has {len(saved)} {kind}, and this loader has {len(here)}: it was made "
                "with other arguments"
            )
    if not state.get("between_epochs"):
        _check_made_with(loader, state)
    return dict(state)


def _check_made_with(loader: Any, state: dict[str, Any]) -> None:
    here = _made_with(loader)
    for key, there in state.get("loader", {}).items():
        if key == "batch_size" and is_iterable(loader) and _goes_on_from_samples(state):
            continue
        ours = here.get(key, there)
        if key == "samplers" and len(ours) == len(there):
            # Lists and the like are no kinds.
            ours = [t if None in (o, t) else o for o, t in zip(ours, there, strict=True)]
        if ours != there:
            raise _error(
                f"expected a state of a loader with {key} = {here[key]}, got one with {there}; "
                "its batches are not those of this loader"
            )

    if loader.num_workers > 1 and is_iterable(loader) and state["yielded"]:
        workers = state.get("workers", {}).get("had", ())
        if len(workers) != loader.num_workers:
            raise _error(
                f"expected how many batches each of {loader.num_workers} workers has given, got "
                f"{len(workers)} such numbers; where an iterable dataset is is told by a loader "
                f"with num_workers = {loader.num_workers} alone"
            )


def _goes_on_from_samples(state: dict[str, Any]) -> bool:
    """Whether an iterable dataset is where it is told to be, and no batches are counted."""
    workers = state.get("workers")
    if workers is None:
        starts = [state]
        counted = "dataset_at" in state
    else:
        starts = workers.get("starts", [{}])
        counted = any(workers["had"])
    return not counted and all("dataset" in s and "dataset_again" not in s for s in starts)


def _in_processes(loader: Any) -> bool:
    """Whether an iterable dataset is used by copies in worker processes alone."""
    return is_iterable(loader) and loader.num_workers > 0


def put(loader: Any, state: dict[str, Any]) -> None:
    """Generators, samplers and dataset are as `state` says: at the start of the epoch in which it
    was taken, or between two."""
    for generator, saved in zip(_generators(loader), state.get("generators", []), strict=True):
        generator.set_state(saved)
    samplers = _samplers(loader)
    for sampler, saved in zip(samplers, state.get("samplers", [None] * len(samplers)), strict=True):
        if saved is not None:
            sampler.load_state_dict(saved)
    for sampler, saved in zip(samplers, state.get("epochs", [None] * len(samplers)), strict=True):
        if saved is not None:
            sampler.set_epoch(saved)
    if _in_processes(loader):
        return  # there they are told
    if "dataset_again" in state:
        with Draws(again=True).repeated():
            Start.of(state).put(loader.dataset, Loads.of(loader))
    elif "dataset" in state:
        loader.dataset.load_state_dict(state["dataset"])


def end_streams(loader: Any) -> None:
    """Before an epoch is taken up: the copies of persistent workers have gone on, and what the
    loader has is where they begin."""
    workers = loader._iterator if loader.persistent_workers else None
    if is_iterable(loader) and workers is not None:
        loader._iterator = None
        workers._shutdown_workers()


def taken_up(loader: Any, state: dict[str, Any]) -> Epoch:
    """The epoch that goes on from `state`, with generators, samplers and dataset ready for it."""
    if state.get("between_epochs"):
        epoch = Epoch(loader)
        if "base_seed" in state:
            epoch.keep_base_seed(state["base_seed"])
    else:
        put(loader, state)
        epoch = Epoch(loader)
        # The saved ones, which samplers may not tell again before they are iterated.
        for key in ("generators", "samplers", "epochs"):
            setattr(epoch, key, state.get(key, getattr(epoch, key)))
        epoch.draws = Draws(
            state.get("seed"),
            state.get("rng"),
            state.get("rng_in_iter"),
            again=True,
            pieces=state.get("pieces", ()),
        )
        epoch.shared_seed = state.get("shared_seed")
        epoch.base_seed = state.get("base_seed")
        epoch.base_seed_kept = state.get("base_seed_kept", False)
    epoch.missing = set(state.get("missing", ()))
    epoch.reached = state["yielded"] + len(epoch.missing)
    if _in_processes(loader):
        workers = state.get("workers", {}).get("had", (0,))
        if len(workers) == loader.num_workers or not state.get("between_epochs"):
            epoch.streams = Streams.of(state, loader.num_workers)
        epoch._again = sorted(epoch.missing)
        epoch._from = epoch.reached
    elif state.get("ended"):
        epoch.ended = True
        epoch._from = epoch.reached
    elif is_iterable(loader):
        told = {key: state[key] for key in ("dataset", "dataset_again") if key in state}
        epoch._from = 0
        if told:
            epoch._from = state.get("dataset_at", epoch.reached if "dataset" in state else 0)
            epoch._dataset_states[epoch._from] = told
    else:
        epoch._again = sorted(epoch.missing)
        epoch._from = epoch.reached
    epoch._note_generator()
    return epoch
