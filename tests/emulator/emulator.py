"""Calls emulated kernels: schedules, errors and aligned, poisoned memory."""

from __future__ import annotations

import ctypes
from collections.abc import Callable, Iterator
from contextlib import contextmanager

import numpy as np

SCHEDULES = (("forward", 0), ("reverse", 0), ("random", 1))


class Refused(RuntimeError):
    """The host code returned a message instead of running."""


class EmulatorError(RuntimeError):
    """A kernel did what a GPU would not forgive; names kernel, block, thread and source line."""


@contextmanager
def schedule(
    library: ctypes.CDLL,
    order: str,
    seed: int = 0,
    multiprocessors: int = 2,
    resident_blocks: int | None = None,
) -> Iterator[None]:
    """Sets the order of threads and blocks: forward, reverse or random (by seed).

    A random schedule also keeps three blocks in flight at once, a few threads of each at a time,
    unless told another number.
    """
    if resident_blocks is None:
        resident_blocks = 3 if order == "random" else 1
    if library.emulator_set_order(order.encode(), ctypes.c_uint64(seed)) != 0:
        raise ValueError(f"unknown order {order!r}, expected forward, reverse or random")
    library.emulator_set_resident_blocks(resident_blocks)
    library.emulator_set_multiprocessors(multiprocessors)
    try:
        yield
    finally:
        library.emulator_set_order(b"forward", ctypes.c_uint64(0))
        library.emulator_set_resident_blocks(1)
        library.emulator_set_multiprocessors(2)


def call(function: ctypes._NamedFuncPointer, *arguments: object) -> None:
    """function(*arguments, text, size); raises Refused or EmulatorError with the text."""
    text = ctypes.create_string_buffer(1024)
    outcome = function(*arguments, text, ctypes.c_size_t(len(text)))
    if outcome != 0:
        raise (Refused if outcome == 1 else EmulatorError)(text.value.decode())


class Memory:
    """`nbytes` of memory at `offset` bytes past a 64-byte boundary, filled with 0xff (NaN).

    64 bytes on either side hold a pattern that guards_intact() looks for. With `exact` set there
    are none and the memory is one allocation of its own, for AddressSanitizer to watch. `watcher`,
    where set (recording.py), is told of every new one.
    """

    GUARD, PATTERN = 64, 0xA5
    exact = False
    watcher: Callable[[Memory], None] | None = None

    def __init__(self, nbytes: int, offset: int = 0, name: str = "memory") -> None:
        self.name = name
        around = 0 if self.exact else 2 * self.GUARD + 64
        self._owner = np.full(nbytes + offset + around, self.PATTERN, dtype=np.uint8)
        self._start = offset
        if not self.exact:
            self._start += -self._owner.ctypes.data % 64 + self.GUARD
        self.bytes = self._owner[self._start : self._start + nbytes]
        self.bytes[:] = 0xFF
        if Memory.watcher is not None:
            Memory.watcher(self)

    @property
    def pointer(self) -> int:
        return self.bytes.ctypes.data

    def guards_intact(self) -> bool:
        end = self._start + self.bytes.size
        sides = (self._owner[: self._start].tobytes(), self._owner[end:].tobytes())
        return all(side.count(self.PATTERN) == len(side) for side in sides)
