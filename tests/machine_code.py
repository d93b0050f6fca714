"""What nvcc makes of the CUDA kernels: registers, spills, stack, shared memory, occupancy, and the
width of global memory accesses.

    python -m tests.machine_code [sm_90 ...] [--summary] [--markdown] [--library]

prints a table for each target (sm_75, sm_80, sm_90 and sm_100 by default), with a line for each
instance or, with --summary, for each kernel, layout and unit. --library reads the installed build,
for the targets that it has, rather than compiling. Accesses are counted in the
machine code where nvdisasm is found (it is in the pip package nvidia-cuda-nvdisasm), in the PTX
otherwise; the table says which. What is compiled is kept in build/machine_code/ by content.
"""

from __future__ import annotations

import argparse
import hashlib
import json
import os
import subprocess
import tempfile
from collections import Counter
from collections.abc import Callable, Iterable
from concurrent.futures import ThreadPoolExecutor
from functools import cache
from pathlib import Path

from . import disassembly, occupancy
from .disassembly import Kernel
from .emulator import toolkit
from .kept import alone, forget_old

ROOT = Path(__file__).resolve().parents[1]
FOLDER = ROOT / "csrc" / "kernels" / "cuda"
CACHE = ROOT / "build" / "machine_code"
TARGETS = ("sm_75", "sm_80", "sm_90", "sm_100")
# Those of CMakeLists.txt and cmake/cuda.cmake that code generation depends on.
FLAGS = ("-std=c++17", "-O3", "-DNDEBUG", "--expt-relaxed-constexpr", "--extended-lambda")


def sources() -> list[Path]:
    """CUDA sources with kernels in them."""
    return [file for file in sorted(FOLDER.glob("*.cu")) if "__global__" in file.read_text()]


def kernels(source: Path, target: str) -> list[Kernel]:
    """Compiles one source for one target ("sm_90"); raises RuntimeError with nvcc's output."""
    name = f"{source.stem}.{target}.{_content_hash(source, target)}"
    return _kept(name, lambda: _compiled(source, target))


def compile_all(paths: Iterable[Path], targets: Iterable[str]) -> dict[tuple[str, str], list]:
    """kernels() of every source for every target, by (source's name, target), in parallel."""
    pairs = [(path, target) for path in paths for target in targets]
    pairs.sort(key=lambda pair: -pair[0].stat().st_size)  # the longest first
    with ThreadPoolExecutor(max_workers=os.cpu_count()) as pool:
        results = pool.map(lambda pair: kernels(*pair), pairs)
        return {(path.name, t): found for (path, t), found in zip(pairs, results, strict=True)}


def built_library() -> Path | None:
    """The installed build's kernels; None where it has none for CUDA."""
    import batchops
    from batchops import _binding

    if not _binding.core.built_with_cuda():
        return None
    return Path(batchops._C.__file__).with_name("libbatchops_core.so")


def library_kernels(library: Path) -> list[Kernel]:
    """The kernels in a built library, of all its targets. Bytes of spills are not told there; the
    local memory accesses that they come to are."""
    cuobjdump, nvdisasm = toolkit.tool("cuobjdump"), toolkit.tool("nvdisasm")
    if cuobjdump is None or nvdisasm is None:
        raise RuntimeError("needs cuobjdump and nvdisasm")
    digest = hashlib.sha256(library.read_bytes())
    digest.update(Path(__file__).read_bytes() + Path(disassembly.__file__).read_bytes())
    return _kept(f"library.{digest.hexdigest()[:16]}", lambda: _read(library, cuobjdump, nvdisasm))


def _read(library: Path, cuobjdump: str, nvdisasm: str) -> list[Kernel]:
    def read(cubin: Path) -> list[Kernel]:
        target = cubin.name.split(".")[-2]
        usage = _output([cuobjdump, "-res-usage", str(cubin)])
        # From Hopper on it counts what the driver reserves in a block with shared memory.
        hopper = int(target.removeprefix("sm_")) >= 90
        reserved = occupancy.TARGETS[target].shared_reserved if hopper else 0
        found = disassembly.read_library(usage, target, reserved)
        disassembly.read_attributes(_output([cuobjdump, "-elf", str(cubin)]), found)
        disassembly.count_machine_code(_output([nvdisasm, "-c", str(cubin)]), found)
        disassembly.demangle(found)
        return list(found.values())

    with tempfile.TemporaryDirectory() as folder, ThreadPoolExecutor(os.cpu_count()) as pool:
        _output([cuobjdump, "-xelf", "all", str(library)], cwd=folder)
        cubins = sorted(Path(folder).glob("*.cubin"))
        return [kernel for found in pool.map(read, cubins) for kernel in found]


def checked_kernels() -> dict[str, list[Kernel]]:
    """What the tests hold to the limits, by target: the installed build's kernels or, where
    BATCHOPS_MACHINE_CODE_TARGETS names targets ("sm_80 sm_100"), what nvcc makes of the sources for
    them. Nothing without a build for CUDA, nvcc or the tools that read machine code."""
    by_target: dict[str, list[Kernel]] = {}
    if named := os.environ.get("BATCHOPS_MACHINE_CODE_TARGETS", "").split():
        for (_, target), found in compile_all(sources(), named).items():
            by_target.setdefault(target, []).extend(found)
    elif (library := built_library()) and toolkit.tool("cuobjdump") and toolkit.tool("nvdisasm"):
        for kernel in library_kernels(library):
            if kernel.target in occupancy.TARGETS:
                by_target.setdefault(kernel.target, []).append(kernel)
    return by_target


def _kept(name: str, find: Callable[[], list[Kernel]]) -> list[Kernel]:
    """What find() returned before, in this process or another."""
    CACHE.mkdir(parents=True, exist_ok=True)
    kept = CACHE / f"{name}.json"
    with alone(kept.with_suffix(".lock")):
        if kept.exists():
            kept.touch()
            return [_restored(values) for values in json.loads(kept.read_text())]
        found = find()
        forget_old(CACHE)
        part = kept.with_suffix(".part")
        part.write_text(json.dumps([vars(kernel) for kernel in found]))
        part.replace(kept)
        return found


def _compiled(source: Path, target: str) -> list[Kernel]:
    nvcc, nvdisasm = toolkit.tool("nvcc"), toolkit.tool("nvdisasm")
    if nvcc is None:
        raise RuntimeError("no nvcc")
    with tempfile.TemporaryDirectory() as name:
        cubin = Path(name) / "out.cubin"
        command = [nvcc, *FLAGS, f"-arch={target}", f"-I{ROOT / 'csrc'}", "-Xptxas=-v"]
        command += ["--keep", "--keep-dir", name, "-cubin", str(source), "-o", str(cubin)]
        result = subprocess.run(command, capture_output=True, text=True, check=False)
        if result.returncode != 0:
            raise RuntimeError(f"{' '.join(command)}\n{result.stdout}{result.stderr}")
        found = disassembly.read_resources(result.stderr, target)
        ptx = next(Path(name).glob("*.ptx")).read_text()
        disassembly.read_launch_bounds(ptx, found)
        if nvdisasm is not None:
            disassembly.count_machine_code(_output([nvdisasm, "-c", str(cubin)]), found)
        else:
            disassembly.count_ptx(ptx, found)
    disassembly.demangle(found)
    return list(found.values())


def _output(command: list[str], cwd: str | None = None) -> str:
    return subprocess.run(command, cwd=cwd, capture_output=True, text=True, check=True).stdout


@cache
def _versions() -> str:
    tools = [toolkit.tool("nvcc"), toolkit.tool("nvdisasm")]
    return "\0".join(_output([tool, "--version"]) if tool else "" for tool in tools)


def _content_hash(source: Path, target: str) -> str:
    headers = [
        path
        for path in (ROOT / "csrc" / "kernels").rglob("*")
        if path.suffix in {".h", ".cuh", ".inl"} and "cpu" not in path.parts
    ]
    digest = hashlib.sha256("\0".join([*FLAGS, target, _versions()]).encode())
    for path in [source, Path(__file__), Path(disassembly.__file__), *sorted(headers)]:
        digest.update(path.read_bytes())
    return digest.hexdigest()[:16]


def _restored(values: dict) -> Kernel:
    for name in ("loads", "stores"):
        values[name] = Counter({int(bits): count for bits, count in values[name].items()})
    return Kernel(**values)


def residency(kernel: Kernel, dynamic_shared: int = 0) -> occupancy.Resident:
    """With blocks as large as the launch bounds allow, which is how every kernel is launched."""
    return occupancy.resident(
        kernel.target,
        threads=kernel.threads,
        registers=kernel.registers,
        shared=kernel.shared + dynamic_shared,
        barriers=kernel.barriers,
    )


def wide(counter: Counter[int]) -> int:
    """Accesses of 16 bytes a thread and more."""
    return sum(count for bits, count in counter.items() if bits >= 128)


def _share(counter: Counter[int]) -> str:
    total = sum(counter.values())
    return f"{wide(counter)}/{total}" if total else "-"


COLUMNS = (
    *("kernel", "registers", "spills", "stack", "local", "shared", "128-bit loads"),
    *("128-bit stores", "blocks", "occupancy", "limited by"),
)


def _row(kernel: Kernel) -> list[str]:
    fits = residency(kernel) if kernel.threads else None
    return [
        kernel.name,
        str(kernel.registers),
        str(kernel.spill_stores + kernel.spill_loads),
        str(kernel.stack),
        str(kernel.local),
        str(kernel.shared),
        _share(kernel.loads),
        _share(kernel.stores),
        str(fits.blocks) if fits else "?",
        f"{100 * fits.share:.0f} %" if fits else "?",
        fits.limited_by if fits else "?",
    ]


def table(rows: Iterable[Kernel], markdown: bool = False) -> str:
    """Spills, stack and shared in bytes; accesses as 128-bit ones / all, by count in the code."""
    cells = [_row(kernel) for kernel in sorted(rows, key=lambda k: k.name)]
    return _laid_out(list(COLUMNS), cells, markdown)


def _family(kernel: Kernel) -> str:
    unit = f"{kernel.unit // 8} bytes" if kernel.unit else None
    return ", ".join(part for part in (kernel.base, kernel.layout, unit) if part)


def _range(values: Iterable[float], unit: str = "") -> str:
    found = sorted(values)
    if not found:
        return "-"
    low, high = f"{found[0]:.0f}", f"{found[-1]:.0f}"
    return (low if low == high else f"{low}-{high}") + unit


def summary(rows: Iterable[Kernel], markdown: bool = False) -> str:
    """A line for each kernel, layout and unit: least and most over dtypes and activations."""
    groups: dict[str, list[Kernel]] = {}
    for kernel in sorted(rows, key=lambda k: (k.base, k.layout or "", -(k.unit or 0))):
        groups.setdefault(_family(kernel), []).append(kernel)

    def share(counters: list[Counter[int]]) -> str:
        return _range((100 * wide(c) / sum(c.values()) for c in counters if c), " %")

    cells = []
    for name, group in groups.items():
        fits = [residency(kernel) for kernel in group if kernel.threads]
        cells.append(
            [
                name,
                str(len(group)),
                _range(k.registers for k in group),
                str(sum(k.spill_stores + k.spill_loads + k.stack + k.local for k in group)),
                _range(k.shared for k in group),
                share([k.loads for k in group]),
                share([k.stores for k in group]),
                _range(fit.blocks for fit in fits),
                _range((100 * fit.share for fit in fits), " %"),
            ]
        )
    columns = ["kernel, layout, unit", "instances", "registers", "spills, stack, local", "shared"]
    columns += ["128-bit loads", "128-bit stores", "blocks", "occupancy"]
    return _laid_out(columns, cells, markdown)


def _laid_out(columns: list[str], cells: list[list[str]], markdown: bool) -> str:
    if markdown:
        lines = ["| " + " | ".join(columns) + " |", "| --- |" + " ---: |" * (len(columns) - 1)]
        return "\n".join([*lines, *(f"| `{row[0]}` | {' | '.join(row[1:])} |" for row in cells)])
    rows = [columns, *cells]
    widths = [max(len(row[i]) for row in rows) for i in range(len(columns))]
    return "\n".join(
        f"{row[0]:{widths[0]}}  "
        + "  ".join(f"{cell:>{width}}" for cell, width in zip(row[1:], widths[1:], strict=True))
        for row in rows
    )


def main() -> None:
    parser = argparse.ArgumentParser(
        prog="python -m tests.machine_code", description=__doc__.split("\n\n")[0]
    )
    parser.add_argument("targets", nargs="*", default=TARGETS)
    parser.add_argument("--summary", action="store_true", help="one line for all dtypes")
    parser.add_argument("--markdown", action="store_true")
    parser.add_argument("--library", action="store_true", help="of the installed build")
    options = parser.parse_args()
    if unknown := set(options.targets) - set(occupancy.TARGETS):
        parser.error(f"expected targets among {', '.join(occupancy.TARGETS)}, got {unknown}")
    if not options.library and toolkit.tool("nvcc") is None:
        parser.error("needs nvcc, on PATH or under CUDA_HOME")
    if options.library:
        library = built_library()
        if library is None:
            parser.error("the installed build is without CUDA")
        found = library_kernels(library)
    else:
        groups = compile_all(sources(), options.targets)
        found = [kernel for group in groups.values() for kernel in group]
    for target in options.targets:
        rows = [kernel for kernel in found if kernel.target == target]
        if rows:
            counted = " and ".join({row.counted_in for row in rows})
            heading = f"{target}, accesses counted in {counted}"
            print(f"{'### ' if options.markdown else ''}{heading}\n")
            lay_out = summary if options.summary else table
            print(lay_out(rows, options.markdown) + "\n")


if __name__ == "__main__":
    main()
