"""The compiler's output for the CUDA kernels, held to tests/machine_code_limits.py."""

from __future__ import annotations

import re
import subprocess
from concurrent.futures import ThreadPoolExecutor
from dataclasses import replace
from pathlib import Path

import pytest

from . import disassembly, machine_code, machine_code_limits, occupancy
from .disassembly import Kernel
from .emulator import toolkit
from .machine_code_limits import Limits

FAULTS = Path(__file__).with_name("machine_code_faults.cu")
FEATURES = Path(__file__).parent / "emulator" / "features.cu"

needs_nvcc = pytest.mark.skipif(toolkit.tool("nvcc") is None, reason="needs nvcc")
NOTHING = "needs a build with CUDA, cuobjdump and nvdisasm"


@pytest.fixture(scope="module")
def kernels() -> list[Kernel]:
    by_target = machine_code.checked_kernels()
    for target, found in by_target.items():
        print(f"\n{target}, counted in {found[0].counted_in}\n{machine_code.table(found)}")
    return [kernel for found in by_target.values() for kernel in found] or pytest.skip(NOTHING)


def test_every_kernel_has_an_entry_and_every_entry_a_kernel(kernels):
    for target in {kernel.target for kernel in kernels}:
        found = {machine_code_limits.entry(k) for k in kernels if k.target == target}
        assert found == set(machine_code_limits.LIMITS), target


def test_no_spills_no_stack_no_local_memory(kernels):
    assert all(kernel.registers > 0 and kernel.counted_in for kernel in kernels)
    wrong = [w for kernel in kernels for w in machine_code_limits.local_memory(kernel)]
    assert not wrong, "\n".join(wrong)


def test_enough_blocks_are_resident(kernels):
    wrong = []
    for kernel in kernels:
        wrong += machine_code_limits.residency(kernel, machine_code_limits.limits(kernel))
    assert not wrong, "\n".join(wrong)


def test_two_blocks_of_group_norm_on_hopper(kernels):
    """One computes while the other waits for memory."""
    for kernel in kernels:
        wide = kernel.base.startswith("group_norm") and kernel.unit is not None
        if kernel.target == "sm_90" and wide and "AnyActivation" not in kernel.arguments:
            found = occupancy.resident(
                "sm_90",
                threads=machine_code_limits.GROUP_NORM_THREADS,
                registers=kernel.registers,
            )
            assert found.blocks >= 2, f"{kernel.name}: {kernel.registers} registers"


def test_global_memory_is_accessed_in_the_width_meant(kernels):
    wrong = []
    for kernel in kernels:
        wrong += machine_code_limits.accesses(kernel, machine_code_limits.limits(kernel))
    assert not wrong, "\n".join(wrong)


@pytest.mark.parametrize("target", occupancy.TARGETS)
def test_the_optimizers_slots_leave_room_for_two_blocks(kernels, target):
    """What slots_of in optimizer_step.cuh makes of each device, against what it has: three slots at
    the least for each of two blocks, or one block with all that there is. On sm_75 that is two."""
    sm = occupancy.TARGETS[target]
    for kernel in kernels:
        if kernel.base not in machine_code_limits.STAGES:
            continue
        assert kernel.shared <= 1024
        stage = machine_code_limits.STAGES[kernel.base]
        for blocks in (2, 1):
            share = min(sm.shared // blocks - 1024, sm.shared_a_block) - 1024 - stage
            slots = share // machine_code_limits.SLOT
            if slots >= 3:
                break
        assert slots >= (2 if target == "sm_75" else 5 if blocks == 1 else 3)
        assert blocks == 2 or sm.shared < 128 * 1024
        limits = replace(
            machine_code_limits.limits(kernel),
            blocks=blocks,
            dynamic_shared=stage + slots * machine_code_limits.SLOT,
        )
        assert not machine_code_limits.residency(replace(kernel, target=target), limits)


@pytest.mark.parametrize("source", machine_code.sources(), ids=lambda path: path.name)
def test_launches_are_those_that_residency_is_computed_for(source):
    """launch("name", kernel, blocks, threads, shared, stream, ...) against the table."""
    text = source.read_text()
    with_headers = text + "".join(file.read_text() for file in source.parent.glob("*.cuh"))
    launches = re.findall(
        r'\blaunch\(\s*"(\w+)",\s*[\w:]+(?:<[^>]*>)?,\s*[^,]+,\s*([\w:]+),\s*(\w+),\s*stream',
        text,
    )
    by_shape = re.findall(r'\blaunch\(\s*"\w+",\s*[\w:]+(?:<[^>]*>)?,\s*\w+,\s*stream', text)
    assert len(launches) + len(by_shape) == len(re.findall(r'\blaunch\(\s*"', text))
    for name, threads, shared in launches:
        expected = {
            (limit.threads, limit.dynamic_shared)
            for key, limit in machine_code_limits.LIMITS.items()
            if key.split()[0] == name
        }
        constant = threads.split("::")[-1]
        values = set(re.findall(rf"constexpr int {constant} = (\d+);", with_headers))
        assert {(int(value), int(shared)) for value in values} == expected, name


@needs_nvcc
def test_a_library_tells_the_same_as_the_compiler(tmp_path):
    """But for the bytes of spills, of which it tells by the local memory accesses alone."""
    if toolkit.tool("cuobjdump") is None or toolkit.tool("nvdisasm") is None:
        pytest.skip("needs cuobjdump and nvdisasm")
    library = tmp_path / "faults.so"
    command = [toolkit.tool("nvcc"), *machine_code.FLAGS, f"-I{machine_code.ROOT / 'csrc'}"]
    command += ["-gencode=arch=compute_80,code=sm_80", "-gencode=arch=compute_90,code=sm_90"]
    command += ["-shared", "-Xcompiler=-fPIC", str(FAULTS), "-o", str(library)]
    subprocess.run(command, check=True, capture_output=True)
    shipped = machine_code.library_kernels(library)

    def facts(kernel: Kernel) -> tuple:
        return (
            *(kernel.registers, kernel.shared, kernel.barriers, kernel.threads, kernel.stack),
            *(kernel.local, kernel.loads, kernel.stores),
        )

    for target in ("sm_80", "sm_90"):
        ours = {kernel.name: facts(kernel) for kernel in machine_code.kernels(FAULTS, target)}
        theirs = {kernel.name: facts(kernel) for kernel in shipped if kernel.target == target}
        assert ours == theirs
    spills = [kernel for kernel in shipped if kernel.name == "spills"]
    assert len(spills) == 2
    assert all(machine_code_limits.local_memory(kernel) for kernel in spills)


# ---- planted faults


@pytest.fixture(scope="module", params=["sm_75", "sm_90", "sm_100"])
def planted(request) -> dict[str, Kernel]:
    if toolkit.tool("nvcc") is None:
        pytest.skip("needs nvcc")
    return {kernel.name: kernel for kernel in machine_code.kernels(FAULTS, request.param)}


# What each was meant to be, and the check that must find that it is not.
WIDE = Limits(blocks=2, reads=1, writes=1, only=frozenset({128}))
PLANTED = {
    "clean": (WIDE, set()),
    "spills": (WIDE, {"local_memory"}),
    "array_in_local_memory": (WIDE, {"local_memory"}),
    "narrow": (WIDE, {"accesses"}),
    "split_store": (WIDE, {"accesses"}),
    "too_many_registers": (Limits(blocks=3, reads=1, writes=1), {"residency"}),
    "too_much_shared_memory": (Limits(blocks=5, reads=1, writes=1), {"residency"}),
}


@pytest.mark.parametrize("fault", PLANTED)
def test_planted_fault_is_found_by_its_check_alone(planted, fault):
    kernel = planted[fault]
    limit, expected = PLANTED[fault]
    found = {
        "local_memory": machine_code_limits.local_memory(kernel),
        "residency": machine_code_limits.residency(kernel, limit),
        "accesses": machine_code_limits.accesses(kernel, limit),
    }
    assert {name for name, wrong in found.items() if wrong} == expected, found


def test_all_faults_are_tried_and_have_no_entry(planted):
    assert set(planted) == set(PLANTED)
    for kernel in planted.values():
        with pytest.raises(KeyError):
            machine_code_limits.limits(kernel)


def test_each_fault_shows_in_its_figure(planted):
    assert planted["spills"].spill_stores > 0
    assert planted["spills"].registers <= 64
    # 64 floats, and none of it is a spill.
    assert planted["array_in_local_memory"].stack >= 256
    assert planted["array_in_local_memory"].spill_stores == 0
    assert planted["array_in_local_memory"].local > 0
    assert planted["narrow"].loads == {32: 1}
    assert planted["split_store"].stores == {32: 4}
    assert planted["too_many_registers"].registers > occupancy.registers_allowed(
        planted["too_many_registers"].target, threads=256, blocks=3
    )
    assert planted["too_much_shared_memory"].shared == 48 * 1024
    assert machine_code.residency(planted["too_much_shared_memory"]).limited_by == "shared"


def test_residency_wants_launch_bounds():
    kernel = Kernel("sm_90", "unbounded", registers=32)
    assert machine_code_limits.residency(kernel, Limits(blocks=1))


# ---- what is kept between runs


def test_who_asks_at_the_same_time_finds_what_is_made_once(tmp_path, monkeypatch):
    monkeypatch.setattr(machine_code, "CACHE", tmp_path)
    made: list[str] = []

    def ask(name: str) -> list[Kernel]:
        return machine_code._kept(name, lambda: made.append(name) or [Kernel("sm_90", name)])

    names = [f"kernel{k // 4}" for k in range(800)]
    with ThreadPoolExecutor(16) as pool:
        found = list(pool.map(ask, names))
    assert [[kernel.name for kernel in kernels] for kernels in found] == [[n] for n in names]
    assert sorted(made) == sorted(set(names))


# ---- reading the tools' output


def test_machine_code_is_read():
    text = """
\t.section\t.text._Z1kv,"ax",@progbits
        /*0050*/                   @!P0 LDG.E.128.CONSTANT R4, desc[UR4][R2.64] ;
        /*0060*/                   LDG.E.U16 R4, desc[UR4][R2.64] ;
        /*0070*/                   LDG.E.ENL2.256.CONSTANT R8, R4, desc[UR4][R2.64] ;
        /*0080*/                   LD.E R4, desc[UR4][R2.64] ;
        /*0090*/                   LDGSTS.E.BYPASS.128 [R5], desc[UR4][R2.64] ;
        /*00a0*/                   LDS.128 R4, [R2] ;
        /*00b0*/                   STG.E.U8 desc[UR4][R2.64], R4 ;
        /*00c0*/                   ST.E.64 desc[UR4][R2.64], R4 ;
        /*00d0*/                   STL.64 [R1], R4 ;
        /*00e0*/                   LDL.LU R4, [R1+0x8] ;
        /*00f0*/                   LDC.64 R4, c[0x0][0x210] ;
\t.section\t.text.other,"ax",@progbits
        /*0050*/                   LDG.E.64 R4, desc[UR4][R2.64] ;
"""
    found = {"_Z1kv": Kernel("sm_90", "_Z1kv")}
    disassembly.count_machine_code(text, found)
    kernel = found["_Z1kv"]
    assert kernel.loads == {128: 2, 16: 1, 256: 1, 32: 1}
    assert kernel.stores == {8: 1, 64: 1}
    assert kernel.local == 2


@needs_nvcc
def test_without_nvdisasm_accesses_are_counted_in_the_ptx(monkeypatch):
    find = toolkit.tool
    monkeypatch.setattr(toolkit, "tool", lambda name: None if name == "nvdisasm" else find(name))
    found = {kernel.name: kernel for kernel in machine_code._compiled(FAULTS, "sm_90")}
    assert {kernel.counted_in for kernel in found.values()} == {"PTX"}
    assert found["clean"].loads == {128: 1}
    assert found["clean"].stores == {128: 1}
    assert found["narrow"].stores == {32: 1}
    assert found["split_store"].stores == {32: 4}
    assert found["array_in_local_memory"].local > 0
    assert "PTX" not in machine_code.table(found.values())


@needs_nvcc
@pytest.mark.parametrize("target", ["sm_80", "sm_90"])
def test_the_emulators_features_are_cuda(target, tmp_path):
    command = [toolkit.tool("nvcc"), "-std=c++17", f"-arch={target}", "-cubin"]
    command += [f"-I{FEATURES.parents[2] / 'csrc'}", "-Werror", "all-warnings"]
    command += ["-o", str(tmp_path / "features.cubin"), str(FEATURES)]
    result = subprocess.run(command, capture_output=True, text=True, check=False)
    assert result.returncode == 0, result.stderr[-3000:]
