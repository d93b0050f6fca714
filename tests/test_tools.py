"""tools/: what wheels are built from and checked for, and the parts of a check on a GPU."""

from __future__ import annotations

import argparse
import importlib
import json
import pathlib
import sys
import time
import zipfile

import pytest

ROOT = pathlib.Path(__file__).parents[1]


@pytest.fixture
def wheel(monkeypatch: pytest.MonkeyPatch):
    monkeypatch.syspath_prepend(str(ROOT / "tools"))
    return importlib.import_module("wheels")


@pytest.fixture
def gpu_check(monkeypatch: pytest.MonkeyPatch):
    monkeypatch.syspath_prepend(str(ROOT / "tools"))
    return importlib.import_module("gpu_check")


def options(**changes: object) -> argparse.Namespace:
    values = {"cuda_archs": "", "torch": "", "cuda_toolkit": "system", "cuda_version": "13.0"}
    return argparse.Namespace(**{**values, "into": ROOT / "build", **changes})


@pytest.mark.parametrize("text", ["80-real 90", "80-real;90", " 80-real, 90 "])
def test_targets_may_be_separated_as_one_likes(wheel, text):
    assert wheel.parts(options(cuda_archs=text))["CUDAARCHS"] == "80-real;90"


def test_the_installed_torch_is_not_fetched(wheel, monkeypatch):
    monkeypatch.setattr(wheel, "run", lambda *_, **__: pytest.fail("something was fetched"))
    minor, folder = wheel.installed_torch()
    for version in (minor, f"{minor}.0"):
        assert wheel.parts(options(torch=version)) == {
            "BATCHOPS_CUDA": "ON",
            "BATCHOPS_TORCH_ROOTS": str(folder),
        }


def test_other_torches_and_the_toolkit_are_fetched_once(wheel, monkeypatch, tmp_path):
    fetched = []

    def run(*command: object, **_: object) -> None:
        fetched.append([str(part) for part in command])
        target = pathlib.Path(fetched[-1][fetched[-1].index("--target") + 1])
        made = ["torch/lib/libtorch_cpu.so", "nvidia/cu13/bin/nvcc"]
        for name in made:
            (target / name).parent.mkdir(parents=True, exist_ok=True)
            (target / name).touch()

    monkeypatch.setattr(wheel, "run", run)
    wanted = options(torch="1.98 1.99.1", cuda_toolkit="pip", into=tmp_path)
    found = wheel.parts(wanted)
    assert found["BATCHOPS_TORCH_ROOTS"] == (
        f"{tmp_path}/torch-1.98/torch;{tmp_path}/torch-1.99.1/torch"
    )
    assert found["CUDACXX"] == f"{tmp_path}/cuda-13.0/nvidia/cu13/bin/nvcc"
    assert [command[-1] for command in fetched] == [
        "torch==1.98.*",
        "torch==1.99.1",
        "nvidia-nvvm==13.0.*",
    ]
    assert wheel.parts(wanted) == found
    assert len(fetched) == 3


def test_prepare_prints_what_a_shell_takes(wheel, capsys):
    assert wheel.prepare(options(cuda_archs="80 90", cuda_toolkit="none")) == 0
    assert capsys.readouterr().out == "export BATCHOPS_CUDA=OFF\nexport CUDAARCHS='80;90'\n"


def test_a_version_that_is_none(wheel):
    with pytest.raises(SystemExit, match="expected a torch version such as"):
        wheel.minor_of("newest", "--torch")


@pytest.fixture
def libraries():
    """Those of the installed build."""
    from batchops import _C

    return sorted(pathlib.Path(_C.__file__).parent.glob("*.so"))


def make_wheel(path: pathlib.Path, files: dict[str, bytes]) -> pathlib.Path:
    with zipfile.ZipFile(path, "w") as archive:
        for name, data in files.items():
            archive.writestr(name, data)
    return path


def test_a_wheel_needs_no_cuda_library(wheel, libraries, tmp_path, capsys, monkeypatch):
    pytest.importorskip("elftools")
    found = make_wheel(
        tmp_path / "batchops.whl", {f"batchops/{p.name}": p.read_bytes() for p in libraries}
    )
    assert wheel.check_contents(found, tmp_path / "contents") == []
    said = capsys.readouterr().out
    assert "libbatchops_core.so needs " in said
    assert "libtorch_cpu.so" in said

    needed = wheel.needed_by
    monkeypatch.setattr(wheel, "needed_by", lambda path: [*needed(path), "libcudart.so.13"])
    problems = wheel.check_contents(found, tmp_path / "again")
    assert f"{libraries[0].name} needs libcudart.so.13, which a machine may not have" in problems


def test_a_large_wheel_is_found(wheel, libraries, tmp_path, monkeypatch):
    pytest.importorskip("elftools")
    core = next(p for p in libraries if p.name == "libbatchops_core.so")
    found = make_wheel(tmp_path / "batchops.whl", {"batchops/" + core.name: core.read_bytes()})
    monkeypatch.setattr(wheel, "MOST_MEGABYTES", 0.1)
    (problem,) = wheel.check_contents(found, tmp_path / "contents")
    assert problem.startswith("expected at most 0.1 MB, got ")


def test_targets_in_a_library(wheel, tmp_path):
    tool = tmp_path / "cuobjdump"
    tool.write_text(
        """#!/bin/sh
case $1 in
--list-elf) echo 'ELF file    1: a.1.sm_75.cubin'; echo 'ELF file 2: a.2.sm_100.cubin';;
--list-ptx) echo 'PTX file    1: a.3.sm_120.ptx';;
esac
"""
    )
    tool.chmod(0o755)
    assert wheel.targets_of(tmp_path / "library.so", str(tool)) == [
        "sm_75",
        "sm_100",
        "compute_120",
    ]


def test_the_bare_environment_has_no_compiler(wheel, monkeypatch, tmp_path):
    for name in ("CUDA_HOME", "CXX", "PYTHONPATH"):
        monkeypatch.setenv(name, "/somewhere")
    monkeypatch.setenv("PIP_INDEX_URL", "https://example.org/simple")
    found = wheel.bare_environment(tmp_path)
    assert found["PATH"] == str(tmp_path)
    assert found["PIP_INDEX_URL"] == "https://example.org/simple"
    assert not {"CUDA_HOME", "CXX", "PYTHONPATH"} & set(found)


# --- a check on a GPU ----------------------------------------------------------------------------


def test_parts_in_order_and_by_name(gpu_check, monkeypatch, tmp_path, capsys):
    ran = []

    def commands(part: str, out: pathlib.Path) -> list[list[str]]:
        ran.append(part)
        return [[sys.executable, "-c", "pass"]]

    monkeypatch.setattr(gpu_check, "commands", commands)
    assert gpu_check.main(["--out", str(tmp_path)]) == 0
    assert ran == ["build", "tests", "memcheck", "racecheck", "synccheck", "bench"]
    ran.clear()
    assert gpu_check.main(["bench", "tests", "--out", str(tmp_path)]) == 0
    assert ran == ["tests", "bench"]
    stored = json.loads((tmp_path / "parts.json").read_text())
    assert [found["outcome"] for found in stored.values()] == ["ok", "ok"]
    with pytest.raises(SystemExit):
        gpu_check.main(["tets", "--out", str(tmp_path)])
    assert "expected parts of build, tests" in capsys.readouterr().err


@pytest.mark.parametrize(
    ("part", "code", "outcome"),
    [
        ("tests", "raise SystemExit(3)", "exit status 3"),
        ("memcheck", "raise SystemExit(9)", "errors were found"),
        ("memcheck", "raise SystemExit(1)", "exit status 1"),
        ("tests", "import time; time.sleep(60)", "out of time"),
    ],
)
def test_failures_have_a_name(gpu_check, monkeypatch, tmp_path, part, code, outcome):
    monkeypatch.setattr(gpu_check, "commands", lambda *_: [[sys.executable, "-c", code]])
    assert gpu_check.main([part, "--minutes", "0.02", "--out", str(tmp_path)]) == 1
    assert json.loads((tmp_path / "parts.json").read_text())[part]["outcome"] == outcome


def test_what_is_stopped_ends_whole_and_is_reported(gpu_check, monkeypatch, tmp_path):
    """The children too; and the report is made of what there is."""
    child = tmp_path / "child"
    code = (
        "import json, pathlib, subprocess, sys, time\n"
        f"child = subprocess.Popen([sys.executable, '-c', 'import time; time.sleep(60)'])\n"
        f"pathlib.Path({str(child)!r}).write_text(str(child.pid))\n"
        "try:\n"
        "    time.sleep(60)\n"
        "except KeyboardInterrupt:\n"
        f"    pathlib.Path({str(tmp_path / gpu_check.RUN)!r}).write_text('{{}}')\n"
    )
    made = tmp_path / "report"
    script = f"import pathlib; pathlib.Path({str(made)!r}).touch()"
    monkeypatch.setattr(gpu_check, "commands", lambda *_: [[sys.executable, "-c", code]])
    monkeypatch.setattr(gpu_check, "report", lambda _: [sys.executable, "-c", script])
    monkeypatch.setattr(gpu_check, "REPORT_SECONDS", 10.0)
    assert gpu_check.main(["bench", "--minutes", "0.35", "--out", str(tmp_path)]) == 1
    assert made.exists()
    assert json.loads((tmp_path / "parts.json").read_text())["bench"]["outcome"] == "out of time"
    stat = pathlib.Path("/proc", child.read_text(), "stat")
    deadline = time.monotonic() + 5
    while stat.exists() and stat.read_text().rsplit(")", 1)[1].split()[0] not in "ZX":
        assert time.monotonic() < deadline, "the child goes on"
        time.sleep(0.05)


def test_what_a_part_does_not_need_goes_to_the_later_ones(gpu_check, monkeypatch, tmp_path):
    given = {}
    monkeypatch.setattr(
        gpu_check,
        "run_part",
        lambda part, _, seconds: (given.update({part: seconds}), ("ok", 0.0))[1],
    )
    assert gpu_check.main(["--out", str(tmp_path)]) == 0
    assert list(given) == list(gpu_check.PARTS)
    assert given["bench"] == pytest.approx(540 - gpu_check.REPORT_SECONDS, abs=5)
    assert given["build"] < 540 * 0.7


def test_without_a_build_nothing_is_checked(gpu_check, monkeypatch, tmp_path):
    monkeypatch.setattr(gpu_check, "commands", lambda *_: [[sys.executable, "-c", "1/0"]])
    assert gpu_check.main(["--out", str(tmp_path)]) == 1
    assert list(json.loads((tmp_path / "parts.json").read_text())) == ["build"]


def test_commands(gpu_check, monkeypatch, tmp_path):
    monkeypatch.setenv("CUDA_ARCHS", "90-real")
    tool = tmp_path / "compute-sanitizer"
    tool.write_text("#!/bin/sh\necho '  --kernel-name arg  '\n")
    tool.chmod(0o755)
    monkeypatch.setattr(gpu_check.shutil, "which", lambda name: str(tmp_path / name))
    (build,) = gpu_check.commands("build", tmp_path)
    assert "cmake.define.CMAKE_CUDA_ARCHITECTURES=90-real" in build
    assert "--no-build-isolation" in build
    for name in gpu_check.SANITIZERS:
        for command in gpu_check.commands(name, tmp_path):
            assert command[:3] == [str(tool), "--tool", name]
            assert "--kernel-name kernel_substring=batchops" in " ".join(command)
    (bench,) = gpu_check.commands("bench", tmp_path)
    assert f"--benchmark-json={gpu_check.report(tmp_path)[2]}" in bench
    assert "--quick" in bench
    monkeypatch.setenv("BENCH_ARGS", "-k lamb")
    assert gpu_check.commands("bench", tmp_path)[0][-2:] == ["-k", "lamb"]
    monkeypatch.setattr(gpu_check.shutil, "which", lambda name: None)
    with pytest.raises(FileNotFoundError, match="expected compute-sanitizer on the PATH"):
        gpu_check.commands("memcheck", tmp_path)
