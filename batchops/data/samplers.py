"""Batch samplers for samples of unequal length, and for mixtures of datasets.

All three plan an epoch from (seed, epoch) alone: every rank makes the same plan and takes every
``num_replicas``-th batch of it, so that ranks have equally many without a word between them.
"""

from __future__ import annotations

import heapq
import math
import zlib
from collections.abc import Iterator, Sequence
from fractions import Fraction
from typing import Any

import numpy as np
import torch
from torch.utils.data import Sampler

from batchops import _C
from batchops.data._arguments import as_integer

# More than all lengths together: native limits beyond it are none.
_MOST = 1 << 62


def _splitmix64(x: int) -> int:
    """The first number of the splitmix64 that begins at x: a bijection of 64 bits."""
    mask = (1 << 64) - 1
    z = (x + 0x9E3779B97F4A7C15) & mask
    z = ((z ^ (z >> 30)) * 0xBF58476D1CE4E5B9) & mask
    z = ((z ^ (z >> 27)) * 0x94D049BB133111EB) & mask
    return z ^ (z >> 31)


class _Planned(Sampler[list[int]]):
    """An epoch planned at once; ranks, resumption and epochs."""

    def __init__(
        self, seed: int, num_replicas: int | None, rank: int | None, drop_last: bool
    ) -> None:
        grouped = torch.distributed.is_available() and torch.distributed.is_initialized()
        if num_replicas is None:
            num_replicas = torch.distributed.get_world_size() if grouped else 1
        if rank is None:
            rank = torch.distributed.get_rank() if grouped else 0
        self.num_replicas = self._at_least("num_replicas", num_replicas, 1)
        self.rank = self._at_least("rank", rank, 0)
        if self.rank >= self.num_replicas:
            raise self._error(
                f"rank: expected below num_replicas = {self.num_replicas}, got {rank}"
            )
        self.seed = self._at_least("seed", seed, 0)
        self.drop_last = drop_last
        self.epoch = 0
        self._position = 0  # batches of this rank handed out
        self._start = 0  # where the next iteration begins
        self._plan_cache: tuple[int, Any] | None = None

    def _error(self, text: str) -> ValueError:
        return ValueError(f"{type(self).__name__}: {text}")

    def _at_least(self, argument: str, value: Any, least: int) -> int:
        return as_integer(f"{type(self).__name__}: {argument}", value, least)

    def _as_lengths(self, lengths: Any) -> np.ndarray:
        array = lengths.numpy() if isinstance(lengths, torch.Tensor) else np.asarray(lengths)
        if array.ndim != 1 or (array.size and array.dtype.kind not in "iu"):
            raise self._error(
                f"lengths: expected a vector of integers, got {array.ndim} dimensions of "
                f"{array.dtype}"
            )
        return array.astype(np.int64, copy=False)

    def set_epoch(self, epoch: int) -> None:
        """The order of this epoch, from its beginning."""
        self.epoch = self._at_least("epoch", epoch, 0)
        self._position = self._start = 0

    def _epoch_seed(self) -> int:
        # Native code counts up from this: neighbours, or multiples of what it adds, would give one
        # stream, begun earlier or later. Hashed, they are strangers.
        return _splitmix64(_splitmix64(self.seed) + self.epoch)

    def _plan(self) -> tuple[np.ndarray, np.ndarray]:
        raise NotImplementedError

    # The arguments, by their names, that the plan depends on besides seed and epoch.
    _arguments: tuple[str, ...] = ()

    def made_with(self) -> dict[str, Any]:
        """What the batches that a position counts depend on, besides seed and epoch."""
        found = {}
        for name in ("num_replicas", *self._arguments):
            value = getattr(self, name)
            if isinstance(value, np.ndarray):
                # Of values many as samples, enough to tell others from these.
                value = [len(value), zlib.crc32(np.ascontiguousarray(value))]
            found[name] = value
        return found

    def _planned(self) -> tuple[np.ndarray, np.ndarray]:
        if self._plan_cache is None or self._plan_cache[0] != self.epoch:
            self._plan_cache = (self.epoch, self._plan())
        return self._plan_cache[1]

    def _batches_of_a_rank(self, total: int) -> int:
        if self.drop_last:
            return total // self.num_replicas
        return math.ceil(total / self.num_replicas)

    def __len__(self) -> int:
        _, starts = self._planned()
        return self._batches_of_a_rank(len(starts) - 1)

    def __iter__(self) -> Iterator[list[int]]:
        samples, starts = self._planned()
        total = len(starts) - 1
        first, self._start = self._start, 0
        self._position = first
        for k in range(first, self._batches_of_a_rank(total)):
            # Past the end the first batches come again, so that no rank waits for another.
            batch = (k * self.num_replicas + self.rank) % total
            self._position = k + 1
            yield samples[starts[batch] : starts[batch + 1]].tolist()
        self._position = 0

    def state_dict(self) -> dict[str, Any]:
        """Seed, epoch, and how many batches of it this rank has had; with any, what they depend
        on."""
        state = {"seed": self.seed, "epoch": self.epoch, "position": self._position}
        return {**state, "made_with": self.made_with()} if self._position else state

    def load_state_dict(self, state: dict[str, Any]) -> None:
        """The next iteration goes on where ``state`` was taken.

        Raises ValueError in the middle of an epoch for the state of a sampler that was made with
        other arguments, another number of ranks among them: its batches are others.
        """
        try:
            seed, epoch, position = state["seed"], state["epoch"], state["position"]
        except (KeyError, TypeError) as error:
            raise self._error(
                f"load_state_dict: expected seed, epoch and position, got {state!r}"
            ) from error
        seed = self._at_least("seed", seed, 0)
        epoch = self._at_least("epoch", epoch, 0)
        position = self._at_least("position", position, 0)
        here = self.made_with() if position else {}
        for name, there in state.get("made_with", {}).items():
            if here.get(name, there) != there:
                raise self._error(
                    f"load_state_dict: expected a state of a sampler with {name} = {here[name]}, "
                    f"got one with {there}"
                )
        self.seed, self.epoch = seed, epoch
        self._start = self._position = position
        self._plan_cache = None


class TokenBudgetBatchSampler(_Planned):
    """count · longest ≤ max_tokens (padded), or sum of lengths ≤ max_tokens, for every batch.

    lengths: of each sample, integers in [0, 2³¹), at most 2³¹ − 1 of them; a list, array or tensor.
    multiple: lengths count as rounded up to it, as :func:`batchops.data.pad` pads.
    padded: False where batches are packed. max_samples: the most samples of a batch.
    shuffle: samples of equal length, and the order of batches, differ from epoch to epoch. Without,
    the order is that of the plan: longest first.
    window: sort by length among so many samples only (padding grows, batches mix more); None: all.
    oversize: a sample longer than the budget is an error that names it ("error"), a batch of its
    own ("alone"), or left out ("skip").
    num_replicas, rank: from torch.distributed where it is initialized. Every rank makes the same
    plan and gets equally many batches: the last round is filled up with the first batches, or left
    out with drop_last.

    Planned natively: ten million lengths in half a second. Raises ValueError for other arguments.
    """

    _arguments = (
        *("lengths", "max_tokens", "multiple", "padded", "max_samples", "window"),
        *("shuffle", "oversize"),
    )

    def __init__(
        self,
        lengths: Any,
        max_tokens: int,
        *,
        shuffle: bool = True,
        seed: int = 0,
        padded: bool = True,
        multiple: int = 1,
        max_samples: int | None = None,
        window: int | None = None,
        oversize: str = "error",
        num_replicas: int | None = None,
        rank: int | None = None,
        drop_last: bool = False,
    ) -> None:
        super().__init__(seed, num_replicas, rank, drop_last)
        self.lengths = self._as_lengths(lengths)
        self.max_tokens = self._at_least("max_tokens", max_tokens, 1)
        self.multiple = self._at_least("multiple", multiple, 1)
        if self.multiple >= 1 << 31:
            raise self._error(f"multiple: expected below 2^31, as lengths are, got {multiple!r}")
        self.max_samples = (
            None if max_samples is None else self._at_least("max_samples", max_samples, 1)
        )
        self.window = None if window is None else self._at_least("window", window, 1)
        self.shuffle = shuffle
        self.padded = padded
        if oversize not in ("error", "alone", "skip"):
            raise self._error(f'oversize: expected "error", "alone" or "skip", got {oversize!r}')
        self.oversize = oversize
        if oversize == "error":
            self._refuse_oversized()

    def _refuse_oversized(self) -> None:
        longest = int(self.lengths.max(initial=0))
        if -(-longest // self.multiple) * self.multiple <= self.max_tokens:
            return
        rounded = -(-self.lengths // self.multiple) * self.multiple
        over = np.flatnonzero(rounded > self.max_tokens)
        if len(over):
            first = int(over[0])
            raise self._error(
                f"sample {first} has {int(rounded[first])} tokens, more "
                f"than max_tokens = {self.max_tokens} ({len(over)} such samples). Raise the "
                'budget, or pass oversize="alone" (a batch of its own) or "skip"'
            )

    def _plan(self) -> tuple[np.ndarray, np.ndarray]:
        return _C.plan_batches(
            self.lengths,
            max_tokens=min(self.max_tokens, _MOST),
            max_samples=min(self.max_samples or 0, _MOST),
            multiple=self.multiple,
            padded=self.padded,
            shuffle=self.shuffle,
            pool=min(self.window or 0, _MOST),
            skip_oversized=self.oversize == "skip",
            seed=self._epoch_seed(),
        )


class BucketBatchSampler(_Planned):
    """batch_size samples of similar length to a batch.

    lengths: as for :class:`TokenBudgetBatchSampler`. bucket_batches: so many batches' samples are
    drawn at random, sorted by length and cut into batches; more means less padding, fewer means
    more mixing. The last batch is smaller, or left out with drop_last. Batches come in random order
    with shuffle. Ranks, seeds, epochs and resumption as for :class:`TokenBudgetBatchSampler`.
    """

    _arguments = ("lengths", "batch_size", "bucket_batches", "shuffle", "drop_last")

    def __init__(
        self,
        lengths: Any,
        batch_size: int,
        *,
        bucket_batches: int = 100,
        shuffle: bool = True,
        seed: int = 0,
        num_replicas: int | None = None,
        rank: int | None = None,
        drop_last: bool = False,
    ) -> None:
        super().__init__(seed, num_replicas, rank, drop_last)
        self.lengths = self._as_lengths(lengths)
        self.batch_size = self._at_least("batch_size", batch_size, 1)
        self.bucket_batches = self._at_least("bucket_batches", bucket_batches, 1)
        self.shuffle = shuffle

    def _plan(self) -> tuple[np.ndarray, np.ndarray]:
        samples, starts = _C.plan_batches(
            self.lengths,
            max_samples=min(self.batch_size, _MOST),
            shuffle=self.shuffle,
            pool=min(self.bucket_batches * self.batch_size, _MOST),
            seed=self._epoch_seed(),
        )
        if self.drop_last:
            size = min(self.batch_size, _MOST)
            full = np.flatnonzero(np.diff(starts) == size)
            samples = np.concatenate(
                [samples[:0], *(samples[starts[b] : starts[b + 1]] for b in full)]
            )
            starts = np.arange(len(full) + 1) * size
        return samples, starts


class MixtureBatchSampler(_Planned):
    """P(sample of dataset d) = weights[d] / Σ weights, for indices into a ``ConcatDataset``.

    sizes: of the datasets, in the order of the ``ConcatDataset``. weights: one for each, ≥ 0, at
    least one positive. batches: of an epoch, over all ranks; None: as many as one pass over all
    samples has. Within a dataset every sample is drawn once, in random order, before any is drawn
    again; that order goes on from epoch to epoch only through the seed.

    exact: counts are not drawn. With w = weights[d] / Σ weights, each batch has ``batch_size · w``
    samples of d, rounded down or up, and the first n batches of an epoch (of all ranks) have
    ``n · batch_size · w`` to within less than one. The counts of batch n are those of every epoch.
    """

    _arguments = ("sizes", "weights", "batch_size", "batches", "exact")

    def __init__(
        self,
        sizes: Sequence[int],
        weights: Sequence[float],
        batch_size: int,
        *,
        batches: int | None = None,
        exact: bool = False,
        seed: int = 0,
        num_replicas: int | None = None,
        rank: int | None = None,
        drop_last: bool = False,
    ) -> None:
        super().__init__(seed, num_replicas, rank, drop_last)
        self.sizes = [self._at_least("sizes", size, 0) for size in sizes]
        self.weights = np.asarray(weights, dtype=np.float64)
        if self.weights.shape != (len(self.sizes),):
            raise self._error(
                f"weights: expected one for each of {len(self.sizes)} datasets, got shape "
                f"{self.weights.shape}"
            )
        if not np.isfinite(self.weights).all() or (self.weights < 0).any():
            raise self._error(f"weights: expected finite and >= 0, got {weights!r}")
        if not self.weights.any():
            raise self._error(f"weights: expected a positive one, got {weights!r}")
        for d, (size, weight) in enumerate(zip(self.sizes, self.weights, strict=True)):
            if weight > 0 and size == 0:
                raise self._error(f"dataset {d} has weight {weight} and no samples")
        self.batch_size = self._at_least("batch_size", batch_size, 1)
        self.exact = exact
        self._rounded_up: np.ndarray | None = None
        if batches is None:
            batches = math.ceil(sum(self.sizes) / self.batch_size)
        self.batches = self._at_least("batches", batches, 1)

    def _plan(self) -> tuple[np.ndarray, np.ndarray]:
        seed = self._epoch_seed()
        shares = self.weights / self.weights.max()  # whose sum is finite
        shares /= shares.sum()
        total = self.batches * self.batch_size
        rng = np.random.Generator(np.random.PCG64(seed))
        if self.exact:
            counts = self._exact_counts()
            which = np.tile(np.arange(len(shares)), self.batches).repeat(counts.ravel())
            which = which.reshape(self.batches, self.batch_size)
            which = rng.permuted(which, axis=1).reshape(-1)
        else:
            which = rng.choice(len(shares), size=total, p=shares)
        samples = np.empty(total, dtype=np.int64)
        offsets = np.concatenate([[0], np.cumsum(self.sizes)])
        for d, size in enumerate(self.sizes):
            places = np.flatnonzero(which == d)
            if not len(places):
                continue
            rounds = math.ceil(len(places) / size)
            order = np.concatenate(
                [
                    _C.permutation(size, (seed + 31 * d + 7919 * r) % (1 << 64))
                    for r in range(rounds)
                ]
            )
            samples[places] = offsets[d] + order[: len(places)]
        return samples, np.arange(self.batches + 1) * self.batch_size

    def _exact_counts(self) -> np.ndarray:
        """(batches, datasets): how many samples of each dataset each batch has."""
        # In integers: a rounding error would show where n · batch_size · w is whole. A weight is
        # the decimal number that it was written as, so that [0.7, 0.3] come round after 10 batches.
        exact = [Fraction(repr(float(weight))) for weight in self.weights]
        whole = sum(exact)
        wanted = [self.batch_size * weight / whole for weight in exact]
        least = [math.floor(w) for w in wanted]
        if self._rounded_up is None:
            rest = [w - floor for w, floor in zip(wanted, least, strict=True)]
            period = min(math.lcm(*(r.denominator for r in rest)), self.batches)
            self._rounded_up = _fair_turns(rest, period)
        rounds = math.ceil(self.batches / len(self._rounded_up))
        return np.array(least) + np.tile(self._rounded_up, (rounds, 1))[: self.batches]


def _ceil(a: int, b: int) -> int:
    return -(-a // b)


def _fair_turns(shares: list[Fraction], turns: int) -> np.ndarray:
    """(turns, len(shares)): in each turn Σ shares, an integer m, of them have 1, the others 0, and
    in the first n turns share s has it more than n · s − 1 and less than n · s + 1 times.

    That is proportionate fairness: the i-th must come in turns [⌊(i−1)/s⌋, ⌈i/s⌉). The m that are
    due first are taken. It matters which of those due together go first: those whose next one may
    begin before they end, and of these the ones that leave the least room for long (PD²: Anderson,
    Srinivasan, Mixed Pfair/ERfair scheduling of asynchronous periodic tasks, 2004, has the proof).
    """
    m = int(sum(shares))
    out = np.zeros((turns, len(shares)), dtype=np.uint8)
    sizes = [(share.numerator, share.denominator) for share in shares]
    # Of the i-th of each share, i / s = whole + left / numerator: with nothing left it is due
    # before turn `whole`; the next one may begin in that.
    at = [(0, 0)] * len(shares)

    def next_turn(d: int) -> tuple[int, int, int, int]:
        """What the next one of share d is taken by, the least first."""
        p, q = sizes[d]
        more, left = divmod(at[d][1] + q, p)
        whole = at[d][0] + more
        at[d] = (whole, left)
        if not left:
            return (whole, 0, 0, d)
        due = whole + 1
        # With s ≥ 1/2, the end of the run of turns in which its next ones have no choice.
        run = _ceil(_ceil(due * (q - p), q) * q, q - p) if 2 * p >= q else 0
        return (due, -1, -run, d)

    ready = [next_turn(d) for d, share in enumerate(shares) if share]
    heapq.heapify(ready)
    later: dict[int, list[tuple[int, int, int, int]]] = {}  # by the turn that they may begin in
    for t in range(turns):
        for turn in later.pop(t, ()):
            heapq.heappush(ready, turn)
        for _ in range(m):
            d = heapq.heappop(ready)[3]
            out[t, d] = 1
            begins = max(at[d][0], t + 1)
            later.setdefault(begins, []).append(next_turn(d))
    return out
