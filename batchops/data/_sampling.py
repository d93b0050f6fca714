"""torch's own samplers as vectors of indices, drawn when torch would draw them.

A sampler of torch's is a Python generator over integers that it drew as a tensor. Reading the
tensor gives the same indices without a Python object for each. What matters is *when* random
numbers are drawn, since user code may share the generator: a stream draws in ``take`` exactly where
iterating the sampler for the same number of items would.
"""

from __future__ import annotations

import contextlib
import itertools
import operator
import sys
from collections import deque
from collections.abc import Callable, Collection, Iterable, Iterator
from typing import Any, NamedTuple

import numpy as np
import torch
from torch.utils.data import (
    BatchSampler,
    RandomSampler,
    SequentialSampler,
    Subset,
    SubsetRandomSampler,
    TensorDataset,
    WeightedRandomSampler,
)
from torch.utils.data.dataloader import _InfiniteConstantSampler
from torch.utils.data.distributed import DistributedSampler

from batchops.data._arrow import is_dataset
from batchops.data.columns import Columns
from batchops.data.samplers import _Planned

# As they were on import: a patched sampler is user code, and iterated as such.
_ITERATORS = {
    cls: cls.__iter__
    for cls in (
        BatchSampler,
        SequentialSampler,
        RandomSampler,
        SubsetRandomSampler,
        WeightedRandomSampler,
        DistributedSampler,
    )
}

# Their __len__ runs no user code (a Subset's: where its indices are of these types too).
_PLAIN_SIZED = (TensorDataset, Columns, np.ndarray, np.memmap, list, tuple, range, torch.Tensor)


def _is_plain_sized(data: Any) -> bool:
    return (
        type(data) in _PLAIN_SIZED
        or (type(data) is Subset and type(data.indices) in _PLAIN_SIZED)
        or is_dataset(data)
    )


def users_generator(owner: Any) -> torch.Generator | None:
    """The generator of a loader or sampler, if it has one and that is not the global one."""
    generator = getattr(owner, "generator", None)
    mine = isinstance(generator, torch.Generator) and generator is not torch.default_generator
    return generator if mine else None


def _is_global(sampler: Any) -> bool:
    """Whether one of torch's samplers draws from the global generator."""
    return sampler.generator is None or sampler.generator is torch.default_generator


# As many int64 are as large as a generator's state.
_FEW = 600


class Piece(NamedTuple):
    """Some of an epoch's indices, drawn at once."""

    at: int  # the place of the first one among all
    count: int
    drawn: Any  # themselves, where they are few, or the state of the generator before

    def again(self, make: Callable[[torch.Generator], torch.Tensor]) -> torch.Tensor:
        if not isinstance(self.drawn, torch.Tensor):
            return torch.tensor(self.drawn, dtype=torch.int64, device="cpu")
        generator = torch.Generator()
        generator.set_state(self.drawn)
        return make(generator)


class Draws:
    """What an epoch's order took from the global generator: kept, and given again.

    seed: the one that a sampler of torch's drew. state, state_in_iter: the generator's before the
    sampler's first batch and before its ``__iter__``, where that drew from it itself. pieces: of a
    sampler that draws on its way, what it drew last. again: the epoch is one that is taken up; what
    was kept is given in place of a new draw, and what is done for the second time leaves the
    generator as it is.
    """

    def __init__(
        self,
        seed: int | None = None,
        state: torch.Tensor | None = None,
        state_in_iter: torch.Tensor | None = None,
        again: bool = False,
        pieces: Iterable[Iterable[Any]] = (),
    ) -> None:
        self.pieces = [Piece(*piece) for piece in pieces]
        self._skipped = self.pieces[0].at if self.pieces else 0
        self.seed = seed
        self.state = state
        self.state_in_iter = state_in_iter
        self.again = again

    @contextlib.contextmanager
    def repeated(self) -> Iterator[None]:
        """Around what an epoch that is taken up does for the second time."""
        if not self.again:
            yield
            return
        state = torch.get_rng_state()
        try:
            yield
        finally:
            torch.set_rng_state(state)

    @contextlib.contextmanager
    def in_user_code(self, kept: str, again: bool) -> Iterator[None]:
        """Around a sampler's own code; `kept` names what it may draw from."""
        if again:
            with self.repeated():
                state = getattr(self, kept)
                if state is not None:
                    torch.set_rng_state(state)
                yield
            return
        state = torch.get_rng_state()
        yield
        if not torch.equal(state, torch.get_rng_state()):
            setattr(self, kept, state)

    def new_seed(self) -> int:
        if self.seed is None:
            self.seed = int(torch.empty((), dtype=torch.int64).random_().item())
        return self.seed

    def generator(self, given: torch.Generator | None) -> torch.Generator | None:
        """The one to draw with: `given`, or the global one (None) as the first draw met it."""
        if given is not None and given is not torch.default_generator:
            return given
        if self.state is None:
            self.state = torch.get_rng_state()
            return None
        again = torch.Generator()
        again.set_state(self.state)
        return again

    def piece(
        self, at: int, count: int, make: Callable[[torch.Generator], torch.Tensor]
    ) -> torch.Tensor | range:
        """Of the global generator, or as it was drawn before; a range for what is not kept."""
        if at < self._skipped:
            return range(count)
        for piece in self.pieces:
            if piece.at == at:
                return piece.again(make)
        state = torch.get_rng_state()
        drawn = make(torch.default_generator)
        self.pieces.append(Piece(at, count, drawn.tolist() if count <= _FEW else state))
        return drawn

    def forget(self, before: int) -> None:
        """Pieces of indices that are all done with; but the last tells that it was drawn."""
        while len(self.pieces) > 1 and sum(self.pieces[0][:2]) <= before:
            del self.pieces[0]


def _sequential(sampler: SequentialSampler, draws: Draws) -> Iterator[Any]:
    yield range(len(sampler.data_source))


def _random(sampler: RandomSampler, draws: Draws) -> Iterator[Any]:
    n = len(sampler.data_source)
    shown = sampler.generator
    generator = shown
    if shown is None:
        generator = torch.Generator()
        generator.manual_seed(draws.new_seed())
    at = 0

    def some(count: int, make: Callable[[torch.Generator], torch.Tensor]) -> Any:
        nonlocal at
        at += count
        if shown is not torch.default_generator:
            return make(generator)
        return draws.piece(at - count, count, make)

    if sampler.replacement:
        for k in range(sampler.num_samples // 32 + 1):
            count = 32 if k < sampler.num_samples // 32 else sampler.num_samples % 32
            yield some(
                count,
                lambda g, count=count: torch.randint(n, (count,), dtype=torch.int64, generator=g),
            )
    else:
        for _ in range(sampler.num_samples // n):
            yield some(n, lambda g: torch.randperm(n, generator=g))
        # Drawn even where nothing of it is used, if somebody sees the generator.
        rest = sampler.num_samples % n
        if rest or shown is not None:
            yield some(rest, lambda g: torch.randperm(n, generator=g)[:rest])


def _subset_random(sampler: SubsetRandomSampler, draws: Draws) -> Iterator[Any]:
    # Looked up when it is taken, as the sampler's own generator would.
    yield torch.randperm(len(sampler.indices), generator=draws.generator(sampler.generator))


def _weighted_random(sampler: WeightedRandomSampler, draws: Draws) -> Iterator[Any]:
    yield torch.multinomial(
        sampler.weights,
        sampler.num_samples,
        sampler.replacement,
        generator=draws.generator(sampler.generator),
    )


def _distributed(sampler: DistributedSampler, draws: Draws) -> Iterator[Any]:
    yield list(sampler.__iter__())


def _items(sampler: Any, draw: Callable[[Any, Draws], Iterator[Any]], draws: Draws) -> Any:
    """What iterating one of torch's samplers yields."""
    for part in draw(sampler, draws):
        for item in part if isinstance(part, range) else part.tolist():
            yield sampler.indices[item] if draw is _subset_random else item


# Those that draw from the global generator, where they have none of the user's.
_DRAWING: dict[type, Callable[[Any, Draws], Iterator[Any]]] = {
    RandomSampler: _random,
    SubsetRandomSampler: _subset_random,
    WeightedRandomSampler: _weighted_random,
}


def _is_torchs(sampler: Any) -> bool:
    """Whether iterating it runs torch's code alone."""
    kind = type(sampler)
    return kind in _ITERATORS and kind.__iter__ is _ITERATORS[kind]


def draws_unseen(index_sampler: Any) -> bool:
    """Whether nobody can tell when batches after the first are taken: no code of the user's runs,
    and no number is drawn from a generator that the user has."""
    if _is_planned(index_sampler):
        return True
    sampler = index_sampler
    if type(index_sampler) is BatchSampler:
        if not _is_torchs(index_sampler):
            return False
        sampler = index_sampler.sampler
    if type(sampler) in (list, tuple, range, _InfiniteConstantSampler):
        return True
    # Each other draws all that it draws at once.
    return _is_torchs(sampler) and (type(sampler) is not RandomSampler or sampler.generator is None)


def _is_planned(sampler: Any) -> bool:
    return isinstance(sampler, _Planned) and type(sampler).__iter__ is _Planned.__iter__


def _one_by_one(sampler: Any, draws: Draws) -> Iterator[list[Any]]:
    return ([index] for index in sampler)


class IndexStream:
    """The batches of a ``BatchSampler`` over one of torch's samplers."""

    def __init__(
        self,
        batch_sampler: BatchSampler,
        draw: Callable[[Any, Draws], Iterator[Any]],
        private: bool,
        draws: Draws,
    ) -> None:
        self._batch_sampler = batch_sampler
        self._draw = draw
        self._private = private
        self._kept = draws
        self._kind = type(batch_sampler.sampler)
        self._sampler: Any = None  # the one that draws; a batch sampler's may be replaced later
        self._draws: Iterator[Any] | None = None
        self._pending: deque[Any] = deque()  # drawn, not yet taken
        self._batch_size: Any = None
        self._drop_last = False
        self._ended = False

    @classmethod
    def of(
        cls, index_sampler: Any, draws: Draws | None = None, any_length: bool = False
    ) -> IndexStream | None:
        """A stream equal to iterating ``index_sampler``, or None where that is for it to do.

        any_length: also where asking for a length runs user code, which it then does when taken.
        """
        draws = Draws() if draws is None else draws
        if type(index_sampler) is not BatchSampler or type(index_sampler.batch_size) is not int:
            return None
        sampler = index_sampler.sampler
        kind = type(sampler)
        if not _is_torchs(sampler) or not _is_torchs(index_sampler):
            return None
        if kind is SequentialSampler and _is_plain_sized(sampler.data_source):
            return cls(index_sampler, _sequential, private=True, draws=draws)
        if kind is RandomSampler and (any_length or _is_plain_sized(sampler.data_source)):
            # Without a generator of the user's it makes one of its own, seeded on the first draw.
            return cls(index_sampler, _random, private=sampler.generator is None, draws=draws)
        if kind is SubsetRandomSampler and (any_length or type(sampler.indices) is list):
            return cls(index_sampler, _subset_random, private=True, draws=draws)
        if kind is WeightedRandomSampler:
            return cls(index_sampler, _weighted_random, private=True, draws=draws)
        if kind is DistributedSampler and _is_plain_sized(sampler.dataset):
            return cls(index_sampler, _distributed, private=True, draws=draws)
        return None

    @property
    def lookups(self) -> tuple[list[int], ...]:
        """What taken indices are positions of, where they are positions."""
        positions = self._draw is _subset_random and self._sampler is not None
        return (self._sampler.indices,) if positions else ()

    def as_list(self, batch: Any) -> list[Any]:
        """The list that the batch sampler itself would have yielded."""
        vector = isinstance(batch, np.ndarray | torch.Tensor)
        indices = batch.tolist() if vector else list(batch)
        try:
            for lookup in self.lookups:
                indices = [lookup[i] for i in indices]
        except BaseException:
            self._ended = True
            raise
        return indices

    def batch_size(self) -> Any:
        """The size that the next batch asks for; a BatchSampler's may change on the way."""
        if self._draws is None:
            self._drop_last = self._batch_sampler.drop_last
            self._batch_size = self._batch_sampler.batch_size
            self._sampler = self._batch_sampler.sampler
            if type(self._sampler) is not self._kind:  # replaced since this stream was made
                self._draw, self._private = _one_by_one, False
            self._draws = self._draw(self._sampler, self._kept)
        elif not self._drop_last:
            self._batch_size = self._batch_sampler.batch_size
        return self._batch_size

    def may_take_early(self, size: int) -> bool:
        """Whether nobody can tell if the next ``take(size)`` happens now or later."""
        if self._draws is None or self._ended:
            return False
        return self._private or sum(map(len, self._pending)) >= size

    def skip(self, batches: int, but: Collection[int] = ()) -> None:
        """Leave out so many batches, except the ones with the numbers `but`; fewer where the epoch
        ends before."""
        kept = []
        for number in range(batches):
            try:
                taken = self.take(self.batch_size())
            except StopIteration:
                break
            if number in but:
                kept.append(taken)
        for taken in reversed(kept):
            self.untake(taken)

    def untake(self, batch: Any) -> None:
        """Give back the batch that was taken last; an end that was met after it is yet to come."""
        self._pending.appendleft(batch)
        self._ended = False

    def take(self, size: Any) -> Any:
        """The next batch: a range, a list or a vector. StopIteration after the last."""
        if self._ended:
            raise StopIteration
        try:
            parts = self._take(size)
        except BaseException:
            self._ended = True  # as a generator that raised
            raise
        if len(parts) == 1:
            return parts[0]
        if all(isinstance(part, np.ndarray) for part in parts):
            return np.concatenate(parts)
        return [int(index) for part in parts for index in part]

    def _take(self, size: Any) -> list[Any]:
        itertools.islice((), size)  # refuses what BatchSampler's own islice refuses
        missing = sys.maxsize if size is None else operator.index(size)
        parts = []
        while missing > 0:
            if not self._pending:
                drawn = next(self._draws, None)
                if drawn is None:
                    break
                if type(drawn) is torch.Tensor:
                    drawn = drawn.cpu().numpy()  # slices of it cost a fifth of a tensor's
                self._pending.append(drawn)
            drawn = self._pending.popleft()
            if len(drawn) > missing:
                self._pending.appendleft(drawn[missing:])
                drawn = drawn[:missing]
            if len(drawn):
                parts.append(drawn)
            missing -= len(drawn)
        if not parts or (missing > 0 and self._drop_last):
            raise StopIteration
        return parts


class RecordedSampler:
    """A loader's index sampler whose random draws are kept, and which may start on the way.

    Iterating it runs the sampler's own code at the moments at which it always runs; torch's
    samplers without a generator are read as vectors, which draws the same numbers.
    """

    def __init__(self, index_sampler: Any) -> None:
        self.inner = index_sampler
        self.draws = Draws()
        self.skip = 0  # batches that the next epoch leaves out
        self.but: Collection[int] = ()  # except those with these numbers
        self._begun: Callable[[], None] = lambda: None

    def begin(
        self, draws: Draws, skip: int, but: Collection[int], begun: Callable[[], None]
    ) -> None:
        """begun: called at the end of each ``iter()``."""
        self.draws = draws
        self.skip = skip
        self.but = frozenset(but)
        self._begun = begun

    def stream(self, any_length: bool = False) -> IndexStream | None:
        """The rest of the epoch as vectors, or None."""
        stream = IndexStream.of(self.inner, self.draws, any_length)
        if stream is not None:
            with self.draws.repeated() if self.skip else contextlib.nullcontext():
                stream.skip(self.skip, self.but)
        return stream

    def __iter__(self) -> Iterator[Any]:
        iterator = self._iterator()
        self._begun()
        return iterator

    def _iterator(self) -> Iterator[Any]:
        inner, draws = self.inner, self.draws
        batches = type(inner) is BatchSampler
        sampler = inner.sampler if batches else inner
        torchs = _is_torchs(inner) and _is_torchs(sampler)
        draw = _DRAWING.get(type(sampler))
        if torchs and draw is not None and _is_global(sampler):
            if not batches:
                return self._rest(_items(sampler, draw, draws))
            stream = self.stream(any_length=True)
            if stream is not None:
                return _lists(stream)
        if torchs and (draw is None or users_generator(sampler) is not None):
            return self._rest(iter(inner))
        if type(sampler) is _InfiniteConstantSampler:
            return iter(inner)
        with draws.in_user_code("state_in_iter", draws.again):
            iterator = iter(inner)
        return _Batches(iterator, draws, self.skip, self.but)

    def _rest(self, iterator: Iterator[Any]) -> Iterator[Any]:
        """Of one that keeps its draws, or has a generator of the user's."""
        return _Batches(iterator, self.draws, self.skip, self.but) if self.skip else iterator

    def __len__(self) -> int:
        return len(self.inner)

    def __getattr__(self, name: str) -> Any:
        return getattr(self.inner, name)


class _Batches:
    """The rest of a sampler's batches, from a number on and with some of those before it.

    No generator, which would be at its end after an error of the sampler's; the sampler need not
    be.
    """

    def __init__(
        self, iterator: Iterator[Any], draws: Draws, skip: int, but: Collection[int]
    ) -> None:
        self._iterator = iterator
        self._draws = draws
        self._skip = skip
        self._but = but
        self._at = 0  # batches that the sampler gave
        self._held: deque[Any] = deque()  # of these, what is not left out

    def __iter__(self) -> Iterator[Any]:
        return self

    def __next__(self) -> Any:
        if self._at == 0 or self._at < self._skip:
            self._begin()
        return self._held.popleft() if self._held else next(self._iterator)

    def _begin(self) -> None:
        """The first batch is where a sampler draws from the global generator."""
        draws = self._draws
        again = draws.again and (self._skip > 0 or draws.state is not None)
        with draws.in_user_code("state", again):
            while self._at < max(self._skip, 1):
                batch = next(self._iterator)
                if self._at >= self._skip or self._at in self._but:
                    self._held.append(batch)
                self._at += 1


def _lists(stream: IndexStream) -> Iterator[list[Any]]:
    while True:
        try:
            taken = stream.take(stream.batch_size())
        except StopIteration:
            return
        yield stream.as_list(taken)
