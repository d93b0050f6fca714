"""``Collator``: a collate function with padding, packing and image transforms in the same pass."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch
from torch.utils.data import get_worker_info
from torch.utils.data._utils import collate as torch_collate

from batchops import _C
from batchops.data._collate import Collation, SharedMemory
from batchops.data._errors import explained, note, step
from batchops.data._memory import Memory, PinnedMemory, shared_memory
from batchops.data._source import ARRAY_DTYPES, nobody_watches
from batchops.data.normalize import check_format
from batchops.data.padding import IGNORE, pack, pad


@dataclass(frozen=True)
class Pad:
    """Which parts of a sample are padded, with what, and what is made beside them.

    values: the padding of each part, by its key in a mapping or its position in a tuple; a number
    for samples that are sequences themselves. side, multiple, length: as in
    :func:`batchops.data.pad`; all parts get the same width. mask, lengths, position_ids, labels:
    the key under which that is put, made from the first part; None leaves it out. A mask or labels
    that the samples bring along are padded instead (0, and ``ignore``).
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


@dataclass(frozen=True)
class Pack:
    """Which parts of a sample are laid end to end, and what is made beside them.

    keys: of the parts, of equal lengths within a sample. labels: the key under which the first part
    is put once more with ``ignore`` for the first step of each sequence; labels that the samples
    bring along get it too. cu_seqlens, max_seqlen: the keys of these, or several each.
    position_ids, seq_idx: as in :func:`batchops.data.pack`. batch_dim: a first dimension of size 1.
    """

    keys: Sequence[Any] = ("input_ids",)
    labels: Any = None
    position_ids: Any = "position_ids"
    seq_idx: Any = None
    cu_seqlens: Any = "cu_seqlens"
    max_seqlen: Any = "max_seqlen"
    ignore: int = IGNORE
    batch_dim: bool = False


def _keys(value: Any) -> tuple[Any, ...]:
    if value is None:
        return ()
    return tuple(value) if isinstance(value, list | tuple) else (value,)


class Collator:
    """:func:`batchops.data.collate` with steps that cost no further pass.

    pad: a :class:`Pad` (or True, or a value: samples that are sequences, or the only part).
    pack: a :class:`Pack` (or True). Not both.
    transform: a :class:`Normalize` for every image (three dimensions of uint8) of a sample, or a
    mapping from key to Normalize.
    layout: "HWC" where images without a transform have their channels last; the batch is (N, C, H,
    W). memory_format: of batches of images, contiguous or torch.channels_last.
    dtype: of floating-point tensors in the batch.
    pin_memory: page-locked outputs, where there is CUDA; a loader's own setting goes before it.

    Called with a list of samples it gives the batch; pass it as ``collator=`` or ``collate_fn=``.
    Raises ValueError for arguments, and what :func:`pad`, :func:`pack`, :class:`Normalize` and
    :func:`collate` raise, with the place in the batch.
    """

    def __init__(
        self,
        *,
        pad: Any = None,
        pack: Any = None,
        transform: Any = None,
        layout: str = "CHW",
        memory_format: torch.memory_format = torch.contiguous_format,
        dtype: torch.dtype | None = None,
        pin_memory: bool = False,
    ) -> None:
        if pad is not None and pack is not None:
            raise ValueError("Collator: expected pad or pack, got both")
        if pad is not None and pad is not False and not isinstance(pad, Pad):
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
        if transform is not None and not all(callable(t) for t in named):
            raise ValueError(
                f"Collator: transform: expected a Normalize or a mapping to it, got {transform!r}"
            )
        self.pad = pad or None
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
        native = nobody_watches() and torch.autograd.forward_ad._current_level < 0
        collation = _Steps(self, torch_collate.default_collate_fn_map, memory, native)
        try:
            if self.pad is not None:
                return collation.padded(samples, self.pad)
            if self.pack is not None:
                return collation.packed(samples, self.pack)
            return collation.collate(samples)
        except Exception as error:
            better = explained(error)
            if better is error:
                raise
            raise better from better.__cause__


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


class _Steps(Collation):
    def __init__(self, options: Collator, fn_map: Any, memory: Any, native: bool) -> None:
        super().__init__(fn_map, memory, native)
        self.options = options
        named = options.transform if isinstance(options.transform, Mapping) else {}
        self.named = dict(named)
        self.everywhere = None if named else options.transform

    # --- parts by key -------------------------------------------------------------------------

    def part(self, key: Any, samples: Any) -> Any:
        if key not in self.named:
            return super().part(key, samples)
        return self.guarded(key, samples, lambda: self.named[key](samples, memory=self.memory))

    def guarded(self, key: Any, samples: Any, make: Any) -> Any:
        try:
            try:
                return make()
            except Exception as error:
                note(error, samples)
                raise
        except Exception as error:
            step(error, key)
            raise

    # --- sequences ----------------------------------------------------------------------------

    def padded(self, batch: Any, options: Pad) -> Any:
        mappings, keys = _parts(batch)
        shared = {"side": options.side, "multiple": options.multiple, "memory": self.memory}
        if not keys:
            if isinstance(options.values, Mapping):
                raise ValueError(
                    f"Collator: pad: values for {list(options.values)}, and the samples are "
                    f"{type(batch[0]).__name__}: expected mappings or tuples"
                )
            return pad(
                batch,
                value=options.values,
                length=options.length,
                mask=options.mask is not None,
                lengths=options.lengths is not None,
                position_ids=options.position_ids is not None,
                labels=options.labels is not None,
                ignore=options.ignore,
                **shared,
            )
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
        width = options.length
        out: dict[Any, Any] = {}
        beside: dict[Any, Any] = {}
        for position, (key, value) in enumerate(values.items()):
            column = self.samples_of(key, batch)
            first = position == 0
            wanted = {
                "mask": first and options.mask is not None and options.mask not in keys,
                "lengths": first and options.lengths is not None,
                "position_ids": first and options.position_ids is not None,
                "labels": first and options.labels is not None and options.labels not in keys,
            }
            made = self.guarded(
                key,
                column,
                lambda column=column, value=value, wanted=wanted, width=width: pad(
                    column, value=value, length=width, ignore=options.ignore, **wanted, **shared
                ),
            )
            width = max(width or 0, made.values.shape[1])
            out[key] = made.values
            for name, wants in wanted.items():
                if wants:
                    beside[getattr(options, name)] = getattr(made, name)
        narrow = [key for key in out if out[key].shape[1] != width]
        if narrow:
            raise ValueError(
                f"Collator: pad: expected no part longer than the first, and {narrow} are "
                f"{[out[key].shape[1] for key in narrow]} wide of {width}"
            )
        return self.assembled(batch, mappings, keys, out, beside)

    def packed(self, batch: Any, options: Pack) -> Any:
        mappings, keys = _parts(batch)
        if not keys:
            return pack(
                batch,
                position_ids=options.position_ids is not None,
                seq_idx=options.seq_idx is not None,
                labels=options.labels is not None,
                ignore=options.ignore,
                memory=self.memory,
            )
        wanted_keys = [key for key in options.keys if key != options.labels]
        missing = [key for key in wanted_keys if key not in keys]
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
            made = self.guarded(
                key,
                column,
                lambda column=column, first=first, own=own_labels: pack(
                    column,
                    position_ids=first and options.position_ids is not None,
                    seq_idx=first and options.seq_idx is not None,
                    labels=own or (first and options.labels is not None and not brings),
                    ignore=options.ignore,
                    memory=self.memory,
                ),
            )
            if lengths is None:
                lengths = made.cu_seqlens
            elif not torch.equal(lengths, made.cu_seqlens):
                i = int((lengths != made.cu_seqlens).nonzero()[0]) - 1
                raise ValueError(
                    f"Collator: pack: expected parts of equal lengths, got "
                    f"{len(column[i])} of {key!r} and {len(batch[i][wanted_keys[0]])} of "
                    f"{wanted_keys[0]!r} at position {i}"
                )
            out[key] = made.labels if own_labels else made.values
            if first:
                if options.labels is not None and not brings:
                    beside[options.labels] = made.labels
                if options.position_ids is not None:
                    beside[options.position_ids] = made.position_ids
                if options.seq_idx is not None:
                    beside[options.seq_idx] = made.seq_idx
        if options.batch_dim:
            out = {key: value[None] for key, value in out.items()}
            beside = {key: value[None] for key, value in beside.items()}
        for key in _keys(options.cu_seqlens):
            beside[key] = lengths
        longest = int((lengths[1:] - lengths[:-1]).max())
        for key in _keys(options.max_seqlen):
            beside[key] = longest
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
        for key in keys:
            if key not in out:
                out[key] = self.column(key, batch)
        if mappings:
            return {**{key: out[key] for key in keys}, **beside}
        # Tuples become lists, as ever, with what was made beside the parts as a dict at the end.
        return [*(out[key] for key in keys), *([beside] if beside else [])]

    # --- images and dtypes --------------------------------------------------------------------

    def stack_tensors(self, batch: Any) -> torch.Tensor | None:
        first = batch[0]
        if first.dim() == 3 and first.dtype is torch.uint8 and self.everywhere is not None:
            return self.everywhere(batch, memory=self.memory)
        if first.dim() == 3 and self.rearranges():
            return self.rearranged(
                [t.permute(self.order()) if t.dim() == 3 else t for t in batch],
                _C.Samples.of_tensors,
                first.dtype,
            )
        cast = self.options.dtype
        if cast is not None and first.dtype.is_floating_point and first.dtype != cast:
            return self.cast(batch, cast)
        return super().stack_tensors(batch)

    def stack_arrays(self, batch: Any) -> torch.Tensor | None:
        first = batch[0]
        if first.ndim == 3 and first.dtype == np.uint8 and self.everywhere is not None:
            return self.everywhere(batch, memory=self.memory)
        if first.ndim == 3 and self.rearranges() and first.dtype in ARRAY_DTYPES:
            return self.rearranged(
                [a.transpose(self.order()) if a.ndim == 3 else a for a in batch],
                _C.Samples.of_arrays,
                ARRAY_DTYPES[first.dtype],
            )
        cast = self.options.dtype
        if cast is not None and first.dtype.kind == "f" and ARRAY_DTYPES.get(first.dtype) != cast:
            return self.cast([torch.as_tensor(a) for a in batch], cast)
        return super().stack_arrays(batch)

    def rearranges(self) -> bool:
        return self.options.layout == "HWC" or self.options.memory_format is torch.channels_last

    def order(self) -> tuple[int, int, int]:
        """How a sample's dimensions are seen, for rows of the batch in its own order."""
        last = self.options.memory_format is torch.channels_last
        if self.options.layout == "HWC":
            return (0, 1, 2) if last else (2, 0, 1)
        return (1, 2, 0) if last else (0, 1, 2)

    def rearranged(self, views: list[Any], read: Any, dtype: torch.dtype) -> torch.Tensor | None:
        cast = self.options.dtype
        if cast is not None and dtype.is_floating_point and dtype != cast:
            out = self.cast([torch.as_tensor(view) for view in views], cast)
        else:
            samples = read(views)
            if samples is None:
                raise RuntimeError(
                    "Collator: expected plain images of one shape and dtype in host memory"
                )
            out = self.stacked(samples, views[0].shape, dtype)
        last = self.options.memory_format is torch.channels_last
        return out.permute(0, 3, 1, 2) if last else out

    def cast(self, batch: Sequence[torch.Tensor], dtype: torch.dtype) -> torch.Tensor:
        shape = batch[0].shape
        if any(sample.shape != shape or sample.requires_grad for sample in batch):
            return torch.stack(list(batch)).to(dtype)
        out = self.memory.empty((len(batch), *shape), dtype)
        for row, sample in zip(out.unbind(0), batch, strict=True):
            row.copy_(sample)  # reads once and writes once: the conversion costs no pass of its own
        return out
