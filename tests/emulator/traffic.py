"""Passes over memory that kernels make: the check for tests, and a table of them all.

    python -m tests.emulator.traffic [WORD ...]

prints a row for each launch of each operation (those whose row has every WORD in it): what it reads
and writes of the operation's tensors, in passes over one tensor of x's size (lamb, lars: bytes a
parameter), what share of the 32-byte sectors its warps touch they use ("efficiency": 1 is fully
coalesced), and the sectors of small data (weights, statistics, workspace; these stay in the caches)
per sector of tensors. The row "all" adds the launches up and gives the least that the hardware
allows, reads and writes together.

Nothing is timed: the counts are exact and the same on every machine.
"""

from __future__ import annotations

import sys
from collections.abc import Iterable, Mapping
from dataclasses import dataclass

import numpy as np

from .recording import Flow, Recording


@dataclass(frozen=True)
class Passes:
    """How many times each byte of a tensor is read and written.

    With `bits` several threads read parts of the same byte: bytes then count once a warp, and
    because a byte may belong to two warps, of which each meets at least four whole bytes, there may
    be a quarter more reads. Where a unit's bits lie in two bytes, or in two rows, these are read
    one by one: `again` says how often in all.
    """

    read: int = 0
    written: int = 0
    bits: bool = False
    again: float = 1.25


def assert_traffic(
    recording: Recording,
    passes: Mapping[str, Passes],
    *,
    kernel: str | None = None,
    other: int,
    efficiency: Mapping[str, float],
) -> None:
    """That the tensors of `passes` are read and written so many times, byte by byte, no tolerance.

    All other buffers together may have at most `other` bytes touched (read and written count
    apart, and each byte once: this is per-channel data that the caches hold). The tensors of
    `efficiency` have at least that sector efficiency, reads and writes each. With `kernel` only
    its launches count, and bytes are added up instead of looked at one by one.
    """
    wrong = []
    for name, expected in passes.items():
        buffer = recording.buffers[name]
        for what, times, counts in (
            ("read", expected.read, buffer.reads),
            ("written", expected.written, buffer.writes),
        ):
            flow = recording.flow(name, what == "written", kernel)
            share = flow.distinct if expected.bits else flow.bytes
            most = expected.again * times if expected.bits and what == "read" else times
            if not times * buffer.nbytes <= share <= most * buffer.nbytes:
                wrong.append(
                    f"{name} {what} {share / max(buffer.nbytes, 1):.4g} times, expected {times}"
                )
            elif kernel is None and expected.bits and (counts < times).any():
                wrong.append(f"{name}: {what} in part only")
            elif kernel is None and not expected.bits and (counts != times).any():
                at = int(np.flatnonzero(counts != times)[0])
                wrong.append(f"{name}: byte {at} {what} {counts[at]} times, expected {times}")
            least = efficiency.get(name, 0.0)
            if flow.efficiency < least:
                wrong.append(
                    f"{name} {what} with sector efficiency {flow.efficiency:.3f}, "
                    f"expected at least {least:.3f}"
                )
    rest = {name: buffer for name, buffer in recording.buffers.items() if name not in passes}
    touched = {name: touched_bytes(recording, name, kernel) for name in rest}
    if sum(touched.values()) > other:
        wrong.append(f"other buffers: {sum(touched.values())} > {other} bytes touched: {touched}")
    assert not wrong, f"{kernel or 'all launches'}: " + "; ".join(wrong)


def touched_bytes(recording: Recording, name: str, kernel: str | None) -> int:
    """Bytes of the buffer that are read at all, and that are written at all."""
    buffer = recording.buffers[name]
    touched = 0
    for written, counts in ((False, buffer.reads), (True, buffer.writes)):
        if recording.flow(name, written, kernel).bytes:
            touched += int(np.count_nonzero(counts))
    return touched


# ---- the table

COLUMNS = ("operation", "shape", "variant", "launch", "read", "written", "efficiency", "small")
WIDTHS = (20, 12, 27, 29, 7, 7, 10, 6)


def rows(case: Case) -> Iterable[tuple[str, ...]]:  # noqa: F821
    recording = case.record()
    tensors = {name: recording.buffers[name].nbytes for name in case.passes}
    unit = case.unit
    totals = [Flow(), Flow(), Flow()]
    for launch in recording.launches:
        flows = [Flow(), Flow(), Flow()]  # read, written, small
        for way, by_buffer in enumerate((launch.read, launch.written)):
            for name, flow in by_buffer.items():
                flows[way if name in tensors else 2] += flow
        for total, flow in zip(totals, flows, strict=True):
            total += flow
        yield (case.operation, case.shape, case.variant, launch.kernel, *_numbers(flows, unit))
    least = f"all (least: {case.least:.4g})"
    yield (case.operation, case.shape, case.variant, least, *_numbers(totals, unit))


def _numbers(flows: list[Flow], unit: int) -> Iterable[str]:
    read, written, small = flows
    tensors = Flow()
    tensors += read
    tensors += written
    for flow in (read, written):
        yield f"{flow.distinct / unit:.3f}"
    yield f"{tensors.efficiency:.3f}" if tensors.sectors else "-"
    yield f"{small.sectors / tensors.sectors:.2f}" if tensors.sectors else "-"


def main(words: list[str]) -> None:
    from . import traffic_cases

    def show(row: Iterable[str]) -> None:
        cells = [f"{cell:<{width}}" for cell, width in zip(row, WIDTHS, strict=True)]
        print("  ".join(cells).rstrip())

    show(COLUMNS)
    for case in traffic_cases.cases():
        for row in rows(case):
            if all(any(word in cell for cell in row) for word in words):
                show(row)


if __name__ == "__main__":
    main(sys.argv[1:])
