"""Host microseconds a call on tensors so small that nothing but the call itself costs.

Blocks of thousands of calls alternate between the sides. The inputs are the same every time and in
the first-level cache on purpose.
"""

from __future__ import annotations

from typing import Any

import pytest
import torch
import torch.nn.functional as F
from common import close_to
from torch import nn

from batchops import functional as BF
from batchops import nn as bnn

N, C = 2, 8
BLOCK = 2000
EPS = 1e-5


def _forward_side(call: Any, x: torch.Tensor) -> Any:
    return lambda: call(x)


def _backward_side(call: Any, x: torch.Tensor, leaves: list[torch.Tensor], dy: torch.Tensor) -> Any:
    def both() -> tuple[torch.Tensor, ...]:
        y = call(x)
        return (y, *torch.autograd.grad(y, leaves, dy))

    return both


def _expected(x, weight, bias, dy, relu: bool, backward: bool) -> list[torch.Tensor]:
    """Per channel over all other axes: y and, with `backward`, dx, dweight, dbias; in float64."""
    axes = [d for d in range(x.dim()) if d != 1]
    x, dy = x.detach().double(), dy.double()
    w, b = (p.detach().double().view(1, C, *[1] * (x.dim() - 2)) for p in (weight, bias))
    mean = x.mean(axes, keepdim=True)
    rstd = 1 / ((x - mean).square().mean(axes, keepdim=True) + EPS).sqrt()
    x_hat = (x - mean) * rstd
    y = x_hat * w + b
    dz = dy * (y > 0) if relu else dy
    y = y.clamp(min=0) if relu else y
    if not backward:
        return [y]
    count = x.numel() // C
    s, p = dz.sum(axes, keepdim=True), (dz * x_hat).sum(axes, keepdim=True)
    dx = w * rstd * (dz - s / count - x_hat * p / count)
    return [y, dx, p.flatten(), s.flatten()]


@pytest.mark.parametrize("phase", ["forward", "forward + backward"])
@pytest.mark.parametrize("form", ["functional", "module"])
@pytest.mark.parametrize("variant", ["plain", pytest.param("relu", marks=pytest.mark.quick)])
@pytest.mark.parametrize("shape", [(N, C), (N, C, 4, 4)], ids=["1d", "2d"])
def test_overhead(pair, device, threads, shape, variant, form, phase):
    generator = torch.Generator(device).manual_seed(0)
    x = torch.randn(shape, generator=generator, device=device)
    # Two values a channel lie this far apart, so that 1/σ does not magnify roundings.
    x += torch.tensor([2.0, -2.0], device=device).view(N, *[1] * (len(shape) - 1))
    x.requires_grad_(True)
    dy = torch.randn(x.shape, generator=generator, device=device)
    relu = variant == "relu"
    activation = variant if relu else None

    if form == "module":
        name = "BatchNorm1d" if len(shape) == 2 else "BatchNorm2d"
        ours: Any = getattr(bnn, name)(C, EPS, activation=activation, device=device)
        stock: Any = getattr(nn, name)(C, EPS, device=device)
        if relu:
            stock = nn.Sequential(stock, nn.ReLU())
        ours_weight, ours_bias = ours.weight, ours.bias
        norm = stock[0] if relu else stock
        stock_weight, stock_bias = norm.weight, norm.bias
    else:
        mean, var = torch.zeros(C, device=device), torch.ones(C, device=device)
        weight = torch.ones(C, device=device, requires_grad=True)
        bias = torch.zeros(C, device=device, requires_grad=True)
        ours_weight = stock_weight = weight
        ours_bias = stock_bias = bias

        def ours(x: torch.Tensor) -> torch.Tensor:
            return BF.batch_norm(x, mean, var, weight, bias, True, 0.1, EPS, activation=activation)

        def stock(x: torch.Tensor) -> torch.Tensor:
            y = F.batch_norm(x, mean, var, weight, bias, True, 0.1, EPS)
            return F.relu(y) if relu else y

    backward = phase != "forward"
    if backward:
        sides = (
            _backward_side(ours, x, [x, ours_weight, ours_bias], dy),
            _backward_side(stock, x, [x, stock_weight, stock_bias], dy),
        )
    else:
        sides = (_forward_side(ours, x), _forward_side(stock, x))
    expected = _expected(x, ours_weight, ours_bias, dy, relu, backward)
    pair(
        ours=sides[0],
        peers={"torch": sides[1]},
        # Float32 rounding of values below 8 and of sums of 32 of them.
        check=close_to(lambda index: expected if backward else expected[0], 1e-5, 1e-5),
        calls=BLOCK,
        clock="host",
        cached=True,
        op=f"host overhead, {phase}",
        case={"call": f"{form} {variant}", "shape": "×".join(map(str, shape)), "dtype": "fp32"},
    )


@pytest.mark.quick
@pytest.mark.on_cuda
@pytest.mark.parametrize("variant", ["plain", "relu"])
@pytest.mark.parametrize("shape", [(N, C, 4, 4), (8, 32, 16, 16)], ids=["tiny", "small"])
def test_replay(pair, device, threads, shape, variant):
    """The device's time of a small forward with running statistics, replayed from a CUDA graph."""
    channels = shape[1]
    generator = torch.Generator(device).manual_seed(0)
    x = torch.randn(shape, generator=generator, device=device)
    mean, var = torch.zeros(channels, device=device), torch.ones(channels, device=device)
    weight, bias = torch.ones(channels, device=device), torch.zeros(channels, device=device)
    activation = "relu" if variant == "relu" else None

    def ours(index):
        return BF.batch_norm(x, mean, var, weight, bias, True, 0.1, EPS, activation=activation)

    def stock(index):
        y = F.batch_norm(x, mean, var, weight, bias, True, 0.1, EPS)
        return F.relu(y) if variant == "relu" else y

    axes = [0, 2, 3]
    exact = x.double()
    centred = exact - exact.mean(axes, keepdim=True)
    expected = centred / (centred.square().mean(axes, keepdim=True) + EPS).sqrt()
    expected = expected.clamp(min=0) if variant == "relu" else expected
    with torch.no_grad():
        pair(
            ours=ours,
            peers={"torch": stock},
            check=close_to(lambda index: expected, 1e-5, 1e-5),
            clock="graph",
            cached=True,
            op="replayed from a CUDA graph, forward",
            case={"call": variant, "shape": "×".join(map(str, shape)), "dtype": "fp32"},
        )
