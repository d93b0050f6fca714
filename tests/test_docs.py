"""Every Python block of README.md and docs/ runs, each on its own; what they name is there; and the
documentation builds without a warning."""

from __future__ import annotations

import importlib.util
import pathlib
import re
import subprocess
import sys

import pytest

ROOT = pathlib.Path(__file__).parents[1]
PAGES = [ROOT / "README.md", ROOT / "CONTRIBUTING.md", *sorted((ROOT / "docs").glob("*.md"))]
TEXTS = {str(page.relative_to(ROOT)): page.read_text() for page in PAGES}
BLOCKS = [
    (name, text[: m.start()].count("\n") + 2, m[1])
    for name, text in TEXTS.items()
    for m in re.finditer(r"^```python\n(.*?)^```$", text, re.MULTILINE | re.DOTALL)
]
LINKS = sorted(
    (name, target)
    for name, text in TEXTS.items()
    for target in set(re.findall(r"\]\((?!https?:|#)([^)#]+)(?:#[^)]*)?\)", text))
)


def test_there_are_blocks():
    assert len(BLOCKS) == sum(text.count("```python") for text in TEXTS.values()) >= 15
    assert TEXTS["README.md"].count("```python") >= 5


@pytest.mark.parametrize(
    ("name", "line", "code"), BLOCKS, ids=[f"{name}-{line}" for name, line, _ in BLOCKS]
)
def test_block_runs(name, line, code):
    # Leading newlines, so that a traceback shows the line of the page.
    exec(compile("\n" * (line - 1) + code, ROOT / name, "exec"), {"__name__": "__main__"})


@pytest.mark.parametrize(("name", "target"), LINKS)
def test_linked_file_exists(name, target):
    assert ((ROOT / name).parent / target).exists()


@pytest.mark.parametrize("name", TEXTS)
def test_named_make_targets_exist(name):
    targets = re.findall(r"^([a-z-]+):", (ROOT / "Makefile").read_text(), re.MULTILINE)
    readme = name == "README.md"  # names them, and has the word for nothing else
    command = r"make ([a-z-]+)" if readme else r"(?:`|^)make ([a-z-]+)"
    named = set(re.findall(command, TEXTS[name], re.MULTILINE))
    assert named or not readme
    assert named <= set(targets)


@pytest.mark.parametrize("name", [name for name in TEXTS if name.startswith("docs/")])
def test_page_is_in_the_contents(name):
    index = TEXTS["docs/index.md"]
    listed = re.search(r"```\{toctree\}\n:hidden:\n\n(.*?)```", index, re.DOTALL)[1].split()
    page = pathlib.Path(name).stem
    assert page == "index" or page in listed


def test_documentation_builds_without_warnings(tmp_path):
    missing = [m for m in ("sphinx", "myst_parser", "furo") if importlib.util.find_spec(m) is None]
    if missing:
        pytest.skip(f"not installed: {', '.join(missing)}")
    command = [sys.executable, "-m", "sphinx", "-W", "--keep-going", "-q", "-b", "html"]
    done = subprocess.run(
        [*command, "-d", tmp_path / "trees", ROOT / "docs", tmp_path / "html"],
        capture_output=True,
        text=True,
        timeout=300,
    )
    assert done.returncode == 0, done.stderr
    reference = (tmp_path / "html" / "api.html").read_text()
    for name in ("functional.batch_norm", "nn.GroupNorm", "optim.LAMB", "data.DataLoader"):
        assert f'id="batchops.{name}"' in reference
