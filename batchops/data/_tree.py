"""Batches as trees of tensors."""

from __future__ import annotations

import copy
from collections.abc import Callable, Mapping, MutableMapping, MutableSequence, Sequence
from typing import Any

import torch


def map_tensors(data: Any, fn: Callable[[torch.Tensor], torch.Tensor]) -> Any:
    """``data`` with ``fn`` of each tensor in it; containers are kept as torch's pin_memory does."""
    if isinstance(data, torch.Tensor):
        return fn(data)
    if isinstance(data, str | bytes):
        return data
    if isinstance(data, Mapping):
        items = {key: map_tensors(value, fn) for key, value in data.items()}
        try:
            if isinstance(data, MutableMapping):
                clone = copy.copy(data)
                clone.update(items)
                return clone
            return type(data)(items)  # type: ignore[call-arg]
        except TypeError:
            return items
    if isinstance(data, tuple):
        parts = [map_tensors(value, fn) for value in data]
        return type(data)(*parts) if hasattr(data, "_fields") else type(data)(parts)
    if isinstance(data, Sequence):
        parts = [map_tensors(value, fn) for value in data]
        try:
            if isinstance(data, MutableSequence):
                clone = copy.copy(data)
                for i, part in enumerate(parts):
                    clone[i] = part
                return clone
            return type(data)(parts)  # type: ignore[call-arg]
        except TypeError:
            return parts
    return data


def tensor_bytes(data: Any) -> int:
    """Bytes of the tensors in ``data``."""
    total = 0

    def add(tensor: torch.Tensor) -> torch.Tensor:
        nonlocal total
        total += tensor.numel() * tensor.element_size()
        return tensor

    map_tensors(data, add)
    return total
