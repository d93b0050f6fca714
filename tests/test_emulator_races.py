"""That the race detector finds each kind of missing order, and passes what is sound.

The kernels are in emulator/race_faults.cu. What is found does not depend on the schedule: every
test runs under several.
"""

from __future__ import annotations

import ctypes
import itertools
from pathlib import Path

import numpy as np
import pytest

from .emulator import batch_norm, build, emulator, lamb
from .emulator.recording import Recording, record

SOURCE = Path(__file__).parent / "emulator" / "race_faults.cu"
KERNELS = [SOURCE.relative_to(build.ROOT).as_posix()]
BLOCKS, THREADS = 3, 64
SCHEDULES = (*emulator.SCHEDULES, ("random", 7))


@pytest.fixture(scope="module")
def library() -> ctypes.CDLL:
    return build.library("race_faults", KERNELS, [], instrument=True)


def run(library: ctypes.CDLL, name: str, order: str = "forward", seed: int = 0) -> Recording:
    count = BLOCKS * THREADS
    with record(library, traffic=False, races=True) as recording:
        data = [emulator.Memory(4 * count, name=n) for n in ("in", "out", "partial", "flags")]
        data[0].bytes.view(np.float32)[:] = np.arange(count)
        data[3].bytes[:] = 0
        with emulator.schedule(library, order, seed):
            emulator.call(
                library.emulated_race,
                name.encode(),
                *(ctypes.c_void_p(memory.pointer) for memory in data),
                ctypes.c_int(BLOCKS),
            )
    return recording


def line_of(marker: str) -> str:
    lines = SOURCE.read_text().splitlines()
    (line,) = (i for i, text in enumerate(lines, 1) if text.endswith(f"// race: {marker}"))
    return f"tests/emulator/race_faults.cu:{line}"


SOUND = (
    "reverse",
    "reverse_dynamic",
    "reuse",
    "between_lanes",
    "tree",
    "double_buffer",
    "neighbours",
    "own_elements",
    "last_block_thread_0_fences",
    "last_block_all_fence",
    "counting",
    "volatile_flag",
)


@pytest.mark.parametrize("name", SOUND)
def test_passes_sound_patterns(library, name):
    for order, seed in SCHEDULES:
        run(library, name, order, seed).assert_race_free()


@pytest.mark.parametrize(
    ("name", "buffer", "markers"),
    [
        ("reverse_without_barrier", "tile", ("tile written", "tile read")),
        (
            "reverse_dynamic_without_barrier",
            "dynamic shared memory",
            ("dynamic written", "dynamic read"),
        ),
        ("reuse_without_barrier", "sums", ("sums written", "sums read")),
        ("between_lanes_without_syncwarp", "lanes", ("lanes written", "lanes read")),
        ("tree_without_barriers", "level", ("level", "level")),
        ("single_buffer", "stage", ("stage written", "stage read")),
        ("overlapping_blocks", "out", ("out", "out")),
        (
            "last_block_without_fence_before",
            "partial",
            ("partial written", "partial read"),
        ),
        ("last_block_without_fence_after", "partial", ("partial written", "partial read")),
        ("block_fence", "partial", ("block fence written", "block fence read")),
        ("plain_read_of_an_atomic", "flags", ("counter added", "counter read")),
    ],
)
def test_finds_missing_order(library, name, buffer, markers):
    for order, seed in SCHEDULES:
        races = run(library, name, order, seed).races
        assert races, f"{order}:{seed}"
        for race in races:
            assert (race.kernel, race.buffer) == (name, buffer)
            lines = sorted(side.lines[-1] for side in (race.earlier, race.later))
            assert lines == sorted(map(line_of, markers)), str(race)
            sides = race.earlier, race.later
            assert sides[0] != sides[1]
            assert all(side.block < BLOCKS and side.thread < THREADS for side in sides)


def test_finds_a_flag_raised_without_a_fence(library):
    # Only where block 1 comes after block 0 does it see the flag and read.
    (race,) = run(library, "volatile_flag_without_fence").races
    assert (race.buffer, race.offset) == ("partial", 0)
    assert race.earlier.lines[-1] == line_of("published")
    assert race.later.lines[-1] == line_of("consumed")
    assert (race.earlier.block, race.later.block) == (0, 1)


def test_reports_read_as_text_and_replay(library):
    text = "\n".join(map(str, run(library, "reverse_without_barrier", "random", 5).races))
    assert "reverse_without_barrier: race on tile byte" in text
    assert "nothing orders them" in text
    assert text == "\n".join(map(str, run(library, "reverse_without_barrier", "random", 5).races))


# ---- the shipped kernels

SHAPES = (  # N, C, HxW
    (2, 8, 64),  # rows of whole units
    (5, 6, 49),  # element accesses; two chunks in channels_last
    (1, 264, 12),  # more channels than a tile has
    (5, 3, 4096),  # several chunks a channel
)


@pytest.mark.parametrize("layout", batch_norm.LAYOUTS)
@pytest.mark.parametrize("shape", SHAPES, ids=lambda s: "x".join(map(str, s)))
def test_batch_norm_is_race_free(shape, layout):
    library = batch_norm.library(instrument=True)
    for dtype, residual in itertools.product(("f32", "bf16"), (False, True)):
        problem = batch_norm.Problem(
            *shape, layout=layout, dtype=dtype, activation="relu", residual=residual
        )
        with (
            record(library, traffic=False, races=True) as recording,
            emulator.schedule(library, "random", 2),
        ):
            saved = batch_norm.forward(library, problem)
            batch_norm.backward(library, problem, saved)
        recording.assert_race_free()


@pytest.mark.parametrize("clip", [0.05, None], ids=["clip", "no clip"])
def test_lamb_is_race_free(clip):
    library = lamb.library(instrument=True)
    sizes = (1, 37, 4096, lamb.CHUNK + 5)
    problem = lamb.Problem([lamb.Parameter(n) for n in sizes], max_grad_norm=clip)
    with (
        record(library, traffic=False, races=True) as recording,
        emulator.schedule(library, "random", 2),
    ):
        lamb.run(library, problem)
    recording.assert_race_free()
