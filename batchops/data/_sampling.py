"""torch's own samplers as vectors of indices, drawn when torch would draw them.

A sampler of torch's is a Python generator over integers that it drew as a tensor. Reading the
tensor gives the same indices without a Python object for each. What matters is *when* random
numbers are drawn, since user code may share the generator: a stream draws in ``take`` exactly where
iterating the sampler for the same number of items would.
"""

from __future__ import annotations

import itertools
import operator
import sys
from collections import deque
from collections.abc import Callable, Iterator
from typing import Any

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
from torch.utils.data.distributed import DistributedSampler

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
_PLAIN_SIZED = (TensorDataset, list, tuple, range, torch.Tensor)


def _is_plain_sized(data: Any) -> bool:
    return type(data) in _PLAIN_SIZED or (
        type(data) is Subset and type(data.indices) in _PLAIN_SIZED
    )


def _sequential(sampler: SequentialSampler) -> Iterator[Any]:
    yield range(len(sampler.data_source))


def _random(sampler: RandomSampler) -> Iterator[Any]:
    n = len(sampler.data_source)
    if sampler.generator is None:
        seed = int(torch.empty((), dtype=torch.int64).random_().item())
        generator = torch.Generator()
        generator.manual_seed(seed)
    else:
        generator = sampler.generator
    if sampler.replacement:
        for _ in range(sampler.num_samples // 32):
            yield torch.randint(high=n, size=(32,), dtype=torch.int64, generator=generator)
        rest = sampler.num_samples % 32
        yield torch.randint(high=n, size=(rest,), dtype=torch.int64, generator=generator)
    else:
        for _ in range(sampler.num_samples // n):
            yield torch.randperm(n, generator=generator)
        # Drawn even where nothing of it is used.
        yield torch.randperm(n, generator=generator)[: sampler.num_samples % n]


def _subset_random(sampler: SubsetRandomSampler) -> Iterator[Any]:
    # Looked up when it is taken, as the sampler's own generator would.
    yield torch.randperm(len(sampler.indices), generator=sampler.generator)


def _weighted_random(sampler: WeightedRandomSampler) -> Iterator[Any]:
    yield torch.multinomial(
        sampler.weights, sampler.num_samples, sampler.replacement, generator=sampler.generator
    )


def _distributed(sampler: DistributedSampler) -> Iterator[Any]:
    yield list(sampler.__iter__())


def _one_by_one(sampler: Any) -> Iterator[list[Any]]:
    return ([index] for index in sampler)


class IndexStream:
    """The batches of a ``BatchSampler`` over one of torch's samplers."""

    def __init__(
        self,
        batch_sampler: BatchSampler,
        draw: Callable[[Any], Iterator[Any]],
        private: bool,
    ) -> None:
        self._batch_sampler = batch_sampler
        self._draw = draw
        self._private = private
        self._kind = type(batch_sampler.sampler)
        self._sampler: Any = None  # the one that draws; a batch sampler's may be replaced later
        self._draws: Iterator[Any] | None = None
        self._pending: deque[Any] = deque()  # drawn, not yet taken
        self._batch_size: Any = None
        self._drop_last = False
        self._ended = False

    @classmethod
    def of(cls, index_sampler: Any) -> IndexStream | None:
        """A stream equal to iterating ``index_sampler``, or None where that is for it to do."""
        if type(index_sampler) is not BatchSampler or type(index_sampler.batch_size) is not int:
            return None
        sampler = index_sampler.sampler
        kind = type(sampler)
        if any(
            t not in _ITERATORS or t.__iter__ is not _ITERATORS[t] for t in (kind, BatchSampler)
        ):
            return None
        if kind is SequentialSampler and _is_plain_sized(sampler.data_source):
            return cls(index_sampler, _sequential, private=True)
        if kind is RandomSampler and _is_plain_sized(sampler.data_source):
            # Without a generator of the user's it makes one of its own, seeded on the first draw.
            return cls(index_sampler, _random, private=sampler.generator is None)
        if kind is SubsetRandomSampler and type(sampler.indices) is list:
            return cls(index_sampler, _subset_random, private=True)
        if kind is WeightedRandomSampler:
            return cls(index_sampler, _weighted_random, private=True)
        if kind is DistributedSampler and _is_plain_sized(sampler.dataset):
            return cls(index_sampler, _distributed, private=True)
        return None

    @property
    def lookups(self) -> tuple[list[int], ...]:
        """What taken indices are positions of, where they are positions."""
        positions = self._draw is _subset_random and self._sampler is not None
        return (self._sampler.indices,) if positions else ()

    def as_list(self, batch: Any) -> list[Any]:
        """The list that the batch sampler itself would have yielded."""
        indices = batch.tolist() if isinstance(batch, torch.Tensor) else list(batch)
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
            self._draws = self._draw(self._sampler)
        elif not self._drop_last:
            self._batch_size = self._batch_sampler.batch_size
        return self._batch_size

    def may_take_early(self, size: int) -> bool:
        """Whether nobody can tell if the next ``take(size)`` happens now or later."""
        if self._draws is None or self._ended:
            return False
        return self._private or sum(map(len, self._pending)) >= size

    def untake(self, batch: Any) -> None:
        """Give back the batch that was taken last."""
        self._pending.appendleft(batch)

    def take(self, size: Any) -> Any:
        """The next batch: a range, a list or an int64 vector. StopIteration after the last."""
        if self._ended:
            raise StopIteration
        try:
            parts = self._take(size)
        except BaseException:
            self._ended = True  # as a generator that raised
            raise
        if len(parts) == 1:
            return parts[0]
        if all(isinstance(part, torch.Tensor) for part in parts):
            return torch.cat(parts)
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
                if isinstance(drawn, torch.Tensor) and drawn.device.type != "cpu":
                    drawn = drawn.cpu()
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
