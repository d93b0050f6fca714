"""Trains a residual network on handwritten digits twice, on stock torch and on batchops.

    python examples/digits.py            (or: make demo)

Both runs start from the same seed, see the same samples in the same order and differ in three
lines: nn.BatchNorm2d / batchops.convert, a plain LAMB / batchops.optim.LAMB, torch's DataLoader /
batchops.data.DataLoader. The data are the 1,797 digits of 8 × 8 pixels that scikit-learn brings.
How the times are taken, and what has to agree: see side_by_side.py.

Accepted (the exit code is 0) when both runs reach --min-accuracy on the 360 test images, and their
losses agree from the start and later.
"""

from __future__ import annotations

import argparse
import sys
from typing import Any

import torch
import torch.nn.functional as F
from digits_model import DigitNet
from plain_lamb import PlainLAMB
from side_by_side import Comparison, Job, Run, largest, parameter_groups, parser_for
from torch import Tensor
from torch.utils.data import TensorDataset

import batchops
import batchops.data
import batchops.optim

TEST_SIZE = 360


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


class Training(Run):
    """Model, optimizer and loader of either side."""

    def __init__(self, side: str, options: argparse.Namespace, seed: int) -> None:
        super().__init__(side, options)
        # The split belongs to the task: it is the same for all seeds.
        dataset, images, labels = load_digits(options.seed)
        self.test = images.to(self.device), labels.to(self.device)

        torch.manual_seed(seed)
        model = DigitNet()
        if self.ours:
            batchops.convert(model)
        self.model = model.to(self.device)
        optimizer = batchops.optim.LAMB if self.ours else PlainLAMB
        groups = parameter_groups(self.model, options.weight_decay)
        self.optimizer = optimizer(groups, lr=options.lr)
        loader = batchops.data.DataLoader if self.ours else torch.utils.data.DataLoader
        self.loader = loader(
            dataset,
            batch_size=options.batch_size,
            shuffle=True,
            drop_last=True,
            generator=torch.Generator().manual_seed(seed),
        )

    def loss(self, batch: Any) -> Tensor:
        images, labels = batch
        return F.cross_entropy(self.model(images), labels)

    def score(self) -> float:
        images, labels = self.test
        return float((self.model(images).argmax(dim=1) == labels).float().mean())


def judge(comparison: Comparison, min_accuracy: float) -> dict[str, dict[str, Any]]:
    worst = -largest(-run.scores[-1] for run in (comparison.stock, comparison.ours))
    accuracy = {"value": worst, "bound": min_accuracy, "ok": worst >= min_accuracy}
    return {"accuracy": accuracy, **comparison.judge()}


def main(arguments: list[str] | None = None) -> int:
    parser = parser_for(__doc__.splitlines()[0], "digits", epochs=10, lr=0.01)
    parser.add_argument("--batch-size", type=int, default=64)
    parser.add_argument("--min-accuracy", type=float, default=0.97)
    job = Job(
        name="digits",
        training=Training,
        judge=lambda comparison, options: judge(comparison, options.min_accuracy),
        texts={"accuracy": "lowest test accuracy {value:.2%}, expected at least {bound:.2%}"},
        score="test accuracy",
        form="{:.2%}",
        key="test_accuracy",
    )
    return job.main(parser, arguments)


if __name__ == "__main__":
    sys.exit(main())
