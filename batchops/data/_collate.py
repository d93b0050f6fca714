"""``collate``: torch's default_collate, with stacks and vectors written by native code.

Which function collates what is decided as torch decides it, from the first element and from
``default_collate_fn_map`` as it is at that moment. Where that would be one of torch's own functions
and the samples are plain memory, native code does what it does; otherwise the function is called.
"""

from __future__ import annotations

import collections.abc
import copy
from typing import Any

import torch
from torch.utils.data import get_worker_info
from torch.utils.data._utils import collate as torch_collate

from batchops import _C
from batchops.data._errors import explained, note, raise_better, step
from batchops.data._memory import PlainMemory, shared_memory
from batchops.data._source import (
    ARRAY_DTYPES,
    DTYPES,
    makes_tensors_on_cpu,
    native_may_stand_in,
    refuse_truncated_ones,
)

_default_collate = torch_collate.default_collate
_tensor_fn = torch_collate.collate_tensor_fn
_array_fn = torch_collate.collate_numpy_array_fn
_float_fn = torch_collate.collate_float_fn
_int_fn = torch_collate.collate_int_fn

# These take a tuple as well as a list.
_ANY_SEQUENCE = (_tensor_fn, _array_fn)

# What numbers are collated by.
VECTOR_FNS = (_float_fn, _int_fn, torch_collate.collate_numpy_scalar_fn)

# torch.tensor makes a vector of few numbers as fast.
_FEW_NUMBERS = 16

read_tensors = _C.Samples.of_tensors
read_arrays = _C.Samples.of_arrays


def collate(batch: Any) -> Any:
    """out[...][i] = batch[i][...]: the samples of a list as one batch.

    Exactly ``torch.utils.data.default_collate``: tensors and arrays are stacked, numbers become
    vectors (float64 from floats), strings and bytes stay lists, mappings, namedtuples and sequences
    are collated part by part, custom classes of these are kept where torch keeps them.
    ``torch.utils.data.default_collate_fn_map`` is read as it is at the call. Use it as the
    ``collate_fn`` of a loader, torch's included.

    Stacks of plain tensors and arrays are written by native threads (without the GIL from 4 MiB on:
    below, its return may cost more than the copy), in memory that is used again once no view of an
    earlier batch is alive; in a worker process, in shared memory, as torch does.

    Raises what torch raises: its message first, then the position in the batch, the way to the
    value, and both shapes and dtypes. RuntimeError for a memmap whose file was truncated.
    """
    return collate_into(batch, None)


def collate_into(batch: Any, memory: Any) -> Any:
    """:func:`collate` with outputs from ``memory``, or where they belong by themselves."""
    if memory is None:
        memory = shared_memory()
    native = native_may_stand_in()
    if get_worker_info() is not None:
        memory = SharedMemory()
    try:
        return Collation(torch_collate.default_collate_fn_map, memory, native).collate(batch)
    except Exception as error:
        raise_better(error, explained(error))


def is_default(fn: Any) -> bool:
    """Whether ``fn`` is torch's default_collate, or ours."""
    return fn is _default_collate or fn is collate


def look_at_memory(samples: _C.Samples, batch: Any) -> None:
    """Raises RuntimeError for a mapped file that was truncated; warns of arrays that are read-only,
    as torch does."""
    refuse_truncated_ones(batch, samples.mapped)
    if samples.readonly >= 0:
        torch.as_tensor(batch[samples.readonly])  # which warns, once


class SharedMemory(PlainMemory):
    """Memory that a worker process hands to its parent without a copy, made as torch makes it."""

    def __init__(self) -> None:
        super().__init__(self._shared_empty)

    @staticmethod
    def _shared_empty(shape: tuple[int, ...], dtype: torch.dtype, device: str) -> torch.Tensor:
        like = torch.empty(0, dtype=dtype, device=device)
        numel = 1
        for size in shape:
            numel *= size
        storage = like._typed_storage()._new_shared(numel, device=like.device)
        return like.new(storage).resize_(*shape)


class Collation:
    def __init__(self, fn_map: dict[Any, Any], memory: Any, native: bool) -> None:
        self.fn_map = fn_map
        self.memory = memory
        self.native = native
        self.makes_tensors = native and makes_tensors_on_cpu()
        self.threads = torch.get_num_threads() - 1

    def collate(self, batch: Any) -> Any:
        elem = batch[0]
        elem_type = type(elem)
        fn_map = self.fn_map
        if elem_type in fn_map:
            return self.leaf(fn_map[elem_type], batch)
        for key in fn_map:
            if isinstance(elem, key):
                return self.leaf(fn_map[key], batch)
        if isinstance(elem, collections.abc.Mapping):
            return self.mapping(elem, batch)
        if isinstance(elem, tuple) and hasattr(elem, "_fields"):  # a namedtuple
            try:
                # Made as torch makes it: each part is collated before the next is looked at.
                return elem_type(
                    *(
                        self.part(key, samples)
                        for key, samples in enumerate(zip(*batch, strict=False))
                    )
                )
            except Exception as error:
                note(error, batch)
                raise
        if isinstance(elem, collections.abc.Sequence):
            return self.sequence(elem, batch)
        error = TypeError(torch_collate.default_collate_err_msg_format.format(elem_type))
        note(error, batch)
        raise error

    def part(self, key: Any, samples: Any) -> Any:
        try:
            return self.collate(samples)
        except Exception as error:
            step(error, key)
            raise

    def column(self, key: Any, batch: Any) -> Any:
        samples = _C.column(batch, key)
        if samples is None:
            try:
                samples = [d[key] for d in batch]
            except Exception as error:
                note(error, batch)
                raise
        elif self.fn_map.get(type(samples[0])) not in _ANY_SEQUENCE:
            samples = list(samples)  # as user functions, and strings, know it
        return self.part(key, samples)

    def mapping(self, elem: Any, batch: Any) -> Any:
        try:
            if isinstance(elem, collections.abc.MutableMapping):
                # A copy keeps what else the class holds.
                clone = copy.copy(elem)
                clone.update({key: self.column(key, batch) for key in elem})
                return clone
            return type(elem)({key: self.column(key, batch) for key in elem})
        except TypeError:
            # Neither copied, nor updated, nor made from a dict; or the error of a part, again.
            return {key: self.column(key, batch) for key in elem}

    def sequence(self, elem: Any, batch: Any) -> Any:
        try:
            # One len() an item, through the iterator, in torch's order.
            it = iter(batch)
            size = len(next(it))
            if not all(len(other) == size for other in it):
                raise RuntimeError("each element in list of batch should be of equal size")
            transposed = list(zip(*batch, strict=False))
        except Exception as error:
            note(error, batch)
            raise
        if isinstance(elem, tuple):
            return [self.part(key, samples) for key, samples in enumerate(transposed)]
        try:
            if isinstance(elem, collections.abc.MutableSequence):
                clone = copy.copy(elem)
                for i, samples in enumerate(transposed):
                    clone[i] = self.part(i, samples)
                return clone
            return type(elem)([self.part(key, samples) for key, samples in enumerate(transposed)])
        except TypeError:
            return [self.part(key, samples) for key, samples in enumerate(transposed)]

    def leaf(self, fn: Any, batch: Any) -> Any:
        try:
            out = None
            if fn is _tensor_fn:
                out = self.stack_tensors(batch) if self.native else None
            elif self.makes_tensors:
                if fn is _array_fn:
                    # Arrays become tensors, and are collated by whatever collates tensors now.
                    if self.fn_map.get(torch.Tensor) is _tensor_fn:
                        out = self.stack_arrays(batch)
                elif fn is _float_fn or fn is _int_fn:
                    out = self.numbers(fn, batch)
            return self.by_torch(fn, batch) if out is None else out
        except Exception as error:
            note(error, batch)
            raise

    def stacks(self, fn: Any) -> bool:
        """Whether what ``fn`` gives is torch's stack."""
        return fn is _tensor_fn or (fn is _array_fn and self.fn_map.get(torch.Tensor) is _tensor_fn)

    def by_torch(self, fn: Any, batch: Any) -> Any:
        if fn is _array_fn:
            refuse_truncated_ones(batch)
        return fn(batch, collate_fn_map=self.fn_map)

    def stack_tensors(self, batch: Any) -> torch.Tensor | None:
        samples = read_tensors(batch)
        if samples is None:
            return None
        elem = batch[0]
        if elem.dtype not in DTYPES:
            return None
        return self.stacked(samples, elem.shape, elem.dtype)

    def stack_arrays(self, batch: Any) -> torch.Tensor | None:
        elem = batch[0]
        dtype = ARRAY_DTYPES.get(elem.dtype)
        samples = read_arrays(batch) if dtype is not None else None
        if samples is None:
            return None
        if not samples.in_plain_memory:
            look_at_memory(samples, batch)
        return self.stacked(samples, elem.shape, dtype)

    def stacked(self, samples: _C.Samples, shape: Any, dtype: torch.dtype) -> torch.Tensor:
        out = self.memory.empty((len(samples), *shape), dtype)
        samples.copy_to(out.data_ptr(), samples.total_bytes, self.threads)
        return out

    def numbers(self, fn: Any, batch: Any) -> torch.Tensor | None:
        n = len(batch)
        if n < _FEW_NUMBERS or not isinstance(batch, list | tuple):
            return None
        if fn is _float_fn:
            out = torch.empty(n, dtype=torch.float64, device="cpu")
            return out if _C.write_floats(batch, out.data_ptr(), 8 * n) else None
        out = torch.empty(n, dtype=torch.int64, device="cpu")
        return out if _C.write_ints(batch, out.data_ptr(), 8 * n) else None
