"""What every bench needs: the machine's description, inputs that defeat its caches, checks.

Nothing here measures; the `pair` fixture in conftest.py does.
"""

from __future__ import annotations

import contextlib
import importlib
import os
import platform
import re
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path
from typing import Any, TypeVar

import torch

T = TypeVar("T")

# Rotated inputs together are this many times the last-level cache, so that none of it survives
# from one use of a buffer to the next. Filling them takes most of the time of a short run: there
# it is QUICK_CACHE_MULTIPLE, which is enough where the cache drops what was used least recently.
CACHE_MULTIPLE = 4
QUICK_CACHE_MULTIPLE = 2
# Below this threshold glibc takes memory from the heap and keeps it; the design value for
# "recycled pages" is far above any tensor of the benches.
RECYCLED_THRESHOLD = 1 << 30


def optional(module: str) -> Any | str:
    """The module, or the reason why it is left out (which `pair` reports as a skipped peer)."""
    try:
        return importlib.import_module(module)
    except ImportError as error:
        return f"{module} cannot be imported: {error}"


def reason(error: Exception) -> str:
    """Why a peer is left out, in a line."""
    return f"raised {type(error).__name__}: {' '.join(str(error).split())[:120]}"


def allocator() -> str:
    """Which allocator the CPU tensors of this process get: `default`, `recycled` or a preload.

    glibc returns large blocks to the system, so that each large output pays its page faults anew.
    With MALLOC_MMAP_THRESHOLD_ and MALLOC_TRIM_THRESHOLD_ raised (before the process starts, both)
    it keeps the pages.
    """
    preload = os.environ.get("LD_PRELOAD", "")
    for name in ("jemalloc", "tcmalloc", "mimalloc"):
        if name in preload:
            return name

    def raised(name: str) -> bool:
        value = os.environ.get(name, "")
        return value.isdigit() and int(value) >= RECYCLED_THRESHOLD

    both = raised("MALLOC_MMAP_THRESHOLD_") and raised("MALLOC_TRIM_THRESHOLD_")
    return "recycled" if both else "default"


def last_level_cache_bytes(device: torch.device) -> int:
    """Size of the largest cache that the device reads through; 64 MiB where it cannot be told."""
    if device.type == "cuda":
        return int(torch.cuda.get_device_properties(device).L2_cache_size)
    sizes = []
    for file in Path("/sys/devices/system/cpu/cpu0/cache").glob("index*/size"):
        found = re.fullmatch(r"(\d+)([KM]?)", file.read_text().strip())
        if found:
            sizes.append(int(found[1]) << {"": 0, "K": 10, "M": 20}[found[2]])
    return max(sizes, default=64 << 20)


def rotation_length(bytes_each: int, device: torch.device) -> int:
    """How many sets of `bytes_each` pass CACHE_MULTIPLE caches: odd, and at least 3 but where one
    is QUICK_CACHE_MULTIPLE caches by itself.

    Odd, because `pair` numbers the calls of both sides through: with an even count each side would
    only ever meet its own half of the sets.
    """
    cache = last_level_cache_bytes(device)
    if bytes_each >= QUICK_CACHE_MULTIPLE * cache:
        return 1
    return max(3, -(-CACHE_MULTIPLE * cache // max(bytes_each, 1))) | 1


def rotating(make: Callable[[int], T], bytes_each: int, device: torch.device) -> list[T]:
    """`make(i)` for as many i as `rotation_length` says."""
    return [make(i) for i in range(rotation_length(bytes_each, device))]


def flatten(value: Any) -> list[Any]:
    """Leaves of nested lists, tuples and mappings, in order."""
    if isinstance(value, dict):
        return [leaf for key in sorted(value) for leaf in flatten(value[key])]
    if isinstance(value, Sequence) and not isinstance(value, str | bytes):
        return [leaf for item in value for leaf in flatten(item)]
    return [value]


def close_to(reference: Callable[[int], Any], rtol: float, atol: float) -> Callable[..., None]:
    """Check for `pair`: |output − reference(index)| ≤ atol + rtol·|reference|, in float64.

    `reference(index)` gives the expected tensors, nested as the outputs are; a None on either side
    is left out on both. It must share no code with what is measured.
    """

    def check(output: Any, index: int) -> None:
        expected = flatten(reference(index))
        actual = flatten(output)
        assert len(actual) == len(expected), f"{len(actual)} outputs, expected {len(expected)}"
        for position, (got, want) in enumerate(zip(actual, expected, strict=True)):
            if got is None or want is None:
                assert got is want, f"output {position}: {got}, expected {want}"
                continue
            assert_close(got.detach(), want.detach().double(), rtol, atol, position)

    return check


def assert_close(
    got: torch.Tensor, want: torch.Tensor, rtol: float, atol: float, position: int
) -> None:
    """|got − want| ≤ atol + rtol·|want| of output `position`, in `want`'s float64.

    torch.testing.assert_close in fewer passes, since the benches' tensors are large.
    """
    assert got.shape == want.shape, f"output {position}: {got.shape}, expected {want.shape}"
    difference = torch.sub(want, got.detach()).abs_()
    bound = want.abs().mul_(rtol).add_(atol)
    if not (difference <= bound).all():  # a NaN fails as well
        wrong = ~(difference <= bound)
        raise AssertionError(
            f"output {position}: {int(wrong.sum())} of {wrong.numel()} elements differ by up to "
            f"{float(difference[wrong].max()):.3g}, expected at most {atol:.3g} + {rtol:.3g} × |y|"
        )


@contextlib.contextmanager
def one_thread() -> Iterator[None]:
    """For thousands of small operations, which threads would wait for each other over."""
    before = torch.get_num_threads()
    torch.set_num_threads(1)
    try:
        yield
    finally:
        torch.set_num_threads(before)


# What is checked at a time. On the CPU a few tensors of so many elements in float64 stay in the
# caches; on a GPU a part must be worth its launches.
PART_ELEMENTS = 1 << 18
CUDA_PART_ELEMENTS = 1 << 25


def parts_of(
    count: int, elements_each: int, device: torch.device, least: int = 1
) -> Iterator[slice]:
    """[0, count) in slices of about so many elements, and of at least ``least``."""
    most = CUDA_PART_ELEMENTS if device.type == "cuda" else PART_ELEMENTS
    step = max(least, most // max(elements_each, 1))
    for begin in range(0, count, step):
        yield slice(begin, min(begin + step, count))


def equal_to(reference: Callable[[int], Any]) -> Callable[..., None]:
    """Check for `pair`: every leaf equals reference(index)'s, dtype and shape included."""

    def check(output: Any, index: int) -> None:
        expected = flatten(reference(index))
        actual = flatten(output)
        assert len(actual) == len(expected), f"{len(actual)} outputs, expected {len(expected)}"
        for position, (got, want) in enumerate(zip(actual, expected, strict=True)):
            if isinstance(want, torch.Tensor):
                torch.testing.assert_close(
                    got,
                    want,
                    rtol=0,
                    atol=0,
                    msg=lambda text, position=position: f"output {position}: {text}",
                )
            else:
                assert got == want, f"output {position}: {got!r}, expected {want!r}"

    return check


def dtype_name(dtype: torch.dtype) -> str:
    names = {torch.float32: "fp32", torch.bfloat16: "bf16", torch.float16: "fp16"}
    return names.get(dtype, str(dtype).removeprefix("torch."))


def cpu_model() -> str:
    try:
        for line in Path("/proc/cpuinfo").read_text().splitlines():
            if line.startswith("model name"):
                return " ".join(line.split(":", 1)[1].split())
    except OSError:
        pass
    return platform.processor() or platform.machine()


def machine() -> dict[str, Any]:
    """Describes the machine and the software without naming the host, the user or any path."""
    gpu = torch.cuda.get_device_name(0) if torch.cuda.is_available() else None
    cpu = torch.device("cpu")
    return {
        "cpu": cpu_model(),
        "cores": os.cpu_count(),
        "cpu_capability": torch.backends.cpu.get_cpu_capability(),
        "last_level_cache_bytes": last_level_cache_bytes(cpu),
        "gpu": gpu,
        "system": f"{platform.system()} {platform.machine()}",
        "python": platform.python_version(),
        "torch": torch.__version__,
    }
