"""What a loader keeps beside torch's attributes, all under one name, out of a subclass's way."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch

from batchops.data._memory import CudaPages, Memory
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
        self.current: Any = None  # a weak reference to the last iterator

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
        device = torch.device(loader.device) if loader.device is not None else None
        to_cuda = device is not None and device.type == "cuda"
        pins = to_cuda or (loader.pin_memory and torch.cuda.is_available())
        pages = CudaPages() if pins else None
        mine.memory = Memory(loader.ring_bytes, checked=loader.checked, pages=pages)
    return mine.memory


def transfer_of(loader: Any) -> Callable[[Any], Any] | None:
    """How a batch gets to the loader's device, if it is to be elsewhere than it was made."""
    if loader.device is None:
        return None
    device = torch.device(loader.device)
    if device.type == "cuda":
        return Transfer(device, memory_of(loader).hold)
    if device.type == "cpu":
        return None
    return lambda data: map_tensors(data, lambda tensor: tensor.to(device))
