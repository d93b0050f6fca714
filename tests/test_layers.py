"""The layers hold: kernels know no framework, and the binaries ask for nothing they must not."""

from __future__ import annotations

import pathlib
import re
import shutil
import subprocess

import pytest

import batchops._binding as binding

ROOT = pathlib.Path(__file__).parents[1]
CSRC = ROOT / "csrc"
FOREIGN = re.compile(r'#\s*include\s*[<"](torch|ATen|c10|Python\.h|pybind11|caffe2)')


def test_kernels_and_collation_include_no_framework():
    sources = [p for part in ("kernels", "collate") for p in (CSRC / part).rglob("*.*")]
    assert sources
    offending = [p.relative_to(ROOT) for p in sources if FOREIGN.search(p.read_text())]
    assert not offending


def test_what_stands_in_for_cuda_compiles():
    """Builds with CUDA leave it out. The other kernels compile alone in every build."""
    compiler = shutil.which("g++") or shutil.which("c++")
    if compiler is None:
        pytest.skip("no C++ compiler here")
    source = CSRC / "kernels" / "no_cuda.cpp"
    subprocess.run([compiler, "-std=c++20", "-fsyntax-only", f"-I{CSRC}", source], check=True)


def needed(library: pathlib.Path) -> list[str]:
    tool = shutil.which("readelf")
    if tool is None:
        pytest.skip("no readelf here")
    text = subprocess.run([tool, "-d", library], capture_output=True, text=True, check=True).stdout
    return re.findall(r"\(NEEDED\)\s+Shared library: \[(.+)\]", text)


def test_no_cuda_library_is_needed():
    folder = pathlib.Path(binding.core.__file__).parent
    libraries = [folder / "libbatchops_core.so", binding.operators, binding.core.__file__]
    for library in libraries:
        wrong = [
            n for n in needed(library) if re.match(r"libcu|libnv|libtorch_cuda|libc10_cuda", n)
        ]
        assert not wrong, (library, wrong)


def test_only_the_binding_needs_torch():
    folder = pathlib.Path(binding.core.__file__).parent
    for library in (folder / "libbatchops_core.so", binding.core.__file__):
        assert not [n for n in needed(library) if n.startswith(("libtorch", "libc10"))]
    assert "libtorch_cpu.so" in needed(binding.operators)
