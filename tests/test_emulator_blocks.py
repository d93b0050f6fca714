"""That waits between blocks, clusters, copies and launches that cannot be right become errors.

The kernels are in emulator/block_faults.cu; each is found by the check meant for it.
"""

from __future__ import annotations

import ctypes
import re
import time
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

import numpy as np
import pytest

from .emulator import build, emulator
from .emulator.planted import line_of

SOURCE = Path(__file__).parent / "emulator" / "block_faults.cu"
KERNELS = [SOURCE.relative_to(build.ROOT).as_posix()]
VALUES = np.arange(64, dtype=np.float32) / 10


@pytest.fixture(scope="module")
def library() -> ctypes.CDLL:
    return build.library("block_faults", KERNELS, [])


def run(
    library: ctypes.CDLL,
    name: str,
    order: str = "forward",
    seed: int = 0,
    resident: int | None = None,
) -> np.ndarray:
    """What kernel `name` makes of 0.0, 0.1 ... 6.3; `resident` blocks at a time."""
    source, target, words = (emulator.Memory(256) for _ in range(3))
    source.bytes.view(np.float32)[:] = VALUES
    words.bytes[:] = 0
    pointers = [ctypes.c_void_p(memory.pointer) for memory in (source, target, words)]
    with emulator.schedule(library, order, seed):
        if resident is not None:
            library.emulator_set_resident_blocks(resident)
        emulator.call(library.emulated_fault, name.encode(), *pointers)
    return target.bytes.view(np.float32).copy()


def error_of(library: ctypes.CDLL, name: str, *arguments: object, **settings: object) -> str:
    with pytest.raises(emulator.EmulatorError) as caught:
        run(library, name, *arguments, **settings)
    return str(caught.value)


@pytest.mark.parametrize(("order", "seed"), emulator.SCHEDULES)
@pytest.mark.parametrize(
    ("name", "message", "markers"),
    [
        ("wait_for_one_arrival_too_many", "deadlock: spins", ["too many"]),
        ("wait_with_a_barrier_in_the_loop", "deadlock: spins", ["looks"]),
        ("crossed_wait", "deadlock: spins .* 2 blocks are resident, 0 have not", ["crossed"]),
        ("grid_sync_not_cooperative", "launch that is not cooperative", ["not cooperative"]),
        ("divergent_grid_sync", r"divergent grid.sync\(\)", ["one sync", "other sync"]),
        ("grid_sync_after_exit", r"deadlock: waits in grid.sync\(\)", ["sync after exit"]),
        ("grid_sync_against_a_barrier", "deadlock: waits in .* while", ["sync", "barrier"]),
        ("map_of_an_exited_block", "block 1 of the cluster has exited", ["exited owner"]),
        ("map_past_the_cluster", "rank 2 in a cluster of 2", ["rank"]),
        ("map_of_global_memory", "not shared memory of this cluster", ["not shared"]),
        ("two_arrivals", "arrives twice", ["second arrival"]),
        ("wait_without_arrival", "without having arrived", ["no arrival"]),
        ("barrier_of_part_of_a_warp", "barrier of 48 threads", ["48 threads"]),
        ("barrier_seventeen", "barrier 16, expected 0 to 15", ["seventeenth"]),
        ("two_sizes_of_one_barrier", "barrier 1 of .* waits there for", ["sizes", "more sizes"]),
        ("consumer_without_producer", "deadlock: waits in a barrier of the block", ["alone"]),
        ("copy_of_twelve_bytes", "copy of 12 bytes, expected 4, 8, 16", ["twelve"]),
        ("copy_from_a_misaligned_source", "source is not on a boundary", ["misaligned source"]),
        ("copy_to_a_misaligned_place", "destination is not on a", ["misaligned place"]),
        ("copy_to_global_memory", "not shared memory of this block", ["not to shared"]),
        ("misaligned_atomic", "not on a boundary of 8 bytes", ["misaligned atomic"]),
        ("read_of_no_memory", "which is no memory", ["far away"]),
        ("too_deep", "its stack has run out", ["deep"]),
    ],
)
def test_names_kernel_block_thread_and_line(library, name, message, markers, order, seed):
    text = error_of(library, name, order, seed)
    assert re.match(rf"{name}: block \(\d+, 0, 0\) thread \(\d+, 0, 0\): ", text), text
    assert re.search(message, text), text
    lines = [line_of(SOURCE, marker) for marker in markers]
    # A stack may run out in the function's first line, before that of its call.
    if name == "too_deep":
        lines += range(lines[0] - 4, lines[0])
    assert any(f"block_faults.cu:{line} " in text for line in lines), text
    assert f"({order} schedule" in text
    assert order != "random" or f"seed {seed}" in text


def test_a_wait_that_needs_two_resident_blocks(library):
    text = error_of(library, "wait_for_a_later_block", resident=1)
    assert "deadlock: spins and nothing changes; 1 blocks are resident, 1 have not started" in text
    assert f"block_faults.cu:{line_of(SOURCE, 'later block')} " in text
    for order, seed in emulator.SCHEDULES:
        assert run(library, "wait_for_a_later_block", order, seed, resident=2)[0] == 1
    # With one at a time it is the order of blocks that decides.
    assert run(library, "wait_for_a_later_block", "reverse", resident=1)[0] == 1


def test_a_volatile_wait_is_interrupted(library):
    began = time.perf_counter()
    text = error_of(library, "volatile_wait_for_nobody")
    assert "deadlock: spins and nothing changes" in text
    # The line of the loop or of its condition.
    lines = [line_of(SOURCE, "volatile"), line_of(SOURCE, "volatile") + 1]
    assert any(f"block_faults.cu:{line} " in text for line in lines), text
    assert time.perf_counter() - began < 30


@pytest.mark.parametrize("name", ["read_of_an_exited_neighbour", "read_of_an_unborn_neighbour"])
def test_shared_memory_of_a_block_that_is_not_there(library, name):
    for order, seed in emulator.SCHEDULES:
        assert run(library, "read_of_the_neighbour", order, seed)[:2].tolist() == [
            VALUES[1],
            VALUES[0],
        ]
    state = "has exited" if "exited" in name else "has not started"
    for order in ("forward", "reverse"):
        text = error_of(library, name, order)
        assert re.search(rf"touches shared memory of block \(\d, 0, 0\), which {state}", text), text
        assert f"block_faults.cu:{line_of(SOURCE, 'neighbour')} " in text, text


@pytest.mark.sanitizer
@pytest.mark.parametrize(
    ("name", "message", "marker"),
    [
        (
            "read_of_an_exited_neighbour",
            "touches shared memory of block (1, 0, 0), which has exited",
            "neighbour",
        ),
        ("read_of_no_memory", "which is no memory", "far away"),
        ("too_deep", "its stack has run out", "deep"),
    ],
)
def test_faults_under_sanitizers_name_the_line(name, message, marker):
    path = build.build("block_faults", KERNELS, [], sanitize=True)
    result = build.run_sanitized("tests.emulator.sanitized_fault", str(path), name, "3")
    assert result.returncode != 0
    assert "ran to the end" not in result.stdout
    (text,) = (line for line in result.stderr.splitlines() if "EmulatorError: " in line)
    assert re.search(rf"{name}: block \(\d, 0, 0\) thread \(\d+, 0, 0\): touches ", text), text
    assert message in text
    line = line_of(SOURCE, marker)
    near = range(line - 4, line + 1) if marker == "deep" else [line]
    assert any(f"block_faults.cu:{number} " in text for number in near), text


@pytest.mark.parametrize(
    "name", ["copy_without_wait", "copy_without_commit", "copy_with_a_wait_for_too_few"]
)
def test_a_missing_wait_for_a_copy_shows(library, name):
    for order, seed in emulator.SCHEDULES:
        np.testing.assert_array_equal(run(library, "copy", order, seed), VALUES[::-1])
        assert np.isnan(run(library, name, order, seed)).all()


def test_a_source_that_changes_before_the_wait_shows(library):
    assert (run(library, "copy_whose_source_changes") == -1).all()


@pytest.mark.parametrize(
    ("name", "message", "call", "marker"),
    [
        (
            "grid_sync_too_large",
            "launch failed: .*cudaErrorCooperativeLaunchTooLarge",
            "cudaLaunchKernelEx: grid_sync_too_large: 5000 blocks, of which the device holds 64",
            "launch",
        ),
        (
            "cluster_of_seventeen",
            "launch failed: .*cudaErrorInvalidClusterSize",
            "cudaLaunchKernelEx: cluster_of_seventeen: clusters of 17 blocks, expected 1 to 16",
            "launch",
        ),
        (
            "cluster_that_does_not_divide",
            "launch failed: .*cudaErrorInvalidClusterSize",
            r"cudaLaunchKernelEx: .*: clusters \(2, 1, 1\) do not divide \(7, 1, 1\)",
            "launch",
        ),
        (
            "occupancy_of_no_threads",
            "cudaOccupancyMaxActiveBlocksPerMultiprocessor failed: .*cudaErrorInvalidValue",
            "cudaOccupancyMaxActive.*: plain: block of 0 threads, expected 1 to 1024",
            "no threads",
        ),
        (
            "occupancy_of_wide_clusters",
            "cudaOccupancyMaxActiveClusters failed: .*cudaErrorInvalidClusterSize",
            "cudaOccupancyMaxActiveClusters: plain: clusters of 17 blocks, expected 1 to 16",
            "wide clusters",
        ),
        (
            "unknown_attribute",
            "cudaDeviceGetAttribute failed: .*cudaErrorInvalidValue",
            "cudaDeviceGetAttribute: attribute 11 is unknown",
            "attribute",
        ),
        (
            "launch_in_no_stream",
            "launch failed: .*cudaErrorInvalidResourceHandle",
            "cudaLaunchKernelEx: plain: the stream does not exist",
            "no stream",
        ),
    ],
)
def test_calls_the_runtime_refuses(library, name, message, call, marker):
    """The message that a GPU's runtime would bring, then call, kernel, reason and host line."""
    with pytest.raises(emulator.Refused) as caught:
        run(library, name)
    text = str(caught.value)
    said, _, more = text.partition(" [")
    assert re.search(message, said), text
    assert re.match(call, more), text
    assert more.endswith(f"block_faults.cu:{line_of(SOURCE, marker)}]"), text


def test_a_refusal_that_was_handled_is_not_the_reason(library):
    with pytest.raises(emulator.Refused) as caught:
        run(library, "a_refusal_that_is_handled")
    assert str(caught.value) == "a_refusal_that_is_handled: something else"


@pytest.mark.parametrize(
    ("name", "message", "marker"),
    [
        ("bounded_by_fewer", "block of 160 threads, its __launch_bounds__ allow 128", "launch"),
        (
            "block_of_none",
            r"bad block size \(0, 1, 1\), expected 1 to 1024 threads, at most 64 in z",
            "launch",
        ),
        ("grid_of_none", r"bad grid size \(0, 1, 1\)", "launch"),
        (
            "shared_not_asked_for",
            "too much shared memory: 49168 bytes dynamic, cudaFuncSetAttribute has allowed 49152",
            "not asked",
        ),
    ],
)
def test_launches_that_cannot_be_meant(library, name, message, marker):
    text = error_of(library, name)
    kernel = r"\w+" if name == "shared_not_asked_for" else name  # which has passed launch() by
    assert re.match(f"{kernel}: {message}, before thread .* of block .*, at ", text), text
    assert f"block_faults.cu:{line_of(SOURCE, marker)} (forward schedule" in text


def test_static_shared_memory_counts_with_what_was_not_asked_for(library):
    first = error_of(library, "static_and_dynamic_not_asked_for")
    assert re.search(
        "too much shared memory: 16 bytes static and 49152 dynamic, cudaFuncSetAttribute has "
        "allowed 49152 together",
        first,
    ), first
    assert f"block_faults.cu:{line_of(SOURCE, 'static and dynamic')}" in first
    again = error_of(library, "static_and_dynamic_not_asked_for")
    assert "49152 bytes dynamic, cudaFuncSetAttribute has allowed 49136" in again
    np.testing.assert_array_equal(run(library, "static_and_dynamic_asked_for")[:4], 0)


def test_launch_bounds_are_kept(library):
    np.testing.assert_array_equal(run(library, "bounded"), VALUES)


@contextmanager
def registers(library: ctypes.CDLL, count: int) -> Iterator[None]:
    library.emulator_set_registers(b"plain", count)
    try:
        yield
    finally:
        library.emulator_set_registers(b"plain", 0)


def test_registers_of_a_block(library):
    with registers(library, 128):  # 512 · 128 is all there are
        np.testing.assert_array_equal(run(library, "plain"), VALUES)
    with registers(library, 129):
        text = error_of(library, "plain")
    assert "plain: block of 512 threads with 129 registers each, a multiprocessor has 65536" in text
    assert "before thread (0, 0, 0) of block (0, 0, 0), at " in text
    assert f"block_faults.cu:{line_of(SOURCE, 'launch')} (forward schedule" in text


def test_registers_without_launch_bounds(library):
    # 255 registers, the most there may be, always fit 256 threads.
    run(library, "plain_of_256")
    text = error_of(library, "plain")
    assert "plain: block of 512 threads without __launch_bounds__: the compiler may give" in text


def test_goes_on_after_each_kind_of_error(library):
    for name in ("crossed_wait", "read_of_an_exited_neighbour", "read_of_no_memory", "too_deep"):
        error_of(library, name)
        np.testing.assert_array_equal(run(library, "copy"), VALUES[::-1])
    assert run(library, "read_of_the_neighbour")[0] == VALUES[1]


def test_a_random_schedule_replays(library):
    texts = [error_of(library, "map_of_an_exited_block", "random", 11) for _ in range(3)]
    assert len(set(texts)) == 1
    others = {error_of(library, "map_of_an_exited_block", "random", seed) for seed in range(8)}
    assert len(others) > 1, "another seed is another order"
