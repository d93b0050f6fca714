"""That the emulator runs CUDA's language as CUDA means it: each part used once, in CUDA's spelling.

The kernels are in emulator/features.cu; nvcc compiles the same source (test_machine_code.py).
"""

from __future__ import annotations

import ctypes
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import pytest

from .emulator import build, emulator
from .emulator.sanitized_features import Buffers

SOURCE = Path(__file__).parent / "emulator" / "features.cu"
KERNELS = [SOURCE.relative_to(build.ROOT).as_posix()]
SCHEDULES = [*emulator.SCHEDULES, ("random", 2), ("random", 3)]
BLOCK, WARP = 64, 32


@pytest.fixture(scope="module")
def library() -> ctypes.CDLL:
    return build.library("features", KERNELS, [])


@dataclass
class Run:
    """What a kernel has left behind."""

    out: np.ndarray
    words: np.ndarray
    wide: np.ndarray
    doubles: np.ndarray


def run(
    library: ctypes.CDLL,
    name: str,
    order: str = "forward",
    seed: int = 0,
    *,
    values: np.ndarray | None = None,
    n: int = 0,
    words: np.ndarray | None = None,
    wide: np.ndarray | None = None,
    out: np.ndarray | None = None,
    entry: str = "emulated_feature",
    extra: tuple[object, ...] = (),
    **device: int,
) -> Run:
    """Runs kernel `name` on float32 `values`; words, wide and doubles are zero unless given."""
    source = emulator.Memory(4 * (1 if values is None else values.size))
    source.bytes.view(np.float32)[:] = 0 if values is None else values
    memory = [emulator.Memory(nbytes) for nbytes in (8192, 4096, 512, 512)]
    if out is not None:
        memory[0].bytes.view(np.float32)[: out.size] = out
    for part, initial in zip(memory[1:], (words, wide, None), strict=True):
        part.bytes[:] = 0
        if initial is not None:
            part.bytes[: initial.nbytes] = initial.view(np.uint8)
    buffers = Buffers(source.pointer, *(part.pointer for part in memory), n)
    arguments = (name.encode(),) if entry == "emulated_feature" else ()
    with emulator.schedule(library, order, seed, **device):
        emulator.call(getattr(library, entry), *arguments, ctypes.byref(buffers), *extra)
    types = (np.float32, np.uint32, np.uint64, np.float64)
    views = [part.bytes.view(dtype).copy() for part, dtype in zip(memory, types, strict=True)]
    assert all(part.guards_intact() for part in (source, *memory))
    return Run(*views)


def slices(blocks: int, n: int) -> tuple[np.ndarray, np.ndarray]:
    """Whole numbers, whose float32 sums are exact, and the sum of each block's n of them."""
    values = np.arange(blocks * n, dtype=np.float32) % 13
    return values, values.reshape(blocks, n).sum(1)


@pytest.mark.parametrize(("order", "seed"), SCHEDULES)
@pytest.mark.parametrize("name", ["grid_sum", "grid_sum_in_halves"])
def test_grid_sync(library, name, order, seed):
    values, sums = slices(6, 5)
    result = run(library, name, order, seed, values=values, n=5)
    np.testing.assert_array_equal(result.out[:6], sums.sum())


@pytest.mark.parametrize(("order", "seed"), SCHEDULES)
@pytest.mark.parametrize("spin", ["acquire", "update", "polite", "bare"])
def test_blocks_of_a_channel_meet_at_its_counter(library, spin, order, seed):
    channels = 1 if spin == "bare" else 4  # one that never gives way is interrupted: slow
    values, sums = slices(3 * channels, 7)
    result = run(library, f"channel_sum_{spin}", order, seed, values=values, n=7)
    np.testing.assert_array_equal(result.out[:channels], sums.reshape(channels, 3).sum(1))
    assert not result.words.any(), "the counters put themselves back"


@pytest.mark.parametrize(("order", "seed"), SCHEDULES)
def test_last_block_finishes(library, order, seed):
    values, sums = slices(7, 5)
    result = run(library, "last_block_sum", order, seed, values=values, n=5)
    assert result.out[0] == sums.sum()
    assert result.words[0] == 0


@pytest.mark.parametrize(("order", "seed"), SCHEDULES)
def test_three_dimensions(library, order, seed):
    blocks, threads = 3 * 2 * 4, 5 * 3 * 2
    expected = np.add.outer(np.arange(blocks) * 1000, np.arange(threads)).ravel()
    result = run(library, "dimensions", order, seed)
    np.testing.assert_array_equal(result.words[: expected.size], expected)


@pytest.mark.parametrize(("order", "seed"), SCHEDULES)
@pytest.mark.parametrize(
    ("name", "blocks", "cluster"),
    [
        ("cluster_sum_by_pull", 8, 4),  # two clusters
        ("cluster_sum_by_push", 8, 4),
        ("cluster_sum_of_sixteen", 32, 16),  # more than runs everywhere, and than are resident
    ],
)
def test_shared_memory_of_a_cluster(library, name, blocks, cluster, order, seed):
    values, sums = slices(blocks, 5)
    result = run(library, name, order, seed, values=values, n=5)
    expected = np.repeat(sums.reshape(-1, cluster).sum(1), cluster)
    np.testing.assert_array_equal(result.out[:blocks], expected)


@pytest.mark.parametrize(("order", "seed"), SCHEDULES)
def test_places_in_a_cluster(library, order, seed):
    result = run(library, "cluster_identity", order, seed)
    np.testing.assert_array_equal(result.words[: 6 * BLOCK], BLOCK)


@pytest.mark.parametrize(("order", "seed"), SCHEDULES)
def test_named_barriers(library, order, seed):
    values = np.arange(9 * WARP, dtype=np.float32)
    result = run(library, "producer_and_consumer", order, seed, values=values, n=9)
    np.testing.assert_array_equal(result.out[:WARP], values.reshape(9, WARP).sum(0))


@pytest.mark.parametrize(("order", "seed"), SCHEDULES)
def test_block_votes(library, order, seed):
    # 32 odd threads; and: not all are odd, all are one; or: some are odd, none is zero
    expected = BLOCK // 2 * 100 + 1 * 10 + 2
    assert (run(library, "block_votes", order, seed).words[:BLOCK] == expected).all()


@pytest.mark.parametrize(("order", "seed"), SCHEDULES)
def test_warp_operations(library, order, seed):
    lanes = np.arange(WARP)
    value = lanes - 8
    halves = [lanes < 16, lanes >= 16]
    bits = 1 << lanes.astype(np.uint64)
    expected = np.zeros((WARP, 12), np.uint32)
    expected[:, 0] = np.uint32(value.sum() & 0xFFFFFFFF)
    expected[:, 6] = np.bitwise_xor.reduce(lanes * lanes)
    for lane in lanes:
        expected[lane, 7] = bits[lanes % 3 == lane % 3].sum()
        expected[lane, 11] = lane - 3 if lane % 16 >= 3 else lane
    for half in halves:
        expected[half, 1] = np.uint32(value[half].min() & 0xFFFFFFFF)
        expected[half, 2] = np.uint32(value[half].max() & 0xFFFFFFFF)
        expected[half, 3] = max(int(v) & 0xFFFFFFFF for v in value[half])
        expected[half, 4] = np.bitwise_and.reduce(lanes[half] | 4)
        expected[half, 5] = np.bitwise_or.reduce(lanes[half])
        expected[half, 8] = bits[half].sum() + 1
        expected[half, 9] = 0
        expected[half, 10] = bits[half & (value < 0)].sum()
    result = run(library, "warp_operations", order, seed).words[: 12 * WARP].reshape(WARP, 12)
    np.testing.assert_array_equal(result, expected)


@pytest.mark.parametrize(("order", "seed"), SCHEDULES)
@pytest.mark.parametrize(
    "n",
    [
        64 * 4 * 5,  # five full rounds through three stages
        64 * 4 * 2 + 6,  # a part of a round, and a tail of two elements with zeros after it
        3,  # less than one unit
    ],
)
def test_asynchronous_copies(library, n, order, seed):
    values = np.arange(n, dtype=np.float32) + 1
    padded = np.pad(values, (0, -n % 4))
    result = run(library, "staged_copy", order, seed, values=padded, n=n)
    units = padded.size // 4
    # A unit whose neighbour does not exist is nobody's to write.
    written = [u for u in range(units) if u ^ 1 < units]
    got = result.out.reshape(-1, 4)
    np.testing.assert_array_equal(got[written], padded.reshape(-1, 4)[written])
    rest = np.delete(got, written, axis=0)
    assert np.isnan(rest).all()


@pytest.mark.parametrize(("order", "seed"), SCHEDULES)
def test_atomics_of_every_type(library, order, seed):
    threads = np.arange(1, 3 * BLOCK + 1, dtype=np.int64)
    total, top = int(threads.sum()), int(threads.max())
    start = np.zeros(64, np.uint32)
    start[[1, 17]] = 1000  # min
    start[[3, 19]] = 0xFF  # and
    wide = np.zeros(16, np.uint64)
    wide[1], wide[3] = 1000, 0xFF
    out = np.zeros(8, np.float32)
    result = run(library, "old_atomics", order, seed, words=start, wide=wide, out=out)
    xor = int(np.bitwise_xor.reduce(threads))
    both = int(np.bitwise_or.reduce(threads))
    expected = [total, 1, top, 0, both, xor, total, total, top, both, total]
    for row in (result.words[:12], result.words[16:28], result.wide[:12]):
        np.testing.assert_array_equal(row[:11], expected)
        assert row[11] in threads
    assert result.words[32] == (-total) & 0xFFFFFFFF
    assert result.words[35] == (-total) & 0xFFFFFFFF
    assert result.words[33] == threads.size % 5  # 0 1 2 3 4 0 ...
    assert result.words[34] == -threads.size % 5  # 0 4 3 2 1 0 ...
    np.testing.assert_array_equal(result.out[:2], total)
    np.testing.assert_array_equal(result.doubles[:2], total)
    half = result.out.view(np.float16)
    np.testing.assert_array_equal(half[4:7], [threads.size, 2 * threads.size, threads.size])
    bfloat = (result.out.view(np.uint16)[8:11].astype(np.uint32) << 16).view(np.float32)
    # Sums of ones and twos are exact in bfloat16's eight bits up to 256 and 512.
    np.testing.assert_array_equal(bfloat, [threads.size, 2 * threads.size, threads.size])


@pytest.mark.parametrize(("order", "seed"), SCHEDULES)
def test_atomics_with_an_order(library, order, seed):
    threads = np.arange(1, 3 * BLOCK + 1, dtype=np.int64)
    total = int(threads.sum())
    start = np.zeros(16, np.uint32)
    start[5] = 1000
    start[6] = 0xFF
    out = np.zeros(1, np.float32)
    result = run(library, "ordered_atomics", order, seed, words=start, out=out)
    xor, both = int(np.bitwise_xor.reduce(threads)), int(np.bitwise_or.reduce(threads))
    expected = [total, -total & 0xFFFFFFFF, both, xor, threads.max(), 1, 0, 0, total, 0]
    np.testing.assert_array_equal(result.words[:10], expected)
    assert result.words[10] in threads
    assert result.words[11] == 1, "one thread found the first value"
    assert result.wide[0] == total
    assert result.out[0] == total


@pytest.mark.parametrize(("order", "seed"), SCHEDULES)
def test_an_event_orders_two_streams(library, order, seed):
    values = np.arange(100, dtype=np.float32)
    result = run(
        library,
        "",
        order,
        seed,
        values=values,
        n=100,
        entry="emulated_two_streams",
        extra=(ctypes.c_bool(True),),
    )
    np.testing.assert_array_equal(result.out[:100], (values + 1) * 3)


def test_a_missing_event_shows(library):
    values = np.arange(100, dtype=np.float32)
    wrong = 0
    for order, seed in SCHEDULES:
        result = run(
            library,
            "",
            order,
            seed,
            values=values,
            n=100,
            entry="emulated_two_streams",
            extra=(ctypes.c_bool(False),),
        )
        wrong += not np.array_equal(result.out[:100], (values + 1) * 3)
    assert wrong > 0, "in the order of issue all is well; other orders must tell"


def test_what_the_host_is_told(library):
    result = run(library, "", entry="emulated_ask_host", multiprocessors=5)
    # 100 KB + 1 KB a block of 228 KB: two; 96 threads with 96 registers would leave more.
    blocks, clusters, threads, registers, dynamic = result.words[:5]
    assert (blocks, clusters) == (10, 2)
    assert threads == 96, "__launch_bounds__"
    assert registers == 255, "what launch bounds of 96 threads leave, at most 255"
    assert dynamic == 227 * 1024, "asked for once, and all there is"


def test_what_the_host_is_told_can_be_set(library):
    library.emulator_set_blocks_per_multiprocessor(7)
    library.emulator_set_registers(b"bounded", 40)
    try:
        result = run(library, "", entry="emulated_ask_host", multiprocessors=4)
    finally:
        library.emulator_set_blocks_per_multiprocessor(0)
        library.emulator_set_registers(b"bounded", 0)
    assert list(result.words[[0, 1, 3]]) == [28, 7, 40]


def test_cooperative_launch_that_does_not_fit_is_refused(library):
    values, _ = slices(6, 5)
    library.emulator_set_blocks_per_multiprocessor(1)
    try:
        run(library, "grid_sum", values=values, n=5, multiprocessors=6)
        with pytest.raises(emulator.Refused, match="cudaErrorCooperativeLaunchTooLarge"):
            run(library, "grid_sum", values=values, n=5, multiprocessors=5)
    finally:
        library.emulator_set_blocks_per_multiprocessor(0)


@pytest.mark.sanitizer
@pytest.mark.parametrize(
    ("name", "values", "n"),
    [
        ("grid_sum", 6 * 5, 5),
        ("channel_sum_acquire", 12 * 7, 7),
        ("channel_sum_bare", 3 * 7, 7),  # interrupted by a signal
        ("cluster_sum_by_push", 8 * 5, 5),
        ("producer_and_consumer", 9 * WARP, 9),
        ("staged_copy", 520, 518),
        ("old_atomics", 1, 0),
    ],
)
def test_sanitizers_pass(name, values, n):
    path = build.build("features", KERNELS, [], sanitize=True)
    module = "tests.emulator.sanitized_features"
    result = build.run_sanitized(module, str(path), name, str(values), str(n))
    assert result.returncode == 0, result.stderr[-3000:]
    assert result.stdout == "ran to the end\n"
