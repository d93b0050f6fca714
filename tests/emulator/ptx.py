"""The PTX of the installed build, run by the emulator in place of its kernels' C++.

With BATCHOPS_EMULATOR_PTX=1 every emulated kernel of the other tests runs as that, and with the
path of a folder as the PTX that lies there; or, for one library:

    with ptx.running(library):
        run(library, problem)          # as ever
        counts = ptx.take_counts(library)

What nvcc makes of inline assembly, of what is compiled under __CUDA_ARCH__ and of every access is
then what runs (ptx_machine.h).
"""

from __future__ import annotations

import ctypes
import hashlib
import os
import shutil
import subprocess
import tempfile
from collections import Counter
from collections.abc import Iterable, Iterator
from contextlib import contextmanager
from functools import cache
from pathlib import Path
from typing import NamedTuple

import pytest

from .. import machine_code
from ..kept import alone
from . import build, emulator, toolkit


def _skip(reason: str) -> None:
    if toolkit.required():
        raise RuntimeError(reason)
    pytest.skip(reason)


@cache
def files() -> tuple[Path, ...]:
    """The folder's that BATCHOPS_EMULATOR_PTX names, or the installed build's PTX, one file a
    source; skips where it has none."""
    wanted = os.environ.get("BATCHOPS_EMULATOR_PTX", "0")
    if wanted not in ("0", "1"):
        return tuple(sorted(Path(wanted).glob("*.ptx")))
    library, cuobjdump = machine_code.built_library(), toolkit.tool("cuobjdump")
    if library is None or cuobjdump is None:
        _skip("needs a build with CUDA, and cuobjdump")
    digest = hashlib.sha256(library.read_bytes()).hexdigest()[:16]
    folder = build.CACHE / f"ptx-{digest}"
    build.CACHE.mkdir(parents=True, exist_ok=True)
    with alone(build.CACHE / "ptx.lock"):
        if not folder.exists():
            part = folder.with_suffix(".part")
            shutil.rmtree(part, ignore_errors=True)  # of who was interrupted
            part.mkdir()
            command = [cuobjdump, "-xptx", "all", str(library)]
            subprocess.run(command, cwd=part, capture_output=True, check=True)
            part.rename(folder)
    found = tuple(sorted(folder.glob("*.ptx")))
    if not found:
        _skip("the build has no PTX: its targets are all real ones, as 90-real")
    return found


def load(library: ctypes.CDLL, path: Path) -> None:
    emulator.call(library.emulator_load_ptx, str(path).encode())


def load_as_wanted(library: ctypes.CDLL) -> None:
    """What BATCHOPS_EMULATOR_PTX says, if it does."""
    if os.environ.get("BATCHOPS_EMULATOR_PTX", "0") != "0":
        for path in files():
            load(library, path)


_running: dict[int, list[tuple[Path, ...]]] = {}  # by library, the innermost last


@contextmanager
def running(library: ctypes.CDLL, *paths: Path) -> Iterator[None]:
    """Kernels run as PTX: of these files, or else of the installed build. May be nested."""
    stack = _running.setdefault(library._handle, [])
    stack.append(paths or files())
    try:
        _load_innermost(library)
        yield
    finally:
        stack.pop()
        _load_innermost(library)


def _load_innermost(library: ctypes.CDLL) -> None:
    library.emulator_forget_ptx()
    for path in (_running[library._handle] or [()])[-1]:
        load(library, path)


def unknown_instructions(library: ctypes.CDLL) -> list[str]:
    """Of what is loaded, those that the machine does not know."""
    return _said(library.emulator_unknown_ptx).splitlines()


class Count(NamedTuple):
    """How often an instruction of a file has run."""

    runs: int
    name: str
    line: int
    file: str


def take_lines(library: ctypes.CDLL) -> list[Count]:
    """Instructions that threads have run, by their places, since this was last asked."""
    with tempfile.NamedTemporaryFile("r") as written:
        emulator.call(library.emulator_take_ptx_counts, written.name.encode())
        lines = [line.rstrip("\n").split(" ", 3) for line in written]
    return [Count(int(runs), name, int(line), file) for runs, name, line, file in lines]


def by_name(lines: Iterable[Count]) -> Counter[str]:
    counts: Counter[str] = Counter()
    for line in lines:
        counts[line.name] += line.runs
    return counts


def take_counts(library: ctypes.CDLL) -> dict[str, int]:
    """The same, added up by name."""
    return dict(by_name(take_lines(library)))


def _said(function: ctypes._NamedFuncPointer) -> str:
    text = ctypes.create_string_buffer(1 << 16)
    function(text, ctypes.c_size_t(len(text)))
    return text.value.decode()
