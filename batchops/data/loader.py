"""``DataLoader``: torch's, with batches of in-memory tensors gathered by native threads."""

from __future__ import annotations

from collections import deque
from typing import Any, NamedTuple, TypeVar

import torch
from torch._utils import ExceptionWrapper
from torch.utils.data import dataloader as torch_dataloader
from torch.utils.data._utils import collate as torch_collate
from torch.utils.data._utils.pin_memory import pin_memory as pin

from batchops import _C
from batchops.data._sampling import IndexStream
from batchops.data._source import Batch, GatherSource, collate_only_stacks, nobody_watches

_T_co = TypeVar("_T_co", covariant=True)
_DEFAULT_COLLATE = torch_collate.default_collate


class DataLoader(torch_dataloader.DataLoader[_T_co]):
    r"""batch[c][i] = dataset.tensors[c][index[i]], for the indices that torch's samplers give.

    A drop-in for :class:`torch.utils.data.DataLoader`: the same arguments, the same order of
    samples for the same seed, the same batches bit for bit, the same random numbers drawn at the
    same moments.

    Where the dataset is a ``TensorDataset`` of dense CPU tensors (or a ``Subset`` of one, nested or
    not) and ``collate_fn`` is the default, batches are gathered by native threads without the GIL
    and without Python for each sample, into page-locked memory with ``pin_memory=True`` where there
    is an accelerator. Everything else takes torch's own path unchanged: other datasets and
    subclasses of these two, other ``collate_fn``, ``batch_size=None``, a ``worker_init_fn``,
    tensors that require grad, sparse, nested, quantized or non-CPU tensors, tensor subclasses, and
    batches whose indices are not plain integers in range.

    ``num_workers=0``
        ``torch.get_num_threads()`` threads fill a batch, the caller's among them. While a batch is
        in use the next one is gathered, if its indices can be known without running user code or
        drawing from a generator that user code sees. A tensor that was written to meanwhile is
        gathered again, so a batch holds what the dataset holds when it is asked for, as in torch.
        Writes that torch does not count (through a NumPy array that shares the memory, or
        ``.data``) may be seen one batch late; ``torch.set_num_threads(1)`` turns gathering ahead
        off.
    ``num_workers=k``
        k threads take the place of k processes and gather ``prefetch_factor * k`` batches ahead.
        Indices are drawn when torch would send them to its workers. Workers of torch's copy the
        dataset when they start; here a batch holds what the tensors hold when it is gathered.
        ``timeout``, ``multiprocessing_context`` and ``in_order`` are checked as in torch and
        have nothing to do: no process is started and batches come in order.

    Batches never share memory with one another or with the dataset. While an iterator is alive the
    tensors of the dataset must not be resized or moved to shared memory (``share_memory_``, which
    sending them to another process does too): that frees memory which threads may be reading.

    Raises what torch raises, with torch's message.
    """

    def _get_iterator(self) -> torch_dataloader._BaseDataLoaderIter:
        source = self._gather_source()
        if source is None:
            return super()._get_iterator()
        if self.num_workers == 0:
            return _GatherIter(self, source)
        self.check_worker_number_rationality()
        return _WorkerGatherIter(self, source)

    def _gather_source(self) -> GatherSource | None:
        if (
            self._dataset_kind != torch_dataloader._DatasetKind.Map
            or not self._auto_collation
            or self.collate_fn is not _DEFAULT_COLLATE
            or (self.num_workers > 0 and self.worker_init_fn is not None)
            or not collate_only_stacks()
            or not nobody_watches()
        ):
            return None
        return GatherSource.of(self.dataset)


# Below this, torch's own lists of indices cost less than slices of vectors.
_STREAM_BATCH = 128


def _stream(index_sampler: Any, source: GatherSource) -> IndexStream | None:
    """The batches of ``index_sampler`` as vectors, where that is possible and pays."""
    stream = IndexStream.of(index_sampler)
    if stream is None:
        return None
    size = index_sampler.batch_size
    large = size >= _STREAM_BATCH or size * source.row_bytes >= _C.COLLATE_BACKGROUND_BYTES
    return stream if large else None


class _Ahead(NamedTuple):
    """A batch that is gathered before it is asked for, and what it was gathered from."""

    taken: Any
    size: int
    source: GatherSource
    versions: list[int]
    inference: bool
    rows: _C.Rows
    batch: Batch


class _GatherIter(torch_dataloader._SingleProcessDataLoaderIter):
    """One batch at a time, the next one gathered while this one is in use.

    ::

        __next__ k     take indices k · (gather k) · take indices k+1 · start gather k+1 · return k
        user code      uses batch k, while pool threads gather k+1
        __next__ k+1   still what the dataset holds? then wait for k+1, else gather it now
    """

    def __init__(self, loader: DataLoader, source: GatherSource) -> None:
        super().__init__(loader)
        self._source: GatherSource | None = source
        self._stream = _stream(self._index_sampler, source)
        self._ahead: _Ahead | None = None

    def _next_data(self) -> Any:
        stream = self._stream
        if stream is None:
            return self._load(self._next_index())
        size = stream.batch_size()
        ahead, self._ahead = self._ahead, None
        if ahead is not None and ahead.size != size:
            stream.untake(ahead.taken)
            ahead = None
        taken = stream.take(size) if ahead is None else ahead.taken
        if ahead is not None and self._is_valid(ahead):
            data = ahead.batch.result()
        else:
            data = self._load(taken)
        self._read_ahead(size)
        return data

    def _gathers(self) -> bool:
        """Whether the dataset can be gathered from right now; self._source is its source."""
        if self._source is not None:
            self._source = self._source.refreshed()
        return self._source is not None and collate_only_stacks() and nobody_watches()

    def _lookups(self) -> tuple[Any, ...]:
        return () if self._stream is None else self._stream.lookups

    def _load(self, taken: Any) -> Any:
        if self._gathers():
            rows = self._source.resolve(taken, self._lookups())
            if rows is not None:
                threads = torch.get_num_threads() - 1
                return self._source.start(rows, threads, self._pin_memory).result()
        index = taken if self._stream is None else self._stream.as_list(taken)
        data = self._dataset_fetcher.fetch(index)
        return pin(data, self._pin_memory_device) if self._pin_memory else data

    def _read_ahead(self, size: Any) -> None:
        threads = torch.get_num_threads() - 1
        if threads < 1 or type(size) is not int or not self._stream.may_take_early(size):
            return
        if not self._gathers() or size * self._source.row_bytes < _C.COLLATE_BACKGROUND_BYTES:
            return  # a small batch is gathered when it is asked for, by its thread
        try:
            taken = self._stream.take(size)
        except StopIteration:
            return
        try:
            self._ahead = self._start(taken, size, threads)
        except (RuntimeError, MemoryError):
            pass  # no memory for a second batch: this one is not lost, the next may fit later
        finally:
            if self._ahead is None:
                self._stream.untake(taken)

    def _start(self, taken: Any, size: int, threads: int) -> _Ahead | None:
        source = self._source
        rows = source.resolve(taken, self._lookups())
        if rows is None:
            return None
        versions = source.versions()
        batch = source.start(rows, threads, self._pin_memory)
        inference = torch.is_inference_mode_enabled()
        return _Ahead(taken, size, source, versions, inference, rows, batch)

    def _is_valid(self, ahead: _Ahead) -> bool:
        """Whether gathering now would give the same batch."""
        if not self._gathers() or self._source is not ahead.source:
            return False
        if ahead.versions != ahead.source.versions():
            return False
        if ahead.inference != torch.is_inference_mode_enabled():
            return False
        lookups = self._lookups()
        if lookups or ahead.source.has_lookups:
            return ahead.rows == ahead.source.resolve(ahead.taken, lookups)
        return True


class _WorkerGatherIter(torch_dataloader._BaseDataLoaderIter):
    """Native threads in the place of torch's worker processes.

    Keeps ``prefetch_factor * num_workers`` batches under way, and takes indices at the moments
    at which ``_MultiProcessingDataLoaderIter`` does: so many when it starts, one for each batch
    handed out.
    """

    def __init__(self, loader: DataLoader, source: GatherSource) -> None:
        super().__init__(loader)
        if loader.prefetch_factor <= 0:
            raise AssertionError(
                "prefetch_factor must be greater than 0 for MultiProcessingDataLoaderIter"
            )
        self._source: GatherSource | None = source
        self._prefetch_factor = loader.prefetch_factor
        self._dataset_fetcher = torch_dataloader._DatasetKind.create_fetcher(
            self._dataset_kind,
            self._dataset,
            self._auto_collation,
            self._collate_fn,
            self._drop_last,
        )
        self._reset(loader, first_iter=True)

    def _reset(self, loader: DataLoader, first_iter: bool = False) -> None:
        super()._reset(loader, first_iter)
        source = self._source
        self._stream = None if source is None else _stream(self._index_sampler, source)
        self._under_way: deque[Any] = deque()
        self._sent = 0
        for _ in range(self._prefetch_factor * self._num_workers):
            self._send()

    def _send(self) -> None:
        stream = self._stream
        try:
            taken = self._next_index() if stream is None else stream.take(stream.batch_size())
        except StopIteration:
            return
        worker = self._sent % self._num_workers
        self._sent += 1
        if self._source is not None and not self._source.is_current():
            self._source = self._source.refreshed()
        lookups = () if stream is None else stream.lookups
        rows = None
        if self._source is not None and nobody_watches():
            rows = self._source.resolve(taken, lookups)
        # The sampler's own errors are raised now, as in torch.
        index = taken if rows is not None or stream is None else stream.as_list(taken)
        try:
            if rows is not None:
                # Inference mode is that of the moment at which a batch is handed out.
                with torch.inference_mode(False):
                    data = self._source.start(rows, self._num_workers, self._pin_memory)
            else:
                data = self._dataset_fetcher.fetch(index)
                if self._pin_memory:
                    data = pin(data, self._pin_memory_device)
        except Exception:
            # Raised, as in torch, when it is this batch's turn.
            data = ExceptionWrapper(where=f"in DataLoader worker process {worker}")
        self._under_way.append(data)

    def _next_data(self) -> Any:
        if not self._under_way:
            raise StopIteration
        data = self._under_way.popleft()
        self._send()
        if isinstance(data, Batch):
            tensors = data.result()
            return [_alias(t) for t in tensors] if torch.is_inference_mode_enabled() else tensors
        if isinstance(data, ExceptionWrapper):
            data.reraise()
        return data


def _alias(tensor: torch.Tensor) -> torch.Tensor:
    """A new tensor over the same memory: in inference mode, an inference tensor."""
    empty = torch.empty(0, dtype=tensor.dtype, device=tensor.device)
    return empty.set_(tensor.untyped_storage(), 0, tensor.shape, tensor.stride())
