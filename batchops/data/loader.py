"""``DataLoader``: torch's, with one copy from a sample to its place in a page-locked batch."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any, TypeVar

import torch
from torch.utils.data import dataloader as torch_dataloader

from batchops.data._arguments import as_integer
from batchops.data._collate import is_default
from batchops.data._iterators import (
    Delivery,
    GatherIter,
    LocalIter,
    ProcessIter,
    ThreadIter,
    WorkerGatherIter,
)
from batchops.data._own import NAME, Own, memory_of, own
from batchops.data._resume import Epoch, begins, checked, end_streams, put, state_of, taken_up
from batchops.data._source import GatherSource, collate_only_stacks

_T_co = TypeVar("_T_co", covariant=True)


class _Computed:
    """A property that an instance may shadow, as a subclass with a name of its own for it does."""

    def __init__(self, compute: Callable[[Any], Any]) -> None:
        self._compute = compute
        self.__doc__ = compute.__doc__

    def __get__(self, instance: Any, owner: type | None = None) -> Any:
        return self if instance is None else self._compute(instance)


class DataLoader(torch_dataloader.DataLoader[_T_co]):
    r"""batch[...][i] = dataset[index[i]][...], for the indices that torch's samplers give.

    A drop-in for :class:`torch.utils.data.DataLoader`: the same arguments, the same order of
    samples for the same seed, the same batches bit for bit, the same random numbers drawn at the
    same moments. A batch is written once, where it is used from: into slots that are used again
    when no view of an earlier batch is alive (page-locked, and when the copy is over, where
    ``device`` is a CUDA device), or into torch's page-locked memory with ``pin_memory=True``, which
    waits for the copies that the user starts.

    Where the data lie in memory and ``collate_fn`` is the default, batches are gathered by native
    threads without Python for each sample (and without the GIL from 4 MiB on): ``TensorDataset``,
    tensors, ``numpy.ndarray`` and ``numpy.memmap`` as datasets, :class:`batchops.data.Columns`,
    ``StackDataset`` and ``ConcatDataset`` of these, Hugging Face's ``datasets.Dataset`` (in torch
    or NumPy format, of numbers and arrays of one size, without nulls; without a format, of numbers
    alone), and ``Subset`` of any, nested or not. Samples of every other dataset are collated
    natively (:func:`batchops.data.collate`).

    Keyword arguments beyond torch's:

    device
        Batches are on this device when they are handed out. To a CUDA device they are copied on a
        stream of its own while the previous batch is in use; the current stream waits for the
        copy, the host does not.
    threads
        So many Python threads fetch and collate batches ahead, in this process; ``num_workers``
        must be 0. Batches come in order (``in_order``), ``timeout`` and ``worker_init_fn`` work as
        with worker processes. The dataset is shared by the threads, not copied. Inside them
        :func:`batchops.data.get_worker_info` gives id, number of threads, seed (base seed + id, as
        for worker processes) and a ``torch.Generator`` seeded with it; torch's own
        ``get_worker_info`` gives None, and the global generators of torch, ``random`` and NumPy are
        those of the process: not seeded for each thread, and drawn from in no fixed order. An
        iterable dataset has one iterator, advanced by one thread at a time, in order. Gradient,
        inference and autocast mode, the default device and ``contextvars`` are those of the moment
        when the epoch begins. How many batches are under way follows from how long the last ones
        were waited for; but with samplers of the user's, and those that draw on their way from a
        generator of the user's, it is two for each thread: then indices are drawn when torch would
        draw them for as many worker processes.
    collator
        A :class:`batchops.data.Collator`, in the place of ``collate_fn``.
    ring_bytes
        The most memory for slots (an eighth of the machine's, at most 4 GiB). Beyond it batches
        are in pageable memory, and a warning says so once.
    checked
        Released slots are filled with 0xFF, and a write to one after its release is an error.

    ``num_workers=0``
        User code runs when and where torch would run it. Gathers alone go on in the background:
        while a batch is in use the next ones are gathered, if their indices can be known without
        running user code or drawing from a generator that user code sees. A tensor that was written
        to meanwhile is gathered again, so a batch holds what the dataset holds when it is asked
        for, as in torch. Writes that torch does not count (through a NumPy array that shares the
        memory, or ``.data``) may be seen late; ``torch.set_num_threads(1)`` turns gathering ahead
        off. Writable arrays are not gathered ahead.
    ``num_workers=k``
        Gathers: k threads take the place of k processes and gather ``prefetch_factor * k`` batches
        ahead. Indices are drawn when torch would send them to its workers. Workers of torch's copy
        the dataset when they start; here a batch holds what the tensors hold when it is gathered.
        ``timeout``, ``multiprocessing_context`` and ``in_order`` are checked as in torch and
        have nothing to do. Everything else: torch's worker processes, which collate natively
        into shared memory.

    Batches never share memory with one another or with the dataset. While an iterator is alive the
    tensors of the dataset must not be resized or moved to shared memory (``share_memory_``, which
    sending them to another process does too): that frees memory which threads may be reading.

    ``state_dict()`` and ``load_state_dict()`` stop and go on in the middle of an epoch, exact to
    the next sample. ``metrics`` tells samples a second, waiting, and the use of slots.

    Raises what torch raises, with torch's message first; errors of collation name the position in
    the batch, the way to the value, and the index in the dataset. RuntimeError for a memmap whose
    file was truncated.
    """

    # Of the class, for loaders that come from a dict of attributes or from torch's class.
    device: torch.device | str | None = None
    threads: int | None = None
    collator: Any = None
    ring_bytes: int | None = None
    checked: bool = False

    def __init__(
        self,
        dataset: Any,
        batch_size: int | None = 1,
        shuffle: bool | None = None,
        sampler: Any = None,
        batch_sampler: Any = None,
        num_workers: int = 0,
        collate_fn: Any = None,
        pin_memory: bool = False,
        drop_last: bool = False,
        timeout: float = 0,
        worker_init_fn: Any = None,
        multiprocessing_context: Any = None,
        generator: Any = None,
        *,
        prefetch_factor: int | None = None,
        persistent_workers: bool = False,
        pin_memory_device: str = "",
        in_order: bool = True,
        device: torch.device | str | None = None,
        threads: int | None = None,
        collator: Any = None,
        ring_bytes: int | None = None,
        checked: bool = False,
    ) -> None:
        threads = None if threads is None else as_integer("DataLoader: threads", threads, 1)
        if threads is not None and num_workers != 0:
            raise ValueError(
                f"DataLoader: threads: expected num_workers=0 beside it, got {num_workers}"
            )
        if ring_bytes is not None:
            ring_bytes = as_integer("DataLoader: ring_bytes", ring_bytes, 0)
        if collator is not None:
            # Both, where a framework makes a loader anew from the attributes of this one.
            if collate_fn is not None and collate_fn is not collator:
                raise ValueError("DataLoader: collator: expected no other collate_fn beside it")
            collate_fn = collator
        super().__init__(
            dataset,
            batch_size,
            shuffle,
            sampler,
            batch_sampler,
            num_workers,
            collate_fn,
            pin_memory,
            drop_last,
            timeout,
            worker_init_fn,
            multiprocessing_context,
            generator,
            prefetch_factor=prefetch_factor,
            persistent_workers=persistent_workers,
            pin_memory_device=pin_memory_device,
            in_order=in_order,
        )
        self.device = device
        self.threads = threads
        self.collator = collator
        self.ring_bytes = ring_bytes
        self.checked = checked

    def __getstate__(self) -> dict[str, Any]:
        """Without what belongs to this process: slots, counts, the iterator."""
        return {**self.__dict__, NAME: Own(own(self).pending)}

    # --- iteration ----------------------------------------------------------------------------

    def __iter__(self) -> Any:
        mine = own(self)
        state = mine.pending
        if state is not None:
            end_streams(self)
        epoch = Epoch(self) if state is None else taken_up(self, state)
        with begins(self, epoch):
            iterator = super().__iter__()
        ours = isinstance(iterator, Delivery)  # what a subclass makes may be any iterator
        if ours and state is not None:
            iterator._go_on()
        # Not before all this went well: a state that was loaded is there for another attempt.
        if mine.pending is state:
            mine.pending = None
        mine.current = iterator._epoch if ours else None
        return iterator

    def _get_iterator(self) -> torch_dataloader._BaseDataLoaderIter:
        if self.threads is not None:
            return ThreadIter(self)
        source = _gather_source(self)
        if source is not None:
            if self.num_workers == 0:
                return GatherIter(self, source)
            self.check_worker_number_rationality()
            return WorkerGatherIter(self, source)
        if self.num_workers == 0:
            return LocalIter(self)
        self.check_worker_number_rationality()
        return ProcessIter(self)

    @_Computed
    def metrics(self) -> dict[str, Any]:
        """samples, batches, samples_per_second, wait_seconds and wait_fraction (in ``next``),
        prefetch_depth (batches under way), ring (slots, bytes, allocations ...), ring_occupancy
        (bytes in use / bytes of slots), bytes_written_per_batch_byte."""
        return own(self).counts.snapshot(memory_of(self))

    # --- resumption ---------------------------------------------------------------------------

    def state_dict(self) -> dict[str, Any]:
        """Where the loader is: how many batches of the epoch are done with, and what its order
        came from.

        Of the iterator that ``iter()`` made last, whether it is still there or was dropped; from
        its end on, and before the first, the state is one between two epochs. A batch is done with
        when it was handed out, or when its error was raised; batches under way are not. The number
        of threads does not matter, nor, for datasets with indices, that of workers.

        Below 1 KB for torch's samplers, and 5 KB more for each generator of the user's (and for
        samplers without one that draw from the global generator itself: ``SubsetRandomSampler``,
        ``WeightedRandomSampler``, the user's). Samplers of the user's with ``state_dict`` and
        ``load_state_dict`` get their state of the beginning of the epoch; others must give the same
        order again, or draw it from torch's global generator when they start.

        Datasets with these two methods are asked for theirs: an iterable one, or each worker's copy
        of it, for its state after the last batch that is done with (in this process none at the
        beginning of an epoch and between two), a map-style one, where there are no ``threads`` and
        no workers, for its state now. Other iterable datasets are replayed.

        Raises RuntimeError where a worker's copy could not tell its state.
        """
        mine = own(self)
        pending = mine.pending if mine.current is None else None
        if pending is None:
            return state_of(self, mine.current)
        if pending.get("between_epochs"):
            return state_of(self, None, pending)
        return dict(pending)

    def load_state_dict(self, state: dict[str, Any]) -> None:
        """The next ``iter()`` goes on after the batches that were done with when ``state`` was
        taken; an ``iter()`` that fails leaves the state for the next.

        torch's global generator is left as it is. The numbers that were drawn from it are in the
        state; for what is drawn later, as the order of the next epoch, restore it yourself
        (``torch.set_rng_state``), before ``iter()``.

        Raises ValueError for a state of another format, of a loader with other generators or
        another number of samplers, and in the middle of an epoch for one of a loader with another
        batch size, other kinds of samplers, a dataset of another length, or of an iterable dataset
        with another number of worker processes.
        """
        mine = own(self)
        state = checked(self, state)
        if state.get("between_epochs"):
            put(self, state)
        mine.pending = state
        mine.current = None


def _gather_source(loader: Any) -> GatherSource | None:
    if (
        loader._dataset_kind != torch_dataloader._DatasetKind.Map
        or not loader._auto_collation
        or not is_default(loader.collate_fn)
        or (loader.num_workers > 0 and loader.worker_init_fn is not None)
        or not collate_only_stacks()
    ):
        return None
    source = GatherSource.of(loader.dataset)
    return source if source is not None and source.may_gather() else None
