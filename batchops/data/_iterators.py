"""The loader's iterators: torch's own protocol, with what every one of them adds."""

from __future__ import annotations

import contextlib
import copy
import ctypes
import threading
import time
from collections import deque
from multiprocessing.util import Finalize
from typing import Any, NamedTuple

import torch
from torch._utils import ExceptionWrapper
from torch.utils.data import dataloader as torch_dataloader
from torch.utils.data._utils.pin_memory import pin_memory as pin

from batchops import _C
from batchops.data._collate import collate, collate_into, is_default
from batchops.data._errors import WholeBatch, raise_alone, raise_better, with_indices
from batchops.data._memory import PlainMemory
from batchops.data._metrics import Depth, batch_length
from batchops.data._own import memory_of, own, transfer_of
from batchops.data._resume import beginning_of, has_state, is_iterable, users_context
from batchops.data._sampling import IndexStream, RecordedSampler, draws_unseen
from batchops.data._source import Batch, GatherSource, collate_only_stacks
from batchops.data._streams import BeginsAt, History, Loads, Start, Streams, Tells, Told
from batchops.data._threads import Crew, End, WorkerInfo
from batchops.data._tree import tensor_bytes

_PLAIN = PlainMemory()


class Delivery:
    """Mixed into an iterator of torch's: memory, metrics, resumption, devices, errors.

    ``_index_sampler`` and ``_collate_fn`` are set by torch's constructors; here they become a
    sampler that is recorded and a function that collates natively.
    """

    _shares_batches = False  # collated in another process

    def _attach(self, loader: Any) -> None:
        """Before torch's constructor runs."""
        self._loader_metrics = own(loader).counts
        self._memory = memory_of(loader)
        self._transfer = transfer_of(loader)
        self._begin_epoch(loader)

    def _begin_epoch(self, loader: Any) -> None:
        self._epoch = beginning_of(loader)
        self._turns = 0  # batches that were asked for
        self._turn: int | None = None  # of these, the one to be handed out now
        self._held: deque[tuple[int, Any]] = deque()  # batches to come first, with their numbers

    def _next_epoch(self, loader: Any) -> None:
        """Of workers that are there already, before torch's _reset."""
        base_seed = self._base_seed
        self._begin_epoch(loader)
        if self._epoch.base_seed is None:
            self._epoch.keep_base_seed(base_seed)
        self._epoch.begins_with_workers()
        self._begin_sampler()

    @property
    def _index_sampler(self) -> Any:
        return self._recorded

    @_index_sampler.setter
    def _index_sampler(self, sampler: Any) -> None:
        self._recorded = RecordedSampler(sampler)
        self._begin_sampler()

    def _begin_sampler(self) -> None:
        """Where the epoch goes on; the way into a stream is replayed instead."""
        epoch = self._epoch
        skip = epoch.reached if self._is_map else 0
        self._recorded.begin(epoch.draws, skip, epoch.missing, epoch.sampler_begun)

    @property
    def _is_map(self) -> bool:
        return self._dataset_kind == torch_dataloader._DatasetKind.Map

    @property
    def _base_seed(self) -> int:
        return self._epoch.base_seed

    @_base_seed.setter
    def _base_seed(self, seed: int) -> None:
        self._epoch.base_seed_drawn(seed)

    @property
    def _shared_seed(self) -> int | None:
        return self._epoch.shared_seed

    @_shared_seed.setter
    def _shared_seed(self, seed: int | None) -> None:
        if seed is not None:  # of an IterDataPipe
            self._epoch.shared_seed_drawn(seed)

    @property
    def _collate_fn(self) -> Any:
        return self._collates

    @_collate_fn.setter
    def _collate_fn(self, fn: Any) -> None:
        if not is_default(fn):
            into = getattr(fn, "collate_into", None)
            if into is None:
                self._collates = fn
                return
        else:
            fn, into = collate, collate_into
        memory = self._memory
        self._collates = WholeBatch(
            fn if self._shares_batches else lambda batch: into(batch, memory)
        )

    def __next__(self) -> Any:
        begun = self._loader_metrics.begin()
        epoch = self._epoch
        number = None
        self._turn = None
        try:
            if self._held:
                number, data = self._held.popleft()
            else:
                data = super().__next__()
            if self._transfer is not None:
                data = self._transfer(data)
        except StopIteration:
            epoch.finished = True
            raise
        except Exception:
            # That was this batch; an error before its turn, as that of a time limit, was not.
            if number is None and self._turn is not None:
                number = epoch.number(self._turn)
            if number is not None:
                epoch.done(number)
            raise
        epoch.done(epoch.number(self._turn) if number is None else number)
        self._loader_metrics.delivered(begun, batch_length(data))
        return data

    def _take_turn(self) -> None:
        """The batch that was asked for next is the one to be handed out now."""
        self._turn = self._turns
        self._turns += 1

    def _go_on(self) -> None:
        """In an epoch that is taken up: fetch and drop what a stream has had before."""
        epoch = self._epoch
        if not self._is_map:
            in_order, self._in_order = getattr(self, "_in_order", True), True
            try:
                with epoch.draws.repeated():
                    self._replay()
            finally:
                self._in_order = in_order
        self._num_yielded = epoch.reached - len(epoch.missing)

    def _replay(self) -> None:
        epoch = self._epoch
        while (number := epoch.number(self._turns)) < epoch.reached:
            turns = self._turns
            try:
                data = super().__next__()
            except StopIteration:
                return
            except Exception:
                if self._turns == turns:
                    raise
                continue  # this batch's error, as it was raised before
            if number in epoch.missing:
                self._held.append((number, data))
            self._replayed(number)

    def _replayed(self, number: int) -> None:
        pass


class LocalIter(Delivery, torch_dataloader._SingleProcessDataLoaderIter):
    """User code runs when and where torch would run it; its samples are collated natively."""

    def __init__(self, loader: Any) -> None:
        self._attach(loader)
        self._tells = is_iterable(loader) and has_state(loader.dataset)
        # With the beginning of a stream, which may draw.
        with self._epoch.draws.repeated():
            super().__init__(loader)

    def _replayed(self, number: int) -> None:
        # From after a batch that is missing it cannot be asked for any more.
        if self._epoch.missing and has_state(self._dataset):
            self._epoch.dataset_was(number, copy.deepcopy(self._dataset.state_dict()))

    def _next_data(self) -> Any:
        if self._epoch.ended:
            raise StopIteration
        index = self._next_index()
        self._take_turn()
        try:
            data = self._dataset_fetcher.fetch(index)
        except Exception as error:
            if not self._is_map:
                raise  # a stream's samples have no index
            raise_better(error, with_indices(error, index))
        if self._tells and self._dataset_fetcher.ended:
            self._epoch.ended = True
        return pin(data, self._pin_memory_device) if self._pin_memory else data


class SharedFlag:
    """What multiprocessing's Event is to those who never wait for it: down at first, and up for
    all processes once it was set. Without a lock, so whoever dies leaves none taken."""

    def __init__(self, context: Any) -> None:
        self._up = context.RawValue(ctypes.c_bool, False)

    def is_set(self) -> bool:
        return self._up.value

    def set(self) -> None:
        self._up.value = True


_DROPPED = object()


class ProcessIter(Delivery, torch_dataloader._MultiProcessingDataLoaderIter):
    """torch's worker processes, which collate natively into shared memory."""

    _shares_batches = True

    def __init__(self, loader: Any) -> None:
        self._attach(loader)
        self._processes = loader.multiprocessing_context or torch.multiprocessing
        self._sent: dict[int, Any] = {}
        self._left: dict[int, Any] = {}  # torch's _task_info of an iteration that was left
        self._loads = Loads.of(loader) if is_iterable(loader) else None
        if self._loads is not None and self._epoch.streams is None:
            self._epoch.streams = Streams([Start()] * loader.num_workers)
        super().__init__(loader)

    def _reset(self, loader: Any, first_iter: bool = False) -> None:
        self._sent.clear()
        if not first_iter:
            self._left = self._task_info
            self._next_epoch(loader)
        super()._reset(loader, first_iter)
        self._left = {}
        if self._loads is not None:
            if not first_iter:
                self._epoch.streams = self.next_streams()
            self._histories = [History(start) for start in self._epoch.streams.starts]

    def next_streams(self) -> Streams | None:
        """Of the epoch that the workers would begin now."""
        if self._loads is None:
            return None
        if not self._tells:
            return Streams([Start()] * self._num_workers)
        streams = Streams(history.next_start() for history in self._histories)
        streams.problem = next(filter(None, (h.problem for h in self._histories)), "")
        return streams

    @property
    def _tells(self) -> bool:
        return self._loads is not None and has_state(self._dataset)

    @property
    def _collate_fn(self) -> Any:
        return Tells(self._collates, self._loads) if self._tells else self._collates

    @_collate_fn.setter
    def _collate_fn(self, fn: Any) -> None:
        Delivery._collate_fn.fset(self, fn)

    @property
    def _worker_init_fn(self) -> Any:
        starts = [] if self._loads is None else self._epoch.streams.starts
        if all(start == Start() for start in starts):
            return self._init
        return BeginsAt(self._init, starts, self._loads)

    @_worker_init_fn.setter
    def _worker_init_fn(self, fn: Any) -> None:
        self._init = fn

    @property
    def _worker_queue_idx_cycle(self) -> Any:
        return self._turns_of_workers

    @_worker_queue_idx_cycle.setter
    def _worker_queue_idx_cycle(self, cycle: Any) -> None:
        self._turns_of_workers = cycle
        if self._loads is not None:
            for _ in range(self._epoch.streams.first):
                next(cycle)

    def _replay(self) -> None:
        """Batches that were handed out before are dropped as they arrive."""

    def _next_index(self) -> Any:
        index = super()._next_index()
        if self._is_map:
            self._sent[self._send_idx] = index
        return index

    def _get_data(self) -> Any:
        got = super()._get_data()
        self._received, data = got
        asked = self._task_info.get(self._received) or self._left.get(self._received)
        if self._loads is not None and asked is not None:
            self._histories[asked[0]].answered(data if isinstance(data, Told) else None)
        return got

    def _next_data(self) -> Any:
        while True:
            data = super()._next_data()
            if data is not _DROPPED:
                return data

    def _process_data(self, data: Any, *worker: Any) -> Any:
        number = self._rcvd_idx - 1 if self._in_order else self._received
        index = self._sent.pop(number, None)
        if self._loads is not None:
            told = data if isinstance(data, Told) else None
            if not self._epoch.streams.arrived(worker[0], told):
                super()._process_data(None, *worker)
                return _DROPPED
            data = data if told is None else told.data
        # Of a stream some are never answered, by workers that are at their end.
        self._take_turn()
        if self._is_map:
            self._turn = number
        try:
            return self._counted(super()._process_data(data, *worker))
        except Exception as error:
            raise_alone(error, index)

    @property
    def _workers_done_event(self) -> SharedFlag:
        return self._done

    @_workers_done_event.setter
    def _workers_done_event(self, _: Any) -> None:
        # torch's own has a lock, which a worker that is killed may hold for ever.
        self._done = SharedFlag(self._processes)

    def _shutdown_workers(self) -> None:
        try:
            if self._workers_are_out_of_reach():
                self._terminate_workers()
            super()._shutdown_workers()
        except BaseException as error:
            self._end_workers()
            # That a worker was killed is told by a signal, which may come in the middle of this.
            if hasattr(self, "_pin_memory_thread") or not isinstance(error, RuntimeError):
                raise

    def _workers_are_out_of_reach(self) -> bool:
        """Whether queues were taken down before this iterator, as the garbage collector does with
        both in a cycle: what ends workers would stay here, and torch wait for each of them."""
        # At the program's end nobody waits, and modules lose their names, one by one.
        utils = None if torch_dataloader is None else torch_dataloader._utils
        if Finalize is None or utils is None or utils.python_exit_status is not False:
            return False
        ends = [getattr(queue, "_close", None) for queue in getattr(self, "_index_queues", ())]
        return any(isinstance(end, Finalize) and not end.still_active() for end in ends)

    def _terminate_workers(self) -> None:
        if self._worker_pids_set:
            torch_dataloader._utils.signal_handling._remove_worker_pids(id(self))
            self._worker_pids_set = False
        for worker in self._workers:
            if worker.is_alive():
                worker.terminate()

    def _end_workers(self) -> None:
        """Without their consent, as torch does at the end of what it tries."""
        for queue in self._index_queues:
            queue.cancel_join_thread()
            queue.close()
        self._terminate_workers()
        for worker in self._workers:
            worker.join(timeout=torch_dataloader._utils.MP_STATUS_CHECK_INTERVAL)

    def _counted(self, data: Any) -> Any:
        """Written once to shared memory, and once more where it is page-locked then."""
        nbytes = tensor_bytes(data)
        self._memory.batch_bytes += nbytes
        self._memory.written += nbytes * (2 if self._pin_memory else 1)
        return data


# Below this, torch's own lists of indices cost less than slices of vectors.
_STREAM_BATCH = 128


def _stream(recorded: RecordedSampler, source: GatherSource) -> IndexStream | None:
    """The batches of a sampler as vectors, where that is possible and pays."""
    stream = IndexStream.of(recorded.inner)
    if stream is None:
        return None
    size = recorded.inner.batch_size
    large = size >= _STREAM_BATCH or size * source.row_bytes >= _C.COLLATE_BACKGROUND_BYTES
    return recorded.stream() if large else None


class _Ahead(NamedTuple):
    """A batch that is gathered before it is asked for, and what it was gathered from."""

    taken: Any
    size: int
    source: GatherSource
    writes: list[int]
    inference: bool
    rows: _C.Rows
    batch: Batch


class GatherIter(Delivery, torch_dataloader._SingleProcessDataLoaderIter):
    """One batch at a time, the next ones gathered while this one is in use.

    ::

        __next__ k     take indices k · (gather k) · take indices k+1 · start gather k+1 · return k
        user code      uses batch k, while pool threads gather k+1
        __next__ k+1   still what the dataset holds? then wait for k+1, else gather it now
    """

    MOST_AHEAD = 4

    def __init__(self, loader: Any, source: GatherSource) -> None:
        self._attach(loader)
        super().__init__(loader)
        self._source: GatherSource | None = source
        self._stream = _stream(self._recorded, source)
        self._ahead: deque[_Ahead] = deque()
        self._depth = Depth(1, self.MOST_AHEAD)
        self._last_request = 0.0

    def _next_data(self) -> Any:
        stream = self._stream
        if stream is None:
            index = self._next_index()
            self._take_turn()
            return self._load(index)
        size = stream.batch_size()
        if self._ahead and self._ahead[0].size != size:
            self._forget()
        if self._ahead:
            ahead = self._ahead.popleft()
            self._take_turn()
            if self._is_valid(ahead):
                data = self._awaited(ahead.batch)
            else:
                # What was gathered after it was gathered from the same old rows.
                self._forget()
                data = self._load(ahead.taken)
        else:
            taken = stream.take(size)
            self._take_turn()
            data = self._load(taken)
        self._read_ahead(size)
        return data

    def _forget(self) -> None:
        while self._ahead:
            self._stream.untake(self._ahead.pop().taken)

    def _awaited(self, batch: Batch) -> Any:
        begun = time.perf_counter()
        data = batch.result()
        now = time.perf_counter()
        self._depth.waited(now - begun, now - self._last_request)
        self._last_request = now
        self._loader_metrics.depth = self._depth.value
        return data

    def _gathers(self) -> bool:
        """Whether the dataset can be gathered from right now; self._source is its source."""
        if self._source is not None:
            self._source = self._source.refreshed()
        return self._source is not None and collate_only_stacks() and self._source.may_gather()

    def _lookups(self) -> tuple[Any, ...]:
        return () if self._stream is None else self._stream.lookups

    def _load(self, taken: Any) -> Any:
        if self._gathers():
            rows = self._source.resolve(taken, self._lookups())
            if rows is not None:
                threads = torch.get_num_threads() - 1
                return self._source.start(rows, threads, self._memory).result()
        index = taken if self._stream is None else self._stream.as_list(taken)
        data = self._dataset_fetcher.fetch(index)
        return pin(data, self._pin_memory_device) if self._pin_memory else data

    def _read_ahead(self, size: Any) -> None:
        threads = torch.get_num_threads() - 1
        if threads < 1 or type(size) is not int:
            return
        while len(self._ahead) < self._depth.value and self._stream.may_take_early(size):
            source = self._source
            if source is None or size * source.row_bytes < _C.COLLATE_BACKGROUND_BYTES:
                return  # a small batch is gathered when it is asked for, by its thread
            if not self._gathers() or not self._source.counts_writes:
                return
            try:
                taken = self._stream.take(size)
            except StopIteration:
                return
            ahead = None
            try:
                ahead = self._start(taken, size, threads)
            except (RuntimeError, MemoryError):
                pass  # no memory for a second batch: this one is not lost, the next may fit later
            finally:
                if ahead is None:
                    self._stream.untake(taken)
            if ahead is None:
                return
            self._ahead.append(ahead)

    def _start(self, taken: Any, size: int, threads: int) -> _Ahead | None:
        source = self._source
        rows = source.resolve(taken, self._lookups())
        if rows is None:
            return None
        writes = source.writes()
        batch = source.start(rows, threads, self._memory)
        inference = torch.is_inference_mode_enabled()
        return _Ahead(taken, size, source, writes, inference, rows, batch)

    def _is_valid(self, ahead: _Ahead) -> bool:
        """Whether gathering now would give the same batch."""
        if not self._gathers() or self._source is not ahead.source:
            return False
        if ahead.writes != ahead.source.writes():
            return False
        if ahead.inference != torch.is_inference_mode_enabled():
            return False
        lookups = self._lookups()
        if lookups or ahead.source.has_lookups:
            return ahead.rows == ahead.source.resolve(ahead.taken, lookups)
        return True


class WorkerGatherIter(Delivery, torch_dataloader._BaseDataLoaderIter):
    """Native threads in the place of torch's worker processes.

    Keeps ``prefetch_factor * num_workers`` batches under way, and takes indices at the moments
    at which ``_MultiProcessingDataLoaderIter`` does: so many when it starts, one for each batch
    handed out.
    """

    def __init__(self, loader: Any, source: GatherSource) -> None:
        self._attach(loader)
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

    def _reset(self, loader: Any, first_iter: bool = False) -> None:
        if not first_iter:
            self._next_epoch(loader)
        super()._reset(loader, first_iter)
        source = self._source
        self._stream = None if source is None else _stream(self._recorded, source)
        self._under_way: deque[Any] = deque()
        self._sent = 0
        self._loader_metrics.depth = self._prefetch_factor * self._num_workers
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
        if self._source is not None and self._source.may_gather():
            rows = self._source.resolve(taken, lookups)
        # The sampler's own errors are raised now, as in torch.
        index = taken if rows is not None or stream is None else stream.as_list(taken)
        try:
            if rows is not None:
                # Inference mode is that of the moment at which a batch is handed out.
                with torch.inference_mode(False):
                    data = self._source.start(rows, self._num_workers, self._memory)
            else:
                data = self._dataset_fetcher.fetch(index)
                if self._pin_memory:
                    data = pin(data, self._pin_memory_device)
        except Exception:
            # Raised, as in torch, when it is this batch's turn.
            data = ExceptionWrapper(where=f"in DataLoader worker process {worker}")
        self._under_way.append(data)

    _workers = ()  # of torch's iterator the processes, which users count and shut down

    def _shutdown_workers(self) -> None:
        pass

    def _next_data(self) -> Any:
        if not self._under_way:
            raise StopIteration
        data = self._under_way.popleft()
        self._take_turn()
        self._send()
        if isinstance(data, Batch):
            return data.result(_alias if torch.is_inference_mode_enabled() else None)
        if isinstance(data, ExceptionWrapper):
            data.reraise()
        return data


def _alias(tensor: torch.Tensor) -> torch.Tensor:
    """A new tensor over the same memory: in inference mode, an inference tensor."""
    empty = torch.empty(0, dtype=tensor.dtype, device=tensor.device)
    return empty.set_(tensor.untyped_storage(), 0, tensor.shape, tensor.stride())


class ThreadIter(Delivery, torch_dataloader._BaseDataLoaderIter):
    """``threads=k``: k Python threads fetch whole batches, native threads collate them."""

    def __init__(self, loader: Any) -> None:
        self._attach(loader)
        super().__init__(loader)
        count = loader.threads
        infos = []
        for k in range(count):
            generator = torch.Generator()
            generator.manual_seed(self._base_seed + k)
            infos.append(WorkerInfo(k, count, self._base_seed + k, self._dataset, generator))
        if isinstance(self._dataset, torch_dataloader.IterDataPipe | torch_dataloader.MapDataPipe):
            torch.utils.data.graph_settings.apply_sharding(
                self._dataset, self._world_size, self._rank
            )
        self._in_order = loader.in_order
        # Otherwise as many as torch has under way with as many workers, whatever was waited for.
        unseen = draws_unseen(loader._index_sampler)
        self._depth = Depth(count + 1, 4 * count + 1) if unseen else Depth(2 * count, 2 * count)
        self._sent = 0
        self._exhausted = self._epoch.ended
        self._indices: dict[int, Any] = {}  # of what was asked for and not handed out, in order
        self._last_request = time.perf_counter()
        # Several threads of the user's may share the iterator. The one that is interrupted is the
        # main thread, and a lock of its own does not keep it out.
        self._one_at_a_time = threading.RLock()
        self._states: dict[int, Any] = {}  # of a stream that tells its own, by the batch drawn last
        fetch = _MapFetch(self) if self._is_map else _IterableFetch(self)
        init, timeout = loader.worker_init_fn, loader.timeout
        self._crew = Crew(self, infos, fetch, init, timeout, users_context)
        self._crew.start()
        self._fill()

    def _fill(self) -> None:
        while not self._exhausted and len(self._indices) < self._depth.value:
            try:
                index = self._next_index()
            except StopIteration:
                self._exhausted = True
                return
            # An interrupt between two of these loses the batch; nobody waits for what was not sent.
            number = self._sent
            self._sent += 1
            self._crew.put(number, index if self._is_map else (number, index))
            self._indices[number] = index if self._is_map else None

    def _arrived(self) -> int | None:
        """The number of the batch to hand out next, if it is there."""
        results = self._crew.results
        if self._in_order:
            first = next(iter(self._indices))
            return first if first in results else None
        return next((number for number in self._indices if number in results), None)

    def __next__(self) -> Any:
        self._crew.check_process()  # of the lock a fork has a copy that nobody releases
        with self._one_at_a_time:
            return super().__next__()

    def _next_data(self) -> Any:
        while True:
            if not self._indices:
                self._fill()  # what interrupts have lost is not all there is
            if not self._indices:
                self._crew.stop()
                raise StopIteration
            begun = time.perf_counter()
            number = self._crew.wait(self._arrived)
            now = time.perf_counter()
            self._depth.waited(now - begun, now - self._last_request)
            self._last_request = now
            self._loader_metrics.depth = self._depth.value
            index = self._indices.pop(number)
            data = self._crew.results.pop(number)
            if data is End:
                self._exhausted = True
                continue
            self._turns, self._turn = self._turns + 1, number
            if number in self._states:
                state = self._states.pop(number)
                if state is End:
                    self._epoch.ended = True
                else:
                    self._epoch.dataset_was(self._epoch.number(number), state)
            self._fill()
            if isinstance(data, ExceptionWrapper):
                self._raise(data, index)
            return pin(data, self._pin_memory_device) if self._pin_memory else data

    def _raise(self, data: ExceptionWrapper, index: Any) -> None:
        try:
            data.reraise()
        except Exception as error:
            raise_alone(error, index)

    def __del__(self) -> None:
        with contextlib.suppress(AttributeError):
            self._crew.stop()


class _MapFetch:
    def __init__(self, iterator: ThreadIter) -> None:
        self._fetcher = torch_dataloader._DatasetKind.create_fetcher(
            iterator._dataset_kind,
            iterator._dataset,
            iterator._auto_collation,
            iterator._collate_fn,
            iterator._drop_last,
        )

        self.turns = None

    def draw(self, index: Any) -> Any:
        return index

    def batch(self, index: Any) -> Any:
        return self._fetcher.fetch(index)


class _IterableFetch:
    """One iterator for all threads: advanced in turn, collated at once."""

    def __init__(self, iterator: ThreadIter) -> None:
        self._dataset = iterator._dataset
        self._iterator: Any = None  # made by the first draw, which worker_init_fn comes before
        self._auto = iterator._auto_collation
        self._drop_last = iterator._drop_last
        self._collate = iterator._collate_fn
        self._ended = False
        self._states = iterator._states if has_state(self._dataset) else None
        self.turns = threading.Lock()

    # StopIteration ends a stream from wherever it comes, as in torch's worker processes.

    def draw(self, task: tuple[int, Any]) -> Any:
        number, index = task
        try:
            return self._drawn(index)
        finally:
            if self._states is not None:
                # Later draws must not reach into it. At the end it may be the next epoch's.
                self._states[number] = (
                    End if self._ended else copy.deepcopy(self._dataset.state_dict())
                )

    def _drawn(self, index: Any) -> Any:
        if self._ended:
            return End
        data: list[Any] = []
        try:
            if self._iterator is None:
                self._iterator = iter(self._dataset)
            if not self._auto:
                return next(self._iterator)
            for _ in index:
                data.append(next(self._iterator))
        except StopIteration:
            self._ended = True
        return End if not data or (self._drop_last and len(data) < len(index)) else data

    def batch(self, data: Any) -> Any:
        try:
            return self._collate(data)
        except StopIteration:
            self._ended = True
            return End
