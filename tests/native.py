"""Reaches below the torch operators: CPU kernels through ctypes, and at every instruction set."""

from __future__ import annotations

import ctypes
import os
import shutil
import subprocess
import sys
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[1]
# As CMakeLists.txt compiles the kernels.
FLAGS = ["-std=c++20", "-O2", "-fno-math-errno", "-fno-trapping-math", "-ffp-contract=fast"]


def instruction_sets() -> list[str]:
    """Those compiled for this kind of machine that it can also run, best first."""
    if os.uname().machine != "x86_64":
        return ["baseline"]
    flags = Path("/proc/cpuinfo").read_text().split() if Path("/proc/cpuinfo").exists() else []
    needs = {"avx512": ("avx512f", "avx512bw", "avx512dq", "avx512vl"), "avx2": ("avx2", "fma")}
    return [isa for isa, need in needs.items() if all(n in flags for n in need)] + ["baseline"]


def other_instruction_sets() -> list[str]:
    """What BATCHOPS_CPU_CAPABILITY names them, but for the best: that is this process's own."""
    return ["default" if isa == "baseline" else isa for isa in instruction_sets()[1:]]


def run_python(capability: str, *arguments: str) -> subprocess.CompletedProcess[str]:
    """python at BATCHOPS_CPU_CAPABILITY, which is read once a process."""
    return subprocess.run(
        [sys.executable, *arguments],
        env={**os.environ, "BATCHOPS_CPU_CAPABILITY": capability},
        cwd=ROOT,
        capture_output=True,
        text=True,
    )


def compile_library(folder: Path, *sources: str) -> ctypes.CDLL:
    """The sources, relative to the repository, as one shared library in `folder`."""
    compiler = os.environ.get("CXX") or shutil.which("g++") or shutil.which("clang++")
    if compiler is None:
        pytest.skip("needs g++ or clang++ on PATH, or CXX", allow_module_level=True)
    library = folder / (Path(sources[0]).stem + ".so")
    command = [compiler, *FLAGS, "-shared", "-fPIC", "-fvisibility=hidden"]
    command += [f"-I{ROOT / 'csrc'}", f"-I{ROOT / 'tests/kernels'}"]
    command += [str(ROOT / source) for source in sources]
    built = subprocess.run([*command, "-o", str(library)], capture_output=True, text=True)
    assert built.returncode == 0, built.stderr
    return ctypes.CDLL(str(library))
