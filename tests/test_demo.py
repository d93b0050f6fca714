"""The jobs of examples/ end to end, small; and their acceptance criteria on made-up runs."""

from __future__ import annotations

import importlib
import json
import os
import pathlib
import subprocess
import sys
import types

import pytest
import torch

EXAMPLES = pathlib.Path(__file__).parents[1] / "examples"
EPOCHS = 2
STEPS_PER_EPOCH = (1797 - 360) // 64

pytest.importorskip("sklearn", reason="the digits come with scikit-learn")
pytest.importorskip("matplotlib", reason="the demo writes a plot")


def run_job(name: str, out: pathlib.Path, *arguments: str) -> subprocess.CompletedProcess[str]:
    command = [sys.executable, str(EXAMPLES / f"{name}.py"), "--device", "cpu", "--out", str(out)]
    # one thread: two fight with whatever else the machine runs, and tests measure nothing
    command += ["--epochs", str(EPOCHS), "--threads", "1", *arguments]
    environment = {**os.environ, "MPLCONFIGDIR": str(out / "matplotlib")}
    return subprocess.run(
        command, capture_output=True, text=True, timeout=500, cwd=out, env=environment
    )


@pytest.fixture(scope="module")
def demo(tmp_path_factory: pytest.TempPathFactory):
    out = tmp_path_factory.mktemp("demo")
    return run_job("digits", out, "--min-accuracy", "0.8"), out


@pytest.mark.slow
def test_exit_code_says_that_all_criteria_hold(demo):
    done, _ = demo
    assert done.returncode == 0, done.stdout + done.stderr
    assert done.stdout.count("\nok  ") == 3
    assert "FAIL" not in done.stdout


@pytest.mark.slow
def test_table_and_progress(demo):
    done, _ = demo
    for row in ("test accuracy", "data", "forward", "backward", "optimizer", "total"):
        assert row in done.stdout
    assert "100%" in done.stderr


@pytest.mark.slow
def test_json(demo):
    done, out = demo
    assert done.returncode == 0, done.stdout + done.stderr
    data = json.loads((out / "digits.json").read_text())
    runs = [data["stock"], data["batchops_run"], *data["stock_other_seeds"]]
    assert len(runs) == 4
    for run in runs:
        assert len(run["losses"]) == EPOCHS * STEPS_PER_EPOCH
        assert len(run["epoch_losses"]) == len(run["test_accuracy"]) == EPOCHS
        assert run["epoch_losses"][-1] < run["epoch_losses"][0]
        assert all(run["ms_per_step"][part] > 0 for part in ("data", "forward", "backward"))
    # recomputed here, not read from the criteria
    pairs = zip(data["stock"]["losses"][:20], data["batchops_run"]["losses"][:20], strict=True)
    assert max(abs(a - b) / a for a, b in pairs) <= 1e-4
    # the two sides are not the same code, and the seeds matter
    assert data["stock"]["losses"] != data["batchops_run"]["losses"]
    assert data["stock"]["losses"][0] != data["stock_other_seeds"][0]["losses"][0]
    assert set(data["ratio"]) == {"data", "forward", "backward", "optimizer", "total"}


@pytest.mark.slow
def test_plot_is_a_png(demo):
    _, out = demo
    image = (out / "digits.png").read_bytes()
    assert image.startswith(b"\x89PNG\r\n\x1a\n")
    assert len(image) > 10_000


@pytest.mark.slow
@pytest.mark.parametrize("layout", ["padded", "packed"])
def test_tokens_job(tmp_path, layout):
    small = ["--functions", "120", "--max-bits", "6.5"]
    done = run_job("tokens", tmp_path, "--layout", layout, *small)
    assert done.returncode == 0, done.stdout + done.stderr
    assert done.stdout.count("\nok  ") == 3
    assert "test bits a byte" in done.stdout
    data = json.loads((tmp_path / "tokens.json").read_text())
    stock, ours = data["stock"], data["batchops_run"]
    assert max(abs(a - b) / a for a, b in zip(stock["losses"], ours["losses"], strict=True)) <= 1e-2
    assert ours["losses"] != stock["losses"]
    assert ours["test_bits_per_byte"][-1] < ours["test_bits_per_byte"][0] < 8  # bits of a byte
    assert (tmp_path / "tokens.png").read_bytes().startswith(b"\x89PNG\r\n\x1a\n")


@pytest.fixture
def tokens(monkeypatch: pytest.MonkeyPatch):
    monkeypatch.syspath_prepend(str(EXAMPLES))
    return importlib.import_module("tokens")


@pytest.mark.parametrize("layout", ["padded", "packed"])
def test_tokens_batches_of_both_sides_are_equal(tokens, layout):
    samples, _ = tokens.load_functions(0, 20)
    stock = {"padded": tokens.pad_stock, "packed": tokens.pack_stock}[layout]
    want, got = stock(samples[:9]), tokens.collator(layout)(samples[:9])
    for key in tokens.KEYS:
        assert torch.equal(got[key], want[key]), key


def test_tokens_packed_and_padded_losses_are_the_same(tokens):
    """No byte sees what lies before its own function, nor any padding."""
    samples, _ = tokens.load_functions(0, 20)
    model = importlib.import_module("tokens_model").BytePredictor().double()
    losses = []
    for collate in (tokens.pad_stock, tokens.pack_stock):
        run = types.SimpleNamespace(model=model)
        losses.append(tokens.Training.loss(run, collate(samples[:9])).item())
    assert losses[0] == pytest.approx(losses[1], rel=1e-12)


def test_tokens_functions(tokens):
    source = "import a\n\ndef f(x):\n    return x\n\nclass C:\n    def g(self):\n        pass\n"
    assert tokens.functions_of(source) == [
        b"def f(x):\n    return x\n",
        b"    def g(self):\n        pass\n",
    ]


@pytest.fixture
def digits(monkeypatch: pytest.MonkeyPatch):
    monkeypatch.syspath_prepend(str(EXAMPLES))
    return importlib.import_module("digits")


def _run(losses: list[float], epoch_losses: list[float], accuracy: float = 0.99):
    return types.SimpleNamespace(
        losses=losses, scores=[accuracy], epoch_losses=lambda: epoch_losses
    )


LOSSES = [2.0 - 0.05 * i for i in range(24)]
# spreads 0.1, 0.02, 0.01, widened by neighbours to 0.1, 0.1, 0.02
STOCK = [[1.0, 0.10, 0.050], [1.1, 0.12, 0.060], [1.05, 0.11, 0.055]]


def _judge(digits, losses=LOSSES, epochs=(1.0, 0.1, 0.05), accuracy=0.99):
    stock = [_run(LOSSES, e) for e in STOCK]
    ours = _run(losses, list(epochs), accuracy)
    criteria = digits.judge(digits.Comparison(stock[0], ours, stock), 0.97)
    return {name for name, c in criteria.items() if not c["ok"]}, criteria


def test_equal_runs_are_accepted(digits):
    assert _judge(digits)[0] == set()


def test_low_accuracy_of_one_side_is_refused(digits):
    assert _judge(digits, accuracy=0.96)[0] == {"accuracy"}


@pytest.mark.parametrize(
    ("step", "change", "failing"),
    [
        (0, 0.9e-4, set()),
        (19, 1.1e-4, {"start"}),  # the last step that counts
        (20, 1.1e-4, set()),  # the first one that does not
    ],
)
def test_first_losses_bound(digits, step, change, failing):
    losses = list(LOSSES)
    losses[step] *= 1 + change
    assert _judge(digits, losses=losses)[0] == failing


@pytest.mark.parametrize(("gap", "failing"), [(0.039, set()), (0.041, {"later"})])
def test_later_losses_bound_is_twice_the_widest_neighbouring_spread(digits, gap, failing):
    found, criteria = _judge(digits, epochs=(1.0, 0.1, 0.05 + gap))
    assert found == failing
    assert criteria["spread"]["per_epoch"] == pytest.approx([0.1, 0.1, 0.02])


@pytest.mark.parametrize("step", [0, 7])  # max() steps over a NaN that is not the first value
def test_a_nan_loss_is_refused(digits, step):
    nan = float("nan")
    losses = [*LOSSES[:step], nan, *LOSSES[step + 1 :]]
    assert _judge(digits, losses=losses, epochs=(1.0, nan, 0.05))[0] == {"start", "later"}


def test_missing_scikit_learn_says_what_to_type(digits, monkeypatch):
    monkeypatch.setitem(sys.modules, "sklearn.datasets", None)
    with pytest.raises(SystemExit, match=r"pip install scikit-learn"):
        digits.load_digits(0)


def test_split_is_seeded_and_disjoint(digits):
    train, images, labels = digits.load_digits(0)
    again, _, _ = digits.load_digits(0)
    other, _, _ = digits.load_digits(1)
    assert len(train) == 1437
    assert len(labels) == len(images) == 360
    assert train.tensors[0].equal(again.tensors[0])
    assert not train.tensors[0].equal(other.tensors[0])
