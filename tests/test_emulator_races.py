"""That the race detector finds each kind of missing order, and passes what is sound.

The kernels are in emulator/race_faults*.cu. What is found does not depend on the schedule: every
test runs under several.
"""

from __future__ import annotations

import ctypes
import itertools
from pathlib import Path

import numpy as np
import pytest
import torch

from .emulator import batch_norm, build, emulator, optimizers
from .emulator.recording import Recording, record

SOURCES = [
    Path(__file__).parent / "emulator" / name
    for name in (
        "race_faults.cu",
        "race_faults_between_blocks.cu",
        "race_faults_between_streams.cu",
    )
]
KERNELS = [source.relative_to(build.ROOT).as_posix() for source in SOURCES]
BLOCKS, THREADS = 4, 64
SCHEDULES = (*emulator.SCHEDULES, ("random", 7))


class Data(ctypes.Structure):
    _fields_ = tuple((name, ctypes.c_void_p) for name in ("in_", "out", "partial", "flags"))


@pytest.fixture(scope="module")
def library() -> ctypes.CDLL:
    return build.library("race_faults", KERNELS, [], instrument=True)


def run(
    library: ctypes.CDLL, name: str, order: str = "forward", seed: int = 0, traffic: bool = False
) -> Recording:
    count = BLOCKS * THREADS
    function = library.emulated_race
    resident = None
    if name in BETWEEN_BLOCKS:  # they wait for each other
        function, resident = library.emulated_race_between_blocks, BLOCKS
    elif name in BETWEEN_STREAMS:
        function = library.emulated_race_between_streams
    with record(library, traffic=traffic, races=True) as recording:
        data = [emulator.Memory(4 * count, name=n) for n in ("in", "out", "partial", "flags")]
        data[0].bytes.view(np.float32)[:] = np.arange(count)
        data[3].bytes[:] = 0
        with emulator.schedule(library, order, seed, resident_blocks=resident):
            emulator.call(
                function,
                name.encode(),
                ctypes.byref(Data(*(memory.pointer for memory in data))),
                ctypes.c_int(BLOCKS),
            )
    return recording


def line_of(marker: str) -> str:
    for source in SOURCES:
        for line, text in enumerate(source.read_text().splitlines(), 1):
            if text.endswith(f"// race: {marker}"):
                return f"tests/emulator/{source.name}:{line}"
    raise KeyError(marker)


SOUND = (
    "reverse",
    "reverse_dynamic",
    "reuse",
    "between_lanes",
    "tree",
    "double_buffer",
    "three_readers",
    "neighbours",
    "own_elements",
    "last_block_thread_0_fences",
    "last_block_all_fence",
    "counting",
    "counter_exchanged",
    "volatile_look_and_count",
    "volatile_flag",
)


SOUND_BETWEEN_BLOCKS = (
    "spin_release_acquire",
    "spin_with_fences",
    "bare_volatile_wait",
    "count_blocks",
    "count_threads",
    "lock",
    "grid_sync",
    "cluster_sync",
    "cluster_without_exits",
    "split_barrier",
    "named_barrier",
    "pipeline",
)
FAULTY_BETWEEN_BLOCKS = {  # the buffer, and the lines of both accesses
    "spin_with_a_relaxed_store": ("partial", "data published", "data consumed"),
    "spin_with_a_relaxed_load": ("partial", "data published", "data consumed"),
    "bare_volatile_wait_without_fence": ("partial", "volatile wait written", "met"),
    "lock_without_fences": ("out", "guarded", "guarded"),
    "block_barrier_for_the_grid": ("partial", "grid written", "grid read"),
    "block_barrier_for_the_cluster": ("mine", "cluster written", "cluster read"),
    "exit_before_the_cluster_barrier": (
        "partial",
        "written before the exit",
        "read after the exit",
    ),
    "split_barrier_read_too_early": ("partial", "split written", "split read"),
    "two_named_barriers": ("words", "named written", "named read"),
    "pipeline_without_barrier": ("stages", "copied", "stage used"),
}
# These have more than one pair of lines, and a reason of their own.
REASONS = {
    "spin_in_the_wrong_scope": "an atomic of block scope does not reach the other thread",
    "count_blocks_in_block_scope": "an atomic of block scope does not reach the other thread",
    "pipeline_waits_too_little": "the asynchronous copy has not been waited for",
}
BETWEEN_BLOCKS = {
    *SOUND_BETWEEN_BLOCKS,
    *FAULTY_BETWEEN_BLOCKS,
    *REASONS,
    "volatile_wait_for_nobody",
}


SOUND_BETWEEN_STREAMS = (
    "one_stream",
    "event",
    "stream_waited_for",
    "event_waited_for",
    "event_asked_for",
    "device_waited_for",
    "copy_to_host",
    "by_a_third_stream",
    "default_then_blocking",
    "blocking_then_default",
    "ended_then_default",
    "both_read",
    "both_count",
    "memset_and_event",
)
FAULTY_BETWEEN_STREAMS = {
    "two_streams": ("partial", "produced", "used"),
    "consumer_before_producer": ("partial", "used", "produced"),
    "event_before_the_work": ("partial", "produced", "used"),
    "event_of_another_stream": ("partial", "produced", "used"),
    "other_stream_waited_for": ("partial", "produced", "used"),
    "default_then_not_blocking": ("partial", "produced", "used"),
    "not_blocking_then_default": ("partial", "produced", "used"),
    "both_count_in_block_scope": ("flags", "counted in block scope", "counted in block scope"),
    "count_and_reset": ("flags", "counted in a stream", "reset"),
    "memset_of_two_streams": ("partial", "the host", "used"),
}
BETWEEN_STREAMS = {*SOUND_BETWEEN_STREAMS, *FAULTY_BETWEEN_STREAMS}


@pytest.mark.parametrize("name", [*SOUND, *SOUND_BETWEEN_BLOCKS, *SOUND_BETWEEN_STREAMS])
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
        (
            "three_readers_of_whom_two_meet_the_writer",
            "word",
            ("word read", "word overwritten"),
        ),
        ("counter_set_by_one", "flags", ("counter set", "counted")),
        ("plain_look_and_count", "flags", ("looked", "then counted")),
        *((name, buffer, lines) for name, (buffer, *lines) in FAULTY_BETWEEN_BLOCKS.items()),
    ],
)
def test_finds_missing_order(library, name, buffer, markers):
    for order, seed in SCHEDULES:
        races = run(library, name, order, seed).races
        assert races, f"{order}:{seed}"
        for race in races:
            assert (race.kernel, race.buffer) == (name, buffer)
            sides = race.earlier, race.later
            wanted = [line_of(marker) for marker in markers]
            assert any(
                wanted[0] in one.lines and wanted[1] in other.lines
                for one, other in (sides, sides[::-1])
            ), str(race)
            assert sides[0] != sides[1]
            assert all(side.block < BLOCKS and side.thread < THREADS for side in sides)


@pytest.mark.parametrize("name", FAULTY_BETWEEN_STREAMS)
def test_finds_streams_that_nothing_orders(library, name):
    buffer, *markers = FAULTY_BETWEEN_STREAMS[name]
    wanted = {marker if marker == "the host" else line_of(marker) for marker in markers}
    for order, seed in SCHEDULES:
        (race,) = run(library, name, order, seed).races
        assert race.buffer == buffer
        assert {race.earlier.lines[-1], race.later.lines[-1]} == wanted, str(race)
        assert "is in another stream, and nothing orders the two" in str(race)
        kernels = {race.kernel, race.why.split(" is in ")[0]}
        assert kernels == {"second", "cudaMemsetAsync" if "memset" in name else "first"}


def test_what_the_host_has_waited_for_is_over(library):
    # Two calls on the same memory, with nothing between them but the wait at the end of the first.
    with record(library, traffic=False, races=True) as recording:
        data = [emulator.Memory(1024, name=n) for n in ("in", "out", "partial", "flags")]
        pointers = Data(*(memory.pointer for memory in data))
        for name in ("event", "consumer_before_producer"):
            emulator.call(
                library.emulated_race_between_streams,
                name.encode(),
                ctypes.byref(pointers),
                ctypes.c_int(1),
            )
    (race,) = recording.races
    assert (race.earlier.what, race.later.what) == ("read", "write"), str(race)


@pytest.mark.parametrize("name", REASONS)
def test_names_the_reason(library, name):
    for order, seed in SCHEDULES:
        races = run(library, name, order, seed).races
        assert races, f"{order}:{seed}"
        assert REASONS[name] in "\n".join(map(str, races))


def test_finds_a_flag_raised_without_a_fence(library):
    # Only where block 1 comes after block 0 does it see the flag and read.
    (race,) = run(library, "volatile_flag_without_fence").races
    assert (race.buffer, race.offset) == ("partial", 0)
    assert race.earlier.lines[-1] == line_of("published")
    assert race.later.lines[-1] == line_of("consumed")
    assert (race.earlier.block, race.later.block) == (0, 1)


def test_a_recorded_volatile_wait_ends_as_a_deadlock(library):
    # It has to give way though nearly all of its time goes by in the recorder; the line is its own.
    with pytest.raises(
        emulator.EmulatorError, match="deadlock: spins and nothing changes"
    ) as caught:
        run(library, "volatile_wait_for_nobody", traffic=True)
    source = SOURCES[1].read_text().splitlines()
    (line,) = (i for i, text in enumerate(source, 1) if text.endswith("// fault: nobody"))
    assert f"{SOURCES[1].name}:{line} " in str(caught.value)


def test_reports_read_as_text_and_replay(library):
    text = "\n".join(map(str, run(library, "reverse_without_barrier", "random", 5).races))
    assert "reverse_without_barrier: race on tile byte" in text
    assert "nothing orders them" in text
    assert text == "\n".join(map(str, run(library, "reverse_without_barrier", "random", 5).races))


def test_counts_what_atomics_and_asynchronous_copies_move(library):
    copied = run(library, "pipeline", "random", 3, traffic=True)
    # Four stages; the warps' copies are of whole sectors.
    assert (copied.buffers["in"].reads == 4).all()
    assert copied.flow("in", False).efficiency == 1.0
    copied.assert_written("out")
    counted = run(library, "counting", traffic=True)
    for written in (False, True):
        flow = counted.flow("flags", written)
        # A warp's 32 updates of one counter fetch and leave one sector.
        assert (flow.bytes, flow.sectors) == (4 * BLOCKS * THREADS, BLOCKS * THREADS // 32)
    assert (counted.buffers["flags"].writes[:4] == BLOCKS * THREADS).all()


# ---- the shipped kernels

SHAPES = (  # N, C, HxW
    (2, 8, 64),  # rows of whole units
    (5, 6, 49),  # element accesses; two chunks in channels_last
    (4, 2, 3072),  # several chunks a channel; clusters
)


def assert_batch_norm_is_race_free(device: str, *problems: batch_norm.Problem, **more: int) -> None:
    library = batch_norm.library(instrument=True)
    for problem in problems:
        with (
            batch_norm.device(library, device, "random", 2, **more),
            record(library, traffic=False, races=True) as recording,
        ):
            saved = batch_norm.forward(library, problem)
            batch_norm.backward(library, problem, saved)
        recording.assert_race_free()


@pytest.mark.parametrize("device", ["Hopper", "streams"])
@pytest.mark.parametrize(
    ("layout", "shape"),
    [
        *itertools.product(batch_norm.LAYOUTS, SHAPES),
        ("channels_last", (1, 264, 12)),  # more channels than a tile has
    ],
)
def test_batch_norm_is_race_free(shape, layout, device):
    variants = itertools.product(("f32", "bf16"), (False, True))
    assert_batch_norm_is_race_free(
        device,
        *(
            batch_norm.Problem(
                *shape, layout=layout, dtype=dtype, activation="relu", residual=residual
            )
            for dtype, residual in variants
        ),
    )


@pytest.mark.parametrize("device", ["Hopper", "streams"])
@pytest.mark.parametrize("layout", batch_norm.LAYOUTS)
def test_batch_norm_of_any_activation_is_race_free(layout, device):
    # Mask rows of less than a byte, and several chunks whose backward reads the residual.
    given = {"layout": layout, "dtype": "bf16", "residual": True}
    assert_batch_norm_is_race_free(
        device,
        batch_norm.Problem(5, 6, 49, activation="leaky_relu", **given),
        batch_norm.Problem(4, 2, 3072, activation="silu", **given),
    )


@pytest.mark.parametrize("layout", batch_norm.LAYOUTS)
@pytest.mark.parametrize("device", ["Turing", "small"])
def test_batch_norms_teams_are_race_free(device, layout):
    # Blocks that meet in the workspace, for one set after the other.
    given = {"layout": layout, "activation": "relu"}
    assert_batch_norm_is_race_free(
        device,
        batch_norm.Problem(5, 3, 4096, residual=True, **given),
        batch_norm.Problem(5, 24, 1024, dtype="bf16", ghost=2, **given),
    )


@pytest.mark.parametrize(
    ("layout", "shape"),
    [
        pytest.param("channels_first", (1, 160, 8), id="160 pieces"),
        pytest.param("channels_last", (1, 2, 65 * 1024), id="65 pieces"),
    ],
)
def test_batch_norm_with_more_pieces_than_blocks_is_race_free(layout, shape):
    # One multiprocessor is given 64 blocks: some use their shared memory again for a second piece.
    problem = batch_norm.Problem(*shape, layout=layout, dtype="f16", activation="relu")
    for device in ("Hopper", "streams"):
        assert_batch_norm_is_race_free(device, problem, multiprocessors=1)


@pytest.mark.parametrize("place", optimizers.DEVICES)
@pytest.mark.parametrize("clip", [0.05, None], ids=["clip", "no clip"])
@pytest.mark.parametrize("kind", [optimizers.Problem, optimizers.Lars], ids=lambda k: k.kind)
def test_optimizers_are_race_free(kind, clip, place):
    library = optimizers.library(instrument=True)
    # Small ones, chunks of whole units and without, and more chunks than all slots hold.
    parameters = [optimizers.Parameter(n) for n in (1, 37, 256, 4096, 5 * optimizers.CHUNK + 5)]
    parameters.append(optimizers.Parameter(2500, "bf16", offset=1, master=True))
    # What is not kept of the first is swept again while the second is under way.
    parameters += [optimizers.Parameter(n * optimizers.CHUNK) for n in (9, 8, 1, 7)]
    parameters += [optimizers.Parameter(n) for n in (256,) * 20]
    # With a clip, and with step counts, lr and scale on the device.
    problem = kind(parameters, max_grad_norm=clip, on_device=clip is None)
    if kind is optimizers.Lars:
        problem.groups[0].momentum = 0.9
    with (
        record(library, traffic=False, races=True) as recording,
        optimizers.device(library, place, "random", 2),
    ):
        optimizers.run(library, problem)
    recording.assert_race_free()


def test_steps_of_two_streams_share_nothing():
    """Each with a table and a workspace of its own, as the callers have them."""
    library = optimizers.library(instrument=True)
    problems = [optimizers.Problem([optimizers.Parameter(5 * optimizers.CHUNK)]) for _ in range(2)]
    with (
        record(library, traffic=False, races=True) as recording,
        optimizers.device(library, "small", "random", 4),
    ):
        together = optimizers.run_in_streams(library, problems)
        alone = [optimizers.run(library, problem) for problem in problems]
    for one, other in zip(together, alone, strict=True):
        assert all(torch.equal(one[0][name], other[0][name]) for name in "pmv")
    recording.assert_race_free()
