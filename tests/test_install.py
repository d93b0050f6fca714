"""What a user sees when a part is missing: an error that says what to type."""

from __future__ import annotations

import os
import pathlib
import shutil
import subprocess
import sys

import pytest

ROOT = pathlib.Path(__file__).parents[1]


def run_python(code: str) -> subprocess.CompletedProcess[str]:
    return subprocess.run(
        [sys.executable, "-c", code], capture_output=True, text=True, timeout=120, cwd=ROOT
    )


@pytest.mark.parametrize(
    ("before", "expected"),
    [
        ("import sys; sys.modules['torch'] = None", ["needs torch", "pip install torch==2.13.0"]),
        (
            "import torch; torch.__version__ = '2.99.1'",
            ["no operators for torch 2.99.1", "pip install --no-build-isolation"],
        ),
        (
            "import sys; sys.modules['batchops._C'] = None",
            ["native module cannot be loaded", "pip install --no-build-isolation"],
        ),
    ],
    ids=["no torch", "no matching binding", "not built"],
)
def test_import_says_what_to_type(before, expected):
    result = run_python(f"{before}; import batchops")
    assert result.returncode != 0
    last = result.stderr[result.stderr.index("ImportError: batchops") :]
    assert all(text in last for text in expected), last


def configure(tmp_path, *definitions, **environment) -> str:
    cmake = shutil.which(
        "cmake", path=os.pathsep.join([os.path.dirname(sys.executable), os.environ["PATH"]])
    )
    if cmake is None:
        pytest.skip("no cmake here")
    result = subprocess.run(
        [cmake, "-S", ROOT, "-B", tmp_path / "build", *definitions],
        capture_output=True,
        text=True,
        timeout=300,
        env={**os.environ, **environment},
    )
    assert result.returncode != 0
    return " ".join(result.stderr.split())  # CMake wraps its messages


def test_build_without_torch_says_what_to_type(tmp_path):
    subprocess.run([sys.executable, "-m", "venv", "--without-pip", tmp_path / "bare"], check=True)
    message = configure(
        tmp_path, "-DBATCHOPS_CUDA=OFF", f"-DPython_EXECUTABLE={tmp_path}/bare/bin/python"
    )
    assert "torch is not installed" in message
    assert "pip install torch==2.13.0" in message
    assert "--no-build-isolation" in message


def test_build_with_an_old_torch_is_refused(tmp_path):
    header = tmp_path / "torch" / "include" / "torch" / "headeronly" / "version.h"
    header.parent.mkdir(parents=True)
    header.write_text("#define TORCH_VERSION_MAJOR 2\n#define TORCH_VERSION_MINOR 9\n")
    message = configure(tmp_path, "-DBATCHOPS_CUDA=OFF", f"-DBATCHOPS_TORCH_ROOTS={tmp_path}/torch")
    assert "torch 2.11 or newer is needed" in message


def test_build_without_a_compiler_says_what_to_type(tmp_path):
    message = configure(tmp_path, CXX="/nowhere/g++")
    assert "no C++ compiler was found" in message
    assert "apt-get install g++" in message


def test_a_broken_nvcc_is_never_a_silent_cpu_build(tmp_path):
    message = configure(tmp_path, "-DBATCHOPS_CUDA=AUTO", CUDACXX="/bin/false")
    assert "cannot compile and link a program" in message
    assert "BATCHOPS_CUDA=OFF" in message
