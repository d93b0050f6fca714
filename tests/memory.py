"""How much memory a call takes at its height."""

from __future__ import annotations

import ctypes
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest


def _kilobytes(field: str) -> int:
    for line in Path("/proc/self/status").read_text().splitlines():
        if line.startswith(field + ":"):
            return int(line.split()[1])
    pytest.skip(f"/proc/self/status has no {field} here")


def bytes_at_its_height(call: Callable[[], Any]) -> int:
    """Resident memory of the process at its height during the call, less that before: whoever
    allocates it, torch or the kernels. Linux only."""
    try:
        # What was freed before and kept would be taken again unseen.
        ctypes.CDLL(None).malloc_trim(0)
    except AttributeError:
        pytest.skip("needs glibc's malloc_trim")
    try:
        Path("/proc/self/clear_refs").write_text("5")  # the height is now the present
    except OSError as error:
        pytest.skip(f"the height of resident memory cannot be reset: {error}")
    before = _kilobytes("VmRSS")
    call()
    return (_kilobytes("VmHWM") - before) * 1024
