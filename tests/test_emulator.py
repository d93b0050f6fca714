"""That the emulator finds planted faults, each by the check meant for it, and passes what is sound.

The kernels are in emulator/faults.cu.
"""

from __future__ import annotations

import ctypes
import re
from pathlib import Path

import numpy as np
import pytest

from .emulator import build, emulator
from .emulator.planted import line_of

SOURCE = Path(__file__).parent / "emulator" / "faults.cu"
KERNELS = [SOURCE.relative_to(build.ROOT).as_posix()]


@pytest.fixture(scope="module")
def library() -> ctypes.CDLL:
    return build.library("faults", KERNELS, [])


def run(library: ctypes.CDLL, name: str, order: str = "forward", seed: int = 0) -> np.ndarray:
    """What kernel `name` makes of 0.0, 0.1, 0.2 ..., 6.3."""
    source, target = emulator.Memory(256), emulator.Memory(256)
    source.bytes.view(np.float32)[:] = np.arange(64, dtype=np.float32) / 10
    with emulator.schedule(library, order, seed):
        emulator.call(
            library.emulated_fault,
            name.encode(),
            ctypes.c_void_p(source.pointer),
            ctypes.c_void_p(target.pointer),
        )
    return target.bytes.view(np.float32).copy()


def test_sound_kernel_under_every_schedule(library):
    expected = (np.arange(64, dtype=np.float32) / 10)[::-1]
    for order, seed in (*emulator.SCHEDULES, ("random", 2), ("random", 3)):
        np.testing.assert_array_equal(run(library, "reverse", order, seed), expected)


def test_missing_barrier_shows_under_another_schedule(library):
    sound = run(library, "reverse")
    faulty = [
        run(library, "reverse_without_barrier", order, seed) for order, seed in emulator.SCHEDULES
    ]
    # A thread that comes first reads what nobody has written yet: NaN from the poison.
    assert all(np.isnan(result).any() for result in faulty)
    assert not np.array_equal(faulty[0], faulty[1], equal_nan=True)
    assert not any(np.array_equal(result, sound) for result in faulty)


def test_missing_barrier_between_reuses_shows(library):
    for order, seed in emulator.SCHEDULES:
        sound = run(library, "two_sums", order, seed)
        assert (sound == sound[0]).all()
        assert sound[0] == pytest.approx(3 * 0.1 * 63 * 64 / 2, rel=1e-6)
    for order in ("forward", "reverse"):
        assert not np.array_equal(run(library, "two_sums_without_barrier", order), sound)


def test_float_atomics_differ_between_schedules(library):
    sums = {run(library, "unordered_sum", "random", seed)[0] for seed in range(8)}
    assert len(sums) > 1


def test_random_schedule_replays(library):
    first, second = (run(library, "unordered_sum", "random", 5) for _ in range(2))
    np.testing.assert_array_equal(first[0], second[0])


@pytest.mark.parametrize("order", ["forward", "reverse", "random"])
@pytest.mark.parametrize(
    ("name", "message", "marker"),
    [
        ("barrier_in_a_branch", "divergent __syncthreads", ("one half", "other half")),
        ("barrier_after_exit", "divergent __syncthreads: 32 threads .* exited", ("exited",)),
        ("mask_with_an_exited_lane", "mask names a lane that has exited", ("mask",)),
        ("lane_outside_its_mask", "lane outside its own mask", ("own mask",)),
        ("different_masks", "different collectives or with different masks", ("masks differ",)),
        ("barrier_against_shuffle", "deadlock", ("deadlock",)),
    ],
)
def test_names_kernel_block_thread_and_line(library, name, message, marker, order):
    with pytest.raises(emulator.EmulatorError, match=message) as caught:
        run(library, name, order, 1)
    text = str(caught.value)
    assert text.startswith(f"{name}: block (0, 0, 0) thread (")
    assert any(f"faults.cu:{line_of(SOURCE, one)}" in text for one in marker), text


@pytest.mark.parametrize(
    ("name", "message"),
    [
        ("static_shared_too_large", "too much shared memory: 53248 bytes static"),
        (
            "dynamic_shared_too_large",
            "too much shared memory: 232464 bytes dynamic, the limit is 232448",
        ),
        ("block_too_large", r"bad block size \(1025, 1, 1\)"),
    ],
)
def test_limits(library, name, message):
    with pytest.raises(emulator.EmulatorError, match=message) as caught:
        run(library, name)
    text = str(caught.value)
    assert text.startswith(name)
    assert "block (0, 0, 0)" in text
    assert "thread (0, 0, 0)" in text
    of_kernel, *of_host = map(int, re.findall(r"faults\.cu:(\d+)", text))
    near = SOURCE.read_text().splitlines()[of_kernel - 3 : of_kernel + 1]
    # refused before it ran: where the kernel is defined
    assert any("__global__" in text or "BATCHOPS_SHARED" in text for text in near), near
    # and where the host called; the thread that came to its shared variable knows no host
    assert of_host == ([] if name == "static_shared_too_large" else [line_of(SOURCE, "launch")]), (
        text
    )


def test_largest_shared_memory_fits(library):
    np.testing.assert_array_equal(
        run(library, "dynamic_shared_fits"), np.arange(64, dtype=np.float32) / 10
    )


def test_unwritten_shared_memory_is_poison(library):
    assert np.isnan(run(library, "unwritten_shared")).all()


def test_goes_on_after_an_error(library):
    with pytest.raises(emulator.EmulatorError):
        run(library, "barrier_in_a_branch")
    test_sound_kernel_under_every_schedule(library)


@pytest.mark.sanitizer
@pytest.mark.parametrize(
    ("name", "report", "marker"),
    [
        ("read_past_the_end", "heap-buffer-overflow", "read past"),
        ("write_past_the_end", "heap-buffer-overflow", "write past"),
        ("shared_past_the_end", "overflow|out of bounds", "shared past"),
        ("misaligned_vector", "misaligned address", "misaligned"),
    ],
)
def test_sanitizers_name_the_line(name, report, marker):
    path = build.build("faults", KERNELS, [], sanitize=True)
    result = build.run_sanitized("tests.emulator.sanitized_fault", str(path), name)
    assert result.returncode != 0
    assert "ran to the end" not in result.stdout
    assert f"faults.cu:{line_of(SOURCE, marker)}" in result.stderr, result.stderr[-3000:]
    assert any(text in result.stderr for text in report.split("|")), result.stderr[-3000:]
    if "ERROR: AddressSanitizer" in result.stderr:  # UBSan's reports know no threads
        assert re.search(rf"^{name}: block \(0, 0, 0\) thread \(\d+, 0, 0\)$", result.stderr, re.M)


@pytest.mark.sanitizer
def test_sanitizers_pass_a_sound_kernel():
    path = build.build("faults", KERNELS, [], sanitize=True)
    result = build.run_sanitized("tests.emulator.sanitized_fault", str(path), "reverse")
    assert result.returncode == 0, result.stderr[-3000:]
    assert result.stdout == "ran to the end\n"
