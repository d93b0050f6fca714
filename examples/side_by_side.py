"""Trains the same job twice, on stock torch and on batchops, and says whether they agree.

How the times are taken. The two runs take turns epoch by epoch in one process, with the same number
of threads, and swap who goes first; so what the machine does at the time meets both. The turns are
whole epochs, not steps, because a loader may work ahead while the model computes: it then does so
beside its own model. The first epoch warms up and is not counted. The table gives medians over the
steps; on a GPU every part ends with a synchronisation.

What is accepted, beside the score that a job asks for:
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
from collections.abc import Callable, Iterable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

import batchops

PARTS = ("data", "forward", "backward", "optimizer")
STARTING_STEPS = 20
STARTING_TOLERANCE = 1e-4
SPREAD_FACTOR = 2.0
SEEDS = 3
WARMUP_EPOCHS = 3


class Run:
    """One run of either side, and what it has recorded.

    A job gives ``model``, ``optimizer`` and ``loader``, how a batch becomes a loss (``loss``) and
    what is measured after each epoch (``score``).
    """

    model: nn.Module
    optimizer: torch.optim.Optimizer
    loader: Any

    def __init__(self, side: str, options: argparse.Namespace) -> None:
        self.side, self.options = side, options
        self.device = torch.device(options.device)
        self.ours = side == "batchops"
        self.losses: list[float] = []
        self.scores: list[float] = []
        self.ms: list[dict[str, float]] = []

    def loss(self, batch: Any) -> Tensor:
        raise NotImplementedError

    def score(self) -> float:
        raise NotImplementedError

    def to_device(self, batch: Any) -> Any:
        return [t.to(self.device) for t in batch]

    @property
    def steps(self) -> int:
        return len(self.loader) * self.options.epochs

    def warm_up_and_decay(self) -> torch.optim.lr_scheduler.LambdaLR:
        """Linear warm-up, then a cosine to zero.

        LAMB moves every weight by the same share at first, also those whose gradient is nothing but
        rounding: a short warm-up turns 1e-7 into 1e-4 within twenty steps, between two runs of
        torch alone as well.
        """
        steps = self.steps
        warmup = min(WARMUP_EPOCHS, self.options.epochs) * len(self.loader)

        def factor(step: int) -> float:
            decay = math.pi * max(0, step - warmup) / max(1, steps - warmup)
            return min(1.0, (step + 1) / warmup) * 0.5 * (1 + math.cos(decay))

        return torch.optim.lr_scheduler.LambdaLR(self.optimizer, factor)

    @contextmanager
    def timed(self, times: dict[str, float], part: str) -> Iterator[None]:
        begin = time.perf_counter()
        yield
        if self.device.type == "cuda":
            torch.cuda.synchronize()
        times[part] = (time.perf_counter() - begin) * 1e3

    def epoch(self, schedule: torch.optim.lr_scheduler.LRScheduler, progress: Progress) -> None:
        batches = iter(self.loader)
        for _ in range(len(self.loader)):
            times: dict[str, float] = {}
            with self.timed(times, "data"):
                batch = self.to_device(next(batches))
            with self.timed(times, "forward"):
                loss = self.loss(batch)
            with self.timed(times, "backward"):
                loss.backward()
            with self.timed(times, "optimizer"):
                self.optimizer.step()
                self.optimizer.zero_grad(set_to_none=True)
            schedule.step()
            self.losses.append(float(loss.detach()))
            self.ms.append(times)
            progress.advance(f"{self.side:8} loss {self.losses[-1]:.4f}")
        self.model.eval()
        with torch.no_grad():
            self.scores.append(self.score())
        self.model.train()

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


@dataclass
class Comparison:
    """The timed pair, all runs of stock (the pair's first), and what they are judged by."""

    stock: Run
    ours: Run
    all_stock: list[Run]

    @classmethod
    def train(cls, make: Callable[[str, int], Run], seed: int, epochs: int) -> Comparison:
        """``make(side, seed)`` gives a run. The pair in turns, then the other seeds of stock."""
        stock, ours = make("stock", seed), make("batchops", seed)
        others = [make("stock", seed + k) for k in range(1, SEEDS)]
        schedules = {id(run): run.warm_up_and_decay() for run in (stock, ours, *others)}
        progress = Progress(sum(run.steps for run in (stock, ours, *others)))
        for epoch in range(epochs):
            for run in (stock, ours) if epoch % 2 == 0 else (ours, stock):
                run.epoch(schedules[id(run)], progress)
        for run in others:
            for _ in range(epochs):
                run.epoch(schedules[id(run)], progress)
        return cls(stock, ours, [stock, *others])

    def judge(self) -> dict[str, dict[str, Any]]:
        """``start`` and ``later`` of the module's docstring, each with what was measured."""
        stock, ours = self.stock, self.ours
        n = min(STARTING_STEPS, len(stock.losses))
        pairs = zip(ours.losses[:n], stock.losses[:n], strict=True)
        start = largest(abs(a - b) / abs(b) for a, b in pairs)

        by_seed = [run.epoch_losses() for run in self.all_stock]
        ranges = [max(values) - min(values) for values in zip(*by_seed, strict=True)]
        spread = [max(ranges[max(0, e - 1) : e + 2]) for e in range(len(ranges))]
        gaps = [abs(a - b) for a, b in zip(ours.epoch_losses(), by_seed[0], strict=True)]
        later = largest(gap / max(width, 1e-12) for gap, width in zip(gaps, spread, strict=True))
        return {
            "start": {
                "value": start,
                "bound": STARTING_TOLERANCE,
                "ok": start <= STARTING_TOLERANCE,
            },
            "later": {"value": later, "bound": SPREAD_FACTOR, "ok": later <= SPREAD_FACTOR},
            "spread": {"per_epoch": spread, "gap_per_epoch": gaps, "ok": True},
        }

    def table(self, score: str, form: str) -> str:
        """``score`` names what `form` shows of a run's last one."""
        stock, ours = self.stock, self.ours
        a, b = stock.milliseconds(), ours.milliseconds()
        scores = [form.format(run.scores[-1]) for run in (stock, ours)]
        lines = ["", f"{'':22}{'stock':>12}{'batchops':>12}{'ratio':>9}"]
        lines.append(f"{score:22}{scores[0]:>12}{scores[1]:>12}")
        for part in (*PARTS, "total"):
            name = f"ms a step, {part}"
            lines.append(f"{name:22}{a[part]:>12.3f}{b[part]:>12.3f}{a[part] / b[part]:>8.2f}×")
        lines += ["", f"{'loss, mean of epoch':22}{'stock':>12}{'batchops':>12}{'difference':>14}"]
        for e, (x, y) in enumerate(zip(stock.epoch_losses(), ours.epoch_losses(), strict=True), 1):
            lines.append(f"{e:>22}{x:>12.6f}{y:>12.6f}{abs(x - y):>14.1e}")
        return "\n".join(lines)

    def plot(self, path: Path) -> None:
        import matplotlib

        matplotlib.use("Agg")
        import matplotlib.pyplot as plt

        stock, ours = self.stock, self.ours
        figure, (left, right) = plt.subplots(1, 2, figsize=(11, 4), width_ratios=(3, 2))
        for k, run in enumerate(self.all_stock[1:]):
            label = "stock, other seeds" if k == 0 else None
            steps = range(1, len(run.losses) + 1)
            left.plot(steps, run.losses, color="0.8", lw=0.8, label=label)
        steps = range(1, len(stock.losses) + 1)
        left.plot(steps, stock.losses, color="C0", lw=2.5, alpha=0.6, label="stock")
        left.plot(steps, ours.losses, color="C1", lw=1, label="batchops")
        left.set(
            xlabel="step", ylabel="training loss", yscale="log", title="Same seed, same losses"
        )
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
        self, options: argparse.Namespace, score: str, criteria: dict[str, dict[str, Any]]
    ) -> dict[str, Any]:
        """All of it for JSON; ``score`` is the key of the runs' scores."""

        def describe(run: Run) -> dict[str, Any]:
            return {
                "losses": run.losses,
                "epoch_losses": run.epoch_losses(),
                score: run.scores,
                "ms_per_step": run.milliseconds(),
            }

        a, b = self.stock.milliseconds(), self.ours.milliseconds()
        settings = {k: v for k, v in vars(options).items() if k != "out"}
        return {
            "settings": settings | {"threads": torch.get_num_threads()},
            "torch": torch.__version__,
            "batchops": batchops.__version__,
            "stock": describe(self.stock),
            "batchops_run": describe(self.ours),
            "stock_other_seeds": [describe(run) for run in self.all_stock[1:]],
            "ratio": {part: a[part] / b[part] for part in (*PARTS, "total")},
            "criteria": criteria,
        }


VERDICTS = {
    "start": f"first {STARTING_STEPS} losses: relative difference at most {{value:.1e}}, "
    "bound {bound:.0e}",
    "later": "epochs' losses: at most {value:.2f} spreads of stock apart, bound {bound:g}",
}


def verdict(criteria: dict[str, dict[str, Any]], texts: dict[str, str]) -> str:
    return "\n".join(
        f"{'ok  ' if criteria[name]['ok'] else 'FAIL'} {text.format(**criteria[name])}"
        for name, text in {**texts, **VERDICTS}.items()
    )


def largest(values: Iterable[float]) -> float:
    """The maximum, NaN when there is one (max() alone may step over it)."""
    return float(torch.tensor(list(values), dtype=torch.float64).max())


def parameter_groups(model: nn.Module, weight_decay: float) -> list[dict]:
    """Matrices and filters decay; biases and norms do not, and so LAMB does not adapt them."""
    decayed = [p for p in model.parameters() if p.dim() > 1]
    others = [p for p in model.parameters() if p.dim() <= 1]
    return [
        {"params": decayed, "weight_decay": weight_decay},
        {"params": others, "weight_decay": 0.0},
    ]


def parser_for(description: str, name: str, epochs: int, lr: float) -> argparse.ArgumentParser:
    """The options that every job has; ``name`` is that of its files."""
    parser = argparse.ArgumentParser(description=description)
    device = "cuda" if torch.cuda.is_available() else "cpu"
    parser.add_argument("--device", default=device, help=f"default here: {device}")
    parser.add_argument("--epochs", type=int, default=epochs)
    parser.add_argument("--lr", type=float, default=lr)
    parser.add_argument("--weight-decay", type=float, default=0.01)
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--threads", type=int, help="default: torch's own choice")
    parser.add_argument(
        "--out", type=Path, default=Path("out"), help=f"for {name}.png, {name}.json"
    )
    return parser


Criteria = dict[str, dict[str, Any]]


@dataclass
class Job:
    """What a job's program does with its options.

    name: of its files. training: makes a run of a side, options and seed. judge: the job's own
    criteria and those of Comparison.judge. texts: of the job's own. score: what Run.score is called
    in the table, and form: how it is shown; key: its name in JSON.
    """

    name: str
    training: Callable[[str, argparse.Namespace, int], Run]
    judge: Callable[[Comparison, argparse.Namespace], Criteria]
    texts: dict[str, str]
    score: str
    form: str
    key: str

    def main(self, parser: argparse.ArgumentParser, arguments: list[str] | None) -> int:
        options = parser.parse_args(arguments)
        if options.epochs < 1:
            parser.error(f"--epochs: expected 1 or more, got {options.epochs}")
        begin = time.perf_counter()
        if options.threads:
            torch.set_num_threads(options.threads)
        # Two runs can only be compared bit by bit if neither chooses its algorithms by the clock or
        # rounds the factors of its products.
        torch.backends.cudnn.benchmark = False
        torch.backends.cudnn.deterministic = True
        torch.backends.cudnn.allow_tf32 = False

        def make(side: str, seed: int) -> Run:
            return self.training(side, options, seed)

        comparison = Comparison.train(make, options.seed, options.epochs)
        criteria = self.judge(comparison, options)
        options.out.mkdir(parents=True, exist_ok=True)
        data = comparison.result(options, self.key, criteria)
        (options.out / f"{self.name}.json").write_text(json.dumps(data, indent=1) + "\n")
        comparison.plot(options.out / f"{self.name}.png")

        print(comparison.table(self.score, self.form))
        print()
        print(verdict(criteria, self.texts))
        files = ", ".join(f"{options.out}/{self.name}.{kind}" for kind in ("png", "json"))
        print(f"\nwritten: {files} ({time.perf_counter() - begin:.0f} s)")
        return 0 if all(c["ok"] for c in criteria.values()) else 1
