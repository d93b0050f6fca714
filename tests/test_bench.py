"""The benches' tools: what `pair` does to its sides, and what the report makes of a run."""

from __future__ import annotations

import functools
import importlib
import importlib.util
import json
import os
import pathlib
import shutil
import subprocess
import sys

import pytest

BENCH = pathlib.Path(__file__).parents[1] / "bench"

pytest.importorskip("pytest_benchmark")

TINY = """
import gc, json, pathlib, time
import torch
LOG = []

def side(name, seconds, value=1):
    def call(index):
        LOG.append((name, index, gc.isenabled(), torch.get_num_threads()))
        time.sleep(seconds)
        return value
    return call

def right(output, index):
    assert output == 1, "not one"

def test_order(pair, threads):
    LOG.clear()
    record = pair(
        ours=side("ours", 1e-3),
        peers={
            "torch": side("torch", 4e-3),
            "wrong": side("wrong", 0, value=2),
            "absent": "absent is not installed",
        },
        check=right, rotate=5, calls=2, bytes_moved=1000, items=10,
        op="sleep", case={"for": "1 ms"},
    )
    pathlib.Path(f"log-{threads}.json").write_text(json.dumps(LOG))

def test_plain(pair):
    pair(ours=lambda: 1, peers={"python": lambda: 1}, check=right, op="nothing")

def test_errors(accuracy, benchmark):
    benchmark.pedantic(lambda: 1)
    accuracy({"norm": "some"}, {"ours": {"y": 1.25e-7, "dx": 2e-6}, "torch": {"y": 3e-2, "dx": 1}})

def test_wrong(pair):
    pair(ours=side("ours", 0, value=2), peers={}, check=right)
"""


def plain_environment() -> dict[str, str]:
    return {k: v for k, v in os.environ.items() if not k.startswith(("MALLOC_", "PYTEST_"))}


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> pathlib.Path:
    """A copy of the tools beside a bench of sleeps, run once with each allocator."""
    folder = tmp_path_factory.mktemp("bench")
    for name in ("conftest.py", "common.py", "comparison.py", "report.py", "pytest.ini"):
        shutil.copy(BENCH / name, folder)
    (folder / "bench_tiny.py").write_text(TINY)
    for allocator, threshold in (("default", None), ("recycled", str(1 << 32))):
        environment = plain_environment()
        if threshold:
            environment |= {
                "MALLOC_MMAP_THRESHOLD_": threshold,
                "MALLOC_TRIM_THRESHOLD_": threshold,
            }
        command = [sys.executable, "-m", "pytest", "-q", "--pair-seconds", "0.05"]
        command += [f"--benchmark-json={allocator}.json"]
        done = subprocess.run(
            command, cwd=folder, env=environment, capture_output=True, text=True, timeout=300
        )
        (folder / f"{allocator}.txt").write_text(done.stdout + done.stderr)
    return folder


def _records(folder: pathlib.Path, allocator: str = "default") -> dict[str, dict]:
    stored = json.loads((folder / f"{allocator}.json").read_text())
    return {bench["name"]: bench["extra_info"] for bench in stored["benchmarks"]}


def test_a_wrong_kernel_has_no_time(folder):
    text = (folder / "default.txt").read_text()
    assert "1 failed, 4 passed" in text, text
    assert "not one" in text
    assert "test_wrong" not in _records(folder)


@pytest.mark.parametrize("threads", [1, 2])
def test_rounds_alternate_and_inputs_rotate(folder, threads):
    log = json.loads((folder / f"log-{threads}.json").read_text())
    record = _records(folder)[f"test_order[{threads}-thread]"]
    timed = [entry for entry in log if not entry[2]]  # the collector is off in rounds only
    names = [name for name, *_ in timed]
    # the peer's turn precedes ours in every round, two calls each
    assert names == ["torch", "torch", "ours", "ours"] * record["rounds"]
    assert record["rounds"] >= 7
    # calls of both sides are numbered through, modulo the number of sets
    first = timed[0][1]
    assert [index for _, index, *_ in timed] == [(first + k) % 5 for k in range(len(timed))]
    assert {count for *_, count in timed} == {threads}


def test_record(folder):
    record = _records(folder)["test_order[1-thread]"]
    # sleeps of 1 and 4 ms; a busy machine stretches both by the same fraction of a millisecond
    assert 2 < record["ratio"]["torch"] < 4.2
    low, high = record["ratio_quartiles"]["torch"]
    assert low <= record["ratio"]["torch"] <= high
    assert 1000 <= record["median_us"]["batchops"] < record["median_us"]["torch"]
    assert record["calls_per_round"] == 2
    assert record["skipped"]["absent"] == "absent is not installed"
    assert record["skipped"]["wrong"].startswith("wrong result")
    assert set(record["ratio"]) == {"torch"}
    seconds = record["median_us"]["batchops"] * 1e-6
    assert record["gbps"]["batchops"] == pytest.approx(1000 / seconds / 1e9)
    assert record["items_per_s"]["batchops"] == pytest.approx(10 / seconds)
    fraction = record["gbps"]["batchops"] / record["floor_gbps"]
    assert record["fraction_of_floor"]["batchops"] == pytest.approx(fraction)
    assert record["floor_gbps"] > 0.1


def test_allocator_is_stated(folder):
    for allocator in ("default", "recycled"):
        assert _records(folder, allocator)["test_plain"]["allocator"] == allocator


def test_stored_file_names_no_host(folder):
    stored = json.loads((folder / "default.json").read_text())
    assert "node" not in stored["machine_info"]
    assert os.uname().nodename not in json.dumps(stored["machine_info"]).split('"')


@pytest.fixture(scope="module")
def report():
    spec = importlib.util.spec_from_file_location("bench_report", BENCH / "report.py")
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


def test_report_of_both_allocators(folder, report, capsys):
    readme = folder / "README.md"
    readme.write_text(f"before\n{report.START}\nold\n{report.END}\nafter\n")
    runs = [str(folder / "default.json"), str(folder / "recycled.json")]
    arguments = [*runs, "--name", "here", "--out", str(folder / "results"), "--readme", str(readme)]
    assert report.main(arguments) == 0
    assert "sleep" in capsys.readouterr().out
    text = (folder / "results/here/report.md").read_text()
    # 1 and 2 threads, two allocators
    assert len([line for line in text.splitlines() if line.startswith("| 1 ms |")]) == 4
    assert "Skipped absent: absent is not installed" in text
    stored = json.loads((folder / "results/here/report.json").read_text())
    assert len(stored["records"]) == 6
    assert "| some | 1.2e-07 | 3.0e-02 | 2.0e-06 | 1.0e+00 |" in text
    assert stored["errors"][0]["errors"]["torch"]["y"] == 3e-2
    if importlib.util.find_spec("matplotlib"):
        assert "<svg" in (folder / "results/here/report.svg").read_text()
    filled = readme.read_text()
    assert filled.startswith("before\n")
    assert filled.endswith("\nafter\n")
    assert "old" not in filled
    assert "| sleep | torch | 1 | default | 1 |" in filled


def _record(report, ratio: float, **changes):
    record = {
        "op": "op",
        "case": {"shape": "1"},
        "device": "cpu",
        "threads": 1,
        "allocator": "default",
        "median_us": {report.OURS: 10.0, "torch": 10 * ratio},
        "spread": {report.OURS: 0.01},
        "ratio": {"torch": ratio},
        "ratio_quartiles": {"torch": [ratio, ratio]},
        "skipped": {},
    }
    return record | changes


@pytest.mark.parametrize(("ratio", "marked"), [(0.96, True), (0.98, False), (2.0, False)])
def test_slower_rows_are_marked(report, ratio, marked):
    assert ("▼" in report.ratio_text(_record(report, ratio), "torch")) is marked


def test_later_run_replaces_the_same_case(report, tmp_path):
    machine = {"cpu": "cpu", "cores": 2, "gpu": None}
    paths = []
    for k, records in enumerate(
        [[_record(report, 1.0), _record(report, 1.0, threads=2)], [_record(report, 3.0)]]
    ):
        path = tmp_path / f"{k}.json"
        benches = [{"fullname": "b", "extra_info": r} for r in records]
        stored = {"machine_info": machine, "benchmarks": benches, "datetime": str(k)}
        path.write_text(json.dumps(stored))
        paths.append(path)
    found, records = report.load(paths)
    assert found == machine
    assert {r["threads"]: r["ratio"]["torch"] for r in records} == {1: 3.0, 2: 1.0}


def test_runs_of_two_machines_do_not_mix(report, tmp_path):
    paths = []
    for k in range(2):
        paths.append(tmp_path / f"{k}.json")
        stored = {"machine_info": {"cores": k}, "benchmarks": [], "datetime": ""}
        paths[-1].write_text(json.dumps(stored))
    with pytest.raises(SystemExit, match="another machine"):
        report.load(paths)


def test_machine_name(report):
    machine = {"cpu": "AMD EPYC (9)", "cpu_capability": "AVX2", "cores": 2, "gpu": "NVIDIA X"}
    assert report.machine_name(machine) == "amd-epyc-9-avx2-2-cores-nvidia-x"


def test_memory_is_told_with_the_peers(report):
    sides = {"batchops": 812_000_000, "torch": 1_218_000_000}
    assert report.memory_text(sides) == "812 MB (torch 1.50×)"
    assert report.memory_text({}) == ""


def test_whole_steps_for_a_gpu_run_elsewhere_when_asked(tmp_path):
    """Small, and checked only; without -m they are not even collected."""
    command = [sys.executable, "-m", "pytest", "bench_training.py", "-q", "--benchmark-disable"]
    options = {"cwd": BENCH, "env": plain_environment(), "capture_output": True, "text": True}
    asked = subprocess.run([*command, "-m", "on_cuda"], timeout=300, **options)
    assert "4 deselected" not in asked.stdout
    assert "3 passed" in asked.stdout or "4 passed" in asked.stdout, asked.stdout + asked.stderr
    left = subprocess.run(command, timeout=300, **options)
    assert "4 deselected" in left.stdout, left.stdout + left.stderr


def test_a_graph_needs_a_gpu(tmp_path):
    for name in ("conftest.py", "common.py", "pytest.ini"):
        shutil.copy(BENCH / name, tmp_path)
    (tmp_path / "bench_graph.py").write_text(
        "def test_graph(pair):\n"
        "    pair(ours=lambda: 1, peers={}, check=lambda *_: None, clock='graph')\n"
    )
    command = [sys.executable, "-m", "pytest", "-q"]
    options = {"env": plain_environment(), "capture_output": True, "text": True}
    done = subprocess.run(command, cwd=tmp_path, timeout=300, **options)
    assert "clock 'graph' needs --device cuda" in done.stdout


def test_readme_without_markers_is_left_alone(report, tmp_path):
    readme = tmp_path / "README.md"
    readme.write_text("no markers")
    with pytest.raises(SystemExit, match="bench:start"):
        report.fill(readme, "section")
    assert readme.read_text() == "no markers"


# --- against a saved run -------------------------------------------------------------------------


def _row(ratio: float, low: float, high: float, **other: object) -> dict:
    record = {"op": "norm", "case": {"shape": "8"}, "device": "cpu", "threads": 1}
    record |= {"allocator": "default", "ratio": {"torch": ratio}}
    return record | {"ratio_quartiles": {"torch": [low, high]}} | other


@pytest.fixture
def comparison(monkeypatch: pytest.MonkeyPatch):
    monkeypatch.syspath_prepend(str(BENCH))
    return importlib.import_module("comparison")


@pytest.mark.parametrize(
    ("ratio", "high", "regressed"),
    [
        (2.0, 2.1, False),  # as before
        (3.0, 3.1, False),  # better
        (1.91, 1.93, False),  # lower by less than the tolerance
        (1.89, 1.93, True),
        (1.5, 1.96, False),  # scatters into what it was
    ],
)
def test_a_regression_is_lower_and_apart(comparison, ratio, high, regressed):
    (change,) = comparison.compare([_row(2.0, 1.95, 2.05)], [_row(ratio, ratio, high)])
    assert change.regressed is regressed
    assert comparison.summary([change]).startswith(f"1 ratios compared, {int(regressed)} regressed")


def test_only_what_both_runs_have_is_compared(comparison):
    saved = [_row(2.0, 2.0, 2.0), _row(2.0, 2.0, 2.0, threads=2)]
    new = [_row(1.0, 1.0, 1.0, threads=4), _row(1.0, 1.0, 1.0) | {"ratio": {"timm": 1.0}}]
    assert comparison.compare(saved, new) == []


def test_compare_names_regressions_and_fails(folder):
    stored = json.loads((folder / "default.json").read_text())
    for bench in stored["benchmarks"]:
        for name in bench["extra_info"].get("ratio", {}):
            bench["extra_info"]["ratio"][name] *= 2
            bench["extra_info"]["ratio_quartiles"][name] = [
                2 * q for q in bench["extra_info"]["ratio_quartiles"][name]
            ]
    (folder / "faster.json").write_text(json.dumps(stored))
    command = [sys.executable, "-m", "pytest", "-q", "--pair-seconds", "0.05", "--compare"]
    command += ["faster.json", "-k", "order", "--threads", "1"]

    def run() -> subprocess.CompletedProcess[str]:
        options = {"capture_output": True, "text": True, "timeout": 300}
        return subprocess.run(command, cwd=folder, env=plain_environment(), **options)

    done = run()
    assert done.returncode == 1, done.stdout
    assert "1 ratios compared, 1 regressed\n  sleep, 1 ms, 1 threads, default, × torch: " in (
        done.stdout
    )
    command[command.index("faster.json")] = "report.md"
    (folder / "report.md").write_text("{}")
    done = run()
    assert done.returncode != 0
    assert "neither records nor benchmarks" in done.stdout + done.stderr


@pytest.mark.parametrize("layout", ["contiguous", "channels_last"])
@pytest.mark.parametrize("phase", ["forward", "backward"])
@pytest.mark.parametrize(("bench", "variant"), [("batch", "add_relu"), ("group", "silu")])
def test_norms_are_checked_to_the_last_element(monkeypatch, bench, variant, phase, layout):
    """What is checked in parts is checked whole: one wrong element anywhere is found."""
    torch = pytest.importorskip("torch")
    monkeypatch.syspath_prepend(str(BENCH))
    for name in ("common", "peers", f"bench_{bench}_norm"):
        monkeypatch.delitem(sys.modules, name, raising=False)
    module = importlib.import_module(f"bench_{bench}_norm")
    common = importlib.import_module("common")
    monkeypatch.setattr(common, "PART_ELEMENTS", 1000)
    monkeypatch.setattr(common, "rotation_length", lambda *_: 1)
    problem = module.Problem(
        (3, 64, 5, 7), torch.float32, layout, variant, phase, torch.device("cpu")
    )
    activation = variant.removeprefix("add_")
    if bench == "batch":
        call = problem.side(module._ours(activation))
    else:
        call = problem.side(functools.partial(module._ours, activation=activation))
    check = problem.check(ours=True)

    def detached() -> list[torch.Tensor]:
        outputs = call(0) if phase == "backward" else [call(0)]
        return [t.detach().clone() for t in outputs]

    def given(outputs: list[torch.Tensor]) -> object:
        return outputs if phase == "backward" else outputs[0]

    check(given(detached()), 0)
    for position, output in enumerate(detached()):
        for element in (0, output.numel() // 2, -1):
            outputs = detached()
            flat = outputs[position].flatten()
            flat[element] += 1.0
            outputs[position] = flat.view(output.shape)
            with pytest.raises(AssertionError, match=f"output {position}"):
                check(given(outputs), 0)


def test_both_sides_of_a_sweep_compute_the_same(monkeypatch):
    torch = pytest.importorskip("torch")
    monkeypatch.syspath_prepend(str(BENCH))
    sweep = importlib.import_module("sweep")
    tiny = [(2, 32, 4, 4), (1, 64, 3, 3)]
    monkeypatch.setattr(sweep, "GROUP_NORM_SHAPES", tiny)
    monkeypatch.setattr(sweep, "BATCH_NORM_SHAPES", tiny)
    monkeypatch.setattr(sweep, "SMALL", [])
    monkeypatch.setattr(sweep, "ROWS", [(3, 24)])
    names = []
    for case in sweep.norms(None):
        names.append(case.name)
        outputs = {}
        for side in ("batchops", "torch"):
            generator = torch.Generator().manual_seed(0)
            call = case.make(side, lambda shape, g=generator: torch.randn(shape, generator=g))
            found = call()
            outputs[side] = found if isinstance(found, tuple) else (found,)
        tolerance = 1e-5 if "fp32" in case.name else 0.1  # norm-wise; torch rounds in between
        for got, want in zip(outputs["batchops"], outputs["torch"], strict=True):
            assert (got.shape, got.dtype) == (want.shape, want.dtype)
            assert (got - want).float().norm() <= tolerance * want.float().norm(), case.name
    assert len(set(names)) == len(names) == 2 * (2 * 2 * 4 + 2 * 2 * 6) + 2 * 2
    assert all(
        case.bytes == 8 * 1024
        for case in sweep.norms(2)
        if "plain forward, 2×32" in case.name and "fp32" in case.name
    )
