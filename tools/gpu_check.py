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
  bench      the benches on the GPU, and the report under --out; BENCH_ARGS in the place of --quick

The whole is over after --minutes: each part gets its share of what is left, and what it does not
need goes to the later ones. The exit status is 1 where a part failed; out/gpu/parts.json holds the
parts' seconds and outcomes.
"""

from __future__ import annotations

import argparse
import contextlib
import importlib.util
import json
import os
import shutil
import signal
import subprocess
import sys
import time
from collections.abc import Sequence
from pathlib import Path

ROOT = Path(__file__).resolve().parents[1]
SANITIZERS = ("memcheck", "racecheck", "synccheck")
PARTS = ("build", "tests", *SANITIZERS, "bench")
SANITIZER_FAILED = 9
# Shares of the time that is left. Nothing can be said without a build.
SHARES = {"build": 20, "tests": 6, "memcheck": 2, "racecheck": 1, "synccheck": 1, "bench": 3}
REPORT_SECONDS = 30.0  # with what an interrupted run takes to end
GRACE_SECONDS = 10.0
RUN = "cuda.json"  # the benches' own file
# Their sources are compiled for the emulator while they are collected: of no use to a GPU.
WITHOUT_EMULATOR = "--ignore-glob=*/test_emulator*"


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
        return [
            [python, "-m", "pytest", "-q", *all_cores(), WITHOUT_EMULATOR, "-m", "cuda", "tests"]
        ]
    if part in SANITIZERS:
        check = [sanitizer(), "--tool", part, "--error-exitcode", str(SANITIZER_FAILED)]
        # torch's own kernels, and errors of calls that torch tries and handles, are not ours.
        check += ["--report-api-errors", "no", *only_our_kernels()]
        reduced = ["-q", "-p", "no:cacheprovider", WITHOUT_EMULATOR, "-m", "cuda and reduced"]
        return [
            [*check, python, "-m", "batchops", "--device", "cuda"],
            [*check, python, "-m", "pytest", *reduced, "tests"],
        ]
    bench = [python, "-m", "pytest", "bench", "-q", "--device", "cuda"]
    arguments = os.environ.get("BENCH_ARGS", "").split() or ["--quick"]
    return [[*bench, f"--benchmark-json={out / RUN}", *arguments]]


def report(out: Path) -> list[str]:
    script = str(ROOT / "bench" / "report.py")
    return [sys.executable, script, str(out / RUN), "--out", str(out / "results")]


def all_cores() -> list[str]:
    """Most of a test's time is the reference's, on the CPU."""
    return ["-n", "auto"] if importlib.util.find_spec("xdist") else []


def only_our_kernels() -> list[str]:
    """The option that keeps compute-sanitizer to kernels with batchops in their names; its own name
    has changed."""
    asked = subprocess.run([sanitizer(), "--help"], capture_output=True, text=True, check=False)
    for option in ("--kernel-name", "--filter"):
        if option in asked.stdout:
            return [option, "kernel_substring=batchops"]
    return []


def environment_of(part: str) -> dict[str, str]:
    if part != "memcheck":
        return dict(os.environ)
    # So that each tensor is an allocation of its own, with bounds.
    return os.environ | {"PYTORCH_NO_CUDA_MEMORY_CACHING": "1"}


def run(command: list[str], environment: dict[str, str], seconds: float) -> int | None:
    """The exit status; None where it had to be stopped, with all that it had started."""
    print("+", *command, flush=True)
    # A shell without a terminal has its background jobs ignore interrupts, and so their children.
    before = signal.signal(signal.SIGINT, signal.default_int_handler)
    try:
        process = subprocess.Popen(command, cwd=ROOT, env=environment, start_new_session=True)
    finally:
        signal.signal(signal.SIGINT, before)
    try:
        return process.wait(max(seconds, 1))
    except subprocess.TimeoutExpired:
        # Interrupted, pytest still writes down what it has.
        os.killpg(process.pid, signal.SIGINT)
        with contextlib.suppress(subprocess.TimeoutExpired):
            process.wait(GRACE_SECONDS)
        return None
    finally:
        with contextlib.suppress(ProcessLookupError):
            os.killpg(process.pid, signal.SIGKILL)
        process.wait()


def run_part(part: str, out: Path, seconds: float) -> tuple[str, float]:
    """What came of it, in a word or two, and its seconds."""
    begun = time.monotonic()
    words = "ok"
    try:
        for command in commands(part, out):
            status = run(command, environment_of(part), seconds - (time.monotonic() - begun))
            if status is None:
                words = "out of time"
            elif status != 0:
                found = part in SANITIZERS and status == SANITIZER_FAILED
                words = "errors were found" if found else f"exit status {status}"
            if words != "ok":
                break
        if part == "bench" and (out / RUN).exists():  # what there is, whatever became of the rest
            status = run(report(out), dict(os.environ), REPORT_SECONDS)
            if status != 0 and words == "ok":
                words = f"report: exit status {status}"
    except FileNotFoundError as error:
        words = str(error)
    return words, time.monotonic() - begun


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
    if "bench" in chosen:
        (options.out / RUN).unlink(missing_ok=True)  # an earlier run's
    for k, part in enumerate(chosen):
        share = SHARES[part] / sum(SHARES[later] for later in chosen[k:])
        left = deadline - time.monotonic() - (REPORT_SECONDS if "bench" in chosen else 0)
        words, seconds = run_part(part, options.out.resolve(), left * share)
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
