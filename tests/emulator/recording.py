"""What a kernel does to memory: bytes and sectors by buffer, writes by byte, races, strays.

    library = build.library("optimizers", KERNELS, API, instrument=True)
    with record(library, races=True) as recording:
        ...                                        # buffers are emulator.Memory, with names
    recording.assert_in_bounds()
    recording.assert_race_free()
    recording.assert_written("y", times=1)

Every emulator.Memory made inside the block is watched. Accesses are those of the compiled code,
whatever helper they go through.
"""

from __future__ import annotations

import ctypes
import json
import subprocess
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field
from functools import cache
from pathlib import Path
from typing import Any

import numpy as np

from .build import ROOT
from .emulator import Memory

SECTOR = 32


@dataclass
class Flow:
    """Traffic of one buffer one way."""

    bytes: int = 0  # all that the threads ask for
    distinct: int = 0  # each byte once in a warp instruction
    sectors: int = 0  # of 32 bytes, each once in a warp instruction

    def __iadd__(self, other: Flow) -> Flow:
        self.bytes += other.bytes
        self.distinct += other.distinct
        self.sectors += other.sectors
        return self

    @property
    def efficiency(self) -> float:
        """distinct bytes / (sectors · 32): 1 where a warp uses all of what it fetches."""
        return self.distinct / (self.sectors * SECTOR) if self.sectors else 1.0


@dataclass
class Launch:
    kernel: str
    blocks: int  # 0 where no thread runs, as for a memset
    cluster: int
    read: dict[str, Flow] = field(default_factory=dict)
    written: dict[str, Flow] = field(default_factory=dict)


@dataclass
class Buffer:
    nbytes: int
    reads: np.ndarray  # of each byte
    writes: np.ndarray


@dataclass
class Side:
    """One access: what, by which block and thread, and where in the source, innermost first."""

    what: str
    block: int
    thread: int
    lines: tuple[str, ...]

    def __str__(self) -> str:
        through = f" (through {self.lines[0]})" if len(self.lines) > 1 else ""
        who = f"block {self.block} thread {self.thread}"
        return f"{self.what} by {who} at {self.lines[-1]}{through}"


@dataclass
class Race:
    kernel: str
    buffer: str
    offset: int
    earlier: Side
    later: Side
    why: str

    def __str__(self) -> str:
        why = self.why or "nothing orders them"
        return (
            f"{self.kernel}: race on {self.buffer} byte {self.offset}: {self.later}, "
            f"earlier {self.earlier}: {why}"
        )


@dataclass
class Stray:
    """An access past the bounds of a buffer, or across them."""

    kernel: str
    buffer: str
    nbytes: int
    offset: int
    size: int
    access: Side

    def __str__(self) -> str:
        return (
            f"{self.kernel}: {self.size} bytes at byte {self.offset} of {self.buffer}, "
            f"which has {self.nbytes}: {self.access}"
        )


@dataclass
class Recording:
    buffers: dict[str, Buffer] = field(default_factory=dict)
    launches: list[Launch] = field(default_factory=list)
    races: list[Race] = field(default_factory=list)
    strays: list[Stray] = field(default_factory=list)

    def flow(self, buffer: str, written: bool, kernel: str | None = None) -> Flow:
        """All traffic of a buffer one way, or that of one kernel's launches."""
        total = Flow()
        for launch in self.launches:
            if kernel in (None, launch.kernel):
                total += (launch.written if written else launch.read).get(buffer, Flow())
        return total

    def assert_in_bounds(self) -> None:
        assert not self.strays, "out of bounds:\n" + "\n".join(map(str, self.strays))

    def assert_race_free(self) -> None:
        assert not self.races, "\n".join(map(str, self.races))

    def assert_written(self, name: str, times: int = 1) -> None:
        """Every byte of the buffer written, and each that often: counted, not told by its value."""
        writes = self.buffers[name].writes
        wrong = np.flatnonzero(writes != times)
        assert wrong.size == 0, (
            f"{name}: {wrong.size} of {writes.size} bytes not written {times} times: "
            f"byte {wrong[0]} {writes[wrong[0]]} times, byte {wrong[-1]} {writes[wrong[-1]]} times"
        )


@contextmanager
def record(
    library: ctypes.CDLL, *, traffic: bool = True, races: bool = False
) -> Iterator[Recording]:
    """Watches kernels of an instrumented library; the recording is filled in at the end."""
    library.emulator_recorded.restype = ctypes.c_char_p
    library.emulator_times.restype = ctypes.POINTER(ctypes.c_uint16)
    recording = Recording()
    watched: list[Memory] = []
    names: dict[str, int] = {}

    def watch(memory: Memory) -> None:
        names[memory.name] = names.get(memory.name, 0) + 1
        name = memory.name + (f" {names[memory.name]}" if names[memory.name] > 1 else "")
        watched.append(memory)  # keeps the address from another's use
        library.emulator_watch(
            name.encode(),
            ctypes.c_void_p(memory.pointer),
            ctypes.c_size_t(memory.bytes.size),
            ctypes.c_size_t(Memory.GUARD),
        )

    library.emulator_record(traffic, races)
    before, Memory.watcher = Memory.watcher, watch
    try:
        yield recording
    finally:
        Memory.watcher = before
        _fill(recording, library)
        library.emulator_stop_recording()


def _fill(recording: Recording, library: ctypes.CDLL) -> None:
    said = json.loads(library.emulator_recorded())
    path = library._name
    name_of = {}
    for n, buffer in enumerate(said["buffers"]):
        name_of[buffer["region"]] = buffer["name"]
        nbytes = buffer["bytes"]

        def times(written: bool, n: int = n, nbytes: int = nbytes) -> np.ndarray:
            pointer = library.emulator_times(ctypes.c_size_t(n), written)
            if nbytes == 0:
                return np.zeros(0, np.uint16)
            return np.ctypeslib.as_array(pointer, (nbytes,)).copy()

        recording.buffers[buffer["name"]] = Buffer(nbytes, times(False), times(True))
    for launch in said["launches"]:
        mine = Launch(launch["kernel"], launch["blocks"], launch["cluster"])
        for buffer in launch["buffers"]:
            mine.read[name_of[buffer["region"]]] = Flow(*buffer["read"])
            mine.written[name_of[buffer["region"]]] = Flow(*buffer["written"])
        recording.launches.append(mine)

    def side(access: dict[str, Any]) -> Side:
        return Side(
            access["what"], access["block"], access["thread"], source_lines(path, access["code"])
        )

    for race in said["races"]:
        recording.races.append(
            Race(
                race["kernel"],
                race["buffer"],
                race["offset"],
                side(race["earlier"]),
                side(race["later"]),
                race["why"],
            )
        )
    for stray in said["outside"]:
        recording.strays.append(
            Stray(
                stray["kernel"],
                stray["buffer"],
                recording.buffers[stray["buffer"]].nbytes,
                stray["offset"],
                stray["bytes"],
                side(stray),
            )
        )


@cache
def source_lines(library: str, code: int) -> tuple[str, ...]:
    """file:line of a code offset, innermost first, then where that was inlined."""
    if code < 0:
        return ("the host",)
    said = subprocess.run(
        ["addr2line", "-i", "-e", library, hex(code)], capture_output=True, text=True, check=True
    )
    lines = []
    for line in said.stdout.splitlines():
        file, _, number = line.partition(" ")[0].rpartition(":")
        path = Path(file)
        if path.is_relative_to(ROOT):
            path = path.relative_to(ROOT)
        lines.append(f"{path.as_posix()}:{number}")
    return tuple(lines)
