"""Tensors to test norms with, and what autograd keeps of them."""

from __future__ import annotations

import contextlib
import mmap
import pathlib
import re
from collections.abc import Callable, Iterable

import pytest
import torch

DTYPES = [torch.float32, torch.bfloat16, torch.float16, torch.float64]


def channels_last(t: torch.Tensor) -> torch.Tensor:
    """The same values with the channel innermost in memory, for any number of dimensions."""
    return t.movedim(1, -1).contiguous().movedim(-1, 1)


LAYOUTS = {"contiguous": torch.Tensor.contiguous, "channels_last": channels_last}


def make(shape, dtype, device, layout="contiguous", offset=0.5, scale=2.0):
    x = (torch.randn(shape, device=device) * scale + offset).to(dtype)
    return LAYOUTS[layout](x)


def huge_zeros(shape, dtype):
    """Zeros for tensors of gigabytes: on huge pages where there are any, a page fault each 2 MB."""
    if not hasattr(mmap, "MADV_HUGEPAGE"):
        return torch.zeros(shape, dtype=dtype)
    size = torch.Size(shape).numel() * dtype.itemsize
    pages = mmap.mmap(-1, size, flags=mmap.MAP_PRIVATE | mmap.MAP_ANONYMOUS)
    with contextlib.suppress(OSError):
        pages.madvise(mmap.MADV_HUGEPAGE)
    return torch.frombuffer(pages, dtype=dtype).view(shape)


def parameters(C, dtype, device):
    weight = (torch.rand(C, device=device) + 0.5).to(dtype)
    bias = torch.randn(C, device=device).to(dtype)
    return weight, bias


def leaf(t):
    return t.detach().requires_grad_()


def skip_unless_kernel(device, dtype):
    if device.type == "cuda" and dtype == torch.float64:
        pytest.skip("CUDA float64 takes torch's operator; test_fallback checks it")


def saved_bytes(
    call: Callable[[], object],
    given: Iterable[torch.Tensor | None] = (),
    context: Callable[[], contextlib.AbstractContextManager] = contextlib.nullcontext,
) -> int:
    """Bytes of all storages that autograd saves in call(), each once; those of `given` not."""
    storages = {}
    skip = {t.untyped_storage().data_ptr() for t in given if t is not None}

    def pack(t):
        storage = t.untyped_storage()
        if storage.data_ptr() not in skip:
            storages[storage.data_ptr()] = storage  # alive, so that no address is used again
        return t

    with torch.autograd.graph.saved_tensors_hooks(pack, lambda t: t), context():
        y = call()
    del y
    return sum(storage.nbytes() for storage in storages.values())


def needs_memory(gib):
    """Skips where less is free, which only the system's own account can tell."""
    meminfo = pathlib.Path("/proc/meminfo").read_text()
    free = int(re.search(r"MemAvailable:\s+(\d+)", meminfo)[1]) / 2**20
    return pytest.mark.skipif(free < gib, reason=f"needs {gib} GiB of memory, {free:.1f} are free")
