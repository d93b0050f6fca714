"""How often the CUDA kernels go through memory, counted exactly, and that the counters find faults.

The cases and their limits are in emulator/traffic_cases.py, the planted faults in
emulator/traffic_faults.cu.
"""

from __future__ import annotations

import ctypes
from itertools import groupby
from pathlib import Path

import numpy as np
import pytest

from . import lamb_reference, lars_reference
from .emulator import build, emulator, optimizers, traffic_cases
from .emulator.planted import line_of
from .emulator.recording import Recording, record
from .emulator.traffic import Passes, assert_traffic

SOURCE = Path(__file__).parent / "emulator" / "traffic_faults.cu"
KERNELS = [SOURCE.relative_to(build.ROOT).as_posix()]
BLOCKS, COUNT = 2, 2 * 64 * 16  # each thread 16 elements
ONCE = {"x": Passes(read=1), "y": Passes(written=1)}
FULL = {"x": 1.0, "y": 1.0}


@pytest.mark.parametrize(
    "cases",
    [
        pytest.param(list(group), id=f"{operation}-{shape}".replace(" ", "_"))
        for (operation, shape), group in groupby(
            sorted(traffic_cases.cases(), key=lambda case: (case.operation, case.shape)),
            key=lambda case: (case.operation, case.shape),
        )
    ],
)
def test_passes_over_memory(cases):
    """Every dtype, layout and variant: passes, coalescing, small data, every output written once.

    Where tensors are kept on the chip, x (and dy) are read one time in all; where they are
    streamed, statistics and apply read them one time each.
    """
    for case in cases:
        try:
            case.assert_holds(case.record())
        except AssertionError as error:
            raise AssertionError(f"{case}: {error}") from None


def optimizer_bytes(problem: optimizers.Problem, place: str) -> float:
    """What a step reads and writes of a parameter's tensors, in bytes a parameter."""
    library = optimizers.library(instrument=True)
    with record(library) as recording, optimizers.device(library, place):
        optimizers.run(library, problem)
    recording.assert_in_bounds()
    names = {f"{n}{i}" for i, x in enumerate(problem.parameters) for n in problem.arrays(x)}
    flows = [recording.flow(name, written) for name in names for written in (False, True)]
    return sum(flow.bytes for flow in flows) / sum(x.numel for x in problem.parameters)


# Chunks; the one block of the second holds 2, and 1 of a tensor that it does not hold whole.
KEPT, NOT_KEPT = ("Hopper", 20), ("alone", 22)


@pytest.mark.parametrize(
    ("kind", "dtypes", "clip", "place", "bar"),
    [
        ("lamb", ("f32", "f32", False), None, KEPT, 28),
        ("lamb", ("f32", "f32", False), 0.05, KEPT, 32),
        ("lamb", ("f32", "f32", False), None, NOT_KEPT, 40),
        ("lamb", ("f32", "f32", False), 0.05, NOT_KEPT, 44),
        ("lamb", ("bf16", "bf16", True), None, KEPT, 28),
        ("lamb", ("bf16", "bf16", True), 0.05, KEPT, 30),
        ("cautious lamb", ("f32", "f32", False), None, KEPT, 32),
        ("lars", ("f32", "f32", False), None, KEPT, 20),
        ("lars", ("f32", "f32", False), 0.05, KEPT, 24),
        ("lars", ("f32", "f32", False), None, NOT_KEPT, 28),
    ],
)
def test_bytes_a_parameter_of_the_optimizers(kind, dtypes, clip, place, bar):
    """Tensors that all slots hold together cost what Adam and SGD do; of larger ones the chunks
    that find no room are read once more (12 bytes a parameter, LARS 8). With caution and decay
    both, LAMB's slots have no room for p."""
    device, chunks = place
    p, g, master = dtypes
    parameters = [optimizers.Parameter(chunks * optimizers.CHUNK, p, g, master=master)]
    if kind == "lars":
        problem = optimizers.Lars(parameters, [lars_reference.Options(momentum=0.9)], clip)
        again = 8
    else:
        options = lamb_reference.Options(caution=kind == "cautious lamb")
        problem, again = optimizers.Problem(parameters, [options], clip), 12
    room = 1 if place is NOT_KEPT else chunks
    assert optimizer_bytes(problem, device) == bar - (again * room / chunks if room < chunks else 0)


# ---- that the counters count


@pytest.fixture(scope="module")
def library() -> ctypes.CDLL:
    return build.library("traffic_faults", KERNELS, [], instrument=True)


def run(library: ctypes.CDLL, name: str, order: str = "forward") -> Recording:
    with record(library) as recording, emulator.schedule(library, order, 3):
        x, y = emulator.Memory(4 * COUNT, name="x"), emulator.Memory(4 * COUNT, name="y")
        x.bytes.view(np.float32)[:] = np.arange(COUNT)
        emulator.call(
            library.emulated_traffic_fault,
            name.encode(),
            ctypes.c_void_p(x.pointer),
            ctypes.c_void_p(y.pointer),
            ctypes.c_int(COUNT),
            ctypes.c_int(BLOCKS),
        )
    return recording


@pytest.mark.parametrize("order", ["forward", "reverse", "random"])
@pytest.mark.parametrize("name", ["sound", "wide", "through_memcpy"])
def test_exact_for_sound_kernels(library, name, order):
    recording = run(library, name, order)
    recording.assert_in_bounds()
    recording.assert_written("y")
    assert_traffic(recording, ONCE, other=0, efficiency=FULL)
    assert_traffic(recording, ONCE, kernel=name, other=0, efficiency=FULL)
    # 32 lanes of 4 or 16 bytes: 4 or 16 sectors, whatever the compiler made of the access.
    for flow in (recording.flow("x", False), recording.flow("y", True)):
        assert (flow.bytes, flow.distinct, flow.sectors) == (4 * COUNT, 4 * COUNT, COUNT // 8)


@pytest.mark.parametrize("name", ["through_builtin_memcpy", "through_std_copy"])
def test_counts_copies_by_any_name(library, name):
    recording = run(library, name)
    recording.assert_written("y")
    assert_traffic(recording, ONCE, other=0, efficiency={})


def test_finds_an_extra_pass(library):
    recording = run(library, "extra_pass")
    with pytest.raises(AssertionError, match="x read 2 times, expected 1"):
        assert_traffic(recording, ONCE, other=0, efficiency=FULL)
    assert_traffic(recording, ONCE | {"x": Passes(read=2)}, other=0, efficiency=FULL)


def test_finds_an_uncoalesced_layout(library):
    recording = run(library, "uncoalesced")
    assert_traffic(recording, ONCE, other=0, efficiency={})
    # Each lane of a warp has a sector of its own and uses 4 of its 32 bytes.
    assert recording.flow("x", False).efficiency == 1 / 8
    with pytest.raises(AssertionError, match=r"x read with sector efficiency 0\.125"):
        assert_traffic(recording, ONCE, other=0, efficiency=FULL)


def test_finds_an_unwritten_tail(library):
    recording = run(library, "unwritten_tail")
    with pytest.raises(
        AssertionError, match=f"y: 4 of {4 * COUNT} bytes not written 1 times: byte {4 * COUNT - 4}"
    ):
        recording.assert_written("y")


def test_written_is_not_told_by_values(library):
    run(library, "writes_the_poison").assert_written("y")


def test_finds_what_is_written_twice(library):
    recording = run(library, "written_twice")
    with pytest.raises(AssertionError, match=rf"4 of .* byte {2 * COUNT} 2 times"):
        recording.assert_written("y")


def test_finds_an_undeclared_buffer(library):
    recording = run(library, "sound")
    with pytest.raises(AssertionError, match=f"other buffers: {4 * COUNT} > 64 bytes"):
        assert_traffic(recording, {"x": Passes(read=1)}, other=64, efficiency={})


@pytest.mark.parametrize(
    ("name", "marker", "where"),
    [
        ("read_one_past", "read past", f"{4 * COUNT} of x"),
        ("read_one_before", "read before", "-4 of x"),
        ("write_one_past", "write past", f"{4 * COUNT} of y"),
    ],
)
def test_finds_accesses_out_of_bounds(library, name, marker, where):
    recording = run(library, name)
    with pytest.raises(AssertionError, match=f"{name}: 4 bytes at byte {where}") as caught:
        recording.assert_in_bounds()
    assert f"traffic_faults.cu:{line_of(SOURCE, marker)}" in str(caught.value)


def test_counts_memsets(library):
    with record(library) as recording:
        y = emulator.Memory(4 * COUNT, name="y")
        emulator.call(
            library.emulated_memset, ctypes.c_void_p(y.pointer), ctypes.c_size_t(4 * COUNT)
        )
    assert [launch.kernel for launch in recording.launches] == ["cudaMemsetAsync"]
    recording.assert_written("y")
    assert recording.flow("y", True).sectors == COUNT // 8


def test_counts_nothing_that_is_over(library):
    """A recording's buffers are its own; what ran before or after it is not in it."""
    first = run(library, "sound")
    with record(library) as empty:
        pass
    assert not empty.launches
    assert not empty.buffers
    assert len(first.launches) == 1
