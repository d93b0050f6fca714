"""Finds and loads the native libraries; every failure says what to type."""

from __future__ import annotations

import ctypes
import importlib.metadata
import pathlib
import sys
from collections.abc import Callable
from typing import Any

import numpy

_REBUILD = f"{sys.executable} -m pip install --no-build-isolation --force-reinstall --no-deps ."

try:
    import torch
except ImportError as error:
    raise ImportError(
        "batchops needs torch 2.11 or newer, and it cannot be imported here. Type:\n"
        f"    {sys.executable} -m pip install torch==2.13.0"
    ) from error

try:
    from . import _C
except ImportError as error:
    raise ImportError(
        f"batchops's native module cannot be loaded ({error}). It is not built, or was built for "
        f"another Python than {sys.version.split()[0]}. In batchops's source folder, type:\n"
        f"    {_REBUILD}"
    ) from error


def _load_operators() -> pathlib.Path:
    """Loads the operator library built for the running torch's minor version."""
    folder = pathlib.Path(_C.__file__).parent
    minor = ".".join(torch.__version__.split(".")[:2])
    library = folder / f"_torch_{minor.replace('.', '_')}.so"
    if not library.exists():
        built = sorted(
            p.stem.removeprefix("_torch_").replace("_", ".") for p in folder.glob("_torch_*.so")
        )
        raise ImportError(
            f"batchops has no operators for torch {torch.__version__}: this build has them for "
            f"torch {', '.join(built) or '(none)'}. Install one of those, or in batchops's source "
            f"folder, type:\n    {_REBUILD}"
        )
    torch.ops.load_library(library)
    return library


def _let_the_collator_read_tensors(library: pathlib.Path) -> None:
    """How a tensor lies in memory differs from torch to torch: the operators' library knows."""
    loaded = ctypes.CDLL(str(library))
    names = (
        "read_tensor",
        "count_writes",
        "prefetch_tensor",
        "prefetch_storage",
        "let_grow",
        "run_on_team",
    )
    functions = [getattr(loaded, f"batchops_{name}") for name in names]
    addresses = [ctypes.cast(function, ctypes.c_void_p).value for function in functions]
    _C.read_tensors_by(torch.Tensor, *addresses, numpy.memmap)


def _calls_of_norms(library: pathlib.Path) -> dict[str, Callable[..., Any]]:
    """Norms' operators by name, without what torch.ops does for operators of any kind, and
    ``count``. Each gives the first output, or NotImplemented where the arguments are not plain."""
    calls = ctypes.PyDLL(str(library)).batchops_norm_calls
    calls.argtypes, calls.restype = [ctypes.py_object] * 2, ctypes.py_object
    found: dict[str, Callable[..., Any]] = calls(torch.Tensor, torch.nn.Parameter)
    return found


operators = _load_operators()
norms = _calls_of_norms(operators)
core = _C
_let_the_collator_read_tensors(operators)


def version() -> str:
    """The installed distribution's version, or "0+source" where there is no distribution."""
    try:
        return importlib.metadata.version("batchops")
    except importlib.metadata.PackageNotFoundError:
        return "0+source"
