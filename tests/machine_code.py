"""What nvcc makes of the CUDA kernels: registers, spills, shared memory, width of memory accesses.

    python -m tests.machine_code [sm_90 ...]

prints a table. Accesses are counted in the machine code where nvdisasm is found (it is in
the pip package nvidia-cuda-nvdisasm), in the PTX otherwise.
"""

from __future__ import annotations

import functools
import re
import subprocess
import sys
import tempfile
from collections import Counter
from dataclasses import dataclass, field
from pathlib import Path

from .emulator import toolkit

ROOT = Path(__file__).resolve().parents[1]


@dataclass
class Kernel:
    source: str
    name: str  # demangled, without namespaces and parameters
    registers: int = 0
    shared: int = 0
    stack: int = 0
    spill_stores: int = 0
    spill_loads: int = 0
    loads: Counter[int] = field(default_factory=Counter)  # global loads by bits a thread
    stores: Counter[int] = field(default_factory=Counter)


def sources() -> list[str]:
    """CUDA sources with kernels in them."""
    files = sorted((ROOT / "csrc" / "kernels" / "cuda").glob("*.cu"))
    return [file.name for file in files if "__global__" in file.read_text()]


@functools.cache
def kernels(source: str, target: str) -> list[Kernel]:
    """Compiles one source for one target ("sm_90"); raises RuntimeError with nvcc's output."""
    nvcc = toolkit.tool("nvcc")
    if nvcc is None:
        raise RuntimeError("no nvcc")
    with tempfile.TemporaryDirectory() as name:
        folder = Path(name)
        path = ROOT / "csrc" / "kernels" / "cuda" / source
        result = subprocess.run(
            [
                *(nvcc, "-std=c++17", "-O3", "--expt-relaxed-constexpr", "--extended-lambda"),
                *(f"-arch={target}", f"-I{ROOT / 'csrc'}", "-Xptxas=-v", "--keep"),
                *("--keep-dir", name, "-cubin", str(path), "-o", str(folder / "out.cubin")),
            ],
            capture_output=True,
            text=True,
            check=False,
        )
        if result.returncode != 0:
            raise RuntimeError(result.stdout + result.stderr)
        found = _resources(source, result.stderr)
        if (nvdisasm := toolkit.tool("nvdisasm")) is not None:
            text = subprocess.run(
                [nvdisasm, str(folder / "out.cubin")], capture_output=True, text=True, check=True
            ).stdout
            _count_machine_code(text, found)
        else:
            _count_ptx(next(folder.glob("*.ptx")).read_text(), found)
    _demangle(found)
    return list(found.values())


def _resources(source: str, log: str) -> dict[str, Kernel]:
    """From ptxas -v, by mangled name."""
    found: dict[str, Kernel] = {}
    kernel = None
    for line in log.splitlines():
        if match := re.search(r"Compiling entry function '(\w+)'", line):
            kernel = found.setdefault(match[1], Kernel(source, match[1]))
        elif match := re.search(r"Function properties for (\w+)", line):
            kernel = found.get(match[1])
        elif kernel is None:
            continue
        elif match := re.search(r"(\d+) bytes stack frame, (\d+).*stores, (\d+)", line):
            kernel.stack, kernel.spill_stores, kernel.spill_loads = map(int, match.groups())
        elif match := re.search(r"Used (\d+) registers", line):
            kernel.registers = int(match[1])
            if shared := re.search(r"(\d+) bytes smem", line):
                kernel.shared = int(shared[1])
    return found


def _count_machine_code(text: str, found: dict[str, Kernel]) -> None:
    """LDG.E.128.CONSTANT R4, ...: 32 bits where no width is written."""
    kernel = None
    for line in text.splitlines():
        if match := re.match(r"\s*\.section\s+\.text\.(\w+)", line):
            kernel = found.get(match[1])
        elif kernel is not None and (match := re.search(r"\b(LDG|STG)\.([\w.]+)", line)):
            width = re.search(r"(?:^|\.)[US]?(8|16|64|128)(?:\.|$)", match[2])
            bits = int(width[1]) if width else 32
            (kernel.loads if match[1] == "LDG" else kernel.stores)[bits] += 1


def _count_ptx(text: str, found: dict[str, Kernel]) -> None:
    """ld.global.nc.v4.u32: vector length times element bits."""
    for part in re.split(r"\.entry\s+", text)[1:]:
        kernel = found.get(re.match(r"\w+", part)[0])
        if kernel is None:
            continue
        for kind, length, bits in re.findall(
            r"\b(ld|st)\.global(?:\.\w+)*?(?:\.v(\d))?\.[busf](\d+)\b", part
        ):
            counter = kernel.loads if kind == "ld" else kernel.stores
            counter[int(length or 1) * int(bits)] += 1


def _demangle(found: dict[str, Kernel]) -> None:
    text = subprocess.run(
        ["c++filt"], input="\n".join(found), capture_output=True, text=True, check=True
    ).stdout
    for mangled, demangled in zip(found, text.splitlines(), strict=True):
        short = re.sub(
            r"\(anonymous namespace\)::|_GLOBAL__N__\w+::|batchops::(cuda::)?", "", demangled
        )
        short = short.removeprefix("void ")
        short = short.replace("(Layout)0", "channels_first").replace("(Layout)1", "channels_last")
        short = re.sub(r">\(.*\)$", ">", short)
        found[mangled].name = re.sub(r"\(\w+(, .*)?\)$", "", short)


def _share(counter: Counter[int]) -> str:
    total = sum(counter.values())
    return f"{counter[128]}/{total}" if total else "-"


def table(rows: list[Kernel]) -> str:
    width = max(len(row.name) for row in rows)
    lines = [
        f"{'kernel':{width}}  regs  shared  stack  spills  128-bit loads  128-bit stores",
    ]
    for row in sorted(rows, key=lambda r: r.name):
        lines.append(
            f"{row.name:{width}}  {row.registers:4}  {row.shared:6}  {row.stack:5}  "
            f"{row.spill_stores + row.spill_loads:6}  {_share(row.loads):>13}  "
            f"{_share(row.stores):>14}"
        )
    return "\n".join(lines)


def main() -> None:
    counted = "machine code" if toolkit.tool("nvdisasm") else "PTX"
    for target in sys.argv[1:] or ["sm_90"]:
        rows = [kernel for source in sources() for kernel in kernels(source, target)]
        print(f"{target}, accesses counted in {counted}\n{table(rows)}\n")


if __name__ == "__main__":
    main()
