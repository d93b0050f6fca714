"""Batches to a device: a copy on a stream of its own, ready by event."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch

from batchops.data._tree import map_tensors

# So much a driver takes over at once.
PAGEABLE_BYTES = 64 << 10


class CudaStreams:
    """What is used of ``torch.cuda``; another object with these methods can stand in for it."""

    def new_stream(self, device: torch.device) -> Any:
        return torch.cuda.Stream(device)

    def current_stream(self, device: torch.device) -> Any:
        return torch.cuda.current_stream(device)

    def on(self, stream: Any) -> Any:
        return torch.cuda.stream(stream)

    def new_event(self) -> Any:
        return torch.cuda.Event()

    def to_device(self, tensor: torch.Tensor, device: torch.device) -> torch.Tensor:
        # From pageable memory a large copy would be waited for.
        if tensor.nbytes >= PAGEABLE_BYTES and not tensor.is_pinned():
            tensor = tensor.contiguous().pin_memory()  # which takes no expanded tensors
        return tensor.to(device, non_blocking=True)


class Transfer:
    """Copies batches to ``device`` while the previous one is in use.

    ::

        side stream     copy k ── event k
        current stream             wait event k ── what the user does with batch k

    The host does not wait. A slot that was copied from is held until its event: the ring gets it
    (``hold``), and the device tensors are recorded on the stream that uses them.
    """

    def __init__(
        self,
        device: torch.device,
        hold: Callable[[torch.Tensor, Any], None],
        streams: Any = None,
    ) -> None:
        self.device = device
        self._streams = CudaStreams() if streams is None else streams
        self._hold = hold
        self._side: Any = None

    def __call__(self, data: Any) -> Any:
        streams = self._streams
        if self._side is None:
            self._side = streams.new_stream(self.device)
        sources: list[torch.Tensor] = []
        moved: list[torch.Tensor] = []

        current = streams.current_stream(self.device)

        def moved_by_itself(data: Any) -> Any:
            with streams.on(current):
                return data.to(self.device)

        def move(tensor: torch.Tensor) -> torch.Tensor:
            if tensor.device == self.device:
                return tensor
            # Of several tensors, or on another device: of no slot, and on the user's own stream.
            if tensor.layout is not torch.strided or tensor.device.type != "cpu":
                return moved_by_itself(tensor)
            sources.append(tensor)
            out = streams.to_device(tensor, self.device)
            moved.append(out)
            return out

        with streams.on(self._side):
            try:
                result = map_tensors(data, move, moved_by_itself)
            finally:  # what has begun goes on, whatever became of the rest
                event = streams.new_event()
                event.record(self._side)
                for tensor in sources:
                    self._hold(tensor, event)
        current.wait_event(event)
        for tensor in moved:
            tensor.record_stream(current)
        return result
