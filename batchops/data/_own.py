"""What a loader keeps beside torch's attributes, all under one name, out of a subclass's way."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch

from batchops import _C
from batchops.data._memory import CudaPages, Memory, PinnedMemory
from batchops.data._metrics import Metrics
from batchops.data._transfer import Transfer
from batchops.data._tree import map_tensors

NAME = "_batchops"


class Own:
    def __init__(self, pending: dict[str, Any] | None = None) -> None:
        self.pending = pending  # a state to go on from
        # Of this process: neither pickled nor copied.
        self.counts = Metrics()
        self.memory: Memory | None = None
        self.transfer: Transfer | None = None  # with its stream: memory on a device belongs to one
        self.current: Any = None  # the epoch that was begun last

    def __reduce__(self) -> Any:
        return (Own, (self.pending,))


def own(loader: Any) -> Own:
    """Made when it is asked for: loaders may come from a dict of attributes, without __init__."""
    found: Own | None = loader.__dict__.get(NAME)
    return loader.__dict__.setdefault(NAME, Own()) if found is None else found


def memory_of(loader: Any) -> Memory:
    """The slots that a loader's batches are written to."""
    mine = own(loader)
    if mine.memory is None:
        mine.memory = _memory_for(loader, _cuda_device(loader))
    return mine.memory


def _cuda_device(loader: Any) -> torch.device | None:
    """The CUDA device that batches are copied to, by its number."""
    device = None if loader.device is None else torch.device(loader.device)
    if device is None or device.type != "cuda":
        return None
    return device if device.index is not None else torch.device("cuda", torch.cuda.current_device())


def _memory_for(loader: Any, device: torch.device | None) -> Memory:
    if device is None:
        pins = loader.pin_memory and torch.cuda.is_available()
        return (PinnedMemory if pins else Memory)(loader.ring_bytes, checked=loader.checked)
    if not _locks_pages(device.index):
        return PinnedMemory(loader.ring_bytes)
    return Memory(
        loader.ring_bytes,
        checked=loader.checked,
        pages=CudaPages(device.index),
        pins_small=True,
    )


def _locks_pages(device: int) -> bool:
    """Whether this build can: it has CUDA, and the driver is new enough."""
    with torch.cuda.device(device):
        return _C.cuda_problem(device) is None


def transfer_of(loader: Any) -> Callable[[Any], Any] | None:
    """How a batch gets to the loader's device, if it is to be elsewhere than it was made."""
    if loader.device is None:
        return None
    cuda = _cuda_device(loader)
    if cuda is not None:
        mine = own(loader)
        if mine.transfer is None or mine.transfer.device != cuda:
            mine.transfer = Transfer(cuda, memory_of(loader).hold)
        return mine.transfer
    device = torch.device(loader.device)
    if device.type == "cpu":
        return None

    def to(data: Any) -> Any:
        return data.to(device)

    return lambda data: map_tensors(data, to, to)
