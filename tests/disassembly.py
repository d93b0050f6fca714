"""Reads what nvcc's tools print about kernels: ptxas -v, PTX, nvdisasm, cuobjdump -res-usage.

Every function takes the printed text and the kernels found so far, by mangled name, and fills in
what that text tells.
"""

from __future__ import annotations

import re
import subprocess
from collections import Counter
from dataclasses import dataclass, field

BITS = {"float": 32, "__half": 16, "__nv_bfloat16": 16}


@dataclass
class Kernel:
    target: str
    name: str  # demangled, without namespaces and parameters
    registers: int = 0
    shared: int = 0  # static, bytes
    barriers: int = 0
    threads: int = 0  # of a block at most, by __launch_bounds__; 0 where there is none
    stack: int = 0  # bytes a thread
    spill_stores: int = 0
    spill_loads: int = 0
    local: int = 0  # instructions that access local memory
    loads: Counter[int] = field(default_factory=Counter)  # from global memory, by bits a thread
    stores: Counter[int] = field(default_factory=Counter)
    counted_in: str = ""  # "machine code" or "PTX"

    @property
    def base(self) -> str:
        """The name without template arguments."""
        return self.name.split("<")[0]

    @property
    def arguments(self) -> list[str]:
        match = re.search(r"<(.*)>", self.name)
        return match[1].split(", ") if match else []

    @property
    def layout(self) -> str | None:
        """channels_first, channels_last or None, from the template arguments."""
        return next((a for a in self.arguments if a.startswith("channels_")), None)

    @property
    def unit(self) -> int | None:
        """Bits a thread moves at once: element type times width, from the template arguments."""
        bits = next((BITS[a] for a in self.arguments if a in BITS), None)
        width = next((int(a) for a in self.arguments if a.isdigit()), None)
        return bits * width if bits and width else None


Kernels = dict[str, Kernel]


def read_resources(log: str, target: str) -> Kernels:
    """ptxas -v: the kernels, their registers, stack, spills, static shared memory, barriers."""
    found: Kernels = {}
    kernel = None
    for line in log.splitlines():
        if match := re.search(r"Compiling entry function '(\w+)'", line):
            kernel = found.setdefault(match[1], Kernel(target, match[1]))
        elif match := re.search(r"Function properties for (\w+)", line):
            kernel = found.get(match[1])
        elif kernel is None:
            continue
        elif match := re.search(r"(\d+) bytes stack frame, (\d+).*stores, (\d+)", line):
            kernel.stack, kernel.spill_stores, kernel.spill_loads = map(int, match.groups())
        elif match := re.search(r"Used (\d+) registers", line):
            kernel.registers = int(match[1])
            if barriers := re.search(r"used (\d+) barriers", line):
                kernel.barriers = int(barriers[1])
            if shared := re.search(r"(\d+) bytes smem", line):
                kernel.shared = int(shared[1])
    return found


def read_library(usage: str, target: str, reserved: int) -> Kernels:
    """cuobjdump -res-usage; its shared memory includes the `reserved` bytes of the driver."""
    found: Kernels = {}
    for name, registers, stack, shared in re.findall(
        r"Function (\w+):\s+REG:(\d+) STACK:(\d+) SHARED:(\d+)", usage
    ):
        found[name] = Kernel(target, name, int(registers), max(0, int(shared) - reserved))
        found[name].stack = int(stack)
    return found


def read_attributes(elf: str, found: Kernels) -> None:
    """cuobjdump -elf: launch bounds and barriers."""
    for section in re.split(r"^\.nv\.info\.", elf, flags=re.MULTILINE)[1:]:
        kernel = found.get(re.match(r"\w+", section)[0])
        if kernel is None:
            continue
        section = section.split("\n.", 1)[0]
        values = dict(
            re.findall(r"Attribute:\s*EIATTR_(\w+)\s+Format:\s*\w+\s+Value:\s*0x(\w+)", section)
        )
        kernel.threads = int(values.get("MAX_THREADS", "0"), 16)
        kernel.barriers = int(values.get("NUM_BARRIERS", "0"), 16)


def read_launch_bounds(ptx: str, found: Kernels) -> None:
    for name, directives in re.findall(r"\.entry\s+(\w+)\(.*?\)([^{]*)\{", ptx, re.DOTALL):
        if name in found and (match := re.search(r"\.maxntid\s+(\d+)", directives)):
            found[name].threads = int(match[1])


# LDG.E.128.CONSTANT R4, [...]; LD and ST are generic: global memory whose pointer came from memory.
# LDGSTS copies from global to shared memory.
_MACHINE_ACCESS = re.compile(r"\s(LDG|LD|LDGSTS|STG|ST|LDL|STL)((?:\.\w+)*)\s")
_WIDTH = re.compile(r"\.[US]?(8|16|64|128|256)(?=\.|$)")


def count_machine_code(text: str, found: Kernels) -> None:
    """nvdisasm: 32 bits where an instruction names no width."""
    kernel = None
    for line in text.splitlines():
        if match := re.match(r"\s*\.section\s+\.text\.(\w+)", line):
            kernel = found.get(match[1])
            if kernel is not None:
                kernel.counted_in = "machine code"
        elif kernel is not None and (match := _MACHINE_ACCESS.search(line)):
            width = _WIDTH.search(match[2])
            _count(kernel, match[1].lower(), int(width[1]) if width else 32)


def count_ptx(text: str, found: Kernels) -> None:
    """ld.global.nc.v4.u32: vector length times element bits. ptxas may still split or merge."""
    access = re.compile(
        r"\s(ld|st)((?:\.(?!v\d|[busf]\d)[\w:]+)*)(?:\.v(\d))?\.[busf](\d+)\s", re.ASCII
    )
    for part in re.split(r"\.entry\s+", text)[1:]:
        kernel = found.get(re.match(r"\w+", part)[0])
        if kernel is None:
            continue
        kernel.counted_in = "PTX"
        for kind, space, length, bits in access.findall(part):
            if ".param" in space or ".shared" in space or ".const" in space:
                continue
            local = "l" if ".local" in space else ""
            _count(kernel, kind + local, int(length or 1) * int(bits))


def _count(kernel: Kernel, kind: str, bits: int) -> None:
    if kind.endswith("l"):
        kernel.local += 1
    elif kind.startswith("ld"):
        kernel.loads[bits] += 1
    else:
        kernel.stores[bits] += 1


def demangle(found: Kernels) -> None:
    text = subprocess.run(
        ["c++filt"], input="\n".join(found), capture_output=True, text=True, check=True
    ).stdout
    for mangled, demangled in zip(found, text.splitlines(), strict=True):
        unnamed = r"\(anonymous namespace\)::|_GLOBAL__N__\w+::"
        namespaces = unnamed + r"|batchops::(cuda::)?(optimizer::)?(\w+_cu::)?"
        short = re.sub(namespaces, "", demangled)
        short = short.removeprefix("void ")
        short = short.replace("(Layout)0", "channels_first").replace("(Layout)1", "channels_last")
        short = re.sub(r">\(.*\)$", ">", short)
        found[mangled].name = re.sub(r"\([^()]*\)$", "", short)
