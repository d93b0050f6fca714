"""Every Python block of README.md runs, each on its own; every file that it names is there."""

from __future__ import annotations

import pathlib
import re

import pytest

ROOT = pathlib.Path(__file__).parents[1]
README = (ROOT / "README.md").read_text()
BLOCKS = [
    (README[: m.start()].count("\n") + 2, m[1])
    for m in re.finditer(r"^```python\n(.*?)^```$", README, re.MULTILINE | re.DOTALL)
]


def test_there_are_blocks():
    assert len(BLOCKS) == README.count("```python") >= 5


@pytest.mark.parametrize(("line", "code"), BLOCKS, ids=[f"line-{line}" for line, _ in BLOCKS])
def test_block_runs(line, code):
    # Leading newlines, so that a traceback shows the line of README.md.
    exec(compile("\n" * (line - 1) + code, ROOT / "README.md", "exec"), {"__name__": "__main__"})


@pytest.mark.parametrize("name", sorted(set(re.findall(r"\]\((?!https?:)([^)#]+)\)", README))))
def test_linked_file_exists(name):
    assert (ROOT / name).exists()


def test_named_make_targets_exist():
    targets = re.findall(r"^([a-z-]+):", (ROOT / "Makefile").read_text(), re.MULTILINE)
    named = set(re.findall(r"make ([a-z-]+)", README))
    assert named
    assert named <= set(targets)
