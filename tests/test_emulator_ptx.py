"""What nvcc made of the kernels, their PTX in the installed build, run by the emulator.

The emulator's other tests run the kernels' C++: this is what else the GPU gets, inline assembly and
what is compiled for devices alone. First, that instructions do what PTX says they do.
"""

from __future__ import annotations

import ctypes
import itertools
import math
import struct
from collections.abc import Iterator
from functools import partial
from pathlib import Path

import numpy as np
import pytest

from .emulator import (
    batch_norm,
    build,
    emulator,
    group_norm,
    instructions,
    norm_checks,
    optimizers,
    ptx,
)
from .emulator.optimizer_checks import LARGE, SIZES, check_everywhere
from .emulator.optimizers import CHUNK, DTYPES, Parameter
from .lamb_reference import Options as LambOptions
from .lars_reference import Options as LarsOptions

THREADS = 64

# ---- instructions, each by itself

REGISTERS = {"u16": "h", "b16": "h", "f16": "h", "bf16": "h", "f32": "f", "f64": "d", "pred": "p"}
REGISTERS |= dict.fromkeys(("u32", "s32", "b32", "bf16x2", "f16x2"), "r")
REGISTERS |= dict.fromkeys(("u64", "s64", "b64"), "a")

HEAD = """
.version 9.0
.target sm_90
.address_size 64

.extern .shared .align 16 .b8 all_dynamic[];

.visible .entry ptx_probe(.param .u64 ptx_probe_param_0)
.maxntid 64
{
.reg .pred %p<16>;
.reg .b16 %h<16>;
.reg .b32 %r<32>;
.reg .f32 %f<32>;
.reg .b64 %a<32>;
.reg .f64 %d<16>;
.shared .align 16 .b8 own[512];
ld.param.u64 %a0, [ptx_probe_param_0];
cvta.to.global.u64 %a0, %a0;
mov.u32 %r0, %tid.x;
mul.wide.u32 %a1, %r0, 64;
add.s64 %a0, %a0, %a1; // the thread's eight words
"""


@pytest.fixture(scope="module")
def probe() -> ctypes.CDLL:
    return build.library("ptx_probe", ["tests/emulator/ptx_probe.cu"], [])


def run(
    library: ctypes.CDLL,
    folder: Path,
    body: str,
    words: object = (),
    threads: int = 1,
    blocks: int = 1,
    cluster: int = 1,
    head: str = HEAD,
) -> np.ndarray:
    """Runs `body` with `words` in the first of each thread's eight words; returns all of them."""
    file = folder / "probe.ptx"
    file.write_text(f"{head}{body}\nret;\n}}\n")
    memory = emulator.Memory(threads * blocks * 64)
    memory.bytes[:] = 0
    table = memory.bytes.view(np.uint64).reshape(-1, 8)
    given = np.asarray(words, dtype=np.uint64)
    table[:, : given.shape[-1]] = given
    sizes = (ctypes.c_int(n) for n in (blocks, threads, cluster, 512))
    with ptx.running(library, file):
        emulator.call(library.emulated_ptx_probe, ctypes.c_void_p(memory.pointer), *sizes)
    assert memory.guards_intact()
    return table.copy()


def bits(value: float | int, dtype: str) -> int:
    """Of a float, its bits; of an integer, two's complement of the type's width."""
    if dtype == "f32":
        return struct.unpack("<I", struct.pack("<f", value))[0]
    if dtype == "f64":
        return struct.unpack("<Q", struct.pack("<d", value))[0]
    size = {"r": 32, "h": 16, "a": 64, "p": 8}[REGISTERS[dtype]]
    return int(value) & ((1 << size) - 1)


NAN, INF = math.nan, math.inf
LEAST32 = -(1 << 31)
ONE_MORE = 1 + 2**-23  # the float after 1
DENORMAL = 2.0**-140

# The instruction, its result's type, its operands' types and values, the result.
INSTRUCTIONS = [
    ("add.s32", "s32", [("s32", 0x7FFFFFFF), ("s32", 1)], LEAST32),
    ("sub.s64", "s64", [("s64", 1), ("s64", 5)], -4),
    ("mul.lo.s32", "s32", [("s32", 1 << 20), ("s32", -(1 << 13))], 0),
    ("mul.lo.s64", "s64", [("s64", 1 << 40), ("s64", -3)], -3 << 40),
    ("mul.hi.u32", "u32", [("u32", 0xFFFFFFFF), ("u32", 0xFFFFFFFF)], 0xFFFFFFFE),
    ("mul.hi.s32", "s32", [("s32", -1), ("s32", 1)], -1),
    ("mul.wide.s32", "s64", [("s32", -3), ("s32", 1 << 30)], -3 << 30),
    ("mul.wide.u32", "u64", [("u32", 0xFFFFFFFF), ("u32", 2)], 0x1FFFFFFFE),
    ("mul.wide.u16", "u32", [("u16", 0xFFFF), ("u16", 0xFFFF)], 0xFFFE0001),
    ("mad.lo.s32", "s32", [("s32", -2), ("s32", 3), ("s32", 7)], 1),
    ("mad.lo.s64", "s64", [("s64", -2), ("s64", 3), ("s64", 7)], 1),
    ("div.s32", "s32", [("s32", -7), ("s32", 2)], -3),
    ("div.s32", "s32", [("s32", LEAST32), ("s32", -1)], LEAST32),
    ("div.u32", "u32", [("u32", 0xFFFFFFFF), ("u32", 16)], 0x0FFFFFFF),
    ("rem.s64", "s64", [("s64", -7), ("s64", 2)], -1),
    ("rem.u32", "u32", [("u32", 0xFFFFFFFF), ("u32", 10)], 5),
    ("min.s32", "s32", [("s32", -1), ("s32", 1)], -1),
    ("min.u32", "u32", [("u32", -1), ("u32", 1)], 1),
    ("max.s64", "s64", [("s64", -1), ("s64", -2)], -1),
    ("neg.s32", "s32", [("s32", 5)], -5),
    ("abs.s32", "s32", [("s32", -5)], 5),
    ("not.b32", "b32", [("b32", 0xFF)], 0xFFFFFF00),
    ("xor.b32", "b32", [("b32", 0xFF), ("b32", 0xF0)], 0x0F),
    ("shl.b32", "b32", [("b32", 1), ("u32", 31)], 1 << 31),
    ("shl.b32", "b32", [("b32", 1), ("u32", 32)], 0),
    ("shl.b64", "b64", [("b64", 1), ("u32", 40)], 1 << 40),
    ("shr.s32", "s32", [("s32", -8), ("u32", 1)], -4),
    ("shr.s32", "s32", [("s32", -8), ("u32", 40)], -1),
    ("shr.u32", "u32", [("u32", -8), ("u32", 28)], 15),
    ("shr.u64", "u64", [("u64", -1), ("u32", 64)], 0),
    ("bfe.u32", "u32", [("u32", 0x12345678), ("u32", 8), ("u32", 8)], 0x56),
    ("bfi.b32", "b32", [("b32", 0xAB), ("b32", -1), ("u32", 8), ("u32", 8)], 0xFFFFABFF),
    ("prmt.b32", "b32", [("b32", 0x33221100), ("b32", 0x77665584), ("b32", 0xC470)], 0xFF847700),
    ("popc.b32", "u32", [("b32", 0xF0F0)], 8),
    ("clz.b32", "u32", [("b32", 1)], 31),
    ("fma.rn.f32", "f32", [("f32", ONE_MORE), ("f32", ONE_MORE), ("f32", -1)], 2**-22 + 2**-46),
    ("fma.rm.f32", "f32", [("f32", 1), ("f32", 1), ("f32", 2**-30)], 1),
    ("fma.rm.f32", "f32", [("f32", 1), ("f32", 1), ("f32", -(2**-30))], 1 - 2**-24),
    ("fma.rn.f64", "f64", [("f64", 3), ("f64", 5), ("f64", 7)], 22),
    ("add.rn.f32", "f32", [("f32", 1), ("f32", 2**-24)], 1),
    ("mul.f32", "f32", [("f32", ONE_MORE), ("f32", ONE_MORE)], 1 + 2**-22),
    ("div.rn.f32", "f32", [("f32", 1), ("f32", 3)], 1 / 3),
    ("sqrt.rn.f64", "f64", [("f64", 2)], math.sqrt(2)),
    ("rcp.rn.f64", "f64", [("f64", 3)], 1 / 3),
    ("min.f32", "f32", [("f32", NAN), ("f32", 1)], 1),
    ("min.f32", "f32", [("f32", 0.0), ("f32", -0.0)], -0.0),
    ("max.f32", "f32", [("f32", -0.0), ("f32", 0.0)], 0.0),
    ("neg.f32", "f32", [("f32", 0.0)], -0.0),
    ("abs.f32", "f32", [("f32", -INF)], INF),
    ("copysign.f32", "f32", [("f32", -2), ("f32", 3)], -3),
    ("ex2.approx.ftz.f32", "f32", [("f32", -3)], 0.125),
    ("ex2.approx.ftz.f32", "f32", [("f32", -140)], 0),
    ("rcp.approx.ftz.f32", "f32", [("f32", 4)], 0.25),
    ("rcp.approx.ftz.f32", "f32", [("f32", DENORMAL)], INF),
    ("rcp.approx.ftz.f32", "f32", [("f32", 2.0**127)], 0),
    ("sqrt.approx.f32", "f32", [("f32", 2.25)], 1.5),
    ("rsqrt.approx.f32", "f32", [("f32", 4)], 0.5),
    ("cvt.rn.f32.s32", "f32", [("s32", -16777217)], -16777216),
    ("cvt.rn.f32.u64", "f32", [("u64", 1 << 63)], 2.0**63),
    ("cvt.rn.f64.s64", "f64", [("s64", -3)], -3),
    ("cvt.rn.f32.f64", "f32", [("f64", 1 + 2**-40)], 1),
    ("cvt.f64.f32", "f64", [("f32", ONE_MORE)], ONE_MORE),
    ("cvt.rzi.f32.f32", "f32", [("f32", -2.75)], -2),
    ("cvt.rzi.s32.f32", "s32", [("f32", -2.75)], -2),
    ("cvt.rzi.s32.f32", "s32", [("f32", 3e9)], 0x7FFFFFFF),
    ("cvt.rzi.s32.f32", "s32", [("f32", NAN)], 0),
    ("cvt.rni.s32.f32", "s32", [("f32", 2.5)], 2),
    ("cvt.sat.f32.f32", "f32", [("f32", 1.5)], 1),
    ("cvt.sat.f32.f32", "f32", [("f32", NAN)], 0),
    ("cvt.s64.s32", "s64", [("s32", -3)], -3),
    ("cvt.u64.u32", "u64", [("u32", -3)], 0xFFFFFFFD),
    ("cvt.u32.u64", "u32", [("u64", 0x1_0000_0005)], 5),
    ("cvt.u16.u32", "u16", [("u32", 0x12345)], 0x2345),
    ("cvt.rn.f16.f32", "f16", [("f32", 65520)], 0x7C00),
    ("cvt.f32.f16", "f32", [("f16", 0x0001)], 2.0**-24),
    ("cvt.rn.bf16.f32", "bf16", [("f32", 1 + 2**-8 + 2**-20)], 0x3F81),
    ("cvt.f32.bf16", "f32", [("bf16", 0xC000)], -2),
    ("cvt.rn.bf16x2.f32", "bf16x2", [("f32", 1), ("f32", 2)], 0x3F804000),
    ("cvt.rn.f16x2.f32", "f16x2", [("f32", 1), ("f32", 2)], 0x3C004000),
    ("mov.b64", "b64", [("b64", 0x0123456789ABCDEF)], 0x0123456789ABCDEF),
]


def _load(kind: str, index: int) -> str:
    width = {"r": "b32", "h": "b16", "a": "b64", "f": "f32", "d": "f64"}[REGISTERS[kind]]
    return f"ld.global.{width} %{REGISTERS[kind]}{index + 2}, [%a0+{8 * index}];"


def _store(kind: str) -> str:
    width = {"r": "b32", "h": "b16", "a": "b64", "f": "f32", "d": "f64"}[REGISTERS[kind]]
    return f"st.global.{width} [%a0+56], %{REGISTERS[kind]}9;"


@pytest.mark.parametrize(
    ("name", "result", "operands", "expected"),
    INSTRUCTIONS,
    ids=[f"{name}-{i}" for i, (name, *_) in enumerate(INSTRUCTIONS)],
)
def test_an_instruction(probe, tmp_path, name, result, operands, expected):
    loads = [_load(kind, i) for i, (kind, _) in enumerate(operands)]
    names = [f"%{REGISTERS[kind]}{i + 2}" for i, (kind, _) in enumerate(operands)]
    body = [*loads, f"{name} {', '.join([f'%{REGISTERS[result]}9', *names])};", _store(result)]
    words = [bits(value, kind) for kind, value in operands]
    out = int(run(probe, tmp_path, "\n".join(body), words)[0, 7])
    assert hex(out) == hex(bits(expected, result))


COMPARISONS = [
    ("eq.s32", 1, 1, True),
    ("lt.s32", -1, 1, True),
    ("lt.u32", -1, 1, False),
    ("hi.u32", -1, 1, True),
    ("ge.s64", -1, -1, True),
    ("ne.b32", 1, 2, True),
    ("lt.f32", NAN, 1.0, False),
    ("ltu.f32", NAN, 1.0, True),
    ("ne.f32", NAN, 1.0, False),
    ("neu.f32", NAN, 1.0, True),
    ("num.f32", NAN, 1.0, False),
    ("nan.f32", NAN, 1.0, True),
    ("le.f64", 1.0, 1.0, True),
]


@pytest.mark.parametrize(("name", "a", "b", "expected"), COMPARISONS)
def test_comparisons_selections_and_guards(probe, tmp_path, name, a, b, expected):
    kind = name.split(".")[1]
    body = f"""
    {_load(kind, 0)} {_load(kind, 1)}
    setp.{name} %p1, %{REGISTERS[kind]}2, %{REGISTERS[kind]}3;
    not.pred %p2, %p1;
    selp.b32 %r9, 7, 9, %p1;
    st.global.b32 [%a0+56], %r9;
    @%p1 st.global.b32 [%a0+48], %r9;
    @!%p1 st.global.b32 [%a0+40], %r9;
    @%p2 bra $L_end;
    st.global.b32 [%a0+32], %r9;
$L_end:
    """
    out = run(probe, tmp_path, body, [bits(a, kind), bits(b, kind)])[0, 4:]
    assert out.tolist() == ([7, 0, 7, 7] if expected else [0, 9, 0, 9])


def test_vectors_and_pieces(probe, tmp_path):
    body = """
    ld.global.v4.u16 {%h1, %h2, %h3, %h4}, [%a0];
    ld.global.s16 %r1, [%a0+6];
    mov.b32 %r2, {%h1, %h2};
    mov.b64 %a2, {%r2, %r1};
    { .reg .b16 tmp; mov.b32 {tmp, %h5}, %r2; }
    st.global.v2.u32 [%a0+48], {%r2, %r1};
    st.global.u64 [%a0+40], %a2;
    st.global.u16 [%a0+32], %h5;
    """
    out = run(probe, tmp_path, body, [0x8000_0003_0002_0001])[0]
    low, high = 0x0002_0001, 0xFFFF_8000
    assert [int(x) for x in out[4:7]] == [2, high << 32 | low, high << 32 | low]


def test_shared_memory_barriers_and_copies(probe, tmp_path):
    """A word goes by an asynchronous copy to the dynamic part, from there to the next thread."""
    body = """
    createpolicy.fractional.L2::evict_first.b64 %a9, 1.0;
    mov.u64 %a2, all_dynamic;
    shl.b32 %r1, %r0, 3;
    cvt.u32.u64 %r2, %a2;
    add.s32 %r2, %r2, %r1;
    cp.async.ca.shared.global.L2::cache_hint [%r2], [%a0], 8, %a9;
    cp.async.commit_group;
    cp.async.wait_group 0;
    bar.sync 0;
    xor.b32 %r3, %r2, 8;
    ld.shared.u64 %a3, [%r3];
    mov.u64 %a4, own;
    cvta.shared.u64 %a5, %a4;
    cvt.u64.u32 %a6, %r1;
    add.s64 %a5, %a5, %a6;
    st.u64 [%a5], %a3;
    add.s64 %a4, %a4, %a6;
    ld.shared.u64 %a7, [%a4];
    st.global.L2::cache_hint.v2.b32 [%a0+56], {%r0, %r1}, %a9;
    st.global.u64 [%a0+48], %a7;
    """
    words = np.arange(THREADS, dtype=np.uint64)[:, None] + 100
    out = run(probe, tmp_path, body, words, threads=THREADS)
    assert out[:, 6].tolist() == [100 + (t ^ 1) for t in range(THREADS)]
    assert out[:, 7].tolist() == [t | 8 * t << 32 for t in range(THREADS)]


SHUFFLES = {
    "bfly.b32 %r9|%p1, %r2, 5, 31, -1": lambda t: t ^ 5,
    "idx.b32 %r9|%p1, %r2, 3, 31, -1": lambda t: t // 32 * 32 + 3,
    "down.b32 %r9|%p1, %r2, 2, 31, -1": lambda t: t + 2 if t % 32 < 30 else t,
    "up.b32 %r9|%p1, %r2, 2, 0, -1": lambda t: t - 2 if t % 32 >= 2 else t,
    "bfly.b32 %r9|%p1, %r2, 1, 7199, -1": lambda t: t ^ 1,  # segments of four: 28 << 8 | 31
    "down.b32 %r9|%p1, %r2, 1, 7199, -1": lambda t: t + 1 if t % 4 < 3 else t,
}


@pytest.mark.parametrize(("text", "source"), SHUFFLES.items(), ids=[s.split()[0] for s in SHUFFLES])
def test_shuffles_and_votes(probe, tmp_path, text, source):
    body = f"""
    ld.global.u32 %r2, [%a0];
    shfl.sync.{text};
    st.global.u32 [%a0+56], %r9;
    setp.gt.u32 %p2, %r2, 139;
    vote.sync.ballot.b32 %r3, %p2, -1;
    st.global.u32 [%a0+48], %r3;
    bar.warp.sync -1;
    """
    words = np.arange(THREADS, dtype=np.uint64)[:, None] + 100
    out = run(probe, tmp_path, body, words, threads=THREADS)
    assert out[:, 7].tolist() == [100 + source(t) for t in range(THREADS)]
    assert out[:, 6].tolist() == [0] * 32 + [0xFFFFFF00] * 32


def test_clusters_and_atomics(probe, tmp_path):
    """Each block reads what the other one has in its shared memory."""
    body = """
    mov.u32 %r1, %ctaid.x;
    mad.lo.s32 %r2, %r1, 32, %r0;
    mul.wide.u32 %a1, %r1, 2048;
    add.s64 %a0, %a0, %a1;
    mov.u64 %a2, own;
    mul.wide.u32 %a3, %r0, 4;
    add.s64 %a2, %a2, %a3;
    st.shared.u32 [%a2], %r2;
    barrier.cluster.arrive;
    barrier.cluster.wait;
    mov.u32 %r3, %cluster_ctarank;
    xor.b32 %r4, %r3, 1;
    cvta.shared.u64 %a4, %a2;
    mapa.u64 %a5, %a4, %r4;
    ld.u32 %r5, [%a5];
    st.global.u32 [%a0+56], %r5;
    atom.release.gpu.global.add.u32 %r6, [%a0+48], 5;
    red.release.gpu.global.add.u32 [%a0+48], 2;
    ld.acquire.gpu.global.u32 %r7, [%a0+48];
    st.release.gpu.global.u32 [%a0+40], %r7;
    barrier.cluster.arrive.relaxed;
    barrier.cluster.wait;
    """
    out = run(probe, tmp_path, body, threads=32, blocks=2, cluster=2)
    assert out[:, 7].tolist() == [*range(32, 64), *range(32)]
    assert out[:, 5].tolist() == [7] * 64


FAULTS = {
    "ld.global.v2.u32 {%r1, %r2}, [%a0+4];": "8 bytes that is not on a boundary",
    "cvta.shared.u64 %a2, %a3; mov.b64 %a3, own; cvta.shared.u64 %a2, %a3; "
    "ld.global.u32 %r1, [%a2];": "shared memory, taken for a global one",
    "mov.b32 %r1, 400000; ld.shared.u32 %r2, [%r1];": "beyond shared memory",
    "st.global.L2::cache_hint.v2.b32 [%a0], {%r0, %r0}, %a0;": "not a cache policy",
    "tanh.approx.f32 %f1, %f2;": "unknown here: tanh.approx.f32",
    "cp.async.cg.shared.global [%a2], [%a0], 8;": "unknown here: cp.async.cg",
}


@pytest.mark.parametrize(("body", "message"), FAULTS.items(), ids=FAULTS.values())
def test_what_a_device_would_not_do(probe, tmp_path, body, message):
    with pytest.raises(emulator.EmulatorError, match=message) as caught:
        run(probe, tmp_path, body)
    assert "probe.ptx:" in str(caught.value)


@pytest.mark.parametrize(
    ("body", "message"),
    [
        ("bra $L_nowhere;", "no label"),
        ("ld.global.u32 %r1, [%nothing];", "expected an address"),
        (".tex .u32 t;", "unknown directive"),
    ],
)
def test_text_that_is_not_understood(probe, tmp_path, body, message):
    with pytest.raises(emulator.EmulatorError, match=message):
        run(probe, tmp_path, body)


def test_a_kernel_of_other_parameters_or_none(probe, tmp_path):
    with pytest.raises(emulator.EmulatorError, match="parameter of another size"):
        run(probe, tmp_path, "", head=HEAD.replace(".param .u64", ".param .u32"))
    with pytest.raises(emulator.EmulatorError, match="no kernel ptx_probe"):
        run(probe, tmp_path, "", head=HEAD.replace("entry ptx_probe(", "entry another("))


# ---- the kernels


@pytest.fixture(scope="module")
def batch_norms() -> Iterator[ctypes.CDLL]:
    library = batch_norm.library()
    with ptx.running(library):
        yield library


@pytest.fixture(scope="module")
def group_norms() -> Iterator[ctypes.CDLL]:
    library = group_norm.library()
    with ptx.running(library):
        yield library


@pytest.fixture(scope="module")
def steps() -> Iterator[ctypes.CDLL]:
    library = optimizers.library()
    with ptx.running(library):
        yield library


def test_every_instruction_of_the_build_is_known(steps):
    assert not ptx.unknown_instructions(steps)


def assert_ran(library: ctypes.CDLL, *names: str) -> None:
    """It was PTX that ran, and these instructions were among it."""
    counts = ptx.take_counts(library)
    assert counts, "nothing ran as PTX"
    missing = [name for name in names if name not in counts]
    assert not missing, f"of {missing} nothing ran, but {counts}"


@pytest.mark.parametrize("device", ["Hopper", "Turing", "streams"])
@pytest.mark.parametrize("layout", batch_norm.LAYOUTS)
@pytest.mark.parametrize("dtype", norm_checks.DTYPES)
def test_batch_norm(batch_norms, dtype, layout, device):
    for shape, activation, residual in (
        ((2, 8, 64), "relu", True),
        ((5, 6, 49), "none", False),
        ((2, 12, 196), "silu", False),
        ((5, 160, 64), "none", False),
        ((5, 8, 1), "gelu", True),
    ):
        problem = batch_norm.Problem(
            *shape, layout=layout, dtype=dtype, activation=activation, residual=residual
        )
        schedule = partial(batch_norm.device, batch_norms, device)
        norm_checks.check_under_all_schedules(batch_norms, problem, schedule)
    assert_ran(batch_norms, "ld.global", "st.global", "bar", "fma")


@pytest.mark.parametrize("layout", batch_norm.LAYOUTS)
def test_batch_norm_of_ghost_batches_and_in_eval(batch_norms, layout):
    for options in ({"ghost": 2}, {"training": False}):
        problem = batch_norm.Problem(*(6, 8, 64), layout=layout, activation="relu", **options)
        schedule = partial(batch_norm.device, batch_norms, "Hopper")
        norm_checks.check_under_all_schedules(batch_norms, problem, schedule)


@pytest.mark.parametrize("device", group_norm.DEVICES)
@pytest.mark.parametrize("layout", group_norm.LAYOUTS)
@pytest.mark.parametrize("dtype", norm_checks.DTYPES)
def test_group_norm(group_norms, dtype, layout, device):
    for shape, activation, residual in (
        ((2, 8, 64, 2), "relu", True),
        ((3, 6, 49, 3), "none", False),
        ((2, 40, 20, 4), "silu", False),
        ((7, 33, 1, 1), "gelu_tanh", False),
        ((1, 6, 5000, 2), "silu", True),
    ):
        problem = group_norm.Problem(
            *shape, layout=layout, dtype=dtype, activation=activation, residual=residual
        )
        with group_norm.device(group_norms, device):
            norm_checks.check_under_all_schedules(group_norms, problem)
    assert_ran(group_norms, "ld.global", "st.global", "bar", "cp")


def test_instructions_of_an_element(monkeypatch, batch_norms):
    """More of them with an activation and a residual; a multiply-add for z at the least."""
    monkeypatch.setattr(instructions, "BATCH_NORM", (2, 8, 512))
    found = {row.name: row for row in instructions.norms("batch_norm f32 channels_first")}
    for phase in ("forward", "backward"):
        plain, more = (
            found[f"batch_norm f32 channels_first {how}, {phase}"]
            for how in ("none", "relu + residual")
        )
        assert plain.counts["fma"] >= plain.elements
        assert plain.an_element < more.an_element
    assert str(plain).startswith("batch_norm f32 channels_first none, backward")


def test_instructions_of_a_step(steps):
    plain, clipped = instructions.steps("lars")
    assert (plain.bytes_each, clipped.bytes_each) == (20, 24)
    assert plain.counts["fma"] >= plain.elements
    assert plain.an_element < clipped.an_element


OPTIONS = {
    "lamb": (
        LambOptions(),
        LambOptions(caution=True, weight_decay=0.1),
        LambOptions(maximize=True),
    ),
    "lars": (LarsOptions(), LarsOptions(momentum=0.9, nesterov=True, weight_decay=1e-4)),
}


@pytest.mark.parametrize("clip", [None, 0.1])
@pytest.mark.parametrize("kind", OPTIONS)
def test_a_step(steps, kind, clip):
    problem_of = optimizers.Problem if kind == "lamb" else optimizers.Lars
    groups = list(OPTIONS[kind])
    pairs = itertools.product(DTYPES, DTYPES)
    sizes = [Parameter(n, p, g, group=0) for p, g in pairs for n in (37, 300, CHUNK + 5)]
    sizes += [Parameter(n, group=i % len(groups)) for i, n in enumerate((*SIZES, *LARGE))]
    sizes += [Parameter(1030, "bf16", "bf16", master=True), Parameter(1030, offset=1)]
    problem = problem_of(sizes, groups=groups, max_grad_norm=clip)
    check_everywhere(steps, problem)
    assert_ran(steps, "cp", "barrier", "createpolicy", "atom", "nanosleep")
