"""Builds batchops for this machine's NVIDIA GPU, tests it there, and measures.

    python tools/gpu_check.py                      all parts, in order
    python tools/gpu_check.py tests memcheck       some

Uses the environment that is active (torch 2.11 or newer with CUDA, pybind11, scikit-build-core,
pytest, pytest-benchmark); nothing is downloaded. Parts:

  build      pip install, for the GPUs that are here (CUDA_ARCHS names others)
  tests      the tests with the marker cuda
  memcheck, racecheck, synccheck
             compute-sanitizer over `python -m batchops --device cuda` and the tests with the
             markers cuda and reduced
  bench      the benches on the GPU, and the report under --out

Each part is stopped where --minutes of the whole are over. The exit status is 1 where a part
failed; out/gpu/parts.json holds the parts' seconds and outcomes.
"""

from __future__ import annotations

import argparse
import json
import os
import shutil
import subprocess
import sys
import time
from collections.abc import Sequence
from pathlib import Path

ROOT = Path(__file__).resolve().parents[1]
SANITIZERS = ("memcheck", "racecheck", "synccheck")
PARTS = ("build", "tests", *SANITIZERS, "bench")
SANITIZER_FAILED = 9


def sanitizer() -> str:
    """compute-sanitizer of the PATH or of the toolkit that nvcc belongs to."""
    found = shutil.which("compute-sanitizer")
    nvcc = shutil.which("nvcc")
    if found is None and nvcc is not None:
        beside = Path(nvcc).resolve().parent / "compute-sanitizer"
        found = str(beside) if beside.exists() else None
    if found is None:
        raise FileNotFoundError("expected compute-sanitizer on the PATH or beside nvcc")
    return found


def commands(part: str, out: Path) -> list[list[str]]:
    python = sys.executable
    if part == "build":
        targets = os.environ.get("CUDA_ARCHS") or "native"
        pip = [python, "-m", "pip", "install", "--no-build-isolation", "--no-deps", str(ROOT)]
        define = "cmake.define."
        return [
            [
                *pip,
                *("-C", f"{define}BATCHOPS_CUDA=ON"),
                *("-C", f"{define}CMAKE_CUDA_ARCHITECTURES={targets}"),
            ]
        ]
    if part == "tests":
        return [[python, "-m", "pytest", "-q", "-m", "cuda"]]
    if part in SANITIZERS:
        check = [sanitizer(), "--tool", part, "--error-exitcode", str(SANITIZER_FAILED)]
        reduced = ["pytest", "-q", "-p", "no:cacheprovider", "-m", "cuda and reduced"]
        return [
            [*check, python, "-m", "batchops", "--device", "cuda"],
            [*check, python, "-m", *reduced],
        ]
    run = str(out / "cuda.json")
    bench = [python, "-m", "pytest", "bench", "-q", "--device", "cuda", f"--benchmark-json={run}"]
    return [
        [*bench, *os.environ.get("BENCH_ARGS", "").split()],
        [python, str(ROOT / "bench" / "report.py"), run, "--out", str(out / "results")],
    ]


def run_part(part: str, out: Path, seconds: float) -> tuple[str, float]:
    """What came of it, in a word or two, and its seconds."""
    begun = time.monotonic()
    try:
        for command in commands(part, out):
            print("+", *command, flush=True)
            left = seconds - (time.monotonic() - begun)
            status = subprocess.run(command, cwd=ROOT, timeout=max(left, 1)).returncode
            if status != 0:
                found = part in SANITIZERS and status == SANITIZER_FAILED
                words = "errors were found" if found else f"exit status {status}"
                return words, time.monotonic() - begun
    except subprocess.TimeoutExpired:
        return "out of time", time.monotonic() - begun
    except FileNotFoundError as error:
        return str(error), time.monotonic() - begun
    return "ok", time.monotonic() - begun


def main(arguments: Sequence[str] | None = None) -> int:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("parts", nargs="*", metavar="part", help=f"of {', '.join(PARTS)}")
    parser.add_argument("--minutes", type=float, default=9.0, help="for all of it")
    parser.add_argument("--out", type=Path, default=ROOT / "out" / "gpu")
    options = parser.parse_args(arguments)
    unknown = [part for part in options.parts if part not in PARTS]
    if unknown:
        parser.error(f"expected parts of {', '.join(PARTS)}, got {', '.join(unknown)}")
    chosen = [part for part in PARTS if part in options.parts or not options.parts]

    options.out.mkdir(parents=True, exist_ok=True)
    deadline = time.monotonic() + 60 * options.minutes
    outcomes: dict[str, dict[str, object]] = {}
    for part in chosen:
        words, seconds = run_part(part, options.out.resolve(), deadline - time.monotonic())
        outcomes[part] = {"outcome": words, "seconds": round(seconds, 1)}
        (options.out / "parts.json").write_text(json.dumps(outcomes, indent=1) + "\n")
        if part == "build" and words != "ok":
            break  # the rest would check another build
    print()
    for part, found in outcomes.items():
        print(f"{part:<10} {found['seconds']:>7} s  {found['outcome']}")
    return 0 if all(found["outcome"] == "ok" for found in outcomes.values()) else 1


if __name__ == "__main__":
    sys.exit(main())
