"""The compiler's output for the CUDA kernels: no spills, and wide accesses where they are meant."""

from __future__ import annotations

import re

import pytest

from . import machine_code
from .emulator import toolkit

TARGET = "sm_90"

pytestmark = pytest.mark.skipif(toolkit.tool("nvcc") is None, reason="needs nvcc")


def compiled(source: str) -> list[machine_code.Kernel]:
    return machine_code.kernels(source, TARGET)


@pytest.mark.parametrize("source", machine_code.sources())
def test_no_spills_and_no_stack(source):
    rows = compiled(source)
    assert rows, "no kernel found in nvcc's output"
    assert all(row.registers > 0 for row in rows)
    print(f"\n{TARGET}\n{machine_code.table(rows)}")
    bad = [row for row in rows if row.stack or row.spill_stores or row.spill_loads]
    assert not bad, machine_code.table(bad)


# Tensors that each kernel reads and writes, and what else it may touch by single words: a mask
# by bytes (8), and where z is recomputed one float a channel (32).
TRAFFIC = {
    "batch_norm_partials": (1, 0),
    "batch_norm_apply": (2, 1),
    "batch_norm_backward_partials": (2, 0),
    "batch_norm_backward_apply": (2, 2),
}
IN_FLIGHT = 4


def widest(kernel: machine_code.Kernel) -> bool:
    """Whether it is the instance for 16-byte units."""
    match = re.search(r"<(float|__half|__nv_bfloat16), \w+, (\d+)", kernel.name)
    return bool(match) and int(match[2]) * (4 if match[1] == "float" else 2) == 16


@pytest.mark.parametrize("source", ["batch_norm_forward.cu", "batch_norm_backward.cu"])
def test_batch_norm_moves_16_bytes_at_a_time(source):
    wide = [kernel for kernel in compiled(source) if widest(kernel)]
    bases = {kernel.name.split("<")[0] for kernel in wide}
    assert bases == {name for name in TRAFFIC if ("backward" in name) == ("backward" in source)}
    for kernel in wide:
        base = kernel.name.split("<")[0]
        reads, writes = TRAFFIC[base]
        # All units of a batch are loaded before the first is used: as many separate loads.
        assert kernel.loads[128] >= reads * IN_FLIGHT, kernel
        assert kernel.stores[128] >= writes * IN_FLIGHT, kernel
        if base.endswith("apply"):
            assert set(kernel.loads) <= {128, 32, 8}, kernel
            assert set(kernel.stores) <= {128, 8}, kernel
