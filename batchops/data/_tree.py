"""Batches as trees of tensors."""

from __future__ import annotations

import copy
from collections import UserDict
from collections.abc import Callable, Mapping, MutableMapping, MutableSequence, Sequence
from typing import Any

import torch
from torch.nn.utils.rnn import PackedSequence


def map_tensors(
    data: Any,
    fn: Callable[[torch.Tensor], torch.Tensor],
    other: Callable[[Any], Any] | None = None,
) -> Any:
    """``data`` with ``fn`` of each tensor in it; containers are kept as torch's pin_memory does.
    ``other`` is for what is no container and has a method ``to``, and for packed sequences."""
    if isinstance(data, torch.Tensor):
        return fn(data)
    if isinstance(data, str | bytes):
        return data
    if isinstance(data, PackedSequence):
        return data if other is None else other(data)
    if isinstance(data, Mapping):
        items = {key: map_tensors(value, fn, other) for key, value in data.items()}
        try:
            if isinstance(data, MutableMapping):
                clone = copy.copy(data)
                clone.update(items)
                return clone
            return type(data)(items)  # type: ignore[call-arg]
        except TypeError:
            return items
    if isinstance(data, tuple):
        parts = [map_tensors(value, fn, other) for value in data]
        return type(data)(*parts) if hasattr(data, "_fields") else type(data)(parts)
    if isinstance(data, Sequence):
        parts = [map_tensors(value, fn, other) for value in data]
        try:
            if isinstance(data, MutableSequence):
                clone = copy.copy(data)
                for i, part in enumerate(parts):
                    clone[i] = part
                return clone
            return type(data)(parts)  # type: ignore[call-arg]
        except TypeError:
            return parts
    if other is None or isinstance(data, type) or not callable(getattr(data, "to", None)):
        return data
    return other(data)


def parts_of(data: Any) -> list[Any] | None:
    """What a container of Python's own, or a subclass of one, holds, read without its own methods:
    those may be slow, or fail. None for everything else."""
    if isinstance(data, UserDict):
        data = data.__dict__.get("data")
    if isinstance(data, dict):
        return list(dict.values(data))
    if isinstance(data, tuple):
        return list(tuple.__iter__(data))
    return list(list.__iter__(data)) if isinstance(data, list) else None


def tensor_bytes(data: Any) -> int:
    """Bytes of the tensors in ``data``, as far as parts_of reaches."""
    total, left, seen = 0, [data], set()
    while left:
        value = left.pop()
        if isinstance(value, torch.Tensor):
            total += value.numel() * value.element_size()
        elif (parts := parts_of(value)) is not None and id(value) not in seen:
            seen.add(id(value))
            left += parts
    return total
