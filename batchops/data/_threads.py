"""Python threads that fetch batches ahead, in the process of the user."""

from __future__ import annotations

import _thread
import atexit
import contextlib
import contextvars
import os
import threading
import time
import weakref
from collections.abc import Callable, Iterator
from queue import Empty, SimpleQueue
from typing import Any, NamedTuple, Protocol

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


class Modes(NamedTuple):
    """torch's modes of a thread, which another one does not have by itself; a forked worker has."""

    inference: bool
    grad: bool
    autocast: list[tuple[str, torch.dtype]]
    device: torch.device  # of tensors that are made without one

    @classmethod
    def now(cls) -> Modes:
        on = [kind for kind in ("cpu", "cuda") if torch.is_autocast_enabled(kind)]
        autocast = [(kind, torch.get_autocast_dtype(kind)) for kind in on]
        return cls(
            torch.is_inference_mode_enabled(),
            torch.is_grad_enabled(),
            autocast,
            torch.get_default_device(),
        )

    @contextlib.contextmanager
    def entered(self) -> Iterator[None]:
        with contextlib.ExitStack() as stack:
            stack.enter_context(torch.inference_mode(self.inference))
            stack.enter_context(torch.set_grad_enabled(self.grad))
            for kind, dtype in self.autocast:
                stack.enter_context(torch.autocast(kind, dtype=dtype))
            if self.device.type != "cpu":
                stack.enter_context(self.device)
            yield


class End:
    """In the place of a batch: the iterable dataset is exhausted."""


# Seconds after which a thread without work looks whether it is still wanted.
_IDLE = 0.5

_crews: weakref.WeakSet[Crew] = weakref.WeakSet()


class Fetch(Protocol):
    """How a batch comes of a task, in two parts."""

    turns: threading.Lock | None
    """Where draws go by the tasks' order: with it one thread at a time takes a task and draws."""

    def draw(self, task: Any) -> Any: ...

    def batch(self, drawn: Any) -> Any: ...


class Crew:
    """Threads that take tasks in order and leave their results under the task's number.

    They hold the crew and never the iterator that owns it, so a dropped iterator stops them: each
    ends when the user's code that it is in returns. Where Ctrl-C comes in the middle of that, they
    find out by themselves.

    The last reference to the iterator may go in any thread and at any moment, a worker's included,
    and an interrupt may come between any two steps: so there is no lock that `stop` would need, and
    nothing that two steps leave half done.
    """

    def __init__(
        self,
        owner: Any,
        infos: list[WorkerInfo],
        fetch: Fetch,
        init: Callable[[int], Any] | None,
        timeout: float,
        new_context: Callable[[], contextvars.Context],
    ) -> None:
        self._orphaned: list[Any] = []
        # Who asks the reference whether it is alive holds the owner for that moment, and may be
        # left with the last reference. The callback is no Python function: nothing interrupts it.
        self._owner = weakref.ref(owner, self._orphaned.append)
        self._fetch = fetch
        self._init = init
        self._timeout = timeout
        self._tasks: SimpleQueue[tuple[int, Any] | None] = SimpleQueue()
        self.results: dict[int, Any] = {}  # by task number; the owner takes out what it has used
        self._news = threading.Lock()  # released when there is a result that was not looked at
        self._stopped = False
        self._pid = os.getpid()
        modes = Modes.now()
        self._threads = [
            threading.Thread(
                target=new_context().run,
                args=(_serve, self, info, modes),
                name=f"batchops-data-{info.id}",
                daemon=True,
            )
            for info in infos
        ]
        _crews.add(self)

    def start(self) -> None:
        """Apart, so that who is to stop them holds the crew before there are threads."""
        # An interrupt inside Thread.start may leave a lock taken that the new thread waits for, for
        # ever. Interrupts come to the main thread alone: so another one starts them.
        outcome: SimpleQueue[BaseException | None] = SimpleQueue()
        _thread.start_new_thread(_start, (self._threads, outcome))
        error = outcome.get()
        if error is not None:
            self.stop()  # those that were started: the error holds what would drop them
            raise error

    def put(self, number: int, task: Any) -> None:
        self._tasks.put((number, task))

    def check_process(self) -> None:
        if self._pid != os.getpid():
            raise RuntimeError(
                "DataLoader: the threads of this iterator are in the process that made it, and "
                "this is a fork of it: iterate over the loader anew"
            )

    def wait(self, wanted: Callable[[], int | None]) -> int:
        """Waits until wanted() is the number of a task, and gives it; asked at each result."""
        self.check_process()
        deadline = time.monotonic() + self._timeout if self._timeout > 0 else None
        while (number := wanted()) is None:
            # In slices: a wait without an end would not see Ctrl-C on every system.
            left = 5.0 if deadline is None else deadline - time.monotonic()
            if left <= 0:
                raise RuntimeError(f"DataLoader timed out after {self._timeout} seconds")
            self._news.acquire(timeout=min(left, 5.0))
        return number

    def stop(self) -> None:
        if self._pid != os.getpid():
            return  # nobody is left here to stop
        self._stopped = True
        for _ in self._threads:
            self._tasks.put(None)

    def next_task(self) -> tuple[int, Any] | None:
        """For a thread of the crew: None when it is to end."""
        while not self._stopped and not self._orphaned:
            with contextlib.suppress(Empty):
                task = self._tasks.get(timeout=_IDLE)
                if task is not None and not self._stopped:
                    return task
        return None

    @contextlib.contextmanager
    def turn(self) -> Iterator[None]:
        """For a thread of the crew: alone in here where draws have an order, or about to end."""
        turns = self._fetch.turns
        alone = False
        while turns is not None and not alone and not self._stopped and not self._orphaned:
            # Who has the turn may never leave the user's code.
            alone = turns.acquire(timeout=_IDLE)
        try:
            yield
        finally:
            if alone:
                turns.release()

    def done(self, number: int, result: Any) -> None:
        """For a thread of the crew."""
        self.results[number] = result
        with contextlib.suppress(RuntimeError):  # released already
            self._news.release()

    def join(self, timeout: float) -> bool:
        """Waits for threads to end; whether all did."""
        deadline = time.monotonic() + timeout
        for thread in self._threads:
            if thread.is_alive() and thread is not threading.current_thread():
                thread.join(max(deadline - time.monotonic(), 0))
        return not any(thread.is_alive() for thread in self._threads)


def _start(threads: list[threading.Thread], outcome: SimpleQueue[BaseException | None]) -> None:
    try:
        for thread in threads:
            thread.start()
    except BaseException as error:  # raised where it is waited for
        outcome.put(error)
    else:
        outcome.put(None)


def _serve(crew: Crew, info: WorkerInfo, modes: Modes) -> None:
    _local.info = info
    where = f"in DataLoader thread {info.id}"
    failed = None
    if crew._init is not None:
        try:
            crew._init(info.id)
        except BaseException:  # as below
            failed = ExceptionWrapper(where=where)

    def attempt(call: Callable[[Any], Any], argument: Any) -> Any:
        try:
            return call(argument)
        except BaseException:
            # A thread that died would leave the loop waiting; so KeyboardInterrupt travels too.
            return ExceptionWrapper(where=where)

    fetch = crew._fetch
    with modes.entered():
        while True:
            with crew.turn():
                taken = crew.next_task()
                if taken is None:
                    return
                number, task = taken
                result = attempt(fetch.draw, task) if failed is None else failed
            if result is not End and not isinstance(result, ExceptionWrapper):
                result = attempt(fetch.batch, result)
            crew.done(number, result)
            # Waiting for the next task must not keep the last batch alive.
            del result, task, taken


@atexit.register
def _stop_all() -> None:
    crews = [crew for crew in _crews if crew._pid == os.getpid()]
    for crew in crews:
        crew.stop()
    for crew in crews:
        crew.join(0.2)
