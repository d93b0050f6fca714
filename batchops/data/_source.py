"""What can be gathered natively, and how: from a dataset to a ``batchops._C.Table``."""

from __future__ import annotations

from typing import Any

import torch
from torch.overrides import _get_current_function_mode_stack
from torch.utils._device import DeviceContext
from torch.utils.data import Dataset, Subset, TensorDataset, get_worker_info
from torch.utils.data._utils import collate as torch_collate

from batchops import _C

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

_TENSOR_GETITEM = TensorDataset.__getitem__
_SUBSET_GETITEM = Subset.__getitem__
_SUBSET_GETITEMS = Subset.__getitems__

# The last map that was found to leave tuples of tensors alone.
_plain_fn_map: dict[Any, Any] = {}

_is_cow = getattr(torch._C, "_is_cow_tensor", lambda _: False)


def collate_only_stacks() -> bool:
    """Whether torch's default_collate does nothing to a tuple of tensors but to stack.

    ``default_collate_fn_map`` is the user's to extend, and read live. Inside a worker process
    stacking goes to shared memory.
    """
    global _plain_fn_map
    fn_map = torch_collate.default_collate_fn_map
    if fn_map != _plain_fn_map:
        if fn_map.get(torch.Tensor) is not torch_collate.collate_tensor_fn or any(
            issubclass(tuple, key) for key in fn_map if key is not torch.Tensor
        ):
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


def _layout(tensor: torch.Tensor) -> tuple[Any, ...]:
    """All that a Table remembers of a tensor, and what may be switched on it in place."""
    return (
        tensor.data_ptr(),
        tensor.shape,
        tensor.stride(),
        tensor.dtype,
        tensor.requires_grad,
        type(tensor),
        tensor.is_conj(),
        tensor.is_neg(),
    )


def _indexes_as_torch_does(dataset: Dataset, subsets: list[Subset]) -> bool:
    """Whether nobody has put another way of indexing on the classes or the objects."""
    return (
        type(dataset) is TensorDataset
        and TensorDataset.__getitem__ is _TENSOR_GETITEM
        and not hasattr(dataset, "__getitems__")
        and (
            not subsets
            or (
                Subset.__getitem__ is _SUBSET_GETITEM
                and Subset.__getitems__ is _SUBSET_GETITEMS
                and all(type(s) is Subset and "__getitems__" not in vars(s) for s in subsets)
            )
        )
    )


class GatherSource:
    """The tensors behind a dataset, and how indices find their rows in them.

    ``table`` holds addresses: it is good for as long as ``is_current()``. Lookups (the ``indices``
    of nested Subsets) are read anew for each batch, as torch does.
    """

    def __init__(self, dataset: TensorDataset, subsets: list[Subset]) -> None:
        self.tensors = dataset.tensors
        self._dataset = dataset
        self._subsets = subsets
        self._layouts = [_layout(t) for t in self.tensors]
        # Held so that memory which threads read outlives a tensor made to point elsewhere.
        self._storages = [t.untyped_storage() for t in self.tensors]
        self._columns = [
            (t.dtype, tuple(t.shape[1:]), t[0].numel() * t.element_size()) for t in self.tensors
        ]
        self.row_bytes = sum(row_bytes for _, _, row_bytes in self._columns)
        self.table = _C.Table(
            [
                (
                    t.data_ptr(),
                    t.shape[0],
                    t.stride(0) * t.element_size(),
                    t.element_size(),
                    list(t.shape[1:]),
                    [s * t.element_size() for s in t.stride()[1:]],
                )
                for t in self.tensors
            ]
        )

    @classmethod
    def of(cls, dataset: Dataset) -> GatherSource | None:
        """The source behind ``dataset``, or None where torch has to fetch the samples itself.

        Exact types only: a subclass may have a ``__getitem__`` of its own.
        """
        subsets: list[Subset] = []
        while type(dataset) is Subset:
            subsets.append(dataset)
            dataset = dataset.dataset
        if not _indexes_as_torch_does(dataset, subsets):
            return None
        tensors = dataset.tensors
        if (
            type(tensors) is not tuple
            or not tensors
            or not all(_is_gatherable(t) for t in tensors)
            or any(t.shape[0] != tensors[0].shape[0] for t in tensors)
            or not all(_stacks_contiguously(t) for t in tensors)
        ):
            return None
        return cls(dataset, subsets)

    def is_current(self) -> bool:
        """Whether the tensors lie where the table says (their values may have changed)."""
        return [_layout(t) for t in self.tensors] == self._layouts

    def is_live(self) -> bool:
        """Whether the dataset still refers to these tensors, through these subsets."""
        dataset: Any = self._dataset
        for subset in reversed(self._subsets):
            if subset.dataset is not dataset:
                return False
            dataset = subset
        return self._dataset.tensors is self.tensors and _indexes_as_torch_does(
            self._dataset, self._subsets
        )

    def versions(self) -> list[int]:
        """Counters that torch moves with every write to a tensor."""
        return [t._version for t in self.tensors]

    @property
    def has_lookups(self) -> bool:
        return bool(self._subsets)

    def refreshed(self) -> GatherSource | None:
        """A source for the dataset as it is now: self, where nothing moved."""
        if self.is_live() and self.is_current():
            return self
        return GatherSource.of(self._subsets[0] if self._subsets else self._dataset)

    def resolve(self, indices: Any, lookups: tuple[Any, ...] = ()) -> _C.Rows | None:
        """Rows for a batch of indices, each looked up in ``lookups`` and in the subsets in turn.

        None where torch has to index (or to raise): indices that are no plain integers, or out of
        range, or no indices at all.
        """
        if self._subsets:
            lookups = (*lookups, *(_readable(subset.indices) for subset in self._subsets))
        rows = self.table.resolve(_readable(indices), lookups)
        return rows if rows is not None and len(rows) else None

    def start(self, rows: _C.Rows, threads: int, pin_memory: bool) -> Batch:
        """Allocate a batch and start to fill it on at most ``threads`` pool threads."""
        n = len(rows)
        batch = []
        outputs = []
        for dtype, shape, row_bytes in self._columns:
            out = torch.empty((n, *shape), dtype=dtype, device="cpu", pin_memory=pin_memory)
            batch.append(out)
            outputs.append((out.data_ptr(), n * row_bytes))
        return Batch(batch, self.table.gather(rows, outputs, (batch, self._storages), threads))


class Batch:
    """A batch that native threads are filling."""

    __slots__ = ("_job", "_tensors")

    def __init__(self, tensors: list[torch.Tensor], job: _C.GatherJob) -> None:
        self._tensors = tensors
        self._job = job

    def result(self) -> list[torch.Tensor]:
        """The finished tensors. The calling thread helps; the GIL is released while it does."""
        self._job.wait()
        return self._tensors


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
