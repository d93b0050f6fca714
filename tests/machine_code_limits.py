"""What is expected of the machine code of each CUDA kernel, and the checks that hold it to that.

A kernel that is not in the table fails the tests: give it a line. Each check takes one kernel and
returns what is wrong with it, in words; nothing means it is as expected.
"""

from __future__ import annotations

from dataclasses import dataclass, replace

from . import machine_code, occupancy
from .disassembly import Kernel


@dataclass(frozen=True)
class Limits:
    blocks: int  # of the largest size, resident on a multiprocessor of every target at the least
    reads: int = 0  # loads of `unit` bits in the code, at the least
    writes: int = 0  # stores of `unit` bits
    unit: int = 128  # 0: what the kernel's template arguments say
    only: frozenset[int] | None = None  # widths that may occur beside it, None: any
    dynamic_shared: int = 0  # bytes, as launched
    threads: int = 256  # by launch bounds, and as launched


# A batch norm kernel moves units of W elements of a row: 16 bytes where row length and alignment
# allow it ("wide"), else 4 elements or 1 ("narrow"): planes of 7 x 7 in channels_first are read
# and written one element at a time. It loads kInFlight units of each tensor before it uses the
# first, so a code with fewer loads of that width than tensors · kInFlight has lost its overlap.
# Kernels of step 3 ("apply") touch besides a mask by bytes and a channel's coefficients by 128 or
# 32 bits, and nothing else; the others read weights of any dtype one by one, a few for each block.
IN_FLIGHT = 4


def _partials(blocks: int, reads: int) -> Limits:
    return Limits(blocks, reads * IN_FLIGHT, unit=0)


def _apply(blocks: int, reads: int, writes: int) -> Limits:
    return Limits(blocks, reads * IN_FLIGHT, writes * IN_FLIGHT, 0, frozenset({128, 32, 8}))


# AnyActivation, the instance for those that have none of their own, needs registers for itself. So
# a thread loads 2 units of each tensor before it uses the first, and 1 where it keeps 8 channels'
# coefficients in the backward. It may read the residual in the backward too.
def _any(blocks: int, reads: int, writes: int = 0) -> Limits:
    return Limits(blocks, reads, writes, 0, frozenset({128, 32, 8}) if writes else None)


def _norm(blocks: int, reads: int, writes: int, threads: int = 256) -> Limits:
    return Limits(blocks, reads, writes, 0, threads=threads)


GROUP_NORM_THREADS = 384


def _group_norm(blocks: int, reads: int, writes: int) -> Limits:
    return _norm(blocks, reads, writes, GROUP_NORM_THREADS)


SLOT = 16 * 1024  # bytes in which the optimizers keep a chunk
# … and what copies for the next one need beside a slot.
STAGES = {"lamb_step": 16 * 1024, "lars_step": 8 * 1024}
OPTIMIZER_THREADS = 320


# The key is the kernel's name, its layout and whether its units are of 16 bytes, as far as its
# template arguments say so, and "any" for AnyActivation where that has an entry of its own.
LIMITS = {
    "batch_norm_partials channels_first wide": _partials(3, reads=1),
    "batch_norm_partials channels_first narrow": _partials(4, reads=1),
    "batch_norm_partials channels_last wide": _partials(3, reads=1),
    "batch_norm_partials channels_last narrow": _partials(3, reads=1),
    "batch_norm_finish": Limits(2),
    # 2 blocks of 256 threads: up to 128 registers. 16-bit elements in channels_last take the most,
    # 94 to 125, for a thread keeps the coefficients of 8 channels (4 floats each) in registers.
    # Blackwell's code takes some more than the others': 83 in finish.
    "batch_norm_apply channels_first wide": _apply(2, reads=2, writes=1),
    "batch_norm_apply channels_first narrow": _apply(2, reads=2, writes=1),
    "batch_norm_apply channels_last wide": _apply(2, reads=2, writes=1),
    "batch_norm_apply channels_last narrow": _apply(2, reads=2, writes=1),
    "batch_norm_apply channels_first wide any": _any(2, reads=2 * 2, writes=2),
    "batch_norm_apply channels_first narrow any": _any(3, reads=2 * 2, writes=2),
    "batch_norm_apply channels_last wide any": _any(2, reads=2 * 2, writes=2),
    "batch_norm_apply channels_last narrow any": _any(3, reads=2 * 2, writes=2),
    "batch_norm_backward_partials channels_first wide": _partials(2, reads=2),
    "batch_norm_backward_partials channels_last wide": _partials(2, reads=2),
    "batch_norm_backward_partials channels_first wide any": _any(2, reads=3 * 2),
    "batch_norm_backward_partials channels_first narrow any": _any(2, reads=3 * 2),
    "batch_norm_backward_partials channels_last wide any": _any(2, reads=3),
    "batch_norm_backward_partials channels_last narrow any": _any(2, reads=3 * 2),
    "batch_norm_backward_finish": Limits(2),
    "batch_norm_backward_apply channels_first wide": _apply(2, reads=2, writes=2),
    "batch_norm_backward_apply channels_last wide": _apply(2, reads=2, writes=2),
    "batch_norm_backward_apply channels_first wide any": _any(2, reads=3 * 2, writes=2 * 2),
    "batch_norm_backward_apply channels_first narrow any": _any(3, reads=3 * 2, writes=2 * 2),
    "batch_norm_backward_apply channels_last wide any": _any(2, reads=3, writes=2),
    "batch_norm_backward_apply channels_last narrow any": _any(2, reads=3 * 2, writes=2 * 2),
    # These keep what they load in shared memory for their second half, in which a thread loads
    # again only what has found no room there. Narrow units have AnyActivation alone; in the
    # backward a thread loads 2 units of 8 elements of each tensor ahead, and 1 with AnyActivation
    # and 8 channels.
    "batch_norm_forward_resident wide": _norm(2, reads=2 * IN_FLIGHT, writes=2),
    "batch_norm_forward_resident narrow": _norm(2, reads=2 * IN_FLIGHT, writes=2),
    "batch_norm_backward_resident wide": _norm(2, reads=6, writes=2),
    "batch_norm_backward_resident narrow": _norm(2, reads=12, writes=4),
    # 3 blocks of 80 registers; fewer where planes of several channels are taken together, and one
    # where they are so in the backward with units of 8 elements, of any activation, or on others
    # than sm_80 to sm_90.
    "batch_norm_forward_flow wide": _norm(2, reads=IN_FLIGHT, writes=1),
    "batch_norm_forward_flow narrow": _norm(2, reads=IN_FLIGHT, writes=1),
    "batch_norm_backward_flow wide": _norm(1, reads=2, writes=2),
    "batch_norm_backward_flow wide any": _norm(1, reads=2, writes=2),
    "batch_norm_backward_flow narrow": _norm(2, reads=2, writes=2),
    # group_norm_forward and _backward copy what they load into shared memory and have it from
    # there, then the elementwise half, a unit at a time. In the backward's, and in channels_last, a
    # thread has the coefficients of four columns: 8 bytes of 16-bit elements. Two blocks of 80
    # registers are for sm_90 and what knows its activation when it is compiled: see
    # test_two_blocks_of_group_norm_on_hopper.
    "group_norm_forward channels_first wide": _group_norm(2, reads=IN_FLIGHT, writes=1),
    "group_norm_forward channels_first narrow": _group_norm(2, reads=IN_FLIGHT, writes=1),
    "group_norm_forward channels_last wide": _group_norm(1, reads=IN_FLIGHT, writes=1),
    "group_norm_forward channels_last narrow": _group_norm(2, reads=IN_FLIGHT, writes=1),
    "group_norm_forward_finish": Limits(2),
    "group_norm_forward_apply channels_first wide": _group_norm(2, reads=2, writes=1),
    "group_norm_forward_apply channels_first narrow": _group_norm(2, reads=2, writes=1),
    "group_norm_forward_apply channels_last wide": _group_norm(1, reads=2, writes=1),
    "group_norm_forward_apply channels_last narrow": _group_norm(2, reads=2, writes=1),
    "group_norm_backward channels_first wide": _group_norm(1, reads=2 * IN_FLIGHT, writes=2),
    "group_norm_backward channels_first narrow": _group_norm(1, reads=2 * IN_FLIGHT, writes=2),
    "group_norm_backward channels_last wide": replace(
        _group_norm(1, reads=2 * IN_FLIGHT, writes=2), unit=64
    ),
    "group_norm_backward channels_last narrow": _group_norm(1, reads=2 * IN_FLIGHT, writes=2),
    "group_norm_backward_finish": Limits(2),
    "group_norm_backward_parameters": Limits(2),
    "group_norm_backward_apply channels_first wide": _group_norm(1, reads=2, writes=2),
    "group_norm_backward_apply channels_first narrow": _group_norm(1, reads=2, writes=2),
    "group_norm_backward_apply channels_last wide": replace(
        _group_norm(1, reads=2, writes=2), unit=64
    ),
    "group_norm_backward_apply channels_last narrow": _group_norm(1, reads=2, writes=2),
    # One kernel takes every dtype of p and g, by branches: of the 9 pairs 3 have float p and 3
    # float g. A thread has 2 units of 4 elements in flight: 16 bytes of float m, v, p and g; 8 of
    # 16-bit p and g, which narrows those accesses but keeps all tensors in step. The first sweep
    # finds copies in shared memory: those of the first chunk are started by themselves, those of
    # the next one for each pair, for what is rare, and where no unit fits. LAMB copies four, LARS
    # p, g and the m of a second sweep. LAMB's second sweep, where nothing was kept, loads p, m and
    # v, and where p gave its place to caution, p; LARS' m and, where nothing was kept, all three.
    # Small tensors have a unit at a time, of any dtype. Elements that no unit fits go one by one.
    # Dynamic shared memory: what sm_75 has for the one block that has room there.
    "lamb_step": Limits(
        1,
        reads=2 * (12 * 4 + 3 * 2 + 1 + 1) + 4,
        writes=2 * (9 * 2 + 1 + 1) + 4,
        dynamic_shared=STAGES["lamb_step"] + 2 * SLOT,
        threads=OPTIMIZER_THREADS,
    ),
    "lamb_store_sets": Limits(2, threads=32),
    "lamb_make_sets": Limits(2, threads=32),
    "lars_step": Limits(
        1,
        reads=2 * (11 * 3 + 3 + 3 + 9 + 3) + 2,
        writes=2 * (3 + 9 + 1 + 3),
        dynamic_shared=STAGES["lars_step"] + 3 * SLOT,
        threads=OPTIMIZER_THREADS,
    ),
    "lars_store_sets": Limits(2, threads=32),
    "lars_make_sets": Limits(2, threads=32),
    "optimizer_send_entries": Limits(4),
    "optimizer_index": Limits(4),
    "optimizer_grad_squares": Limits(4, reads=8),
    "optimizer_grad_total": Limits(4),
    "code_probe": Limits(0, threads=0),  # never launched
}


def entry(kernel: Kernel) -> str:
    """The kernel's key in the table."""
    size = None if kernel.unit is None else "wide" if kernel.unit >= 128 else "narrow"
    key = " ".join(part for part in (kernel.base, kernel.layout, size) if part)
    any_of_them = f"{key} any"
    return any_of_them if "AnyActivation" in kernel.arguments and any_of_them in LIMITS else key


def limits(kernel: Kernel) -> Limits:
    """KeyError for a kernel without an entry."""
    limit = LIMITS[entry(kernel)]
    return limit if limit.unit else replace(limit, unit=kernel.unit)


def local_memory(kernel: Kernel) -> list[str]:
    """No spills, no stack, no instruction that accesses local memory."""
    found = {
        "bytes of spill stores": kernel.spill_stores,
        "bytes of spill loads": kernel.spill_loads,
        "bytes of stack": kernel.stack,
        "local memory instructions": kernel.local,
    }
    return [f"{_of(kernel)}: expected 0 {k}, got {v}" for k, v in found.items() if v]


def residency(kernel: Kernel, limit: Limits) -> list[str]:
    """As many resident blocks as expected."""
    if kernel.threads != limit.threads:
        return [
            f"{_of(kernel)}: expected launch bounds of {limit.threads}, got {kernel.threads or '-'}"
        ]
    if limit.blocks == 0:
        return []
    fits = machine_code.residency(kernel, limit.dynamic_shared)
    if fits.blocks >= limit.blocks:
        return []
    most = occupancy.registers_allowed(kernel.target, threads=limit.threads, blocks=limit.blocks)
    return [
        f"{_of(kernel)}: expected {limit.blocks} resident blocks (up to {most} registers), got "
        f"{fits.blocks}, limited by {fits.limited_by}: {kernel.registers} registers, "
        f"{kernel.shared + limit.dynamic_shared} bytes of shared memory"
    ]


def accesses(kernel: Kernel, limit: Limits) -> list[str]:
    """As many wide loads and stores as expected, and no width that does not belong."""
    wrong = []
    for kind, found, least in (
        ("loads", kernel.loads, limit.reads),
        ("stores", kernel.stores, limit.writes),
    ):
        at_width = sum(count for bits, count in found.items() if bits >= limit.unit)
        if at_width < least:
            wrong.append(
                f"{_of(kernel)}: expected {least} {kind} of {limit.unit} bits or more, got "
                f"{dict(found)}"
            )
        if limit.only is not None and not set(found) <= limit.only | {limit.unit}:
            wrong.append(
                f"{_of(kernel)}: expected {kind} of {limit.unit} bits or of {set(limit.only)}, got "
                f"{dict(found)}"
            )
    return wrong


def _of(kernel: Kernel) -> str:
    return f"{kernel.target} {kernel.name}"
