"""Sanitizers find accesses one element before or past global, static and dynamic shared memory.

The kernels are in emulator/bounds_faults.cu.
"""

from __future__ import annotations

from itertools import product
from pathlib import Path

import pytest

from .emulator import build
from .emulator.planted import line_of

SOURCE = Path(__file__).parent / "emulator" / "bounds_faults.cu"
KERNELS = [SOURCE.relative_to(build.ROOT).as_posix()]

pytestmark = pytest.mark.sanitizer


@pytest.fixture(scope="module")
def library() -> Path:
    return build.build("bounds_faults", KERNELS, [], sanitize=True)


@pytest.mark.parametrize(
    ("where", "what", "side"),
    list(product(("global", "static", "dynamic"), ("read", "written"), ("before", "past"))),
)
def test_one_element_out_of_bounds(library, where, what, side):
    name = f"{where}_{what}_{side}"
    result = build.run_sanitized("tests.emulator.sanitized_fault", str(library), name)
    assert result.returncode != 0, name
    assert "ran to the end" not in result.stdout
    assert "AddressSanitizer" in result.stderr, result.stderr[-3000:]
    assert f"bounds_faults.cu:{line_of(SOURCE, what)}" in result.stderr, result.stderr[-3000:]


def test_misaligned_shared_access(library):
    result = build.run_sanitized(
        "tests.emulator.sanitized_fault", str(library), "misaligned_shared"
    )
    assert result.returncode != 0
    assert "misaligned address" in result.stderr, result.stderr[-3000:]
    assert f"bounds_faults.cu:{line_of(SOURCE, 'misaligned')}" in result.stderr, result.stderr[
        -3000:
    ]


def test_within_bounds(library):
    result = build.run_sanitized("tests.emulator.sanitized_fault", str(library), "within")
    assert result.returncode == 0, result.stderr[-3000:]
    assert result.stdout == "ran to the end\n"
