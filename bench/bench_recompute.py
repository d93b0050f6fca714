"""A training step whose norm outputs are rebuilt in the backward, against one that keeps them."""

from __future__ import annotations

import contextlib
import copy
from typing import Any

import pytest
import torch
from torch import nn

import batchops


class Bottleneck(nn.Module):
    """conv - norm - act, three times, and the shortcut; 4 wide outside."""

    def __init__(self, channels: int, norm: Any, act: Any) -> None:
        super().__init__()
        width = channels // 4

        def layer(inputs: int, outputs: int, size: int) -> list[nn.Module]:
            conv = nn.Conv2d(inputs, outputs, size, padding=size // 2, bias=False)
            return [conv, norm(outputs), act()]

        self.branch = nn.Sequential(
            *layer(channels, width, 1), *layer(width, width, 3), *layer(width, channels, 1)
        )

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return x + self.branch(x)


NETS = {
    "batch norm, relu": (nn.BatchNorm2d, nn.ReLU),
    "group norm, silu": (lambda channels: nn.GroupNorm(32, channels), nn.SiLU),
}


@pytest.mark.quick
@pytest.mark.parametrize("net", NETS)
def test_step_with_recompute(pair, device, net, monkeypatch):
    # The same bits twice are asked of all sides here.
    monkeypatch.setattr(torch.backends.cudnn, "deterministic", True)
    torch.manual_seed(0)
    stock = nn.Sequential(*(Bottleneck(256, *NETS[net]) for _ in range(3))).to(device)
    kept = batchops.convert(copy.deepcopy(stock))
    rebuilt = copy.deepcopy(kept)
    x = torch.randn(8, 256, 28, 28, device=device)

    def step(model: nn.Module, context: Any = contextlib.nullcontext) -> Any:
        parameters = list(model.parameters())

        def run() -> tuple[torch.Tensor, ...]:
            with context():
                loss = model(x).square().mean()
            return torch.autograd.grad(loss, parameters)

        return run

    expected = step(copy.deepcopy(kept))()

    def same_bits(gradients: Any, index: int) -> bool:
        return all(torch.equal(a, b) for a, b in zip(gradients, expected, strict=True))

    def close(gradients: Any, index: int) -> bool:
        # A value within a rounding of 0 may fall on relu's other side, and its gradient with it:
        # both stock and ours are 2e-3 from float64 here.
        pairs = zip(gradients, expected, strict=True)
        return all((a - b).norm() <= 1e-2 * b.norm() for a, b in pairs)

    pair(
        ours=step(rebuilt, batchops.recompute),
        peers={"torch": step(stock), "outputs kept": step(kept)},
        check=same_bits,
        peer_check=close,
        cached=True,  # a step writes far more than a cache holds
        op="training step with recompute",
        case={"net": net, "size": "(8, 256, 28, 28)"},
    )
