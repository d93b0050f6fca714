"""``pad`` and ``pack``: sequences of unequal lengths as one batch, in one pass."""

from __future__ import annotations

import functools
import itertools
from collections.abc import Sequence
from typing import Any, NamedTuple

import numpy as np
import torch
from torch.utils._python_dispatch import _disable_current_modes

from batchops import _C
from batchops.data._arguments import as_integer
from batchops.data._memory import shared_memory
from batchops.data._source import (
    ARRAY_DTYPES,
    DTYPES,
    native_may_stand_in,
    nobody_watches,
    refuse_truncated_ones,
)

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


class Parts:
    """Sequences as tensors, for torch's operators: with a graph or tangents, or in a mode's view.

    What is said about them has the names that ``_C.Samples`` has.
    """

    def __init__(self, tensors: list[torch.Tensor]) -> None:
        self.tensors = tensors
        self.lengths = [len(tensor) for tensor in tensors]
        self.longest = max(self.lengths)
        self.total = sum(self.lengths)
        self.device = tensors[0].device

    def padded(self, width: int, left: bool, value: Any) -> torch.Tensor:
        rows = []
        for tensor, length in zip(self.tensors, self.lengths, strict=True):
            beside = [width - length, 0] if left else [0, width - length]
            inner = [0, 0] * (tensor.dim() - 1)
            rows.append(torch.constant_pad_nd(tensor, [*inner, *beside], value))
        return torch.stack(rows)

    def steps(self, width: int, left: bool) -> tuple[torch.Tensor, torch.Tensor]:
        """(n, width): how far each position is along its sequence, and whether it is in it."""
        lengths = self.vector(self.lengths)[:, None]
        steps = torch.arange(width, device=self.device)[None] - (width - lengths if left else 0)
        return steps, (steps >= 0) & (steps < lengths)

    def vector(self, numbers: list[int], dtype: torch.dtype = torch.int64) -> torch.Tensor:
        return torch.tensor(numbers, dtype=dtype, device=self.device)


def read_sequences(sequences: Any, name: str) -> tuple[_C.Samples | Parts, torch.dtype]:
    """The sequences where they lie, or as tensors where torch has to do it; and the dtype of both.

    For :func:`write_padded` and :func:`write_packed`.
    """
    if not isinstance(sequences, Sequence) or isinstance(sequences, str | bytes):
        raise TypeError(f"{name}: expected a sequence of sequences, got {type(sequences).__name__}")
    if type(sequences) not in (list, tuple):
        sequences = list(sequences)
    if not sequences:
        raise ValueError(f"{name}: expected at least one sequence, got none")
    first = sequences[0]
    native = native_may_stand_in()
    if isinstance(first, torch.Tensor):
        dtype = first.dtype
        samples = _C.Samples.of_tensors(sequences, ragged=True) if native else None
        if samples is not None and dtype in DTYPES:
            return samples, dtype
        return _of_odd_tensors(sequences, name, native), dtype
    if isinstance(first, np.ndarray):
        dtype = ARRAY_DTYPES.get(first.dtype)
        samples = _arrays(sequences) if dtype is not None else None
    else:
        samples = _C.Samples.of_lists(sequences)
        dtype = torch.float32 if samples is not None and samples.floats else torch.int64
    if samples is None or dtype is None:
        _refuse(sequences, name)
    if native:
        return samples, dtype
    return Parts([torch.tensor(s, dtype=dtype, device="cpu") for s in sequences]), dtype


def _arrays(sequences: Sequence[Any]) -> _C.Samples | None:
    samples = _C.Samples.of_arrays(sequences, ragged=True)
    if samples is not None:
        refuse_truncated_ones(sequences, samples.mapped)
        return samples
    if not all(isinstance(array, np.ndarray) and array.ndim for array in sequences):
        return None
    # Subclasses, and strides that count down.
    refuse_truncated_ones(sequences)
    return _C.Samples.of_arrays([np.ascontiguousarray(a) for a in sequences], ragged=True)


def _of_odd_tensors(sequences: Sequence[Any], name: str, native: bool) -> _C.Samples | Parts:
    """Leaves, subclasses, conjugates, and what a mode watches."""
    odd = next((value for value in sequences if not isinstance(value, torch.Tensor)), None)
    if odd is not None:
        raise TypeError(f"{name}: expected tensors only, got {type(odd).__name__} among them")
    first = sequences[0]
    for t in sequences:
        if (
            t.layout is not torch.strided
            or t.is_nested
            or t.device.type != "cpu"
            or t.dtype not in DTYPES
            or t.dtype != first.dtype
            or t.dim() < 1
            or t.shape[1:] != first.shape[1:]
        ):
            _refuse(sequences, name)
    if native and not (torch.is_grad_enabled() and any(t.requires_grad for t in sequences)):
        # No graph to keep: what they hold is taken.
        plain = [t.detach().as_subclass(torch.Tensor) for t in sequences]
        samples = _C.Samples.of_tensors(plain, ragged=True)
        if samples is not None:
            return samples
    return Parts(list(sequences))


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


def check_side(name: str, side: Any) -> None:
    if side not in ("left", "right"):
        raise ValueError(f'{name}: side: expected "left" or "right", got {side!r}')


def width_for(longest: int, length: int | None, multiple: int) -> int:
    multiple = int(multiple)
    return -(-max(longest, int(length or 0)) // multiple) * multiple


def _item(value: Any, dtype: torch.dtype, name: str) -> bytes:
    """One value of `dtype`, as bytes."""
    # Other numbers may be equal and differ in their bytes, as 0.0 and -0.0.
    return _known_item(value, dtype, name) if type(value) is int else _new_item(value, dtype, name)


def _new_item(value: Any, dtype: torch.dtype, name: str) -> bytes:
    if not nobody_watches():  # no mode is to see how bytes are made
        with torch._C.DisableTorchFunction(), _disable_current_modes():
            return _new_item(value, dtype, name)
    try:
        item = torch.tensor([value], dtype=dtype, device="cpu")
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

    Everything is written in one pass by native threads; lists are read once. Tensors that require a
    gradient keep their graph: torch's operators pad them. Raises ValueError and TypeError that say
    which sequence differs, and from what, and RuntimeError for a memmap whose file was truncated.
    """
    check_side("pad", side)
    multiple = as_integer("pad: multiple", multiple, 1)
    length = None if length is None else as_integer("pad: length", length, 0)
    read, dtype = read_sequences(sequences, "pad")
    return write_padded(
        read,
        dtype,
        width_for(read.longest, length, multiple),
        value=value,
        left=side == "left",
        mask=mask,
        lengths=lengths,
        position_ids=position_ids,
        labels=labels,
        ignore=ignore,
        memory=memory,
    )


def write_padded(
    read: _C.Samples | Parts,
    dtype: torch.dtype,
    width: int,
    *,
    value: Any,
    left: bool,
    mask: Any,
    lengths: bool,
    position_ids: bool,
    labels: bool,
    ignore: int,
    memory: Any,
) -> Padded:
    mask_dtype = torch.int64 if mask is True else mask
    if mask_dtype is not False and mask_dtype not in (torch.int64, torch.bool):
        raise ValueError(f"pad: mask: expected a bool, torch.int64 or torch.bool, got {mask!r}")
    fill = _item(value, dtype, "pad: value")
    label_fill = _item(ignore if labels else 0, dtype, "pad: ignore")
    if isinstance(read, Parts):
        steps, inside = read.steps(width, left)
        return Padded(
            read.padded(width, left, value),
            inside.to(mask_dtype) if mask_dtype is not False else None,
            read.vector(read.lengths) if lengths else None,
            steps.where(inside, 0) if position_ids else None,
            read.padded(width, left, ignore) if labels else None,
        )
    memory = shared_memory() if memory is None else memory
    n = len(read)
    shape = (n, width, *read.sizes[1:])
    out = Padded(
        memory.empty(shape, dtype),
        memory.empty((n, width), mask_dtype) if mask_dtype is not False else None,
        memory.empty((n,), torch.int64) if lengths else None,
        memory.empty((n, width), torch.int64) if position_ids else None,
        memory.empty(shape, dtype) if labels else None,
    )
    read.pad_to(
        width,
        left,
        fill,
        label_fill,
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
    which sequence. Graphs are kept as by :func:`pad`. Raises what it raises, and ValueError beyond
    2³¹ − 1 steps.
    """
    return write_packed(
        *read_sequences(sequences, "pack"),
        position_ids=position_ids,
        seq_idx=seq_idx,
        labels=labels,
        ignore=ignore,
        memory=memory,
    )


def write_packed(
    read: _C.Samples | Parts,
    dtype: torch.dtype,
    *,
    position_ids: bool,
    seq_idx: bool,
    labels: bool,
    ignore: int,
    memory: Any,
) -> Packed:
    total = read.total
    if total >= 1 << 31:
        raise ValueError(f"pack: expected fewer than 2^31 steps, got {total}")
    separator = _item(ignore if labels else 0, dtype, "pack: ignore")
    if isinstance(read, Parts):
        return _pack_by_torch(read, position_ids, seq_idx, labels, ignore)
    memory = shared_memory() if memory is None else memory
    shape = (total, *read.sizes[1:])
    out = Packed(
        memory.empty(shape, dtype),
        memory.empty((len(read) + 1,), torch.int32),
        read.longest,
        memory.empty((total,), torch.int64) if position_ids else None,
        memory.empty((total,), torch.int32) if seq_idx else None,
        memory.empty(shape, dtype) if labels else None,
    )
    read.pack_to(
        out.values.data_ptr(),
        _address(out.labels),
        _address(out.position_ids),
        _address(out.seq_idx),
        out.cu_seqlens.data_ptr(),
        separator,
        threads=torch.get_num_threads() - 1,
    )
    return out


def _pack_by_torch(
    parts: Parts, position_ids: bool, seq_idx: bool, labels: bool, ignore: int
) -> Packed:
    n, total = len(parts.lengths), parts.total
    ends = [0, *itertools.accumulate(parts.lengths)]
    cu_seqlens = parts.vector(ends, torch.int32)
    sequence = parts.vector(list(range(n))).repeat_interleave(
        parts.vector(parts.lengths), output_size=total
    )
    steps = torch.arange(total, device=parts.device) - cu_seqlens.long()[sequence]
    values = torch.cat(parts.tensors)
    out = Packed(values, cu_seqlens, parts.longest)
    if position_ids:
        out = out._replace(position_ids=steps)
    if seq_idx:
        out = out._replace(seq_idx=sequence.int())
    if labels:
        first = (steps == 0).view(-1, *[1] * (values.dim() - 1))
        out = out._replace(labels=values.masked_fill(first, ignore))
    return out


def _address(tensor: torch.Tensor | None) -> int:
    return 0 if tensor is None else tensor.data_ptr()
