from __future__ import annotations

import os
import shutil
from contextlib import nullcontext

import pytest
import torch

import batchops._binding as binding

from .emulator import ptx, toolkit


def _why_no_cuda() -> str | None:
    if not binding.core.built_with_cuda():
        return "batchops was built without CUDA"
    if not torch.cuda.is_available():
        return "torch sees no CUDA device"
    count, message = binding.core.cuda_device_count()
    return None if count else f"batchops sees no CUDA device: {message}"


def pytest_collection_modifyitems(items: list[pytest.Item]) -> None:
    reason = _why_no_cuda()
    if reason is None:
        return
    for item in items:
        if "cuda" in item.keywords:
            item.add_marker(pytest.mark.skip(reason=reason))


@pytest.fixture(params=["cpu", pytest.param("cuda", marks=pytest.mark.cuda)])
def device(request: pytest.FixtureRequest) -> torch.device:
    return torch.device(request.param)


@pytest.fixture(autouse=True)
def _seed() -> None:
    """torch.manual_seed(0) for the devices there are: for those there are not, torch keeps each
    call with its stack, which takes longer than most tests."""
    torch.default_generator.manual_seed(0)
    if torch.cuda.is_available():
        torch.cuda.manual_seed_all(0)


@pytest.fixture
def threads():
    """Sets torch's thread count inside a test and puts it back."""
    before = torch.get_num_threads()
    yield torch.set_num_threads
    torch.set_num_threads(before)


@pytest.fixture(params=["floats", "doubles"])
def library_both_ways(request: pytest.FixtureRequest, library):
    """A module's library of kernels: as compiled for the host, which has the formulas of devices
    whose doubles are slow; and as PTX for one where they are fast."""
    running = nullcontext() if request.param == "floats" else ptx.running(library)
    with running:
        yield library


def pytest_configure(config: pytest.Config) -> None:
    """Where the checks of CUDA kernels must run (CI), a missing tool is an error, not a skip."""
    if not toolkit.required():
        return
    found = {
        "CUDA headers": toolkit.include_dir(),
        "g++": os.environ.get("CXX") or shutil.which("g++"),
        **{name: toolkit.tool(name) for name in ("nvcc", "nvdisasm", "cuobjdump")},
    }
    missing = ", ".join(name for name, place in found.items() if place is None)
    if missing:
        raise pytest.UsageError(
            f"BATCHOPS_REQUIRE_CUDA_TOOLKIT=1, and there is no {missing}: install a CUDA 13 "
            "toolkit and requirements-dev.txt, or unset it to skip the tests that need them"
        )
