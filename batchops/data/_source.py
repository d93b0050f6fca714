"""What can be gathered natively, and how: from a dataset to a ``batchops._C.Table``."""

from __future__ import annotations

import functools
import itertools
import math
import mmap
import operator
from collections.abc import Callable, Iterable, Iterator, Sequence
from typing import Any, NamedTuple

import numpy as np
import torch
from torch.autograd import forward_ad
from torch.overrides import _get_current_function_mode_stack
from torch.utils._device import DeviceContext
from torch.utils.data import (
    ConcatDataset,
    StackDataset,
    Subset,
    TensorDataset,
    get_worker_info,
)
from torch.utils.data._utils import collate as torch_collate

from batchops import _C
from batchops.data import _arrow
from batchops.data._errors import note
from batchops.data.columns import Columns

# Types whose rows torch.stack copies bit by bit. What is absent (quantized, sub-byte, bits) takes
# torch's path.
DTYPES = frozenset(
    (
        *(torch.bool, torch.uint8, torch.int8, torch.int16, torch.int32, torch.int64),
        *(torch.uint16, torch.uint32, torch.uint64),
        *(torch.float16, torch.bfloat16, torch.float32, torch.float64),
        *(torch.complex32, torch.complex64, torch.complex128),
        *(torch.float8_e4m3fn, torch.float8_e5m2, torch.float8_e4m3fnuz, torch.float8_e5m2fnuz),
    )
)

ARRAY_DTYPES = {
    np.dtype(name): getattr(torch, name)
    for name in (
        *("bool", "uint8", "int8", "int16", "int32", "int64", "uint16", "uint32", "uint64"),
        *("float16", "float32", "float64", "complex64", "complex128"),
    )
}

# As they were on import: patched indexing is user code, and called as such.
_GETITEM = {
    cls: (cls.__getitem__, getattr(cls, "__getitems__", None))
    for cls in (TensorDataset, Subset, ConcatDataset, StackDataset, Columns)
}

# What collates the samples of these, as it was on import.
_FN_MAP = dict(torch_collate.default_collate_fn_map)
_SAMPLES = (tuple, dict, torch.Tensor, np.ndarray, np.memmap)

# The last map that was found to do nothing else to them.
_plain_fn_map: dict[Any, Any] = {}

_is_cow = getattr(torch._C, "_is_cow_tensor", lambda _: False)


def collate_only_stacks() -> bool:
    """Whether torch's default_collate does nothing to tuples and dicts of rows but to stack.

    ``default_collate_fn_map`` is the user's to extend, and read live. Inside a worker process
    stacking goes to shared memory.
    """
    global _plain_fn_map
    fn_map = torch_collate.default_collate_fn_map
    if fn_map != _plain_fn_map:
        for key, fn in fn_map.items():
            if key in _FN_MAP:
                if fn is not _FN_MAP[key]:
                    return False
            elif any(issubclass(sample, key) for sample in _SAMPLES):
                return False
        if any(key not in fn_map for key in _FN_MAP):
            return False
        _plain_fn_map = dict(fn_map)
    return get_worker_info() is None


def nobody_watches() -> bool:
    """Whether no torch-function or dispatch mode (fake tensors, tracing) would see a stack."""
    if torch._C._len_torch_dispatch_stack():
        return False
    # torch.set_default_device is such a mode; it does not reach what is stacked.
    return not torch._C._len_torch_function_stack() or all(
        isinstance(mode, DeviceContext) for mode in _get_current_function_mode_stack()
    )


def native_may_stand_in() -> bool:
    """Whether native code may do what torch's operators would: nobody watches, and there are no
    tangents to carry along."""
    return nobody_watches() and forward_ad._current_level < 0


def makes_tensors_on_cpu() -> bool:
    """Whether torch would make a tensor of numbers or of an array in host memory."""
    return not torch._C._len_torch_function_stack() or all(
        torch.device(mode.device).type == "cpu"
        for mode in _get_current_function_mode_stack()
        if isinstance(mode, DeviceContext)
    )


def _is_gatherable(tensor: torch.Tensor) -> bool:
    """Whether ``torch.stack([tensor[i], ...])`` is a copy of rows and nothing else."""
    return (
        type(tensor) is torch.Tensor
        and tensor.layout is torch.strided
        and tensor.device.type == "cpu"
        and tensor.dtype in DTYPES
        and tensor.dim() >= 1
        and tensor.numel() > 0
        and not tensor.requires_grad
        and not tensor.is_nested
        and not tensor.is_inference()
        and not tensor.is_conj()
        and not tensor.is_neg()
        and not tensor._is_zerotensor()
        and not torch._C._functorch.is_functorch_wrapped_tensor(tensor)
        and not any(getattr(tensor, "names", ()))
        and not _is_cow(tensor)
    )


def _stacks_contiguously(tensor: torch.Tensor) -> bool:
    """Whether stacked rows come out contiguous. torch.cat keeps channels_last for 4-D and 5-D."""
    if tensor.dim() <= 4:
        return True
    return tensor[0].is_contiguous()


@functools.lru_cache(maxsize=64)
def _dtype_of_scalars(dtype: np.dtype) -> torch.dtype | None:
    """What a list of scalars of an array becomes: not always the array's own dtype."""
    return torch.as_tensor([dtype.type(0), dtype.type(1)]).dtype


def _is_gatherable_array(array: np.ndarray) -> bool:
    """Whether collating rows of it is a copy of rows and nothing else."""
    return (
        type(array) in (np.ndarray, np.memmap)
        and array.dtype in ARRAY_DTYPES
        and array.dtype.isnative
        and array.ndim >= 1
        and array.size > 0
        and all(s >= 0 and s % array.itemsize == 0 for s in array.strides)
        and (array.ndim <= 4 or array[0].flags.c_contiguous)
        and (array.ndim > 1 or _dtype_of_scalars(array.dtype) is ARRAY_DTYPES[array.dtype])
    )


class _Mapping(NamedTuple):
    """The mmap behind an array: where in the file it begins, at least, and the file's name."""

    mapped: mmap.mmap
    start: int
    name: Any = None


def mapped_file(array: Any) -> _Mapping | None:
    while isinstance(array, np.ndarray):
        mapped = getattr(array, "_mmap", None)
        if mapped is not None:
            offset = int(array.offset)
            start = offset - offset % mmap.ALLOCATIONGRANULARITY
            return _Mapping(mapped, start, getattr(array, "filename", None))
        array = array.base
    if isinstance(array, memoryview):
        array = array.obj
    return _Mapping(array, 0) if isinstance(array, mmap.mmap) else None


def refuse_truncated(array: Any) -> None:
    """Raises RuntimeError where the file of a memmap ends before the memory that is mapped."""
    found = mapped_file(array)
    if found is None:
        return
    expected = found.start + len(found.mapped)
    try:
        size = found.mapped.size()
    except (OSError, ValueError):
        return  # anonymous, or no file any more: nothing that can be cut
    if size < expected:
        name = "" if found.name is None else f" {found.name}"
        raise RuntimeError(
            f"memmap{name}: expected a file of at least {expected} bytes, and it has {size}: it "
            "was truncated, and reading it would end the process"
        )


def refuse_truncated_ones(batch: Sequence[Any], positions: Iterable[int] | None = None) -> None:
    """The same for each array in a batch, or those at ``positions``; the error knows which.

    Those in a row that share memory are asked once.
    """
    last = None
    for position in range(len(batch)) if positions is None else positions:
        array = batch[position]
        if isinstance(array, np.ndarray) and array.base is not last:
            last = array.base
            try:
                refuse_truncated(array)
            except RuntimeError as error:
                note(error, batch, position)
                raise


def _standard(dataset: Any, kind: type) -> bool:
    """Whether `dataset` is of exactly this type, and nobody changed how it is indexed."""
    return (
        type(dataset) is kind
        and (kind.__getitem__, getattr(kind, "__getitems__", None)) == _GETITEM[kind]
        and "__getitems__" not in vars(dataset)
    )


class _Link(NamedTuple):
    """A step on the way from a dataset to its columns: an attribute, and what it held."""

    owner: Any
    kind: type
    name: str
    value: Any
    items: list[Any] | None  # of a list or a dict, which may be changed in place

    @classmethod
    def of(cls, owner: Any, name: str) -> _Link:
        value = getattr(owner, name)
        items = _items(value) if isinstance(value, list | dict) else None
        return cls(owner, type(owner), name, value, items)

    def holds(self) -> bool:
        if not _standard(self.owner, self.kind):
            return False
        if vars(self.owner).get(self.name) is not self.value:
            return False
        if self.items is None:
            return True
        now = _items(self.value)
        return len(now) == len(self.items) and all(map(operator.is_, now, self.items))


def _items(value: list[Any] | dict[str, Any]) -> list[Any]:
    return [*value, *value.values()] if isinstance(value, dict) else [*value]


class _Part(NamedTuple):
    """One table: its columns, and the shape in which a batch of them is handed out."""

    columns: list[Any]
    dtypes: list[torch.dtype]  # in a batch
    form: Any
    links: list[_Link]

    def rows(self) -> list[tuple[torch.dtype, tuple[int, ...]]]:
        shapes = [tuple(column.shape[1:]) for column in self.columns]
        return list(zip(self.dtypes, shapes, strict=True))


def _part(dataset: Any) -> _Part | None:
    """The columns of a dataset whose samples are rows of them; None for any other."""
    if isinstance(dataset, np.ndarray):
        if not _is_gatherable_array(dataset):
            return None
        return _Part([dataset], [ARRAY_DTYPES[dataset.dtype]], "tensor", [])
    if isinstance(dataset, torch.Tensor):
        ok = _is_gatherable(dataset) and _stacks_contiguously(dataset)
        return _Part([dataset], [dataset.dtype], "tensor", []) if ok else None
    if _standard(dataset, TensorDataset):
        name, children, keys = "tensors", dataset.tensors, None
        if type(children) is not tuple:
            return None
    elif _standard(dataset, StackDataset):
        name, children = "datasets", dataset.datasets
        keys = tuple(children) if type(children) is dict else None
    elif _standard(dataset, Columns):
        name, children = "columns", dataset.columns
        keys = tuple(children)
    else:
        return None
    parts = [_part(child) for child in (children if keys is None else children.values())]
    if not parts or any(part is None for part in parts):
        return None
    columns = [column for part in parts for column in part.columns]
    if any(len(column) != len(columns[0]) for column in columns):
        return None
    links = [_Link.of(dataset, name), *(link for part in parts for link in part.links)]
    dtypes = [dtype for part in parts for dtype in part.dtypes]
    return _Part(columns, dtypes, (keys, tuple(part.form for part in parts)), links)


def _assemble(form: Any, tensors: Iterator[torch.Tensor]) -> Any:
    if form == "tensor":
        return next(tensors)
    keys, forms = form
    parts = [_assemble(each, tensors) for each in forms]
    return parts if keys is None else dict(zip(keys, parts, strict=True))


class _View(NamedTuple):
    """A dataset taken apart: Subsets around one table, or around several in a row."""

    subsets: list[Subset]
    parts: list[_Part]
    links: list[_Link]
    lookup: np.ndarray | None = None  # of the dataset's own, after the subsets'
    immutable: bool = False  # Arrow's memory: nobody writes to it


def _view(dataset: Any) -> _View | None:
    subsets: list[Subset] = []
    links: list[_Link] = []
    while type(dataset) is Subset:
        if not _standard(dataset, Subset):
            return None
        subsets.append(dataset)
        links.append(_Link.of(dataset, "dataset"))
        dataset = dataset.dataset
    if _arrow.is_dataset(dataset):
        return _arrow_view(dataset, subsets, links)
    datasets = [dataset]
    if _standard(dataset, ConcatDataset):
        datasets = dataset.datasets
        sizes = [len(d) for d in datasets if _is_sized(d)]
        if len(sizes) != len(datasets) or list(itertools.accumulate(sizes)) != (
            dataset.cumulative_sizes
        ):
            return None
        links += [_Link.of(dataset, name) for name in ("datasets", "cumulative_sizes")]
    parts = [_part(d) for d in datasets]
    if not parts or any(part is None for part in parts):
        return None
    if any(part.form != parts[0].form for part in parts) or not _alike(parts):
        return None
    links += [link for part in parts for link in part.links]
    return _View(subsets, parts, links)


def _is_sized(dataset: Any) -> bool:
    return isinstance(dataset, np.ndarray | torch.Tensor) or any(
        _standard(dataset, kind) for kind in _GETITEM
    )


def _alike(parts: list[_Part]) -> bool:
    """Whether samples of all of them stack; tensors and arrays are not collated together."""

    def of(part: _Part) -> list[Any]:
        return [*part.rows(), *(isinstance(column, np.ndarray) for column in part.columns)]

    return all(of(part) == of(parts[0]) for part in parts)


def _arrow_view(dataset: Any, subsets: list[Subset], links: list[_Link]) -> _View | None:
    arrow = _arrow.arrow_of(dataset)
    if arrow is None:
        return None
    cls = type(dataset)
    _GETITEM.setdefault(cls, (cls.__getitem__, cls.__getitems__))
    form = (arrow.names, ("tensor",) * len(arrow.names))
    parts = [_Part(chunk.columns, chunk.dtypes, form, []) for chunk in arrow.chunks]
    if not _alike(parts) or not _standard(dataset, cls):
        return None
    if dataset._format_type == "numpy" and any(
        column.ndim == 1 and _dtype_of_scalars(_array_dtype(dtype)) is not dtype
        for column, dtype in zip(parts[0].columns, parts[0].dtypes, strict=True)
    ):
        return None
    links = [*links, *(_Link.of(dataset, name) for name in _arrow.ATTRIBUTES)]
    return _View(subsets, parts, links, arrow.lookup, immutable=True)


def _array_dtype(dtype: torch.dtype) -> np.dtype:
    return next(array for array, tensor in ARRAY_DTYPES.items() if tensor is dtype)


def _table(part: _Part) -> _C.Table:
    columns = []
    casts = []
    for c, dtype in zip(part.columns, part.dtypes, strict=True):
        if isinstance(c, np.ndarray):
            address, strides, item = c.__array_interface__["data"][0], c.strides, c.itemsize
            source = ARRAY_DTYPES[c.dtype]
        else:
            item, source = c.element_size(), c.dtype
            address, strides = c.data_ptr(), tuple(s * item for s in c.stride())
        columns.append((address, c.shape[0], strides[0], item, list(c.shape[1:]), strides[1:]))
        casts.append("" if source is dtype else f"{source} to {dtype}".replace("torch.", ""))
    return _C.Table(columns, casts)


class GatherSource:
    """The tables behind a dataset, and how indices find their rows in them.

    ``table`` holds addresses: it is good for as long as ``is_current()``. Lookups (the ``indices``
    of nested Subsets) are read anew for each batch, as torch does.
    """

    def __init__(self, dataset: Any, view: _View, watch: _C.Watch) -> None:
        self._dataset = dataset
        self._subsets = view.subsets
        self._links = view.links
        self._watch = watch
        self._lookup = view.lookup
        self._form = view.parts[0].form
        self._columns = [column for part in view.parts for column in part.columns]
        tensors = [c for c in self._columns if isinstance(c, torch.Tensor)]
        arrays = [c for c in self._columns if isinstance(c, np.ndarray)]
        self._mapped = [a for a in arrays if mapped_file(a) is not None]
        self._has_arrays = bool(arrays)
        # Nobody counts what is written to an array.
        self.counts_writes = view.immutable or not any(a.flags.writeable for a in arrays)
        for array in arrays:
            if not array.flags.writeable and not view.immutable:
                torch.as_tensor(array[:1])  # which warns, once
                break
        # Held so that memory which threads read outlives a tensor made to point elsewhere.
        self._held = [t.untyped_storage() for t in tensors] + arrays
        self._rows = [
            (dtype, shape, math.prod(shape) * dtype.itemsize)
            for dtype, shape in view.parts[0].rows()
        ]
        self.row_bytes = sum(row_bytes for _, _, row_bytes in self._rows)
        tables = [_table(part) for part in view.parts]
        self.table = tables[0] if len(tables) == 1 else _C.Concat(tables)

    @classmethod
    def of(cls, dataset: Any) -> GatherSource | None:
        """A source with the same rows as ``dataset[i]``, or None where only Python can tell."""
        view = _view(dataset)
        if view is None:
            return None
        columns = [column for part in view.parts for column in part.columns]
        watch = _C.Watch.of([] if view.immutable else columns)
        return None if watch is None else cls(dataset, view, watch)

    def is_current(self) -> bool:
        """Whether the columns lie where the table says (their values may have changed)."""
        return self._watch.same()

    def is_live(self) -> bool:
        """Whether the dataset still refers to these columns, through these subsets."""
        return all(link.holds() for link in self._links)

    def writes(self) -> list[int]:
        """Counters that torch moves with every write to a tensor."""
        return self._watch.writes()

    def may_gather(self) -> bool:
        """Whether nobody would see the difference to samples that are made one by one."""
        return nobody_watches() and (not self._has_arrays or makes_tensors_on_cpu())

    @property
    def has_lookups(self) -> bool:
        return bool(self._subsets)

    def refreshed(self) -> GatherSource | None:
        """A source for the dataset as it is now: self, where nothing moved."""
        if self.is_live() and self.is_current():
            return self
        return GatherSource.of(self._dataset)

    def resolve(self, indices: Any, lookups: tuple[Any, ...] = ()) -> _C.Rows | None:
        """Rows for a batch of indices, each looked up in ``lookups`` and in the subsets in turn.

        None where torch has to index (or to raise): indices that are no plain integers, or out of
        range, or no indices at all.
        """
        if self._subsets:
            lookups = (*lookups, *(_readable(subset.indices) for subset in self._subsets))
        if self._lookup is not None:
            lookups = (*lookups, self._lookup)
        exact = self._lookup is not None  # a dataset's own mapping takes no negative indices
        rows = self.table.resolve(_readable(indices), lookups, exact)
        return rows if rows is not None and len(rows) else None

    def start(self, rows: _C.Rows, threads: int, memory: Any) -> Batch:
        """Begin to fill a batch on at most ``threads`` pool threads."""
        for array in self._mapped:
            refuse_truncated(array)
        n = len(rows)
        tensors = []
        outputs = []
        for dtype, shape, row_bytes in self._rows:
            out = memory.empty((n, *shape), dtype)
            tensors.append(out)
            outputs.append((out.data_ptr(), n * row_bytes))
        job = self.table.gather(rows, outputs, (tensors, self._held), threads)
        return Batch(tensors, self._form, job)


class Batch:
    """A batch that native threads are filling."""

    __slots__ = ("_form", "_job", "_tensors")

    def __init__(self, tensors: list[torch.Tensor], form: Any, job: _C.GatherJob) -> None:
        self._tensors = tensors
        self._form = form
        self._job = job

    @property
    def done(self) -> bool:
        return self._job.done

    def result(self, each: Callable[[torch.Tensor], torch.Tensor] | None = None) -> Any:
        """The finished batch. The calling thread helps; the GIL is released while it does."""
        self._job.wait()
        return _assemble(self._form, iter(map(each, self._tensors) if each else self._tensors))


def _readable(indices: Any) -> Any:
    """``indices`` in a form that native code reads: int64 CPU vectors by address."""
    if (
        type(indices) is torch.Tensor
        and indices.dtype is torch.int64
        and indices.device.type == "cpu"
        and indices.layout is torch.strided
        and indices.dim() == 1
        and indices.is_contiguous()
        and not indices.is_neg()
    ):
        return _C.IndexSpan(indices.data_ptr(), indices.numel())
    return indices
