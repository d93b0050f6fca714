"""Where batches are written to: torch's allocator, or a ring of slots that are used again."""

from __future__ import annotations

import math
import os
import pathlib
import sys
import warnings
from collections.abc import Callable, Sequence
from typing import Any

import torch

from batchops import _C

# Below this the system's allocator keeps its pages, and is as quick.
RING_BYTES = 128 << 10


def _system_bytes() -> int:
    try:
        return os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_PHYS_PAGES")
    except (ValueError, OSError):
        return 8 << 30


_OURS = tuple(
    f"{pathlib.Path(file).parent}{os.sep}" for file in (__file__, torch.utils.data.__file__)
)


def _users_level() -> int:
    """For a warning's stacklevel: the caller's first frame that is neither ours nor torch's."""
    frame, level = sys._getframe(1), 1
    while frame.f_back is not None and frame.f_code.co_filename.startswith(_OURS):
        frame, level = frame.f_back, level + 1
    return level


def default_capacity() -> int:
    """An eighth of the machine's memory, and at most 4 GiB."""
    return min(4 << 30, _system_bytes() // 8)


class CudaPages:
    """Locks pages for copies to a CUDA device. Any object with these two methods can stand in.

    It is the calling thread's device that counts, whatever thread that is. Through a runtime of our
    own: what fails there is no error of torch's next kernel.
    """

    def __init__(self, device: int) -> None:
        self._device = device
        self._pid = os.getpid()

    def lock(self, address: int, nbytes: int) -> bool:
        with torch.cuda.device(self._device):
            return _C.cuda_lock_pages(address, nbytes, self._device)

    def unlock(self, address: int, nbytes: int) -> None:
        if self._pid != os.getpid():
            return  # they are the parent's
        with torch.cuda.device(self._device):
            _C.cuda_unlock_pages(address, self._device)


class Memory:
    """Output tensors for batches, in slots of a ring.

    A slot belongs to a tensor until the last view of its storage is gone, and until the copies
    that were started from it are over. ``capacity`` bounds the bytes of all slots; beyond it (and
    for small tensors) the memory is torch's, pageable, and one warning says so.

    pages: locks and unlocks memory (:class:`CudaPages`), or None for pageable slots.
    pins_small: tensors that are too small for a slot come from torch's page-locked allocator.
    checked: released slots are filled with 0xFF, and who writes to one later is found out.
    """

    def __init__(
        self,
        capacity: int | None = None,
        *,
        checked: bool = False,
        pages: Any = None,
        pins_small: bool = False,
    ) -> None:
        self.capacity = default_capacity() if capacity is None else int(capacity)
        self.pages = pages
        self.written = 0  # bytes that were written to outputs, copies of copies included
        self.batch_bytes = 0  # bytes of the outputs
        self._checked = checked
        self._pins_small = pins_small
        self._warned = False
        self._pid = os.getpid()
        self._ring = self._new_ring()

    def _new_ring(self) -> _C.Ring:
        if self.pages is None:
            return _C.Ring(self.capacity, self._checked)
        return _C.Ring(self.capacity, self._checked, self.pages.lock, self.pages.unlock)

    @property
    def ring(self) -> _C.Ring:
        if self._pid != os.getpid():
            # Locked pages and slots in flight are the parent's. What is leased here stays valid.
            self._pid = os.getpid()
            self._ring = self._new_ring()
        return self._ring

    def empty(self, shape: Sequence[int], dtype: torch.dtype) -> torch.Tensor:
        """A contiguous tensor of undefined values."""
        count = math.prod(shape)
        nbytes = count * dtype.itemsize
        self._count(nbytes)
        if nbytes < RING_BYTES:
            pins = self._pins_small
            return torch.empty(tuple(shape), dtype=dtype, device="cpu", pin_memory=pins)
        lease = self.ring.acquire(nbytes)
        if lease is not None:
            # resize_ to as many items moves nothing; unlike view, it leaves no base behind.
            flat = torch.frombuffer(lease, dtype=dtype, count=count)
            flat.resize_(tuple(shape))
            _C.let_grow(flat)
            return flat
        self._warn_of_capacity(nbytes)
        return torch.empty(tuple(shape), dtype=dtype, device="cpu")

    def _count(self, nbytes: int) -> None:
        self.batch_bytes += nbytes
        self.written += nbytes

    def hold(self, tensor: torch.Tensor, event: Any) -> None:
        """The slot of ``tensor`` is not used again before ``event.query()`` is true.

        Memory of torch's page-locked allocator waits for its copies by itself.
        """
        self._ring.hold(tensor.untyped_storage().data_ptr(), event)

    def _warn_of_capacity(self, nbytes: int) -> None:
        if self._warned:
            return
        self._warned = True
        stats = self._ring.stats()
        kind = "pageable" if self.pages is None else "not page-locked"
        warnings.warn(
            f"batchops.data: no slot for a batch of {nbytes} bytes: {stats['leased_bytes']} of "
            f"{self.capacity} bytes are in use by batches that are still alive, or the system gave "
            f"no more. Memory from torch's allocator is used instead ({kind}); raise "
            "ring_bytes, or let go of batches sooner",
            stacklevel=_users_level(),
        )

    def stats(self) -> dict[str, int]:
        return self.ring.stats()

    def trim(self) -> None:
        """Gives the memory of free slots back to the system."""
        self.ring.trim()


class PinnedMemory(Memory):
    """torch's page-locked allocator, for batches that users copy to a device themselves.

    It alone learns of such copies, and gives memory out again once those from it are over.
    """

    def empty(self, shape: Sequence[int], dtype: torch.dtype) -> torch.Tensor:
        self._count(math.prod(shape) * dtype.itemsize)
        return torch.empty(tuple(shape), dtype=dtype, device="cpu", pin_memory=True)


class PlainMemory:
    """torch's allocator, for outputs that must live where torch puts them."""

    def __init__(self, empty: Callable[..., torch.Tensor] = torch.empty) -> None:
        self._empty = empty

    def empty(self, shape: Sequence[int], dtype: torch.dtype) -> torch.Tensor:
        return self._empty(tuple(shape), dtype=dtype, device="cpu")


_shared: Memory | None = None


def shared_memory() -> Memory:
    """The process's own slots, for :func:`batchops.data.collate` and its like."""
    global _shared
    if _shared is None:
        _shared = Memory()
    return _shared
