"""What a loader counts about itself, and how far ahead it works."""

from __future__ import annotations

import time
from collections import UserDict
from typing import Any

import torch

from batchops.data._tree import parts_of

# Deeper than batches are; a list may hold itself.
_DEEPEST = 32


def batch_length(data: Any, depth: int = 0) -> int:
    """Samples in a batch: the size of the first tensor or list found in it, 1 where none is."""
    if isinstance(data, torch.Tensor):
        return data.size(0) if data.dim() else 1  # of strided nested tensors there is no shape
    parts = parts_of(data)
    if parts is None or depth == _DEEPEST:
        return 1
    first = parts[0] if parts else None
    if isinstance(data, dict | UserDict):
        return batch_length(first, depth + 1) if parts else 0
    whole = isinstance(first, torch.Tensor) or parts_of(first) is not None
    return batch_length(first, depth + 1) if whole else len(parts)


class Metrics:
    """Counts since the loader was made.

    waited: seconds in ``next``. elapsed: seconds from the first ``next`` to the end of the last.
    """

    def __init__(self) -> None:
        self.samples = 0
        self.batches = 0
        self.waited = 0.0
        self.depth = 0
        self._first: float | None = None
        self._last = 0.0

    def begin(self) -> float:
        now = time.perf_counter()
        if self._first is None:
            self._first = now
        return now

    def delivered(self, begun: float, samples: int) -> None:
        self._last = time.perf_counter()
        self.waited += self._last - begun
        self.samples += samples
        self.batches += 1

    def snapshot(self, memory: Any) -> dict[str, Any]:
        elapsed = 0.0 if self._first is None else self._last - self._first
        ring = memory.stats()
        return {
            "samples": self.samples,
            "batches": self.batches,
            "samples_per_second": self.samples / elapsed if elapsed > 0 else 0.0,
            "wait_seconds": self.waited,
            "wait_fraction": self.waited / elapsed if elapsed > 0 else 0.0,
            "prefetch_depth": self.depth,
            "ring": ring,
            "ring_occupancy": ring["leased_bytes"] / ring["bytes"] if ring["bytes"] else 0.0,
            "bytes_written_per_batch_byte": (
                memory.written / memory.batch_bytes if memory.batch_bytes else 0.0
            ),
        }


class Depth:
    """How many batches to have under way, from how long the last ones were waited for.

    One more after a batch that was waited for longer than a twentieth of the time between two
    requests; one less after 64 in a row that were not waited for at all.
    """

    CALM = 64

    def __init__(self, start: int, most: int) -> None:
        self.least = max(start, 1)
        self.most = max(most, self.least)
        self.value = self.least
        self._calm = 0

    def waited(self, seconds: float, interval: float) -> None:
        if seconds > interval / 20:
            self.value = min(self.value + 1, self.most)
            self._calm = 0
            return
        self._calm += 1
        if self._calm >= self.CALM:
            self._calm = 0
            self.value = max(self.value - 1, self.least)
