"""Trains a residual network on handwritten digits twice, on stock torch and on batchops.

    python examples/digits.py            (or: make demo)

Both runs start from the same seed, see the same samples in the same order and differ in three
lines: nn.BatchNorm2d / batchops.convert, a plain LAMB / batchops.optim.LAMB, torch's DataLoader /
batchops.data.DataLoader. The data are the 1,797 digits of 8 × 8 pixels that scikit-learn brings.

How the times are taken. The two runs take turns epoch by epoch in one process, with the same number
of threads, and swap who goes first; so what the machine does at the time meets both. The turns are
whole epochs, not steps, because a loader may work ahead while the model computes: it then does so
beside its own model. The first epoch warms up and is not counted. The table gives medians over the
steps; on a GPU every part ends with a synchronisation.

Accepted (the exit code is 0) when
  accuracy    both runs reach --min-accuracy on the 360 test images;
  start       the losses of the first 20 steps agree within a relative 1e-4;
  later       after that, for every epoch e: |ours(e) - stock(e)| <= 2 · spread(e), where stock(e)
              is the mean training loss over epoch e of the run with the same seed, and spread(e)
              is its max - min over three stock runs with seeds seed, seed + 1, seed + 2, taken as
              the largest over the epochs e - 1, e and e + 1 (three values alone meet by chance).
"""

from __future__ import annotations

import argparse
import json
import math
import statistics
import sys
import time
from collections.abc import Iterable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import torch
import torch.nn.functional as F
from digits_model import DigitNet, accuracy, parameter_groups
from plain_lamb import PlainLAMB
from torch import Tensor
from torch.utils.data import TensorDataset

import batchops
import batchops.data
import batchops.optim

PARTS = ("data", "forward", "backward", "optimizer")
TEST_SIZE = 360
STARTING_STEPS = 20
STARTING_TOLERANCE = 1e-4
SPREAD_FACTOR = 2.0
SEEDS = 3


def load_digits(seed: int) -> tuple[TensorDataset, Tensor, Tensor]:
    """Training set, test images, test labels: a seeded split of scikit-learn's digits."""
    try:
        from sklearn.datasets import load_digits as load
    except ImportError as error:
        raise SystemExit(
            "digits: the data come with scikit-learn, which cannot be imported. Type:\n"
            f"    {sys.executable} -m pip install scikit-learn matplotlib"
        ) from error
    digits = load()
    images = torch.tensor(digits.images, dtype=torch.float32).unsqueeze(1) / 16 - 0.5
    labels = torch.tensor(digits.target, dtype=torch.int64)
    order = torch.randperm(len(labels), generator=torch.Generator().manual_seed(seed))
    train, test = order[TEST_SIZE:], order[:TEST_SIZE]
    return TensorDataset(images[train], labels[train]), images[test], labels[test]


class Training:
    """One run: model, optimizer and loader of either side, and what it has recorded."""

    def __init__(self, side: str, options: argparse.Namespace, seed: int) -> None:
        self.side, self.options = side, options
        self.device = torch.device(options.device)
        # The split belongs to the task: it is the same for all seeds.
        dataset, images, labels = load_digits(options.seed)
        self.test = images.to(self.device), labels.to(self.device)
        ours = side == "batchops"

        torch.manual_seed(seed)
        model = DigitNet()
        if ours:
            batchops.convert(model)
        self.model = model.to(self.device)
        optimizer = batchops.optim.LAMB if ours else PlainLAMB
        groups = parameter_groups(self.model, options.weight_decay)
        self.optimizer = optimizer(groups, lr=options.lr)
        loader = batchops.data.DataLoader if ours else torch.utils.data.DataLoader
        self.loader = loader(
            dataset,
            batch_size=options.batch_size,
            shuffle=True,
            drop_last=True,
            generator=torch.Generator().manual_seed(seed),
        )
        self.steps = len(self.loader) * options.epochs
        # Linear warm-up over three epochs, then a cosine to zero. LAMB moves every weight by the
        # same share at first, also those whose gradient is nothing but rounding: a short warm-up
        # turns 1e-7 into 1e-4 within twenty steps, between two runs of torch alone as well.
        warmup = min(3, options.epochs) * len(self.loader)
        self.schedule = torch.optim.lr_scheduler.LambdaLR(
            self.optimizer,
            lambda step: (
                min(1.0, (step + 1) / warmup)
                * 0.5
                * (1 + math.cos(math.pi * max(0, step - warmup) / max(1, self.steps - warmup)))
            ),
        )
        self.losses: list[float] = []
        self.accuracies: list[float] = []
        self.ms: list[dict[str, float]] = []

    @contextmanager
    def timed(self, times: dict[str, float], part: str) -> Iterator[None]:
        begin = time.perf_counter()
        yield
        if self.device.type == "cuda":
            torch.cuda.synchronize()
        times[part] = (time.perf_counter() - begin) * 1e3

    def epoch(self, progress: Progress) -> None:
        batches = iter(self.loader)
        for _ in range(len(self.loader)):
            times: dict[str, float] = {}
            with self.timed(times, "data"):
                images, labels = next(batches)
                images, labels = images.to(self.device), labels.to(self.device)
            with self.timed(times, "forward"):
                loss = F.cross_entropy(self.model(images), labels)
            with self.timed(times, "backward"):
                loss.backward()
            with self.timed(times, "optimizer"):
                self.optimizer.step()
                self.optimizer.zero_grad(set_to_none=True)
            self.schedule.step()
            self.losses.append(float(loss.detach()))
            self.ms.append(times)
            progress.advance(f"{self.side:8} loss {self.losses[-1]:.4f}")
        self.accuracies.append(accuracy(self.model, *self.test))

    def epoch_losses(self) -> list[float]:
        """Mean training loss over the steps of each epoch."""
        size = len(self.loader)
        return [statistics.fmean(self.losses[i : i + size]) for i in range(0, self.steps, size)]

    def milliseconds(self) -> dict[str, float]:
        """Median over the steps after the first epoch, part by part and in total."""
        counted = self.ms[len(self.loader) :] or self.ms
        result = {part: statistics.median(step[part] for step in counted) for part in PARTS}
        result["total"] = statistics.median(sum(step.values()) for step in counted)
        return result


class Progress:
    """A bar on one line of a terminal; a line for every tenth of the work elsewhere."""

    WIDTH = 28

    def __init__(self, total: int) -> None:
        self.total, self.done, self.shown = total, 0, -1
        self.terminal = sys.stderr.isatty()

    def advance(self, text: str) -> None:
        self.done += 1
        share = self.done / self.total
        tick = int(share * (200 if self.terminal else 10))
        if tick == self.shown:
            return
        self.shown = tick
        bar = ("█" * int(share * self.WIDTH)).ljust(self.WIDTH, "░")
        end = "" if self.terminal and self.done < self.total else "\n"
        start = "\r" if self.terminal else ""
        print(f"{start}{bar} {share:4.0%}  {text}  ", end=end, file=sys.stderr, flush=True)


def train(options: argparse.Namespace) -> tuple[Training, Training, list[Training]]:
    """The timed pair in turns, then the other seeds of stock; returns stock, ours, all stock."""
    stock = Training("stock", options, options.seed)
    ours = Training("batchops", options, options.seed)
    others = [Training("stock", options, options.seed + k) for k in range(1, SEEDS)]
    progress = Progress(stock.steps * (2 + len(others)))
    for epoch in range(options.epochs):
        for run in (stock, ours) if epoch % 2 == 0 else (ours, stock):
            run.epoch(progress)
    for run in others:
        for _ in range(options.epochs):
            run.epoch(progress)
    return stock, ours, [stock, *others]


def largest(values: Iterable[float]) -> float:
    """The maximum, NaN when there is one (max() alone may step over it)."""
    return float(torch.tensor(list(values), dtype=torch.float64).max())


def judge(
    stock: Training, ours: Training, all_stock: list[Training], min_accuracy: float
) -> dict[str, dict[str, Any]]:
    """The acceptance criteria of the module's docstring, each with what was measured."""
    n = min(STARTING_STEPS, len(stock.losses))
    pairs = zip(ours.losses[:n], stock.losses[:n], strict=True)
    start = largest(abs(a - b) / abs(b) for a, b in pairs)

    by_seed = [run.epoch_losses() for run in all_stock]
    ranges = [max(values) - min(values) for values in zip(*by_seed, strict=True)]
    spread = [max(ranges[max(0, e - 1) : e + 2]) for e in range(len(ranges))]
    gaps = [abs(a - b) for a, b in zip(ours.epoch_losses(), by_seed[0], strict=True)]
    later = largest(gap / max(width, 1e-12) for gap, width in zip(gaps, spread, strict=True))

    worst = -largest(-run.accuracies[-1] for run in (stock, ours))
    return {
        "accuracy": {"value": worst, "bound": min_accuracy, "ok": worst >= min_accuracy},
        "start": {"value": start, "bound": STARTING_TOLERANCE, "ok": start <= STARTING_TOLERANCE},
        "later": {"value": later, "bound": SPREAD_FACTOR, "ok": later <= SPREAD_FACTOR},
        "spread": {"per_epoch": spread, "gap_per_epoch": gaps, "ok": True},
    }


def table(stock: Training, ours: Training) -> str:
    a, b = stock.milliseconds(), ours.milliseconds()
    lines = ["", f"{'':22}{'stock':>12}{'batchops':>12}{'ratio':>9}"]
    lines.append(f"{'test accuracy':22}{stock.accuracies[-1]:>12.2%}{ours.accuracies[-1]:>12.2%}")
    for part in (*PARTS, "total"):
        name = f"ms a step, {part}"
        lines.append(f"{name:22}{a[part]:>12.3f}{b[part]:>12.3f}{a[part] / b[part]:>8.2f}×")
    lines += ["", f"{'loss, mean of epoch':22}{'stock':>12}{'batchops':>12}{'difference':>14}"]
    for e, (x, y) in enumerate(zip(stock.epoch_losses(), ours.epoch_losses(), strict=True), 1):
        lines.append(f"{e:>22}{x:>12.6f}{y:>12.6f}{abs(x - y):>14.1e}")
    return "\n".join(lines)


def verdict(criteria: dict[str, dict[str, Any]]) -> str:
    rows = {
        "accuracy": "lowest test accuracy {value:.2%}, expected at least {bound:.2%}",
        "start": f"first {STARTING_STEPS} losses: relative difference at most {{value:.1e}}, "
        "bound {bound:.0e}",
        "later": "epochs' losses: at most {value:.2f} spreads of stock apart, bound {bound:g}",
    }
    return "\n".join(
        f"{'ok  ' if criteria[name]['ok'] else 'FAIL'} {text.format(**criteria[name])}"
        for name, text in rows.items()
    )


def plot(stock: Training, ours: Training, all_stock: list[Training], path: Path) -> None:
    import matplotlib

    matplotlib.use("Agg")
    import matplotlib.pyplot as plt

    figure, (left, right) = plt.subplots(1, 2, figsize=(11, 4), width_ratios=(3, 2))
    for k, run in enumerate(all_stock[1:]):
        label = "stock, other seeds" if k == 0 else None
        left.plot(range(1, run.steps + 1), run.losses, color="0.8", lw=0.8, label=label)
    steps = range(1, stock.steps + 1)
    left.plot(steps, stock.losses, color="C0", lw=2.5, alpha=0.6, label="stock")
    left.plot(steps, ours.losses, color="C1", lw=1, label="batchops")
    left.set(xlabel="step", ylabel="training loss", yscale="log", title="Same seed, same losses")
    left.legend()

    bottom = [0.0, 0.0]
    times = [stock.milliseconds(), ours.milliseconds()]
    for k, part in enumerate(PARTS):
        heights = [t[part] for t in times]
        right.bar(["stock", "batchops"], heights, 0.6, bottom, label=part, color=f"C{k + 2}")
        bottom = [b + h for b, h in zip(bottom, heights, strict=True)]
    threads = torch.get_num_threads()
    plural = "s" if threads > 1 else ""
    right.set(ylabel="milliseconds a step (median)", title=f"Time, {threads} thread{plural}")
    right.legend(loc="center left", bbox_to_anchor=(1, 0.5), reverse=True)
    figure.tight_layout()
    figure.savefig(path, dpi=120)
    plt.close(figure)


def result(
    options: argparse.Namespace,
    stock: Training,
    ours: Training,
    all_stock: list[Training],
    criteria: dict[str, dict[str, Any]],
) -> dict[str, Any]:
    def describe(run: Training) -> dict[str, Any]:
        return {
            "losses": run.losses,
            "epoch_losses": run.epoch_losses(),
            "test_accuracy": run.accuracies,
            "ms_per_step": run.milliseconds(),
        }

    a, b = stock.milliseconds(), ours.milliseconds()
    settings = {k: v for k, v in vars(options).items() if k != "out"}
    return {
        "settings": settings | {"threads": torch.get_num_threads()},
        "torch": torch.__version__,
        "batchops": batchops.__version__,
        "stock": describe(stock),
        "batchops_run": describe(ours),
        "stock_other_seeds": [describe(run) for run in all_stock[1:]],
        "ratio": {part: a[part] / b[part] for part in (*PARTS, "total")},
        "criteria": criteria,
    }


def parse(arguments: list[str] | None) -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    device = "cuda" if torch.cuda.is_available() else "cpu"
    parser.add_argument("--device", default=device, help=f"default here: {device}")
    parser.add_argument("--epochs", type=int, default=10)
    parser.add_argument("--batch-size", type=int, default=64)
    parser.add_argument("--lr", type=float, default=0.01)
    parser.add_argument("--weight-decay", type=float, default=0.01)
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--threads", type=int, help="default: torch's own choice")
    parser.add_argument("--min-accuracy", type=float, default=0.97)
    parser.add_argument("--out", type=Path, default=Path("out"), help="for digits.png, digits.json")
    options = parser.parse_args(arguments)
    if options.epochs < 1:
        parser.error(f"--epochs: expected 1 or more, got {options.epochs}")
    return options


def main(arguments: list[str] | None = None) -> int:
    options = parse(arguments)
    begin = time.perf_counter()
    if options.threads:
        torch.set_num_threads(options.threads)
    # Two runs can only be compared bit by bit if neither chooses its algorithms by the clock or
    # rounds the factors of its products.
    torch.backends.cudnn.benchmark = False
    torch.backends.cudnn.deterministic = True
    torch.backends.cudnn.allow_tf32 = False

    stock, ours, all_stock = train(options)
    criteria = judge(stock, ours, all_stock, options.min_accuracy)
    options.out.mkdir(parents=True, exist_ok=True)
    data = result(options, stock, ours, all_stock, criteria)
    (options.out / "digits.json").write_text(json.dumps(data, indent=1) + "\n")
    plot(stock, ours, all_stock, options.out / "digits.png")

    print(table(stock, ours))
    print()
    print(verdict(criteria))
    elapsed = time.perf_counter() - begin
    print(f"\nwritten: {options.out}/digits.png, {options.out}/digits.json ({elapsed:.0f} s)")
    return 0 if all(c["ok"] for c in criteria.values()) else 1


if __name__ == "__main__":
    sys.exit(main())
