"""pytest-benchmark drives and stores; the `pair` fixture measures ours and the peers in turn."""

from __future__ import annotations

import gc
import inspect
import resource
import statistics
import time
from collections.abc import Callable, Iterator, Mapping
from pathlib import Path
from typing import Any

import common
import pytest
import torch
from common import allocator, machine, reason

Side = Callable[..., Any]

# A round lasts at least this long, by repeating short calls, so that the clock's own cost and
# resolution stay below a percent of what is measured.
ROUND_SECONDS = 5e-3
# Of rounds that take so long, fewer will do: what disturbs single calls evens out within them.
LONG_ROUND_SECONDS = 0.2
MIN_ROUNDS, FEW_ROUNDS = 7, 5
MAX_ROUNDS = 400
FLOOR_BYTES = 256 << 20
FLOOR_SAMPLES = 2
WHOLE_STEPS = {"bench_training.py", "bench_optimizers.py"}


def pytest_addoption(parser: pytest.Parser) -> None:
    group = parser.getgroup("batchops benches")
    group.addoption("--quick", action="store_true", help="fewer cases, shorter measurements")
    group.addoption(
        "--threads", help="CPU thread counts, comma-separated; 1,2, or 2 alone with --quick"
    )
    group.addoption("--device", default="cpu", help="cpu or cuda (device events, L2 defeated)")
    group.addoption("--compile", action="store_true", help="torch.compile as a peer as well")
    group.addoption("--pair-seconds", type=float, help="time for the rounds of one case")
    group.addoption(
        "--compare",
        type=Path,
        help="a report.json or --benchmark-json file: ratios below its own are named and fail",
    )


def pytest_generate_tests(metafunc: pytest.Metafunc) -> None:
    if "threads" in metafunc.fixturenames:
        if metafunc.config.getoption("--device") == "cpu":
            config = metafunc.config
            default = "2" if config.getoption("--quick") else "1,2"
            counts = [int(n) for n in (config.getoption("--threads") or default).split(",")]
        else:
            counts = [1]
        metafunc.parametrize("threads", counts, indirect=True, ids=lambda n: f"{n}-thread")


def pytest_collection_modifyitems(config: pytest.Config, items: list[pytest.Item]) -> None:
    wanted = [lambda item: item.get_closest_marker("quick")] if config.getoption("--quick") else []
    if config.getoption("--device") == "cpu" and not config.getoption("-m"):
        wanted.append(lambda item: not item.get_closest_marker("on_cuda"))
    if config.getoption("--device") != "cpu":
        # Whole steps first: a GPU's time may end before the rest has had its turn.
        items.sort(key=lambda item: item.path.name not in WHOLE_STEPS)
    kept = [item for item in items if all(wants(item) for wants in wanted)]
    if len(kept) < len(items):
        config.hook.pytest_deselected(items=[item for item in items if item not in kept])
        items[:] = kept


def pytest_benchmark_update_machine_info(config: pytest.Config, machine_info: dict) -> None:
    # The stored file holds what describes the machine, and no host name.
    machine_info.clear()
    machine_info.update(machine(), allocator=allocator())


@pytest.fixture(scope="session")
def quick(request: pytest.FixtureRequest) -> bool:
    return bool(request.config.getoption("--quick"))


@pytest.fixture(scope="session")
def device(request: pytest.FixtureRequest) -> torch.device:
    chosen = torch.device(request.config.getoption("--device"))
    if chosen.type == "cuda" and not torch.cuda.is_available():
        pytest.skip("--device cuda: torch sees no GPU")
    return chosen


@pytest.fixture
def threads(request: pytest.FixtureRequest):
    """Sets torch's thread count for the whole bench, so that every side has the same."""
    before = torch.get_num_threads()
    torch.set_num_threads(request.param)
    yield request.param
    torch.set_num_threads(before)


@pytest.fixture(scope="session")
def floor(device: torch.device, quick: bool) -> Callable[[], list[float]]:
    """Samples of the bytes a second (reads + writes) that a large copy moves at this moment.

    The buffers live as long as the session. Each case takes samples right before and right after
    its rounds: on a shared machine the bandwidth of ten minutes ago is no yardstick.
    """
    source = torch.ones(FLOOR_BYTES // 4, device=device)
    target = torch.zeros_like(source)
    clock = _Clock(device)

    def sample() -> list[float]:
        count = 1 if quick else FLOOR_SAMPLES
        times = [clock(lambda: target.copy_(source)) for _ in range(count + 1)][1:]
        return [2 * FLOOR_BYTES / seconds for seconds in times]

    return sample


class _Clock:
    """Seconds that a block of work takes: device events on a GPU, the host's clock elsewhere."""

    def __init__(self, device: torch.device, host: bool = False) -> None:
        self.cuda = device.type == "cuda"
        self.events = self.cuda and not host

    def __call__(self, work: Callable[[], Any]) -> float:
        if self.cuda:
            torch.cuda.synchronize()
        if self.events:
            start, end = (torch.cuda.Event(enable_timing=True) for _ in range(2))
            start.record()
            work()
            end.record()
            end.synchronize()
            return start.elapsed_time(end) * 1e-3
        begin = time.perf_counter()
        work()
        return time.perf_counter() - begin


class _Side:
    """One contestant: its callable, and what the rounds have measured of it."""

    def __init__(self, name: str, call: Side) -> None:
        self.name = name
        parameters = inspect.signature(call).parameters.values()
        wants_index = any(
            p.kind in (p.POSITIONAL_ONLY, p.POSITIONAL_OR_KEYWORD) and p.default is p.empty
            for p in parameters
        )
        self.wants_index = wants_index
        self.call = call
        self.seconds: list[float] = []
        self.faults: list[int] = []

    def once(self, index: int) -> Any:
        return self.call(index) if self.wants_index else self.call()

    def captured(self, rotate: int) -> _Side:
        """Replays of its calls, one for each set of inputs, that were captured after a warm-up."""
        stream = torch.cuda.Stream()
        stream.wait_stream(torch.cuda.current_stream())
        with torch.cuda.stream(stream):
            for index in range(rotate):
                self.once(index)
        torch.cuda.current_stream().wait_stream(stream)
        graphs = []
        for index in range(rotate):
            graph = torch.cuda.CUDAGraph()
            with torch.cuda.graph(graph):
                self.once(index)
            graphs.append(graph)
        return _Side(self.name, lambda index: graphs[index].replay())


def _page_faults() -> int:
    return resource.getrusage(resource.RUSAGE_SELF).ru_minflt


class Pair:
    """Interleaved measurement of one callable against its peers.

        pair(ours=f, peers={"torch": g, "timm": "timm is not installed"}, check=check, ...)

    Every side's output is checked first: ours failing fails the bench, a peer failing is left out
    with the reason. Then rounds ours, peer, peer, ours, peer, peer, … run with the garbage
    collector off. A round is `calls` calls; the calls of all sides are numbered through, so with
    `rotate` input sets each one is used once before any is used again, whoever uses it.

    ours, peers    callables taking the index of the input set to use, or nothing; a peer may be a
                   string, the reason why it is missing. torch's eager form comes first by custom.
    check          check(output, index) raises AssertionError (or returns False) on a wrong output
                   of input set 0.
    peer_check     the same for the peers, where they round more often than ours may.
    bytes_moved    bytes that one call must move at least; gives GB/s and the fraction of the floor.
    items          what one call handles (samples, parameters); gives items a second.
    rotate         number of input sets; `common.rotation_length` tells how many defeat the caches.
    calls          calls in a round; by default enough for ROUND_SECONDS.
    clock          "device": device events on a GPU; "host": the host's time for issuing the calls;
                   "graph": device events of replays of the calls, which were captured before.
    memory         measures what a call takes of the device's memory at its height.
    cached         says in the results that the inputs fit the cache on purpose.
    op, case       what the report groups by and what it calls the row.
    """

    def __init__(
        self,
        benchmark: Any,
        device: torch.device,
        threads: int,
        floor: Callable[[], list[float]],
        seconds: float,
        min_rounds: int,
        records: list[dict[str, Any]],
        default_op: str,
    ) -> None:
        self.benchmark = benchmark
        self.device = device
        self.threads = threads
        self.floor = floor
        self.seconds = seconds
        self.min_rounds = min_rounds
        self.records = records
        self.default_op = default_op

    def __call__(
        self,
        ours: Side,
        peers: Mapping[str, Side | str],
        *,
        check: Callable[[Any, int], bool | None],
        peer_check: Callable[[Any, int], bool | None] | None = None,
        bytes_moved: int | None = None,
        items: int | None = None,
        rotate: int = 1,
        calls: int | None = None,
        clock: str = "device",
        cached: bool = False,
        memory: bool = False,
        op: str | None = None,
        case: Mapping[str, Any] | None = None,
    ) -> dict[str, Any]:
        if clock not in ("device", "host", "graph"):
            raise ValueError(f"pair: clock must be 'device', 'host' or 'graph', got {clock!r}")
        if clock == "graph" and self.device.type != "cuda":
            raise ValueError("pair: clock 'graph' needs --device cuda")
        skipped = {name: peer for name, peer in peers.items() if isinstance(peer, str)}
        sides = [_Side("batchops", ours)]
        self._checked(sides[0], check)
        for name, peer in peers.items():
            if isinstance(peer, str):
                continue
            side = _Side(name, peer)
            try:
                self._checked(side, peer_check or check)
            except AssertionError as error:
                skipped[name] = f"wrong result, so no time: {str(error).splitlines()[0]}"
            except Exception as error:  # what a peer cannot do is not ours to mend
                skipped[name] = reason(error)
            else:
                sides.append(side)
        if self.benchmark.disabled:  # --benchmark-disable: the checks alone
            return self.benchmark.pedantic(dict)
        if clock == "graph":
            sides = [sides[0].captured(rotate), *self._captured(sides[1:], rotate, skipped)]
        height = self._heights(sides) if memory and self.device.type == "cuda" else {}
        copies = self.floor() if bytes_moved is not None else []
        record = self._measure(sides, rotate, calls, _Clock(self.device, clock == "host"))
        record |= {
            "op": op or self.default_op,
            "case": {key: str(value) for key, value in (case or {}).items()},
            "device": self.device.type,
            "threads": self.threads,
            "allocator": allocator() if self.device.type == "cpu" else "caching",
            "clock": clock,
            "inputs": "cached" if cached else f"rotated over {rotate}",
            "skipped": skipped,
        }
        if bytes_moved is not None:
            floor = statistics.median(copies + self.floor())
            medians = record["median_us"]
            record["bytes_moved"] = bytes_moved
            record["floor_gbps"] = floor / 1e9
            record["gbps"] = {n: bytes_moved / us / 1e3 for n, us in medians.items()}
            record["fraction_of_floor"] = {
                n: bytes_moved / floor / (us * 1e-6) for n, us in medians.items()
            }
        if height:
            record["memory_bytes"] = height
        if items is not None:
            record["items_per_s"] = {n: items / us * 1e6 for n, us in record["median_us"].items()}
        self.benchmark.group = record["op"]
        self.benchmark.extra_info.update(record)
        self.records.append(record)
        return record

    def _captured(
        self, sides: list[_Side], rotate: int, skipped: dict[str, str]
    ) -> Iterator[_Side]:
        for side in sides:
            try:
                yield side.captured(rotate)
            except RuntimeError as error:  # what waits for the device cannot be captured
                torch.cuda.synchronize()
                skipped[side.name] = reason(error)

    @staticmethod
    def _heights(sides: list[_Side]) -> dict[str, int]:
        heights = {}
        for side in sides:
            side.once(0)
            torch.cuda.synchronize()
            torch.cuda.reset_peak_memory_stats()
            before = torch.cuda.memory_allocated()
            side.once(0)
            torch.cuda.synchronize()
            heights[side.name] = torch.cuda.max_memory_allocated() - before
        return heights

    def _checked(self, side: _Side, check: Callable[[Any, int], bool | None]) -> None:
        output = side.once(0)
        with common.one_thread():
            assert check(output, 0) is not False, f"{side.name}: check failed"

    def _measure(
        self, sides: list[_Side], rotate: int, calls: int | None, clock: _Clock
    ) -> dict[str, Any]:
        counter = 0

        def timed(side: _Side, count: int) -> float:
            nonlocal counter
            indices = [(counter + k) % rotate for k in range(count)]
            counter += count
            call = side.call

            def work_indexed() -> None:
                for index in indices:
                    call(index)

            def work_plain() -> None:
                for _ in indices:
                    call()

            work = work_indexed if side.wants_index else work_plain

            faults = _page_faults()
            seconds = clock(work)
            side.faults.append(_page_faults() - faults)
            side.seconds.append(seconds / count)
            return seconds

        # Warm-up; the second call of ours, free of one-off costs, says how many make a round.
        for side in sides:
            timed(side, 1)
        if calls is None:
            calls = max(1, round(ROUND_SECONDS / max(timed(sides[0], 1), 1e-7)))
        for side in sides:
            timed(side, calls)
        one_round = sum(side.seconds[-1] for side in sides) * calls
        least = FEW_ROUNDS if one_round > LONG_ROUND_SECONDS else self.min_rounds
        rounds = min(max(least, round(self.seconds / one_round)), MAX_ROUNDS)
        for side in sides:
            side.seconds.clear()
            side.faults.clear()

        # The stored statistics of pytest-benchmark are those of a whole round of ours; the
        # setup of each round is the peers' turn.
        ours, *peers = sides
        gc.collect()
        was_enabled = gc.isenabled()
        gc.disable()
        try:
            self.benchmark.pedantic(
                timed,
                args=(ours, calls),
                setup=lambda: [timed(peer, calls) for peer in peers] and None,
                rounds=rounds,
            )
        finally:
            if was_enabled:
                gc.enable()
        return _statistics(sides, calls)


def _quartiles(values: list[float]) -> tuple[float, float, float]:
    if len(values) < 2:
        return (values[0],) * 3
    low, middle, high = statistics.quantiles(values, n=4, method="inclusive")
    return low, middle, high


def _statistics(sides: list[_Side], calls: int) -> dict[str, Any]:
    """Medians and interquartile spreads; ratios are medians of the rounds' own ratios.

    A ratio is peer / ours: above 1, ours is the faster one. Taking it within a round cancels what
    the machine does over longer times.
    """
    rounds = min(len(side.seconds) for side in sides)
    ours = sides[0]
    result: dict[str, Any] = {
        "rounds": rounds,
        "calls_per_round": calls,
        "median_us": {},
        "spread": {},
        "page_faults_per_call": {},
        "ratio": {},
        "ratio_quartiles": {},
    }
    for side in sides:
        low, middle, high = _quartiles(side.seconds[:rounds])
        result["median_us"][side.name] = middle * 1e6
        result["spread"][side.name] = (high - low) / middle
        result["page_faults_per_call"][side.name] = statistics.median(side.faults[:rounds]) / calls
        if side is not ours:
            pairs = zip(side.seconds[:rounds], ours.seconds[:rounds], strict=True)
            low, middle, high = _quartiles([peer / mine for peer, mine in pairs])
            result["ratio"][side.name] = middle
            result["ratio_quartiles"][side.name] = [low, high]
    return result


_RECORDS = pytest.StashKey[list[dict[str, Any]]]()
_ERRORS = pytest.StashKey[list[dict[str, Any]]]()
_SAVED = pytest.StashKey[list[Any]]()
_CHANGES = pytest.StashKey[list[Any]]()


@pytest.fixture
def pair(request: pytest.FixtureRequest, benchmark: Any, device: torch.device, floor: Any) -> Pair:
    config = request.config
    records = config.stash.setdefault(_RECORDS, [])
    quick = config.getoption("--quick")
    seconds = config.getoption("--pair-seconds") or (0.2 if quick else 0.4)
    has_threads = "threads" in request.fixturenames
    threads = request.getfixturevalue("threads") if has_threads else torch.get_num_threads()
    op = request.node.originalname.removeprefix("test_").removeprefix("bench_")
    rounds = FEW_ROUNDS if quick else MIN_ROUNDS
    return Pair(benchmark, device, threads, floor, seconds, rounds, records, op)


@pytest.fixture
def accuracy(request: pytest.FixtureRequest, benchmark: Any, device: torch.device) -> Any:
    """accuracy(case, errors): a row of the accuracy table, from {side: {output: error}}."""

    def store(case: Mapping[str, str], errors: Mapping[str, Mapping[str, float]]) -> None:
        record = {
            "op": "accuracy",
            "case": dict(case),
            "device": device.type,
            "threads": torch.get_num_threads(),
            "allocator": allocator(),
            "errors": {side: dict(found) for side, found in errors.items()},
        }
        benchmark.extra_info.update(record)
        request.config.stash.setdefault(_ERRORS, []).append(record)

    return store


def pytest_configure(config: pytest.Config) -> None:
    config.addinivalue_line("markers", "quick: kept when --quick is given")
    config.addinivalue_line("markers", "on_cuda: for --device cuda, or by -m on_cuda")
    if config.getoption("--quick"):
        common.CACHE_MULTIPLE = common.QUICK_CACHE_MULTIPLE
    if path := config.getoption("--compare"):
        from comparison import saved_records

        config.stash[_SAVED] = saved_records(path)  # now: a wrong file is told before an hour


@pytest.hookimpl(trylast=True)
def pytest_sessionfinish(session: pytest.Session) -> None:
    saved = session.config.stash.get(_SAVED, None)
    if saved is None:
        return
    from comparison import compare

    changes = compare(saved, session.config.stash.get(_RECORDS, []))
    session.config.stash[_CHANGES] = changes
    if any(change.regressed for change in changes) and session.exitstatus == pytest.ExitCode.OK:
        session.exitstatus = pytest.ExitCode.TESTS_FAILED


def pytest_terminal_summary(terminalreporter: Any, config: pytest.Config) -> None:
    from comparison import summary
    from report import error_text_table, text_table

    if records := config.stash.get(_RECORDS, []):
        terminalreporter.section("batchops against its peers (interleaved; ratio = peer / ours)")
        terminalreporter.write(text_table(records) + "\n")
    if records := config.stash.get(_ERRORS, []):
        terminalreporter.section("errors against float64")
        terminalreporter.write(error_text_table(records) + "\n")
    if (changes := config.stash.get(_CHANGES, None)) is not None:
        terminalreporter.section("against the saved run")
        terminalreporter.write(summary(changes) + "\n")
