"""``pad`` and ``pack``: sequences of unequal lengths as one batch, in one pass."""

from __future__ import annotations

import functools
from collections.abc import Sequence
from typing import Any, NamedTuple

import numpy as np
import torch

from batchops import _C
from batchops.data._memory import shared_memory
from batchops.data._source import ARRAY_DTYPES, DTYPES

# What a position that holds no token is labelled with: torch's losses ignore it.
IGNORE = -100


class Padded(NamedTuple):
    """values (n, width, ...); mask, position_ids (n, width); lengths (n,); labels like values.

    None for what was not asked for.
    """

    values: torch.Tensor
    mask: torch.Tensor | None = None
    lengths: torch.Tensor | None = None
    position_ids: torch.Tensor | None = None
    labels: torch.Tensor | None = None


class Packed(NamedTuple):
    """values (total, ...); cu_seqlens (n + 1,) int32: where each sequence begins, and the total;
    max_seqlen: the longest; position_ids (total,) int64; seq_idx (total,) int32; labels like
    values.

    None for what was not asked for.
    """

    values: torch.Tensor
    cu_seqlens: torch.Tensor
    max_seqlen: int
    position_ids: torch.Tensor | None = None
    seq_idx: torch.Tensor | None = None
    labels: torch.Tensor | None = None


def _read(sequences: Any, name: str) -> tuple[_C.Samples, torch.dtype]:
    if not isinstance(sequences, Sequence) or isinstance(sequences, str | bytes):
        raise TypeError(f"{name}: expected a sequence of sequences, got {type(sequences).__name__}")
    if type(sequences) not in (list, tuple):
        sequences = list(sequences)
    if not sequences:
        raise ValueError(f"{name}: expected at least one sequence, got none")
    first = sequences[0]
    if isinstance(first, torch.Tensor):
        samples, dtype = _C.Samples.of_tensors(sequences, ragged=True), first.dtype
        if samples is None:  # leaves, subclasses: what they hold is taken
            plain = [_as_tensor(t, name) for t in sequences]
            samples = _C.Samples.of_tensors(plain, ragged=True)
        known = dtype in DTYPES
    elif isinstance(first, np.ndarray):
        samples = _C.Samples.of_arrays(sequences, ragged=True)
        dtype = ARRAY_DTYPES.get(first.dtype)
        known = dtype is not None
    else:
        samples = _C.Samples.of_lists(sequences)
        known = samples is not None
        dtype = torch.float32 if known and samples.floats else torch.int64
    if samples is None or not known:
        _refuse(sequences, name)
    return samples, dtype


def _as_tensor(value: Any, name: str) -> torch.Tensor:
    if not isinstance(value, torch.Tensor):
        raise TypeError(f"{name}: expected tensors only, got {type(value).__name__} among them")
    return value.detach().as_subclass(torch.Tensor)


def _refuse(sequences: Sequence[Any], name: str) -> None:
    def kind(value: Any) -> str:
        if isinstance(value, torch.Tensor | np.ndarray):
            rest = "".join(f", {size}" for size in value.shape[1:])
            shape = f"(L{rest})" if value.ndim else "()"
            device = f" on {value.device}" if isinstance(value, torch.Tensor) else ""
            return f"{type(value).__name__} of shape {shape}, {value.dtype}{device}"
        if isinstance(value, list | tuple):
            inside = sorted({type(item).__name__ for item in value})
            return f"{type(value).__name__} of {', '.join(inside) or 'nothing'}"
        return type(value).__name__

    first = kind(sequences[0])
    for position, value in enumerate(sequences):
        if kind(value) != first:
            raise ValueError(
                f"{name}: expected sequences alike in dtype and in all but the first size, got "
                f"{kind(value)} at position {position} and {first} at position 0"
            )
    raise TypeError(
        f"{name}: expected dense tensors in host memory, arrays or lists of numbers, with at least "
        f"one dimension, got {first}"
    )


def _item(value: Any, dtype: torch.dtype, name: str) -> bytes:
    """One value of `dtype`, as bytes."""
    # Other numbers may be equal and differ in their bytes, as 0.0 and -0.0.
    return _known_item(value, dtype, name) if type(value) is int else _new_item(value, dtype, name)


def _new_item(value: Any, dtype: torch.dtype, name: str) -> bytes:
    try:
        item = torch.tensor([value], dtype=dtype)
        fits = dtype.is_floating_point or dtype.is_complex or item.item() == value
    except (RuntimeError, TypeError, OverflowError) as error:
        raise ValueError(f"{name}: expected a value of {dtype}, got {value!r}") from error
    if not fits:
        raise ValueError(f"{name}: expected a value of {dtype}, got {value!r}")
    return item.view(torch.uint8).numpy().tobytes()


_known_item = functools.lru_cache(256)(_new_item)


def pad(
    sequences: Sequence[Any],
    *,
    value: float | int | bool = 0,
    side: str = "right",
    multiple: int = 1,
    length: int | None = None,
    mask: bool | torch.dtype = True,
    lengths: bool = False,
    position_ids: bool = False,
    labels: bool = False,
    ignore: int = IGNORE,
    memory: Any = None,
) -> Padded:
    """values[i, :L_i] = sequences[i], and ``value`` after it (before it with side="left").

    sequences: tensors, arrays, or lists of int (int64) or float (float32), of shape (L_i, ...),
    alike in dtype and in all but the first size. width = max L_i rounded up to ``multiple``, and at
    least ``length``. mask: int64, 1 where there is a value (True), or of dtype torch.bool or
    torch.int64. position_ids: int64, 0, 1, ... along each sequence and 0 in the padding. lengths:
    int64. labels: the values once more, with ``ignore`` in the padding.

    Everything is written in one pass by native threads; lists are read once. Raises ValueError and
    TypeError that say which sequence differs, and from what.
    """
    if side not in ("left", "right"):
        raise ValueError(f'pad: side: expected "left" or "right", got {side!r}')
    if isinstance(multiple, bool) or not isinstance(multiple, int) or multiple < 1:
        raise ValueError(f"pad: multiple: expected an integer >= 1, got {multiple!r}")
    mask_dtype = torch.int64 if mask is True else mask
    if mask_dtype is not False and mask_dtype not in (torch.int64, torch.bool):
        raise ValueError(f"pad: mask: expected a bool, torch.int64 or torch.bool, got {mask!r}")
    samples, dtype = _read(sequences, "pad")
    width = max(samples.longest, length or 0)
    width = -(-width // multiple) * multiple
    memory = shared_memory() if memory is None else memory
    n = len(samples)
    shape = (n, width, *samples.sizes[1:])
    out = Padded(
        memory.empty(shape, dtype),
        memory.empty((n, width), mask_dtype) if mask_dtype is not False else None,
        memory.empty((n,), torch.int64) if lengths else None,
        memory.empty((n, width), torch.int64) if position_ids else None,
        memory.empty(shape, dtype) if labels else None,
    )
    samples.pad_to(
        width,
        side == "left",
        _item(value, dtype, "pad: value"),
        _item(ignore if labels else 0, dtype, "pad: ignore"),
        values=out.values.data_ptr(),
        labels=_address(out.labels),
        mask=_address(out.mask),
        mask_bytes=1 if mask_dtype is torch.bool else 8,
        positions=_address(out.position_ids),
        lengths=_address(out.lengths),
        threads=torch.get_num_threads() - 1,
    )
    return out


def pack(
    sequences: Sequence[Any],
    *,
    position_ids: bool = True,
    seq_idx: bool = False,
    labels: bool = False,
    ignore: int = IGNORE,
    memory: Any = None,
) -> Packed:
    """values = sequences end to end; cu_seqlens[i] = L_0 + ... + L_{i-1}.

    sequences: as for :func:`pad`. labels: the values once more, with ``ignore`` for the first step
    of each sequence, which nothing predicts. position_ids: 0, 1, ... along each sequence. seq_idx:
    which sequence. Raises what :func:`pad` raises, and ValueError beyond 2³¹ − 1 steps.
    """
    samples, dtype = _read(sequences, "pack")
    memory = shared_memory() if memory is None else memory
    n, total = len(samples), samples.total
    if total >= 1 << 31:
        raise ValueError(f"pack: expected fewer than 2^31 steps, got {total}")
    shape = (total, *samples.sizes[1:])
    out = Packed(
        memory.empty(shape, dtype),
        memory.empty((n + 1,), torch.int32),
        samples.longest,
        memory.empty((total,), torch.int64) if position_ids else None,
        memory.empty((total,), torch.int32) if seq_idx else None,
        memory.empty(shape, dtype) if labels else None,
    )
    samples.pack_to(
        out.values.data_ptr(),
        _address(out.labels),
        _address(out.position_ids),
        _address(out.seq_idx),
        out.cu_seqlens.data_ptr(),
        _item(ignore if labels else 0, dtype, "pack: ignore"),
        threads=torch.get_num_threads() - 1,
    )
    return out


def _address(tensor: torch.Tensor | None) -> int:
    return 0 if tensor is None else tensor.data_ptr()
