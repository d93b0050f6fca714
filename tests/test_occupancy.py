"""The occupancy calculator against NVIDIA's header and against published figures."""

from __future__ import annotations

import ctypes
import os
import random
import shutil
import subprocess
from pathlib import Path

import pytest

from . import occupancy
from .emulator import toolkit

# CUDA C++ Programming Guide, "Technical Specifications per Compute Capability": resident blocks,
# warps and threads of a multiprocessor, KB of shared memory of a multiprocessor and of a block.
GUIDE = {
    "sm_75": (16, 32, 1024, 64, 64),
    "sm_80": (32, 64, 2048, 164, 163),
    "sm_86": (16, 48, 1536, 100, 99),
    "sm_89": (24, 48, 1536, 100, 99),
    "sm_90": (32, 64, 2048, 228, 227),
    "sm_100": (32, 64, 2048, 228, 227),
    "sm_120": (24, 48, 1536, 100, 99),
}


@pytest.mark.parametrize("target", GUIDE)
def test_targets_are_those_of_the_guide(target):
    sm = occupancy.TARGETS[target]
    found = (sm.blocks, sm.warps, 32 * sm.warps, sm.shared // 1024, sm.shared_a_block // 1024)
    assert found == GUIDE[target]
    assert set(occupancy.TARGETS) == set(GUIDE)


# What the guide and the architectures' tuning guides say in words: a block of 1024 threads may have
# 64 registers a thread and not one more; 128 a thread leave 16 warps; full occupancy of 64 warps
# needs 32 registers or fewer, of Turing's 32 warps 64, of 48 warps 40 (42 is not a multiple of 8).
@pytest.mark.parametrize(
    ("target", "threads", "registers", "warps"),
    [
        ("sm_90", 1024, 64, 32),
        ("sm_90", 1024, 65, 0),
        ("sm_80", 256, 128, 16),
        ("sm_100", 256, 129, 8),
        ("sm_80", 256, 32, 64),
        ("sm_80", 256, 33, 48),
        ("sm_75", 256, 64, 32),
        ("sm_86", 256, 40, 48),
        ("sm_86", 256, 41, 40),
        ("sm_90", 32, 255, 8),
        ("sm_90", 32, 256, 0),
    ],
)
def test_published_cases(target, threads, registers, warps):
    assert occupancy.resident(target, threads=threads, registers=registers).warps == warps


def test_shared_memory_counts_the_drivers_kilobyte():
    def blocks(shared: int) -> int:
        return occupancy.resident("sm_90", threads=64, registers=32, shared=shared).blocks

    assert blocks(227 * 1024) == 1
    assert blocks(227 * 1024 + 1) == 0  # cannot be launched
    assert blocks(113 * 1024) == 2  # 2 · (113 + 1) KB = 228 KB
    assert blocks(113 * 1024 + 1) == 1
    # Turing reserves nothing.
    assert occupancy.resident("sm_75", threads=64, registers=32, shared=32 * 1024).blocks == 2


def test_registers_allowed():
    assert occupancy.registers_allowed("sm_90", threads=256, blocks=2) == 128
    assert occupancy.registers_allowed("sm_90", threads=256, blocks=8) == 32
    assert occupancy.registers_allowed("sm_75", threads=256, blocks=5) == 0  # 4 fill it


def test_impossible_values_are_refused():
    with pytest.raises(ValueError, match="threads=0"):
        occupancy.resident("sm_90", threads=0, registers=32)
    with pytest.raises(KeyError):
        occupancy.resident("sm_10", threads=32, registers=32)


@pytest.fixture(scope="module")
def oracle(tmp_path_factory) -> ctypes.CDLL:
    compiler = os.environ.get("CXX") or shutil.which("g++")
    include = toolkit.include_dir()
    if compiler is None or include is None or not (include / "cuda_occupancy.h").is_file():
        pytest.skip("needs g++ and the toolkit's cuda_occupancy.h")
    library = tmp_path_factory.mktemp("occupancy") / "oracle.so"
    source = Path(__file__).with_name("occupancy_oracle.cpp")
    command = [compiler, "-std=c++17", "-O1", "-shared", "-fPIC", "-isystem", str(include)]
    result = subprocess.run(
        [*command, str(source), "-o", str(library)], capture_output=True, text=True, check=False
    )
    assert result.returncode == 0, result.stderr
    return ctypes.CDLL(str(library))


@pytest.mark.parametrize("target", occupancy.TARGETS)
def test_agrees_with_nvidias_header(oracle, target):
    sm = occupancy.TARGETS[target]
    major, minor = divmod(int(target.removeprefix("sm_")), 10)
    assert oracle.most_shared(major, minor) == sm.shared

    draw = random.Random(target)
    cases = [(256, registers, 1024, 1) for registers in range(1, 256)]
    cases += [(threads, 32, 0, 1) for threads in range(1, 1025)]
    cases += [(128, 24, shared, 1) for shared in range(0, sm.shared_a_block + 512, 64)]
    cases += [(64, 16, 0, barriers) for barriers in range(1, 17)]
    for _ in range(5000):
        shared = draw.choice([0, draw.randrange(sm.shared_a_block)])
        cases.append((draw.randint(1, 1024), draw.randint(1, 255), shared, draw.randint(1, 4)))
    for threads, registers, shared, barriers in cases:
        # The header counts barriers from Hopper on; on older targets the hardware has 2 · blocks
        # or 1 · blocks of them all the same.
        counted = barriers if major >= 9 else 0
        theirs = oracle.resident_blocks(
            *(major, minor, 32 * sm.warps, sm.shared, threads, registers, shared, counted)
        )
        ours = occupancy.resident(
            target, threads=threads, registers=registers, shared=shared, barriers=counted
        ).blocks
        assert ours == theirs, (threads, registers, shared, barriers)
