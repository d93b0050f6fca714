"""How far the norms are from float64 as the mean grows against the standard deviation.

Errors are norm-wise, ‖got − exact‖ / ‖exact‖, of y, dx and dweight. float64 starts from what the
dtype holds; parameters are float32, so that dweight is not rounded to a low precision. In float32 a
variance formed as E[x²] − E[x]² is gone from a ratio of about 1e4 on, and a mean rounded to float32
alone costs 5e-4 of x̂ there.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from common import dtype_name

from batchops import functional as BF

EPS = 1e-5
GROUPS = 32
RATIOS = [1.0, 1e3, 1e4]

# A shape of each norm's speed grid, large enough for its sums to be long.
SHAPES = {
    "batch norm": (32, 64, 56, 56),
    "group norm": (8, 320, 32, 32),
    "layer norm": (1024, 4096),
}
Norm = Callable[[torch.Tensor, torch.Tensor, torch.Tensor], torch.Tensor]


def _sides(norm: str) -> dict[str, Norm]:
    if norm == "batch norm":
        return {
            "batchops": lambda x, w, b: BF.batch_norm(x, None, None, w, b, True, eps=EPS),
            "torch": lambda x, w, b: F.batch_norm(x, None, None, w, b, True, eps=EPS),
        }
    if norm == "group norm":
        return {
            "batchops": lambda x, w, b: BF.group_norm(x, GROUPS, w, b, EPS),
            "torch": lambda x, w, b: F.group_norm(x, GROUPS, w, b, EPS),
        }
    return {
        "batchops": lambda x, w, b: BF.layer_norm(x, w.shape, w, b, EPS),
        "torch": lambda x, w, b: F.layer_norm(x, w.shape, w, b, EPS),
    }


def _exact(norm: str, *tensors: torch.Tensor) -> list[torch.Tensor]:
    """y, dx and dweight in float64 by definition; autograd differentiates elementary operations."""
    x, weight, bias, dy = (t.detach().double() for t in tensors)
    x.requires_grad_()
    weight.requires_grad_()
    split = {
        "batch norm": (1, *x.shape),
        "group norm": (x.shape[0], GROUPS, -1),
        "layer norm": (x.shape[0], 1, -1),
    }[norm]
    axes = (1, 3, 4) if norm == "batch norm" else (2,)
    values = x.reshape(split)
    centred = values - values.mean(axes, keepdim=True)
    xhat = centred * (centred.square().mean(axes, keepdim=True) + EPS).rsqrt()
    wide = (-1, *[1] * (x.dim() - 2))
    y = xhat.reshape(x.shape) * weight.view(wide) + bias.view(wide)
    return [y.detach(), *torch.autograd.grad(y, (x, weight), dy)]


def _error(got: torch.Tensor, exact: torch.Tensor) -> float:
    return float((got.detach().double() - exact).norm() / exact.norm())


@pytest.mark.quick
@pytest.mark.parametrize("ratio", RATIOS, ids=lambda r: f"{r:g}")
@pytest.mark.parametrize("layout", ["contiguous", "channels_last"])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=dtype_name)
@pytest.mark.parametrize("norm", SHAPES)
def test_accuracy(
    norm: str,
    dtype: torch.dtype,
    layout: str,
    ratio: float,
    benchmark: Any,
    device: torch.device,
    accuracy: Callable[..., None],
) -> None:
    shape = SHAPES[norm]
    if len(shape) == 2 and layout == "channels_last":
        pytest.skip("rows have one layout")
    if dtype is torch.bfloat16 and ratio > 1e3:
        pytest.skip("bfloat16 holds no values of σ = 1 at 1e4")
    generator = torch.Generator(device).manual_seed(0)
    last = layout == "channels_last"
    memory_format = torch.channels_last if last else torch.contiguous_format

    def draw(*size: int) -> torch.Tensor:
        return torch.randn(*size, generator=generator, device=device)

    x = (draw(*shape) + ratio).to(dtype, memory_format=memory_format)
    dy = draw(*shape).to(dtype, memory_format=memory_format)
    weight, bias = draw(shape[1]).abs() + 0.5, draw(shape[1])
    exact = _exact(norm, x, weight, bias, dy)

    def errors(call: Norm) -> dict[str, float]:
        leaves = [t.clone().requires_grad_() for t in (x, weight)]
        y = call(*leaves, bias)
        got = [y, *torch.autograd.grad(y, leaves, dy)]
        return dict(zip(("y", "dx", "dweight"), map(_error, got, exact), strict=True))

    sides = _sides(norm)
    found = {name: errors(call) for name, call in sides.items()}
    benchmark.pedantic(lambda: errors(sides["batchops"]), rounds=1)
    case = {"norm": norm, "dtype": dtype_name(dtype), "layout": layout, "mean/σ": f"{ratio:g}"}
    accuracy(case, found)
