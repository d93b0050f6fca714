"""Finds the faults that kernel files of this folder hold on purpose."""

from __future__ import annotations

from pathlib import Path


def line_of(source: Path, marker: str) -> int:
    """The line of `source` that ends in `// fault: marker`."""
    lines = source.read_text().splitlines()
    (line,) = (i for i, text in enumerate(lines, 1) if text.endswith(f"// fault: {marker}"))
    return line
