"""``Collator``: a collate function with padding, packing and image transforms in the same pass."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch
from torch.utils.data import get_worker_info
from torch.utils.data._utils import collate as torch_collate

from batchops.data._arguments import as_integer
from batchops.data._collate import (
    VECTOR_FNS,
    Collation,
    SharedMemory,
    look_at_memory,
    read_arrays,
    read_tensors,
)
from batchops.data._errors import explained, note, raise_better, step
from batchops.data._memory import Memory, PinnedMemory, shared_memory
from batchops.data._source import ARRAY_DTYPES, DTYPES, native_may_stand_in
from batchops.data.normalize import Normalize, check_format
from batchops.data.padding import (
    IGNORE,
    check_side,
    pack,
    pad,
    read_sequences,
    width_for,
    write_packed,
    write_padded,
)

_CONTIGUOUS = torch.contiguous_format


@dataclass(frozen=True)
class Pad:
    """Which parts of a sample are padded, with what, and what is made beside them.

    values: the padding of each part, by its key in a mapping or its position in a tuple; a number
    for samples that are sequences themselves. side, multiple, length: as in
    :func:`batchops.data.pad`; all parts get the same width, that of the longest sequence of any.
    mask, lengths, position_ids, labels: the key under which that is put, made from the first part;
    None leaves it out. A mask or labels that the samples bring along are padded instead (0, and
    ``ignore``).

    Mappings become a dict, tuples a list with what was made beside the parts as a dict at its end;
    a namedtuple has no field for that, and stays one where there is none.
    """

    values: Any = 0
    side: str = "right"
    multiple: int = 1
    length: int | None = None
    mask: Any = "attention_mask"
    lengths: Any = None
    position_ids: Any = None
    labels: Any = None
    ignore: int = IGNORE

    def __post_init__(self) -> None:
        check_side("Pad", self.side)
        as_integer("Pad: multiple", self.multiple, 1)
        if self.length is not None:
            as_integer("Pad: length", self.length, 0)
        if isinstance(self.values, Mapping) and not self.values:
            raise ValueError("Pad: values: expected at least one key, got none")


@dataclass(frozen=True)
class Pack:
    """Which parts of a sample are laid end to end, and what is made beside them.

    keys: of the parts, of equal lengths within a sample; one, or a list of several. labels: the key
    under which the first part is put once more with ``ignore`` for the first step of each sequence;
    labels that the samples bring along get it too. cu_seqlens, max_seqlen: the keys of these, or
    several each. position_ids, seq_idx: as in :func:`batchops.data.pack`. batch_dim: a first
    dimension of size 1.
    """

    keys: Any = ("input_ids",)
    labels: Any = None
    position_ids: Any = "position_ids"
    seq_idx: Any = None
    cu_seqlens: Any = "cu_seqlens"
    max_seqlen: Any = "max_seqlen"
    ignore: int = IGNORE
    batch_dim: bool = False

    def __post_init__(self) -> None:
        if not _keys(self.keys):
            raise ValueError(f"Pack: keys: expected at least one key, got {self.keys!r}")


def _keys(value: Any) -> tuple[Any, ...]:
    if value is None:
        return ()
    return tuple(value) if isinstance(value, list | tuple) else (value,)


class Collator:
    """:func:`batchops.data.collate` with steps that cost no further pass.

    pad: a :class:`Pad` (or True, or a value: samples that are sequences, or the only part).
    pack: a :class:`Pack` (or True). Not both; False is off, as None.
    transform: a :class:`Normalize` for every image (three dimensions of uint8) of a sample, at any
    depth, or a mapping from key to Normalize: keys of the sample itself, or positions in it, that
    every sample has.
    layout: "HWC" where images without a transform have their channels last; the batch is (N, C, H,
    W). memory_format: of batches of images, contiguous or torch.channels_last.
    dtype: of floating-point tensors in the batch, those made of Python's and numpy's numbers too.
    A Normalize that has a dtype or a memory_format of its own keeps it; one that has none takes
    these.
    pin_memory: page-locked outputs, where there is CUDA; a loader's own setting goes before it.

    Called with a list of samples it gives the batch; pass it as ``collator=`` or ``collate_fn=``.
    Where native code may not look (subclasses of tensors, gradients, tensors on a device, a mode
    such as fake tensors, samples of several dtypes), torch's operators take the same steps. Steps
    are not taken in what functions of your own in ``default_collate_fn_map`` give.

    Raises ValueError for arguments, TypeError for a transform of another type, and what
    :func:`pad`, :func:`pack`, :class:`Normalize` and :func:`collate` raise, with the place in the
    batch.
    """

    def __init__(
        self,
        *,
        pad: Any = None,
        pack: Any = None,
        transform: Any = None,
        layout: str = "CHW",
        memory_format: torch.memory_format | None = None,
        dtype: torch.dtype | None = None,
        pin_memory: bool = False,
    ) -> None:
        pad = None if pad is False else pad
        pack = None if pack is False else pack
        if pad is not None and pack is not None:
            raise ValueError("Collator: expected pad or pack, got both")
        if pad is not None and not isinstance(pad, Pad):
            pad = Pad(0 if pad is True else pad)
        if pack is True:
            pack = Pack()
        if pack is not None and not isinstance(pack, Pack):
            raise ValueError(f"Collator: pack: expected True or a Pack, got {pack!r}")
        if layout not in ("HWC", "CHW"):
            raise ValueError(f'Collator: layout: expected "HWC" or "CHW", got {layout!r}')
        check_format("Collator", memory_format)
        if dtype is not None and not dtype.is_floating_point:
            raise ValueError(f"Collator: dtype: expected a floating-point dtype, got {dtype}")
        named = transform.values() if isinstance(transform, Mapping) else [transform]
        odd = [t for t in named if not isinstance(t, Normalize)]
        if transform is not None and odd:
            raise TypeError(
                f"Collator: transform: expected a Normalize or a mapping to it, got {odd[0]!r}"
            )
        self.pad = pad
        self.pack = pack
        self.transform = transform
        self.layout = layout
        self.memory_format = memory_format
        self.dtype = dtype
        self.pin_memory = pin_memory
        self._memory: Memory | None = None

    def __getstate__(self) -> dict[str, Any]:
        return {**self.__dict__, "_memory": None}  # slots stay in the process that made them

    def __call__(self, samples: Any) -> Any:
        if self.pin_memory and torch.cuda.is_available() and get_worker_info() is None:
            if self._memory is None:
                self._memory = PinnedMemory()
            return self.collate_into(samples, self._memory)
        return self.collate_into(samples, shared_memory())

    def collate_into(self, samples: Any, memory: Any) -> Any:
        """The batch, with outputs from ``memory``."""
        if get_worker_info() is not None:
            memory = SharedMemory()
        fn_map = torch_collate.default_collate_fn_map
        collation = _Steps(self, fn_map, memory, native_may_stand_in())
        try:
            if collation.named:
                collation.refuse_missing(samples)
            if self.pad is not None:
                return collation.padded(samples, self.pad)
            if self.pack is not None:
                return collation.packed(samples, self.pack)
            return collation.collate(samples)
        except Exception as error:
            raise_better(error, explained(error))


def _parts(batch: Any) -> tuple[bool, list[Any]]:
    """Whether samples are mappings, and the keys of their parts; no keys for bare sequences."""
    first = batch[0]
    if isinstance(first, Mapping):
        return True, list(first)
    if isinstance(first, tuple) and any(
        isinstance(part, torch.Tensor | np.ndarray | list) for part in first
    ):
        return False, list(range(len(first)))
    return False, []


_NO_TRANSFORMS: Mapping[Any, Normalize] = {}


class _Steps(Collation):
    def __init__(self, options: Collator, fn_map: Any, memory: Any, native: bool) -> None:
        super().__init__(fn_map, memory, native)
        self.options = options
        named = isinstance(options.transform, Mapping)
        self.named = options.transform if named else _NO_TRANSFORMS
        self.everywhere = None if named else options.transform
        last = options.memory_format is torch.channels_last
        self.rearranges = options.layout == "HWC" or last
        self.dtype = options.dtype
        self.only_stacks = self.everywhere is None and not self.rearranges and self.dtype is None

    # --- parts by key -------------------------------------------------------------------------

    def refuse_missing(self, batch: Any) -> None:
        first = batch[0]
        keys: Sequence[Any] = []
        if isinstance(first, Mapping):
            keys = list(first)
        elif isinstance(first, Sequence) and not isinstance(first, str | bytes):
            keys = range(len(first))
        missing = [key for key in self.named if key not in keys]
        if missing:
            raise ValueError(
                f"Collator: transform: expected {missing} in each sample, got {list(keys)}"
            )

    def part(self, key: Any, samples: Any) -> Any:
        # Keys are those of the samples, not of what is in their parts.
        named = self.named
        if not named:
            return super().part(key, samples)
        self.named = _NO_TRANSFORMS
        try:
            if key not in named:
                return super().part(key, samples)
            return self.guarded(key, samples, lambda: self.normalized(named[key], samples))
        finally:
            self.named = named

    def guarded(self, key: Any, samples: Any, make: Any) -> Any:
        try:
            return make()
        except Exception as error:
            note(error, samples)
            step(error, key)
            raise

    def read(self, key: Any, samples: Any, name: str) -> Any:
        try:
            return read_sequences(samples, name)
        except Exception as error:
            note(error, samples)
            step(error, key)
            raise

    # --- sequences ----------------------------------------------------------------------------

    def padded(self, batch: Any, options: Pad) -> Any:
        mappings, keys = _parts(batch)
        if not keys:
            if isinstance(options.values, Mapping):
                raise ValueError(
                    f"Collator: pad: values for {list(options.values)}, and the samples are "
                    f"{type(batch[0]).__name__}: expected mappings or tuples"
                )
            made = pad(
                batch,
                value=options.values,
                side=options.side,
                multiple=options.multiple,
                length=options.length,
                mask=options.mask is not None,
                lengths=options.lengths is not None,
                position_ids=options.position_ids is not None,
                labels=options.labels is not None,
                ignore=options.ignore,
                memory=self.memory,
            )
            return made._replace(values=self.cast(made.values), labels=self.cast(made.labels))
        values = options.values
        if not isinstance(values, Mapping):
            values = {("input_ids" if mappings else 0): values}
        values = dict(values)
        for key, value in ((options.mask, 0), (options.labels, options.ignore)):
            if key is not None and key in keys:
                values.setdefault(key, value)
        missing = [key for key in values if key not in keys]
        if missing:
            raise ValueError(f"Collator: pad: expected {missing} in each sample, got {keys}")
        columns = {key: self.samples_of(key, batch) for key in values}
        reads = {key: self.read(key, column, "pad") for key, column in columns.items()}
        longest = max([read.longest for read, _ in reads.values()])
        width = width_for(longest, options.length, options.multiple)
        out: dict[Any, Any] = {}
        beside: dict[Any, Any] = {}
        for position, (key, value) in enumerate(values.items()):
            first = position == 0
            wanted = {
                "mask": first and options.mask is not None and options.mask not in keys,
                "lengths": first and options.lengths is not None,
                "position_ids": first and options.position_ids is not None,
                "labels": first and options.labels is not None and options.labels not in keys,
            }
            made = self.guarded(
                key,
                columns[key],
                lambda key=key, value=value, wanted=wanted: write_padded(
                    *reads[key],
                    width,
                    value=value,
                    left=options.side == "left",
                    ignore=options.ignore,
                    memory=self.memory,
                    **wanted,
                ),
            )
            out[key] = self.cast(made.values)
            for name, wants in wanted.items():
                if wants:
                    value = getattr(made, name)
                    beside[getattr(options, name)] = self.cast(value) if name == "labels" else value
        return self.assembled(batch, mappings, keys, out, beside)

    def packed(self, batch: Any, options: Pack) -> Any:
        mappings, keys = _parts(batch)
        if not keys:
            made = pack(
                batch,
                position_ids=options.position_ids is not None,
                seq_idx=options.seq_idx is not None,
                labels=options.labels is not None,
                ignore=options.ignore,
                memory=self.memory,
            )
            return made._replace(values=self.cast(made.values), labels=self.cast(made.labels))
        wanted_keys = [key for key in _keys(options.keys) if key != options.labels]
        missing = [key for key in wanted_keys or [options.labels] if key not in keys]
        if missing:
            raise ValueError(f"Collator: pack: expected {missing} in each sample, got {keys}")
        out: dict[Any, Any] = {}
        beside: dict[Any, Any] = {}
        brings = options.labels is not None and options.labels in keys
        lengths = None
        for position, key in enumerate([*wanted_keys, *([options.labels] if brings else [])]):
            column = self.samples_of(key, batch)
            first = position == 0
            own_labels = brings and key == options.labels
            read, dtype = self.read(key, column, "pack")
            if first:
                lengths = read.lengths
            elif read.lengths != lengths:
                i = next(i for i, n in enumerate(read.lengths) if n != lengths[i])
                raise ValueError(
                    f"Collator: pack: expected parts of equal lengths, got {read.lengths[i]} of "
                    f"{key!r} and {lengths[i]} of {wanted_keys[0]!r} at position {i}"
                )
            made = self.guarded(
                key,
                column,
                lambda read=read, dtype=dtype, first=first, own=own_labels: write_packed(
                    read,
                    dtype,
                    position_ids=first and options.position_ids is not None,
                    seq_idx=first and options.seq_idx is not None,
                    labels=own or (first and options.labels is not None and not brings),
                    ignore=options.ignore,
                    memory=self.memory,
                ),
            )
            out[key] = self.cast(made.labels if own_labels else made.values)
            if first:
                if options.labels is not None and not brings:
                    beside[options.labels] = self.cast(made.labels)
                if options.position_ids is not None:
                    beside[options.position_ids] = made.position_ids
                if options.seq_idx is not None:
                    beside[options.seq_idx] = made.seq_idx
        if options.batch_dim:
            out = {key: value[None] for key, value in out.items()}
            beside = {key: value[None] for key, value in beside.items()}
        for key in _keys(options.cu_seqlens):
            beside[key] = made.cu_seqlens
        for key in _keys(options.max_seqlen):
            beside[key] = made.max_seqlen
        return self.assembled(batch, mappings, keys, out, beside)

    def samples_of(self, key: Any, batch: Any) -> list[Any]:
        try:
            return [sample[key] for sample in batch]
        except Exception as error:
            note(error, batch)
            raise

    def assembled(
        self, batch: Any, mappings: bool, keys: list[Any], out: dict[Any, Any], beside: Any
    ) -> Any:
        both = [key for key in self.named if key in out]
        if both:
            raise ValueError(f"Collator: transform: expected images, and {both} are sequences")
        for key in keys:
            if key not in out:
                out[key] = self.column(key, batch)
        if mappings:
            return {**{key: out[key] for key in keys}, **beside}
        parts = [out[key] for key in keys]
        if hasattr(batch[0], "_fields") and not beside:
            return type(batch[0])(*parts)
        # Tuples become lists, as ever, with what was made beside the parts as a dict at the end.
        return [*parts, *([beside] if beside else [])]

    # --- images and dtypes --------------------------------------------------------------------

    def stack_tensors(self, batch: Any) -> torch.Tensor | None:
        if self.only_stacks:
            return super().stack_tensors(batch)
        first = batch[0]
        if self.is_transformed(first):
            return None
        rearranges = self.rearranges and first.dim() == 3
        if not rearranges and not self.casts(first.dtype):
            return super().stack_tensors(batch)
        if first.dtype not in DTYPES or read_tensors(batch) is None:
            return None
        if rearranges:
            order = self.order()
            batch = [tensor.permute(order) for tensor in batch]
        return self.stepped(batch, read_tensors, first.dtype, rearranges)

    def stack_arrays(self, batch: Any) -> torch.Tensor | None:
        if self.only_stacks:
            return super().stack_arrays(batch)
        first = batch[0]
        if self.is_transformed(first):
            return None
        dtype = ARRAY_DTYPES.get(first.dtype)
        if dtype is None:
            return None
        rearranges = self.rearranges and first.ndim == 3
        if not rearranges and not self.casts(dtype):
            return super().stack_arrays(batch)
        samples = read_arrays(batch)
        if samples is None:
            return None
        look_at_memory(samples, batch)
        if rearranges:
            order = self.order()
            batch = [array.transpose(order) for array in batch]
        if self.casts(dtype):
            batch = [torch.as_tensor(array) for array in batch]
        return self.stepped(batch, read_arrays, dtype, rearranges)

    def stepped(
        self, rows: Sequence[Any], read: Any, dtype: torch.dtype, rearranged: bool
    ) -> torch.Tensor:
        """The batch of samples as they are to lie, in one pass."""
        shape = rows[0].shape
        if self.casts(dtype):
            out = self.memory.empty((len(rows), *shape), self.dtype)
            for row, sample in zip(out.unbind(0), rows, strict=True):
                row.copy_(sample)  # converts on the way
        else:
            out = self.stacked(read(rows), shape, dtype)
        last = self.options.memory_format is torch.channels_last
        return out.permute(0, 3, 1, 2) if rearranged and last else out

    def numbers(self, fn: Any, batch: Any) -> torch.Tensor | None:
        return self.cast(super().numbers(fn, batch))

    def by_torch(self, fn: Any, batch: Any) -> Any:
        stacks = self.stacks(fn)
        if stacks and self.is_transformed(batch[0]):
            return self.normalized(self.everywhere, batch)
        out = super().by_torch(fn, batch)
        if not stacks and fn not in VECTOR_FNS:
            return out  # of a function of the user's
        if stacks and self.rearranges and out.dim() == 4:
            if self.options.layout == "HWC":
                out = out.permute(0, 3, 1, 2)
            out = out.contiguous(memory_format=self.options.memory_format or _CONTIGUOUS)
        return self.cast(out)

    def order(self) -> tuple[int, int, int]:
        """How a sample's dimensions are seen, for rows of the batch in its own order."""
        last = self.options.memory_format is torch.channels_last
        if self.options.layout == "HWC":
            return (0, 1, 2) if last else (2, 0, 1)
        return (1, 2, 0) if last else (0, 1, 2)

    def normalized(self, transform: Normalize, batch: Any) -> torch.Tensor:
        options = self.options
        return transform(
            batch, self.memory, dtype=options.dtype, memory_format=options.memory_format
        )

    def is_transformed(self, first: Any) -> bool:
        """Whether it is an image for the transform of every image."""
        if self.everywhere is None or first.ndim != 3:
            return False
        if isinstance(first, torch.Tensor):
            return first.dtype is torch.uint8 and not first.is_nested
        return first.dtype == np.uint8

    def casts(self, dtype: torch.dtype) -> bool:
        wanted = self.dtype
        return wanted is not None and dtype.is_floating_point and dtype != wanted

    def cast(self, tensor: torch.Tensor | None) -> torch.Tensor | None:
        if self.dtype is None or tensor is None or not self.casts(tensor.dtype):
            return tensor
        if (
            self.native
            and type(tensor) is torch.Tensor
            and tensor.device.type == "cpu"
            and tensor.is_contiguous()
            and not tensor.requires_grad
        ):
            return self.memory.empty(tensor.shape, self.dtype).copy_(tensor)
        return tensor.to(self.dtype)
