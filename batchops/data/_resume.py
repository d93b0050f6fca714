"""Where in an epoch a loader is, as a small dict, and how to be there again."""

from __future__ import annotations

import contextlib
import inspect
from collections.abc import Iterator
from contextvars import Context, ContextVar, copy_context
from typing import Any, NamedTuple

import torch
from torch.utils.data.distributed import DistributedSampler

from batchops.data._sampling import Draws

FORMAT = 1


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
    found: list[torch.Generator] = []
    for owner in (loader, *_samplers(loader)):
        generator = getattr(owner, "generator", None)
        if isinstance(generator, torch.Generator) and not any(generator is g for g in found):
            found.append(generator)
    return found


def _has_state(thing: Any) -> bool:
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


class EpochStart:
    """Everything that an epoch's order depends on, as it was before its first draw."""

    def __init__(self, loader: Any) -> None:
        self.generators = [g.get_state() for g in _generators(loader)]
        self.samplers = [s.state_dict() if _has_state(s) else None for s in _samplers(loader)]
        self.epochs = [
            s.epoch if isinstance(s, DistributedSampler) else None for s in _samplers(loader)
        ]
        self.draws = Draws()
        self.base_seed: int | None = None

    def as_dict(self, yielded: int) -> dict[str, Any]:
        state: dict[str, Any] = {"format": FORMAT, "yielded": yielded}
        for key, value in (
            ("base_seed", self.base_seed),
            ("seed", self.draws.seed),
            ("rng", self.draws.state),
        ):
            if value is not None:
                state[key] = value
        if self.generators:
            state["generators"] = self.generators
        if any(s is not None for s in self.samplers):
            state["samplers"] = self.samplers
        if any(e is not None for e in self.epochs):
            state["epochs"] = self.epochs
        return state


class Beginning(NamedTuple):
    """The epoch that iter(loader) is about to begin, and how many of its batches were handed out
    before."""

    loader: Any
    epoch: EpochStart
    yielded: int


# Not the loader's: several threads may begin epochs of one loader.
_beginning: ContextVar[Beginning | None] = ContextVar("batchops_beginning", default=None)


@contextlib.contextmanager
def begins(loader: Any, epoch: EpochStart, yielded: int) -> Iterator[None]:
    token = _beginning.set(Beginning(loader, epoch, yielded))
    try:
        yield
    finally:
        _beginning.reset(token)


def beginning_of(loader: Any) -> Beginning:
    """For an iterator that is made or made ready for another epoch, by iter(loader) or without."""
    now = _beginning.get()
    if now is not None and now.loader is loader:
        return now
    return Beginning(loader, EpochStart(loader), 0)


def users_context() -> Context:
    """The current context but for what begins, which would keep the loader alive."""
    context = copy_context()
    context.run(_beginning.set, None)
    return context


def restore(loader: Any, state: dict[str, Any]) -> EpochStart:
    """Put generators and samplers back to the start of the epoch that `state` was taken in."""
    generators = _generators(loader)
    states = state.get("generators", [])
    if len(states) != len(generators):
        raise ValueError(
            f"DataLoader.load_state_dict: the state has {len(states)} generators, and this loader "
            f"has {len(generators)}: it was made with other arguments"
        )
    for generator, saved in zip(generators, states, strict=True):
        generator.set_state(saved)
    samplers = _samplers(loader)
    for key, apply in (
        ("samplers", lambda sampler, saved: sampler.load_state_dict(saved)),
        ("epochs", lambda sampler, saved: sampler.set_epoch(saved)),
    ):
        saved_all = state.get(key)
        if saved_all is None:
            continue
        if len(saved_all) != len(samplers):
            raise ValueError(
                f"DataLoader.load_state_dict: the state has {len(saved_all)} samplers, and this "
                f"loader has {len(samplers)}: it was made with other arguments"
            )
        for sampler, saved in zip(samplers, saved_all, strict=True):
            if saved is not None:
                apply(sampler, saved)
    start = EpochStart(loader)
    start.draws = Draws(state.get("seed"), state.get("rng"))
    start.base_seed = state.get("base_seed")
    return start


def checked(state: Any) -> dict[str, Any]:
    if not isinstance(state, dict) or state.get("format") != FORMAT:
        found = state.get("format") if isinstance(state, dict) else type(state).__name__
        raise ValueError(
            f"DataLoader.load_state_dict: expected a state of format {FORMAT}, got {found}"
        )
    yielded = state.get("yielded")
    if not isinstance(yielded, int) or yielded < 0:
        raise ValueError(
            f"DataLoader.load_state_dict: yielded: expected an integer >= 0, got {yielded!r}"
        )
    return dict(state)
