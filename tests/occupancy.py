"""Blocks resident on a multiprocessor: the least that threads, registers and the rest allow.

    resident = occupancy.resident("sm_90", threads=256, registers=96, shared=1024, barriers=1)
    resident.blocks, resident.warps, resident.share, resident.limited_by

Limits of the targets: CUDA C++ Programming Guide, appendix "Compute Capabilities", table
"Technical Specifications per Compute Capability". How registers and shared memory are rounded up:
NVIDIA's cuda_occupancy.h, with which tests/test_occupancy.py compares this file.
"""

from __future__ import annotations

from dataclasses import dataclass

WARP = 32
REGISTERS = 64 * 1024  # of a multiprocessor, and the most a block may have; 32 bits each
REGISTERS_A_THREAD = 255
REGISTER_UNIT = 256  # what a warp gets is a multiple of it
PARTITIONS = 4  # of a multiprocessor: each holds a quarter of the registers and whole warps
KB = 1024


@dataclass(frozen=True)
class Multiprocessor:
    """What one has, and how shared memory is given out."""

    blocks: int
    warps: int
    shared: int
    shared_a_block: int
    shared_reserved: int  # the driver's, in every block
    shared_unit: int
    barriers: int


_TURING = Multiprocessor(16, 32, 64 * KB, 64 * KB, 0, 256, 32)
_AMPERE = Multiprocessor(32, 64, 164 * KB, 163 * KB, 1 * KB, 128, 64)
_HOPPER = Multiprocessor(32, 64, 228 * KB, 227 * KB, 1 * KB, 128, 64)
TARGETS = {
    "sm_75": _TURING,
    "sm_80": _AMPERE,
    "sm_86": Multiprocessor(16, 48, 100 * KB, 99 * KB, 1 * KB, 128, 16),
    "sm_89": Multiprocessor(24, 48, 100 * KB, 99 * KB, 1 * KB, 128, 24),
    "sm_90": _HOPPER,
    "sm_100": _HOPPER,
    "sm_120": Multiprocessor(24, 48, 100 * KB, 99 * KB, 1 * KB, 128, 24),
}


@dataclass(frozen=True)
class Resident:
    blocks: int
    warps: int
    share: float  # of the warps a multiprocessor can hold
    limited_by: str  # "warps", "blocks", "registers", "shared" or "barriers"


def _round_up(value: int, unit: int) -> int:
    return -(-value // unit) * unit


def resident(
    target: str, *, threads: int, registers: int, shared: int = 0, barriers: int = 0
) -> Resident:
    """Blocks of `threads` threads that one multiprocessor of `target` holds at once.

    registers: a thread's; shared: bytes a block, static and dynamic together, without the driver's
    share. 0 blocks where a block cannot be launched at all. KeyError for an unknown target,
    ValueError for values no kernel has.
    """
    sm = TARGETS[target]
    if not 1 <= threads <= 1024 or registers < 1 or shared < 0 or barriers < 0:
        raise ValueError(
            f"occupancy: expected 1 to 1024 threads, 1 register or more and no negative sizes, got "
            f"threads={threads}, registers={registers}, shared={shared}, barriers={barriers}"
        )
    warps = _round_up(threads, WARP) // WARP
    registers_a_warp = _round_up(registers * WARP, REGISTER_UNIT)
    limits = {"warps": sm.warps // warps, "blocks": sm.blocks}

    # A launch is checked as if every partition held as many of the block's warps as the fullest.
    checked = registers_a_warp * _round_up(warps, PARTITIONS)
    fits = registers <= REGISTERS_A_THREAD and checked <= REGISTERS
    by_partition = REGISTERS // PARTITIONS // registers_a_warp
    limits["registers"] = by_partition * PARTITIONS // warps if fits else 0

    allocated = _round_up(shared + sm.shared_reserved, sm.shared_unit)
    fits = allocated <= sm.shared_a_block + sm.shared_reserved
    if not fits:
        limits["shared"] = 0
    elif allocated > 0:
        limits["shared"] = sm.shared // allocated
    if barriers > 0:
        limits["barriers"] = sm.barriers // barriers

    limited_by = min(limits, key=lambda name: limits[name])
    blocks = limits[limited_by]
    return Resident(blocks, blocks * warps, blocks * warps / sm.warps, limited_by)


def registers_allowed(target: str, *, threads: int, blocks: int) -> int:
    """The most registers a thread may have for `blocks` blocks to fit; 0 if they never do."""
    return max(
        (
            registers
            for registers in range(1, REGISTERS_A_THREAD + 1)
            if resident(target, threads=threads, registers=registers).blocks >= blocks
        ),
        default=0,
    )
