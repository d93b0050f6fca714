"""Registers as nvcc reports them, against the blocks that the host code launches.

The emulator refuses a launch whose block would take more registers than a multiprocessor has. Here
it is told the registers of each kernel, the most over dtypes and targets, and runs the host code of
every operation.
"""

from __future__ import annotations

import ctypes
from collections.abc import Iterable, Iterator
from contextlib import contextmanager
from pathlib import Path

import numpy as np
import pytest

from . import machine_code
from .disassembly import Kernel
from .emulator import batch_norm, build, emulator, group_norm, optimizers, toolkit
from .emulator.planted import line_of

FAULTS = Path(__file__).parent / "emulator" / "register_faults.cu"

pytestmark = pytest.mark.skipif(toolkit.tool("nvcc") is None, reason="needs nvcc")


def most_registers(kernels: Iterable[Kernel]) -> dict[str, int]:
    """By the name that kernels are launched by."""
    most: dict[str, int] = {}
    for kernel in kernels:
        most[kernel.base] = max(kernel.registers, most.get(kernel.base, 0))
    return most


@contextmanager
def known(library: ctypes.CDLL, table: dict[str, int]) -> Iterator[None]:
    """Launches of other kernels than these are errors."""
    for name, registers in table.items():
        library.emulator_set_registers(name.encode(), registers)
    library.emulator_require_registers(True)
    try:
        yield
    finally:
        library.emulator_require_registers(False)
        for name in table:
            library.emulator_set_registers(name.encode(), 0)


@pytest.fixture(scope="module")
def shipped() -> dict[str, int]:
    found = machine_code.checked_kernels()
    if not found:
        pytest.skip("needs a build with CUDA, cuobjdump and nvdisasm")
    return most_registers(kernel for group in found.values() for kernel in group)


@pytest.mark.parametrize("layout", batch_norm.LAYOUTS)
@pytest.mark.parametrize("operation", [batch_norm, group_norm], ids=lambda o: o.__name__[-10:])
def test_blocks_of_the_norms_fit(shipped, operation, layout):
    library = operation.library()
    groups = {"G": 4} if operation is group_norm else {}
    with known(library, shipped):
        for shape in ((2, 16, 64), (3, 16, 5000)):  # the second: several pieces a channel or group
            problem = operation.Problem(*shape, layout=layout, dtype="bf16", **groups)
            saved = operation.forward(library, problem)
            operation.backward(library, problem, saved)


@pytest.mark.parametrize("kind", [optimizers.Problem, optimizers.Lars], ids=lambda k: k.kind)
def test_blocks_of_the_optimizers_fit(shipped, kind):
    library = optimizers.library()
    # Steps: more sets than a launch takes as arguments.
    parameters = [optimizers.Parameter(37, step=t) for t in range(1, 40)]
    parameters.append(optimizers.Parameter(optimizers.CHUNK + 5))
    problem = kind(parameters, max_grad_norm=0.05)
    with known(library, shipped):
        optimizers.run(library, problem)
        optimizers.grad_sum_sq(library, problem)


def test_a_kernel_that_the_table_lacks_is_refused():
    library = optimizers.library()
    problem = optimizers.Problem([optimizers.Parameter(37)])
    with (
        known(library, {"lamb_step": 64}),
        pytest.raises(
            emulator.EmulatorError,
            match="optimizer_send_entries: nothing is known of its registers",
        ),
    ):
        optimizers.run(library, problem)


# ---- planted fault


@pytest.fixture(scope="module")
def planted() -> ctypes.CDLL:
    return build.library("register_faults", [FAULTS.relative_to(build.ROOT).as_posix()], [])


def hold_many(library: ctypes.CDLL, threads: int) -> None:
    values, result = emulator.Memory(4 * 96), emulator.Memory(4 * 96)
    values.bytes.view(np.float32)[:] = np.arange(96)
    pointers = ctypes.c_void_p(values.pointer), ctypes.c_void_p(result.pointer)
    emulator.call(library.emulated_hold_many, *pointers, ctypes.c_int(threads))
    np.testing.assert_array_equal(result.bytes.view(np.float32), np.arange(96)[::-1])


@pytest.mark.parametrize("target", ["sm_75", "sm_90"])
def test_a_block_of_too_many_registers_is_refused(planted, target):
    table = most_registers(machine_code.kernels(FAULTS, target))
    registers = table["holds_many"]
    assert 96 < registers <= 128, "the values that it holds, and little else"
    with known(planted, table):
        hold_many(planted, 512)  # which 128 registers allow
        with pytest.raises(emulator.EmulatorError) as caught:
            hold_many(planted, 1024)
    text = str(caught.value)
    assert text.startswith(
        f"holds_many: block of 1024 threads with {registers} registers each, a multiprocessor has "
        "65536, before thread (0, 0, 0) of block (0, 0, 0), at "
    )
    assert f"register_faults.cu:{line_of(FAULTS, 'launch')} (forward schedule" in text
    # Without a table the most that the compiler may give counts: no more than 256 threads.
    hold_many(planted, 256)
    with pytest.raises(emulator.EmulatorError, match="without __launch_bounds__"):
        hold_many(planted, 512)
