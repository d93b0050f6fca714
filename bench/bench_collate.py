"""A list of samples to a batch: against torch's own way, and the best that torch's operators allow.

The tuned peers write into a buffer that is used again, and read samples as plainly as torch can;
the default ones are what a collate function in the wild does. Samples lie in several sets of memory
that together exceed the caches; a call is one batch. The floor counts one read and one write.
"""

from __future__ import annotations

import random
from collections.abc import Callable
from typing import Any

import numpy as np
import pytest
import torch
from common import equal_to, rotating
from torch.nn.utils.rnn import pad_sequence
from torch.utils.data import default_collate

from batchops import data

OP = "collate"


@pytest.fixture(autouse=True)
def _on_cpu(device: torch.device) -> None:
    if device.type != "cpu":
        pytest.skip("batches are collated in host memory")


def _images(n: int, dtype: torch.dtype, shape: tuple[int, ...]) -> Callable[[int], list[Any]]:
    def make(seed: int) -> list[torch.Tensor]:
        g = torch.Generator().manual_seed(seed)
        base = torch.randint(0, 256, (n, *shape), dtype=torch.uint8, generator=g).to(dtype)
        return [image.clone() for image in base]

    return make


def _bytes(samples: list[Any]) -> int:
    return sum(s.nbytes for s in samples)


@pytest.mark.quick
def test_stack_float32(pair: Any, threads: int, device: torch.device) -> None:
    make = _images(64, torch.float32, (3, 224, 224))
    sets = rotating(make, 64 * 3 * 224 * 224 * 4, device)
    out = torch.empty(64, 3, 224, 224)
    out.fill_(0)
    pair(
        lambda i: data.collate(sets[i]),
        {
            "torch": lambda i: default_collate(sets[i]),
            "torch out=": lambda i: torch.stack(sets[i], out=out),
        },
        check=equal_to(lambda i: torch.stack(sets[i])),
        bytes_moved=2 * _bytes(sets[0]),
        items=64,
        rotate=len(sets),
        op=OP,
        case={"samples": "64 × float32 3×224×224"},
    )


@pytest.mark.quick
def test_stack_arrays(pair: Any, threads: int, device: torch.device) -> None:
    tensors = _images(256, torch.uint8, (224, 224, 3))
    sets = rotating(lambda i: [t.numpy() for t in tensors(i)], 256 * 224 * 224 * 3, device)
    out = torch.empty(256, 224, 224, 3, dtype=torch.uint8)
    out.fill_(0)
    pair(
        lambda i: data.collate(sets[i]),
        {
            "torch": lambda i: default_collate(sets[i]),
            "torch out=": lambda i: torch.stack([torch.from_numpy(a) for a in sets[i]], out=out),
        },
        check=equal_to(lambda i: torch.from_numpy(np.stack(sets[i]))),
        bytes_moved=2 * _bytes(sets[0]),
        items=256,
        rotate=len(sets),
        op=OP,
        case={"samples": "256 × uint8 224×224×3, NumPy"},
    )


@pytest.mark.quick
def test_dicts(pair: Any, threads: int, device: torch.device) -> None:
    def make(seed: int) -> list[Any]:
        g = torch.Generator().manual_seed(seed)
        return [
            {
                "x": torch.randn(64, generator=g),
                "y": torch.randn(16, generator=g),
                "z": torch.tensor(k),
            }
            for k in range(256)
        ]

    sets = [make(seed) for seed in range(64)]
    pair(
        lambda i: data.collate(sets[i]),
        {"torch": lambda i: default_collate(sets[i])},
        check=equal_to(lambda i: {k: torch.stack([d[k] for d in sets[i]]) for k in "xyz"}),
        items=256,
        rotate=len(sets),
        op=OP,
        case={"samples": "256 × dict of 3 tensors"},
    )


def _sequences(seed: int) -> list[torch.Tensor]:
    rng = random.Random(seed)
    g = torch.Generator().manual_seed(seed)
    return [torch.randint(0, 30_000, (rng.randrange(50, 513),), generator=g) for _ in range(256)]


def _hugging_face(features: list[dict[str, Any]]) -> dict[str, torch.Tensor]:
    """What a tokenizer's pad and DataCollatorWithPadding do, list by list."""
    width = max(len(f["input_ids"]) for f in features)
    batch: dict[str, list[Any]] = {"input_ids": [], "attention_mask": []}
    for feature in features:
        ids = list(feature["input_ids"])
        missing = width - len(ids)
        batch["input_ids"].append(ids + [0] * missing)
        batch["attention_mask"].append([1] * len(ids) + [0] * missing)
    return {key: torch.tensor(value) for key, value in batch.items()}


def _by_hand(sequences: list[torch.Tensor]) -> dict[str, torch.Tensor]:
    ids = pad_sequence(sequences, batch_first=True)
    lengths = torch.tensor([len(s) for s in sequences])
    mask = (torch.arange(ids.shape[1])[None] < lengths[:, None]).long()
    return {"input_ids": ids, "attention_mask": mask}


class _Reused:
    """The most that torch's operators allow: buffers used again, one call for each row's copy."""

    def __init__(self) -> None:
        self.ids = torch.zeros(256 * 512, dtype=torch.int64)
        self.mask = torch.zeros(256 * 512, dtype=torch.int64)
        self.steps = torch.arange(512)[None]

    def __call__(self, sequences: list[torch.Tensor]) -> dict[str, torch.Tensor]:
        lengths = torch.tensor([len(s) for s in sequences])
        width = int(lengths.max())
        ids = self.ids[: 256 * width].view(256, width)
        mask = self.mask[: 256 * width].view(256, width)
        flat = torch.cat(sequences)
        torch.lt(self.steps[:, :width], lengths[:, None], out=mask)
        ids.zero_()
        ids.masked_scatter_(mask.bool(), flat)
        return {"input_ids": ids, "attention_mask": mask}


class _ReusedRows(_Reused):
    def __call__(self, sequences: list[torch.Tensor]) -> dict[str, torch.Tensor]:
        lengths = [len(s) for s in sequences]
        width = max(lengths)
        ids = self.ids[: 256 * width].view(256, width)
        mask = self.mask[: 256 * width].view(256, width)
        ids.zero_()
        torch._foreach_copy_([row[:n] for row, n in zip(ids, lengths, strict=True)], sequences)
        torch.lt(self.steps[:, :width], torch.tensor(lengths)[:, None], out=mask)
        return {"input_ids": ids, "attention_mask": mask}


@pytest.mark.quick
def test_pad(pair: Any, threads: int, device: torch.device) -> None:
    sets = rotating(_sequences, 256 * 281 * 8, device)
    features = [[{"input_ids": s.tolist()} for s in sequences] for sequences in sets[:4]]

    def ours(i: int) -> dict[str, torch.Tensor]:
        padded = data.pad(sets[i])
        return {"input_ids": padded.values, "attention_mask": padded.mask}

    reused, rows = _Reused(), _ReusedRows()
    width = max(map(len, sets[0]))
    pair(
        ours,
        {
            "torch pad_sequence": lambda i: _by_hand(sets[i]),
            "torch out=, one scatter": lambda i: reused(sets[i]),
            "torch out=, rows": lambda i: rows(sets[i]),
            "Hugging Face (transcribed)": lambda i: _hugging_face(features[i % 4]),
        },
        check=equal_to(lambda i: _by_hand(sets[i])),
        bytes_moved=_bytes(sets[0]) + 2 * 8 * 256 * width,
        items=256,
        rotate=len(sets),
        op="pad with mask",
        case={"samples": "256 sequences of 50 to 512, int64"},
    )


MEAN, STD = [0.485, 0.456, 0.406], [0.229, 0.224, 0.225]


def _to_tensor_and_normalize(image: torch.Tensor) -> torch.Tensor:
    """torchvision's ToTensor and Normalize, operator by operator, for one image."""
    x = image.permute(2, 0, 1).contiguous().to(torch.float32).div(255)
    mean, std = (torch.tensor(v).view(-1, 1, 1) for v in (MEAN, STD))
    return x.clone().sub_(mean).div_(std)


@pytest.mark.quick
def test_normalize(pair: Any, threads: int, device: torch.device) -> None:
    make = _images(64, torch.uint8, (224, 224, 3))
    sets = rotating(make, 64 * 224 * 224 * 3, device)
    normalize = data.Normalize(MEAN, STD)
    stacked = torch.zeros(64, 224, 224, 3, dtype=torch.uint8)
    out = torch.zeros(64, 3, 224, 224)
    a = torch.tensor([1 / 255 / s for s in STD]).view(1, 3, 1, 1)
    b = torch.tensor([-m / s for m, s in zip(MEAN, STD, strict=True)]).view(1, 3, 1, 1)

    def tuned(i: int) -> torch.Tensor:
        torch.stack(sets[i], out=stacked)
        out.copy_(stacked.permute(0, 3, 1, 2))
        return out.mul_(a).add_(b)

    def reference(i: int) -> torch.Tensor:
        return torch.stack([_to_tensor_and_normalize(image) for image in sets[i]])

    def check(output: torch.Tensor, i: int) -> None:
        torch.testing.assert_close(output, reference(i), rtol=0, atol=2e-6)

    pair(
        lambda i: normalize(sets[i]),
        {"torch": reference, "torch out=": tuned},
        check=check,
        bytes_moved=5 * _bytes(sets[0]),
        items=64,
        rotate=len(sets),
        op="normalize",
        case={"samples": "64 × uint8 224×224×3 to float32 3×224×224"},
    )


@pytest.mark.quick
def test_plan(pair: Any, device: torch.device) -> None:
    """Ten million lengths into batches of a token budget, on one thread."""
    pair.threads = 1
    lengths = np.random.default_rng(0).integers(1, 2000, 10_000_000)
    epoch = iter(range(1 << 30))
    sampler = data.TokenBudgetBatchSampler(lengths, 16_384)

    def plan() -> int:
        sampler.set_epoch(next(epoch))
        return len(sampler)

    def check(count: int, index: int) -> None:
        assert count >= lengths.sum() // 16_384

    pair(
        plan,
        {},
        check=check,
        items=len(lengths),
        clock="host",
        calls=1,
        op="token-budget plan",
        case={"samples": "10,000,000 lengths of 1 to 1999, budget 16,384"},
    )
