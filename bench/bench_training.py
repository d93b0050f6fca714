"""Whole training steps on a GPU: ResNet-50, a stack of diffusion UNet blocks, and a loader's copies
behind the steps.

Steps run in bf16 autocast and channels_last, on data that are on the device already; ours is the
converted model, with and without `recompute`. Each side has parameters and an optimizer of its own.
"""

from __future__ import annotations

import contextlib
import copy
from collections.abc import Callable
from typing import Any

import pytest
import torch
from common import optional
from torch import nn
from torch.utils.data import DataLoader as TorchLoader
from torch.utils.data import TensorDataset

import batchops
from batchops.data import DataLoader
from batchops.optim import LARS

pytestmark = pytest.mark.on_cuda

# Tiny elsewhere: enough to see that it runs.
BATCH = {"cuda": 256, "cpu": 2}
IMAGE = {"cuda": 224, "cpu": 32}
LARS_OPTIONS = {"lr": 0.1, "momentum": 0.9, "weight_decay": 1e-4}
Step = Callable[[], torch.Tensor]


def _step(
    model: nn.Module,
    optimizer: torch.optim.Optimizer,
    loss_of: Callable[[nn.Module], torch.Tensor],
    device: torch.device,
    context: Callable[[], Any] = contextlib.nullcontext,
) -> Step:
    def step() -> torch.Tensor:
        optimizer.zero_grad(set_to_none=True)
        with torch.autocast(device.type, dtype=torch.bfloat16), context():
            loss = loss_of(model)
        loss.backward()
        optimizer.step()
        return loss.detach()

    return step


def _agrees_with(first: torch.Tensor) -> Callable[[torch.Tensor, int], None]:
    """The loss before the first step is that of the same model in float32, as bf16 allows."""

    def check(loss: torch.Tensor, _: int) -> None:
        assert torch.isfinite(loss), "the loss is not finite"
        error = abs(float(loss) - float(first))
        assert error <= 0.05 * max(1.0, abs(float(first))), (
            f"loss {float(loss)}, not {float(first)}"
        )

    return check


def _resnet50() -> nn.Module | str:
    for module, make in (
        ("timm", lambda timm: timm.create_model("resnet50")),
        ("torchvision.models", lambda models: models.resnet50()),
    ):
        found = optional(module)
        if not isinstance(found, str):
            return make(found)
    return "neither timm nor torchvision can be imported"


@pytest.mark.quick
def test_resnet50(pair: Any, device: torch.device) -> None:
    torch.manual_seed(0)
    model = _resnet50()
    if isinstance(model, str):
        pytest.skip(model)
    batch, size = BATCH[device.type], IMAGE[device.type]
    model = model.to(device, memory_format=torch.channels_last)
    images = torch.randn(batch, 3, size, size, device=device)
    images = images.contiguous(memory_format=torch.channels_last)
    labels = torch.randint(0, 1000, (batch,), device=device)

    def loss_of(model: nn.Module) -> torch.Tensor:
        return nn.functional.cross_entropy(model(images), labels)

    with torch.no_grad():
        expected = loss_of(copy.deepcopy(model))

    def side(converted: bool, context: Any = contextlib.nullcontext) -> Step:
        mine = copy.deepcopy(model)
        if converted:
            batchops.convert(mine)
            optimizer: Any = LARS(mine.parameters(), **LARS_OPTIONS)
        else:
            optimizer = torch.optim.SGD(mine.parameters(), **LARS_OPTIONS, fused=True)
        return _step(mine, optimizer, loss_of, device, context)

    pair(
        ours=side(True),
        peers={
            "torch, fused SGD": side(False),
            "with recompute": side(True, batchops.recompute),
        },
        check=_agrees_with(expected),
        items=batch,
        calls=1,
        memory=True,
        op="training step",
        case={"model": "ResNet-50, bf16 autocast, channels_last", "batch": batch},
    )


class _UNetBlock(nn.Module):
    """norm - SiLU - conv, twice, and the shortcut, as diffusion models have it."""

    def __init__(self, channels: int) -> None:
        super().__init__()
        self.norm1, self.norm2 = (nn.GroupNorm(32, channels) for _ in range(2))
        self.conv1, self.conv2 = (nn.Conv2d(channels, channels, 3, padding=1) for _ in range(2))
        self.act = nn.SiLU()

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        y = self.conv1(self.act(self.norm1(x)))
        return x + self.conv2(self.act(self.norm2(y)))


UNET = {"cuda": (16, 320, 64), "cpu": (1, 64, 8)}


@pytest.mark.quick
def test_unet_blocks(pair: Any, device: torch.device) -> None:
    torch.manual_seed(0)
    batch, channels, size = UNET[device.type]
    model = nn.Sequential(*(_UNetBlock(channels) for _ in range(8)))
    # torch's own backward of a bf16 group norm in channels_last ends the process on the CPU.
    last = torch.channels_last if device.type == "cuda" else torch.contiguous_format
    model = model.to(device, memory_format=last)
    x = torch.randn(batch, channels, size, size, device=device).contiguous(memory_format=last)

    def loss_of(model: nn.Module) -> torch.Tensor:
        return model(x).float().square().mean()

    with torch.no_grad():
        expected = loss_of(model)

    def side(converted: bool, context: Any = contextlib.nullcontext) -> Step:
        mine = copy.deepcopy(model)
        if converted:
            batchops.convert(mine)
        optimizer = torch.optim.AdamW(mine.parameters(), lr=1e-5, fused=True)
        return _step(mine, optimizer, loss_of, device, context)

    pair(
        ours=side(True),
        peers={"torch": side(False), "with recompute": side(True, batchops.recompute)},
        check=_agrees_with(expected),
        items=batch,
        calls=1,
        memory=True,
        op="training step",
        case={
            "model": "8 UNet blocks, bf16 autocast, channels_last",
            "batch": f"{batch}×{channels}×{size}×{size}",
        },
    )


# --- a loader's copies behind the steps ----------------------------------------------------------

STEP_SECONDS = 5e-3
LOADED = {
    "uint8 3×32×32": (512, (3, 32, 32), 64),
    "uint8 3×224×224": (256, (3, 224, 224), 12),
}


def _busy(device: torch.device) -> Callable[[], None]:
    """Keeps the device busy for STEP_SECONDS; elsewhere does nothing."""
    if device.type != "cuda":
        return lambda: None
    cycles = 10_000_000
    start, end = (torch.cuda.Event(enable_timing=True) for _ in range(2))
    for _ in range(2):  # the first warms up
        start.record()
        torch.cuda._sleep(cycles)
        end.record()
        end.synchronize()
    wanted = int(cycles * STEP_SECONDS * 1e3 / start.elapsed_time(end))
    return lambda: torch.cuda._sleep(wanted)


@pytest.mark.quick
@pytest.mark.parametrize("samples", LOADED)
def test_copies_behind_steps(pair: Any, device: torch.device, samples: str) -> None:
    """An epoch whose steps take 5 ms each; `steps alone` have no data. A peer's time over ours of 1
    for them says that the copies are hidden."""
    batch, shape, batches = LOADED[samples]
    if device.type == "cpu":
        batch, batches = 8, 3
    generator = torch.Generator().manual_seed(0)
    pixels = torch.randint(
        0, 256, (batch * batches, *shape), dtype=torch.uint8, generator=generator
    )
    dataset = TensorDataset(pixels)
    total = int(pixels.sum())
    busy = _busy(device)
    ours = DataLoader(dataset, batch, shuffle=True, device=device)
    pins = device.type == "cuda"
    stock = TorchLoader(dataset, batch, shuffle=True, pin_memory=pins)

    def epoch(loader: Any, move: bool) -> Callable[[], torch.Tensor]:
        def run() -> torch.Tensor:
            seen = torch.zeros((), dtype=torch.int64, device=device)
            for (x,) in loader:
                if move:
                    x = x.to(device, non_blocking=True)
                busy()
                seen += x.sum()
            return seen

        return run

    def alone() -> int:
        for _ in range(batches):
            busy()
        return total

    def check(seen: Any, _: int) -> None:
        assert int(seen) == total, f"samples whose sum is {int(seen)}, expected {total}"

    pair(
        ours=epoch(ours, move=False),
        peers={"torch": epoch(stock, move=True), "steps alone": alone},
        check=check,
        bytes_moved=None,
        items=batch * batches,
        calls=1,
        op="loader behind steps of 5 ms",
        case={"samples": samples, "batch": batch},
    )
