"""Trains a byte predictor on functions of unequal length twice, on stock torch and on batchops.

    python examples/tokens.py                      padded batches
    python examples/tokens.py --layout packed      functions end to end

The data are the functions of Python's own standard library, as bytes: nothing is downloaded.
Batches are planned by a budget of tokens. Both runs start from the same seed, see the same batches
and differ in three places: nn.GroupNorm, nn.LayerNorm and their activations / batchops.convert, a
plain LAMB / batchops.optim.LAMB, torch's DataLoader with a collate function of pad_sequence or cat
/ batchops.data.DataLoader with a Collator. How the times are taken, and what has to agree: see
side_by_side.py.

Accepted (the exit code is 0) when both runs predict the test functions within --max-bits a byte,
and their losses agree from the start and later.
"""

from __future__ import annotations

import argparse
import ast
import functools
import math
import sys
import sysconfig
from pathlib import Path
from typing import Any

import torch
import torch.nn.functional as F
from plain_lamb import PlainLAMB
from side_by_side import Comparison, Job, Run, largest, parameter_groups, parser_for
from tokens_model import BYTES, BytePredictor
from torch import Tensor
from torch.nn.utils.rnn import pad_sequence

import batchops
import batchops.data
import batchops.optim

TEST_FUNCTIONS = 100
SHORTEST, LONGEST = 64, 1024  # bytes
KEYS = ("input_ids", "position_ids", "labels")
IGNORE = -100

Sample = dict[str, Tensor]


def functions_of(source: str) -> list[bytes]:
    """The top-level functions and methods in a module's source."""
    lines = source.splitlines(keepends=True)
    return [
        "".join(lines[node.lineno - 1 : node.end_lineno]).encode()
        for node in ast.walk(ast.parse(source))
        if isinstance(node, ast.FunctionDef)
    ]


@functools.cache
def load_functions(seed: int, count: int) -> tuple[list[Sample], list[Sample]]:
    """``count`` training samples and the test samples, ``{"input_ids": bytes as int64}``: a seeded
    choice and split."""
    found: list[bytes] = []
    for file in sorted(Path(sysconfig.get_path("stdlib")).glob("*.py")):
        try:
            found += functions_of(file.read_text(encoding="utf-8"))
        except (SyntaxError, UnicodeDecodeError):
            continue
    found = [f for f in dict.fromkeys(found) if SHORTEST <= len(f) <= LONGEST]
    wanted = count + TEST_FUNCTIONS
    if len(found) < wanted:
        raise SystemExit(
            f"tokens: expected at least {wanted} functions in Python's standard library, found "
            f"{len(found)}: its sources are not installed"
        )
    order = torch.randperm(len(found), generator=torch.Generator().manual_seed(seed))
    samples = [{"input_ids": torch.tensor(list(found[i]))} for i in order[:wanted].tolist()]
    return samples[TEST_FUNCTIONS:], samples[:TEST_FUNCTIONS]


def pad_stock(samples: list[Sample]) -> Sample:
    """What Collator(pad=...) gives, as one would write it with torch alone."""
    ids = [s["input_ids"] for s in samples]
    return {
        "input_ids": pad_sequence(ids, batch_first=True),
        "position_ids": pad_sequence([torch.arange(len(t)) for t in ids], batch_first=True),
        "labels": pad_sequence(ids, batch_first=True, padding_value=IGNORE),
    }


def pack_stock(samples: list[Sample]) -> Sample:
    """What Collator(pack=...) gives: the first byte of each function is predicted by nothing."""
    ids = [s["input_ids"] for s in samples]
    labels = [torch.cat([torch.tensor([IGNORE]), t[1:]]) for t in ids]
    return {
        "input_ids": torch.cat(ids),
        "position_ids": torch.cat([torch.arange(len(t)) for t in ids]),
        "labels": torch.cat(labels),
    }


def collator(layout: str) -> batchops.data.Collator:
    if layout == "packed":
        return batchops.data.Collator(pack=batchops.data.Pack(("input_ids",), labels="labels"))
    pad = batchops.data.Pad(
        {"input_ids": 0}, mask=None, position_ids="position_ids", labels="labels", ignore=IGNORE
    )
    return batchops.data.Collator(pad=pad)


class Training(Run):
    """Model, optimizer and loader of either side."""

    def __init__(self, side: str, options: argparse.Namespace, seed: int) -> None:
        super().__init__(side, options)
        samples, test = load_functions(options.seed, options.functions)
        self.test = self.to_device(pack_stock(test))

        torch.manual_seed(seed)
        model = BytePredictor()
        if self.ours:
            batchops.convert(model)
        self.model = model.to(self.device)
        optimizer = batchops.optim.LAMB if self.ours else PlainLAMB
        groups = parameter_groups(self.model, options.weight_decay)
        self.optimizer = optimizer(groups, lr=options.lr)

        packed = options.layout == "packed"
        self.batches = batchops.data.TokenBudgetBatchSampler(
            [len(s["input_ids"]) for s in samples], options.tokens, padded=not packed, seed=seed
        )
        if self.ours:
            self.loader = batchops.data.DataLoader(
                samples, batch_sampler=self.batches, collator=collator(options.layout)
            )
        else:
            self.loader = torch.utils.data.DataLoader(
                samples, batch_sampler=self.batches, collate_fn=pack_stock if packed else pad_stock
            )

    def epoch(self, *args: Any) -> None:
        self.batches.set_epoch(len(self.scores))
        super().epoch(*args)

    def to_device(self, batch: Any) -> Sample:
        return {key: batch[key].to(self.device) for key in KEYS}

    def loss(self, batch: Sample) -> Tensor:
        """Mean over the bytes that have one before them: position t predicts position t + 1."""
        logits = self.model(batch["input_ids"], batch["position_ids"])
        predicted, labels = logits[..., :-1, :], batch["labels"][..., 1:]
        return F.cross_entropy(
            predicted.reshape(-1, BYTES), labels.reshape(-1), ignore_index=IGNORE
        )

    def score(self) -> float:
        """Bits a byte over the test functions."""
        return float(self.loss(self.test)) / math.log(2)


def judge(comparison: Comparison, max_bits: float) -> dict[str, dict[str, Any]]:
    worst = largest(run.scores[-1] for run in (comparison.stock, comparison.ours))
    bits = {"value": worst, "bound": max_bits, "ok": worst <= max_bits}
    return {"bits": bits, **comparison.judge()}


def main(arguments: list[str] | None = None) -> int:
    parser = parser_for(__doc__.splitlines()[0], "tokens", epochs=6, lr=0.02)
    parser.add_argument("--layout", choices=("padded", "packed"), default="padded")
    parser.add_argument("--functions", type=int, default=600, help="to train on")
    parser.add_argument("--tokens", type=int, default=4096, help="budget of a batch")
    parser.add_argument("--max-bits", type=float, default=3.5)
    job = Job(
        name="tokens",
        training=Training,
        judge=lambda comparison, options: judge(comparison, options.max_bits),
        texts={"bits": "highest test bits a byte {value:.3f}, expected at most {bound:g}"},
        score="test bits a byte",
        form="{:.4f}",
        key="test_bits_per_byte",
    )
    return job.main(parser, arguments)


if __name__ == "__main__":
    sys.exit(main())
