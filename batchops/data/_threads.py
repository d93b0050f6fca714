"""Python threads that fetch batches ahead, in the process of the user."""

from __future__ import annotations

import atexit
import contextlib
import os
import threading
import time
import weakref
from collections import deque
from collections.abc import Callable, Iterator
from typing import Any, NamedTuple

import torch
from torch._utils import ExceptionWrapper


class WorkerInfo(NamedTuple):
    """What a thread of ``threads=`` knows about itself.

    id, num_workers: of this thread, and how many there are. seed: base_seed + id, as for worker
    processes. generator: seeded with it, for random numbers that depend on no other thread.
    dataset: the loader's own, not a copy.
    """

    id: int
    num_workers: int
    seed: int
    dataset: Any
    generator: torch.Generator


_local = threading.local()


def get_worker_info() -> Any:
    """Of the thread (``threads=``) or worker process that calls it; None anywhere else."""
    info = getattr(_local, "info", None)
    return torch.utils.data.get_worker_info() if info is None else info


class End:
    """In the place of a batch: the iterable dataset is exhausted."""


# Seconds after which a thread without work looks whether it is still wanted.
_IDLE = 0.5

_crews: weakref.WeakSet[Crew] = weakref.WeakSet()


class Crew:
    """Threads that take tasks in order and leave their results under the task's number.

    They hold the crew and never the iterator that owns it, so a dropped iterator stops them: each
    ends when the user's code that it is in returns. Where Ctrl-C comes in the middle of that, they
    find out by themselves.
    """

    def __init__(
        self,
        owner: Any,
        infos: list[WorkerInfo],
        fetch: Callable[[int, Any], Any],
        init: Callable[[int], Any] | None,
        timeout: float,
    ) -> None:
        self._owner = weakref.ref(owner)
        self._fetch = fetch
        self._init = init
        self._timeout = timeout
        self._lock = threading.Lock()
        self._work = threading.Condition(self._lock)
        self._ready = threading.Condition(self._lock)
        self._tasks: deque[tuple[int, Any]] = deque()
        self._results: dict[int, Any] = {}
        self._turns = threading.Condition(self._lock)
        self._next_turn = 0
        self._stopped = False
        self._pid = os.getpid()
        inference = torch.is_inference_mode_enabled()
        self._threads = [
            threading.Thread(
                target=_serve,
                args=(self, info, inference),
                name=f"batchops-data-{info.id}",
                daemon=True,
            )
            for info in infos
        ]
        _crews.add(self)

    def start(self) -> None:
        """Apart, so that who is to stop them holds the crew before there are threads."""
        for thread in self._threads:
            thread.start()

    def put(self, number: int, task: Any) -> None:
        with self._lock:
            self._tasks.append((number, task))
            self._work.notify()

    def take(self, number: int | None) -> tuple[int, Any]:
        """The result of task `number`, or with None of any; waits for it."""
        if self._pid != os.getpid():
            raise RuntimeError(
                "DataLoader: the threads of this iterator are in the process that made it, and "
                "this is a fork of it: iterate over the loader anew"
            )
        deadline = time.monotonic() + self._timeout if self._timeout > 0 else None
        with self._lock:
            while True:
                if number is None and self._results:
                    found = min(self._results)
                    return found, self._results.pop(found)
                if number in self._results:
                    return number, self._results.pop(number)
                # In slices: a wait without an end would not see Ctrl-C on every system.
                left = 5.0 if deadline is None else deadline - time.monotonic()
                if left <= 0:
                    raise RuntimeError(f"DataLoader timed out after {self._timeout} seconds")
                self._ready.wait(min(left, 5.0))

    def ready(self) -> int:
        with self._lock:
            return len(self._results)

    def stop(self) -> None:
        if self._pid != os.getpid():
            return  # nobody is left here to stop, and the lock may be a lost thread's
        with self._lock:
            self._stopped = True
            self._tasks.clear()
            self._work.notify_all()
            self._turns.notify_all()

    @contextlib.contextmanager
    def turn(self, number: int) -> Iterator[None]:
        """One task at a time in here, in the order of their numbers."""
        with self._lock:
            while self._next_turn != number and not self._stopped and self._owner() is not None:
                self._turns.wait(_IDLE)
        try:
            yield
        finally:
            with self._lock:
                self._next_turn = number + 1
                self._turns.notify_all()

    def join(self, timeout: float) -> bool:
        """Waits for threads to end; whether all did."""
        deadline = time.monotonic() + timeout
        for thread in self._threads:
            if thread.ident is not None and thread is not threading.current_thread():
                thread.join(max(deadline - time.monotonic(), 0))
        return not any(thread.is_alive() for thread in self._threads)


def _serve(crew: Crew, info: WorkerInfo, inference: bool) -> None:
    _local.info = info
    failed = None
    if crew._init is not None:
        try:
            crew._init(info.id)
        except Exception:
            failed = ExceptionWrapper(where=f"in DataLoader thread {info.id}")
    with torch.inference_mode(inference):
        while True:
            with crew._lock:
                while not crew._tasks and not crew._stopped and crew._owner() is not None:
                    crew._work.wait(_IDLE)
                if crew._stopped or crew._owner() is None:
                    return
                number, task = crew._tasks.popleft()
            try:
                result = failed if failed is not None else crew._fetch(number, task)
            except StopIteration:
                result = End
            except BaseException:
                # A thread that died would leave the loop waiting; so KeyboardInterrupt travels too.
                result = ExceptionWrapper(where=f"in DataLoader thread {info.id}")
            with crew._lock:
                if crew._stopped:
                    return
                crew._results[number] = result
                crew._ready.notify_all()
            # Waiting for the next task must not keep the last batch alive.
            del result, task


@atexit.register
def _stop_all() -> None:
    crews = [crew for crew in _crews if crew._pid == os.getpid()]
    for crew in crews:
        crew.stop()
    for crew in crews:
        crew.join(0.2)
