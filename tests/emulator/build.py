"""Compiles kernel sources with g++ over the emulator into a shared library, once per content.

    library = build.library("optimizers", ["csrc/kernels/cuda/lamb.cu", ...], ["optimizer_api.cpp"])

Paths are relative to the repository root and to this folder. Objects are kept in
build/emulator/, named by hashes of all headers, the compiler, its flags, and of their source, so
that a second run compiles nothing and a changed header recompiles everything that could see it.
"""

from __future__ import annotations

import ctypes
import hashlib
import os
import shutil
import subprocess
import sys
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from functools import cache, cached_property
from pathlib import Path

import pytest

from ..kept import alone, forget_old
from . import toolkit

HERE = Path(__file__).resolve().parent
ROOT = HERE.parents[1]
CACHE = ROOT / "build" / "emulator"

CORE = (
    "async_copy.cpp",
    "atomics.cpp",
    "control.cpp",
    "fiber.cpp",
    "host_call.cpp",
    "kernel.cpp",
    "launch.cpp",
    "ptx_machine.cpp",
    "ptx_program.cpp",
    "runtime_api.cpp",
    "scheduler.cpp",
    "settings.cpp",
    "shared_memory.cpp",
    "streams.cpp",
    "trap.cpp",
)
FLAGS = (
    "-std=c++20",
    "-fPIC",
    "-Wall",
    "-Wextra",
    "-Wno-unknown-pragmas",  # unroll is for nvcc
    "-fno-strict-aliasing",  # device code reads elements through wider words
    "-ffp-contract=off",  # an fma only where the source asks for one, as the intrinsics do
    "-DBATCHOPS_CUDA_EMULATOR",
)
# Host calls are the emulator's own, also beside a CUDA runtime that torch has loaded.
SHARED = ("-shared", "-Wl,-Bsymbolic")
FAST = ("-O1", "-g1")  # lines for errors that only a signal tells of
FASTER = ("-O2",)  # for the emulator itself: compiled once, and most of the time goes by in it
# Sources that tell of every load and store (instrument.cpp), beside those that listen.
WATCHERS = (
    "instrument.cpp",
    "knowledge.cpp",
    "memory_map.cpp",
    "race.cpp",
    "recorder.cpp",
    "shadow.cpp",
    "traffic.cpp",
)
INSTRUMENTED = (
    "-O1",
    "-g1",  # lines, for reports
    "-fsanitize=thread",
    "--param=tsan-distinguish-volatile=1",
    # A 16-byte access stays one.
    "-fno-tree-sra",
    "-fno-ipa-sra",
    "-fno-builtin-memcpy",
    "-fno-builtin-memmove",
    "-fno-builtin-memset",
    "-DBATCHOPS_EMULATOR_INSTRUMENTED",
    "-include",
    str(HERE / "instrument_prefix.h"),
)
# Optimised, checks of large kernels take five times as long to compile as to run unoptimised; and
# those of pointers take a fifth of it, where ASan tells what is read or written through them.
SANITIZED = (
    "-O0",
    "-g1",
    "-fsanitize=address,undefined",
    "-fno-sanitize=null,pointer-overflow",
    "-fno-sanitize-recover=undefined",
)


def _compiler() -> str:
    compiler = os.environ.get("CXX") or shutil.which("g++")
    if compiler is None:
        pytest.skip("the emulator needs g++ on PATH or in CXX", allow_module_level=True)
    return compiler


@cache
def _version(compiler: str) -> str:
    said = subprocess.run([compiler, "--version"], capture_output=True, text=True, check=True)
    return said.stdout


def _processor_flags() -> tuple[str, ...]:
    """Hardware fma where there is one: the library's is 30 times slower."""
    cpuinfo = Path("/proc/cpuinfo")
    text = cpuinfo.read_text() if cpuinfo.exists() else ""
    return ("-mfma",) if " fma " in text else ()


def _headers_hash(flags: list[str], version: str) -> str:
    digest = hashlib.sha256("\0".join([*flags, version]).encode())
    kernels = ROOT / "csrc" / "kernels"
    files = [path for folder in (kernels, HERE) for path in folder.rglob("*")]
    for path in sorted(files):
        if path.suffix in {".h", ".cuh", ".inl"} and "cpu" not in path.parts:
            digest.update(path.relative_to(ROOT).as_posix().encode())
            digest.update(path.read_bytes())
    return digest.hexdigest()[:16]


@dataclass
class _Unit:
    """Sources that are compiled as one: each reads the same headers, for longer than its own text
    takes."""

    sources: list[Path]

    @cached_property
    def hash(self) -> str:
        digest = hashlib.sha256()
        for source in self.sources:
            digest.update(source.read_bytes())
        return digest.hexdigest()

    @property
    def name(self) -> str:
        return self.sources[0].stem + "_and_more" * (len(self.sources) > 1)

    @property
    def text(self) -> str:
        return "".join(f'#include "{source}"\n' for source in self.sources)


def build(
    name: str,
    kernels: list[str],
    api: list[str],
    sanitize: bool = False,
    instrument: bool = False,
) -> Path:
    """The path of the shared library with `kernels` and `api` in it; compiles what is missing.

    With `sanitize` all of it runs under AddressSanitizer and UndefinedBehaviorSanitizer
    (run_sanitized). With `instrument` kernels and api report each load and store (recording.py).
    Skips the test where g++ or the CUDA headers are missing.
    """
    compiler = _compiler()
    include = toolkit.include_dir()
    if include is None:
        pytest.skip("the emulator needs the CUDA headers: set CUDA_HOME", allow_module_level=True)
    flags = [*FLAGS, *(SANITIZED if sanitize else FAST), *_processor_flags()]
    flags += [f"-I{ROOT / 'csrc'}", f"-I{HERE}", "-isystem", str(include)]
    folder = CACHE / _headers_hash([*flags, *INSTRUMENTED, *FASTER, *SHARED], _version(compiler))
    watched = [_Unit([HERE / file]) for file in api] + [_Unit([ROOT / file]) for file in kernels]
    core, watchers = (_Unit([HERE / file for file in files]) for files in (CORE, WATCHERS))
    units = [*watched, core, *([watchers] if instrument else [])]
    together = hashlib.sha256("".join(unit.hash for unit in units).encode()).hexdigest()[:16]
    suffix = "_sanitized" * sanitize + "_watched" * instrument
    library = folder / f"{name}{suffix}-{together}.so"
    if library.exists():
        return library
    folder.mkdir(parents=True, exist_ok=True)
    with alone(folder / "lock"):
        if library.exists():
            return library
        forget_old(CACHE)

        def compile_one(unit: _Unit) -> Path:
            instrumented = instrument and unit in watched
            suffix = "_sanitized" * sanitize + "_watched" * instrumented
            object_file = folder / f"{unit.name}{suffix}-{unit.hash[:16]}.o"
            if not object_file.exists():
                part = object_file.with_suffix(f".{os.getpid()}.part")
                own = () if unit in watched else FASTER
                more = INSTRUMENTED if instrumented else own
                command = [compiler, *flags, *more, "-x", "c++", "-c", "-o", str(part)]
                if len(unit.sources) == 1:
                    _run([*command, str(unit.sources[0])])
                else:
                    _run([*command, "-"], unit.text)
                part.replace(object_file)
            return object_file

        with ThreadPoolExecutor(max_workers=os.cpu_count()) as pool:
            objects = list(pool.map(compile_one, units))
        part = library.with_suffix(f".{os.getpid()}.part")
        _run([compiler, *flags, *SHARED, *map(str, objects), "-o", str(part)])
        part.replace(library)
        return library


def library(name: str, kernels: list[str], api: list[str], instrument: bool = False) -> ctypes.CDLL:
    """build(), loaded; its kernels as C++, unless the environment asks for PTX (ptx.py)."""
    from . import ptx

    loaded = ctypes.CDLL(str(build(name, kernels, api, instrument=instrument)))
    ptx.load_as_wanted(loaded)
    return loaded


def run_sanitized(module: str, *arguments: str) -> subprocess.CompletedProcess[str]:
    """python -m module arguments..., with the sanitizers' runtimes loaded before anything else."""
    runtimes = [
        subprocess.run(
            [_compiler(), f"-print-file-name={name}"], capture_output=True, text=True, check=True
        ).stdout.strip()
        for name in ("libasan.so", "libubsan.so")
    ]
    environment = os.environ | {
        "LD_PRELOAD": " ".join(runtimes),
        # Python keeps its own memory to the end; only what the kernels touch is of interest.
        "ASAN_OPTIONS": "detect_leaks=0:detect_stack_use_after_return=0",
        "UBSAN_OPTIONS": "print_stacktrace=1",
        "PYTHONMALLOC": "malloc",
    }
    return subprocess.run(
        [sys.executable, "-m", module, *arguments],
        cwd=ROOT,
        env=environment,
        capture_output=True,
        text=True,
        check=False,
    )


def _run(command: list[str], text: str = "") -> None:
    result = subprocess.run(command, input=text, capture_output=True, text=True, check=False)
    if result.returncode != 0:
        raise RuntimeError(f"{' '.join(command)}\n{result.stdout}{result.stderr}")
