"""Finds the CUDA toolkit's headers and nvcc: CUDA_HOME, nvcc on PATH, or the pip packages."""

from __future__ import annotations

import importlib.util
import os
import shutil
import subprocess
from functools import cache
from pathlib import Path


def required() -> bool:
    """Whether tests fail where a part of the toolkit is missing, rather than being skipped."""
    return os.environ.get("BATCHOPS_REQUIRE_CUDA_TOOLKIT", "0") == "1"


@cache
def _candidates() -> list[Path]:
    found: list[Path] = []
    for variable in ("CUDA_HOME", "CUDA_PATH"):
        if os.environ.get(variable):
            found.append(Path(os.environ[variable]))
    if nvcc := shutil.which("nvcc"):
        found.append(Path(nvcc).resolve().parents[1])
        # nvcc may be a wrapper script: it says itself where its toolkit is.
        dry = subprocess.run(
            [nvcc, "--dryrun", "-x", "cu", os.devnull], capture_output=True, text=True, check=False
        )
        found += [
            Path(line.split("TOP=", 1)[1].strip())
            for line in dry.stderr.splitlines()
            if "TOP=" in line
        ]
    found.append(Path("/usr/local/cuda"))
    # pip: nvidia/cu13 (CUDA 13), nvidia/cuda_runtime and its neighbours (CUDA 12).
    if (spec := importlib.util.find_spec("nvidia")) and spec.submodule_search_locations:
        for place in spec.submodule_search_locations:
            found += sorted(Path(place).glob("cu*"))
    return found


def include_dir() -> Path | None:
    """The folder with cuda_runtime_api.h, cuda_fp16.h and cuda_bf16.h, or None."""
    wanted = ("cuda_runtime_api.h", "cuda_fp16.h", "cuda_bf16.h")
    for root in _candidates():
        for folder in (root / "include", root / "targets" / "x86_64-linux" / "include"):
            if all((folder / name).is_file() for name in wanted):
                return folder
    return None


def tool(name: str) -> str | None:
    """The path of nvcc, nvdisasm or another program of the toolkit, or None."""
    if on_path := shutil.which(name):
        return on_path
    for root in _candidates():
        if (root / "bin" / name).is_file():
            return str(root / "bin" / name)
    return None
