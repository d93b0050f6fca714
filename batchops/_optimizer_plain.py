"""LAMB's and LARS' steps in torch operators, on float64 pieces: any dtype, layout and device.

No number is read back from a device: with ``capturable`` all of a step can be captured.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass
from typing import Any, NamedTuple

import torch
from torch import Tensor

# Elements that are turned into float64 at a time. On the CPU fewer than torch's grain of 32768:
# over more, each of some dozen operators a piece would fork torch's threads and wait for the last
# one, which on a busy machine takes ten times as long as the arithmetic.
_PIECE = {"cpu": (1 << 15) - 64}
_PIECE_ELSEWHERE = 1 << 22

Number = Any  # a float, or a 0-dim tensor on the parameter's device


@dataclass
class Member:
    """Where to find a parameter that takes the plain path, and what its last step has seen."""

    group: int
    position: int
    row: int
    excluded: bool
    name: str
    stats: Tensor | None = None


class Inputs(NamedTuple):
    """What a step is taken of."""

    p: Tensor
    state: dict[str, Any]
    group: dict[str, Any]
    excluded: bool


def wide(p: Tensor) -> torch.dtype:
    return torch.float32 if p.device.type == "mps" else torch.float64


def pieces(tensors: tuple[Tensor, ...]) -> Iterator[tuple[Tensor, ...]]:
    """Views of equal places in tensors of one size, of bounded size whatever the strides."""
    limit = _PIECE.get(tensors[0].device.type, _PIECE_ELSEWHERE)
    shape = tensors[0].shape
    if tensors[0].numel() <= limit:
        yield tensors
        return
    if all(t.is_contiguous() for t in tensors):
        yield from zip(*(t.view(-1).split(limit) for t in tensors), strict=True)
        return
    dim = max(range(len(shape)), key=lambda d: shape[d])
    size = max(1, shape[dim] * limit // tensors[0].numel())
    for views in zip(*(t.split(size, dim) for t in tensors), strict=True):
        yield from pieces(views)


def sum_of_squares(grad: Tensor) -> Tensor:
    return torch.stack([x.to(wide(x)).square().sum() for (x,) in pieces((grad,))]).sum()


def total(sums: list[Tensor], device: torch.device, dtype: torch.dtype) -> Tensor | None:
    if not sums:
        return None
    return torch.stack([s.to(device=device, dtype=dtype) for s in sums]).sum()


def divisor(
    p: Tensor, sum_sq: Tensor | None, bound: float, clip_eps: float, scale: Tensor | None
) -> Tensor:
    """What the gradient is divided by: the loss scale times the clip."""
    like = {"dtype": wide(p), "device": p.device}
    by = torch.ones((), **like) if scale is None else scale.to(**like).reshape(())
    if sum_sq is None:
        return by
    return by * ((sum_sq.sqrt() / by + clip_eps) / bound).clamp(min=1.0)


class _Step:
    """What both optimizers do around their formulas."""

    def __init__(self, inputs: Inputs, skip: Tensor | None) -> None:
        self.wide, self.home = wide(inputs.p), inputs.p.device
        step = inputs.state["step"]
        self.on_device = inputs.group["capturable"] and not step.is_cpu
        self.skip = None if skip is None else skip.to(self.home).reshape(()) != 0
        if self.skip is not None and not self.on_device:
            step.add_(0.0 if bool(self.skip) else 1.0)
        elif self.skip is not None:
            step.add_((~self.skip).to(step.dtype))
        else:
            step.add_(1)
        self.t = step.to(self.wide) if self.on_device else float(step)

    def number(self, value: Number) -> Number:
        if isinstance(value, Tensor) and self.on_device and not value.is_cpu:
            return value.to(device=self.home, dtype=self.wide).reshape(())
        return float(value)

    def store(self, to: Tensor, value: Tensor) -> None:
        to.copy_(value if self.skip is None else torch.where(self.skip, to.to(self.wide), value))

    def zero(self) -> Tensor:
        return torch.zeros((), dtype=self.wide, device=self.home)

    def seen(self, *norms: Tensor) -> Tensor:
        return torch.stack([norm.to(torch.float32) for norm in norms])


def lamb_step(
    inputs: Inputs,
    by: Tensor,
    scale: Tensor | None,
    numbers: tuple[Number, ...],
    skip: Tensor | None,
) -> Tensor:
    """One step; ‖p‖, ‖g‖, ‖u‖ and the ratio."""
    s = _Step(inputs, skip)
    p, entry, group, excluded = inputs
    grad = p.grad
    master = entry["master"] if group["master_weights"] and "master" in entry else p
    m, v = entry["exp_avg"], entry["exp_avg_sq"]
    lr, beta1, beta2, eps, decay, decay_lr, low, high = map(s.number, numbers)
    beta3 = 1 - beta1 if group["grad_averaging"] else 1.0
    bc1, bc2 = (1 - beta1**s.t, 1 - beta2**s.t) if group["bias_correction"] else (1.0, 1.0)
    if group["step_size_correction"]:
        lr, bc1, bc2 = lr * bc2**0.5 / bc1, 1.0, 1.0
    keep = 1 - decay_lr * decay if group["decoupled_decay"] else 1.0
    inner = 0.0 if group["decoupled_decay"] else decay
    caution = group["caution"]

    def gradient(g_i: Tensor) -> Tensor:
        g = g_i.to(s.wide) / by
        return -g if group["maximize"] else g

    def agrees(m_i: Tensor, g_i: Tensor) -> Tensor:
        # Not by both signs, since a NaN's is 0; not by m · g, which may underflow.
        return ~(m_i.to(s.wide) * gradient(g_i).sign() <= 0)

    def adam(m_i: Tensor, v_i: Tensor, g_i: Tensor) -> Tensor:
        root = v_i.to(s.wide) / bc2
        root = (root + eps).sqrt() if group["eps_inside_sqrt"] else root.sqrt() + eps
        a = (m_i.to(s.wide) / bc1) / root
        if caution:
            a = torch.where(agrees(m_i, g_i), a, 0.0)
        return a

    def swept() -> Iterator[tuple[Tensor, ...]]:
        return pieces((master, grad, m, v))

    g_sq, kept = s.zero(), s.zero()
    for _, g_i, m_i, v_i in swept():
        g = gradient(g_i)
        g_sq += g.square().sum()
        s.store(m_i, m_i.to(s.wide) * beta1 + g * beta3)
        s.store(v_i, v_i.to(s.wide) * beta2 + g.square() * (1 - beta2))
        if caution:
            kept += agrees(m_i, g_i).sum()
    boost = 1 / (kept / max(p.numel(), 1)).clamp(min=1e-3) if caution else 1.0

    p_sq, u_sq = s.zero(), s.zero()
    for p_i, g_i, m_i, v_i in swept():
        p_wide = p_i.to(s.wide)
        p_sq += p_wide.square().sum()
        u_sq += (adam(m_i, v_i, g_i) * boost + p_wide * inner).square().sum()
    p_norm, u_norm = p_sq.sqrt() * abs(keep), u_sq.sqrt()
    ratio = torch.ones_like(p_norm)
    if (decay != 0 or group["always_adapt"]) and not excluded:
        clamped = (p_norm / u_norm).clamp(min=low, max=high)
        ratio = torch.where((p_norm == 0) | (u_norm == 0), ratio, clamped)
    for p_i, g_i, m_i, v_i in swept():
        p_wide = p_i.to(s.wide)
        u = adam(m_i, v_i, g_i) * boost + p_wide * inner
        s.store(p_i, p_wide * keep - u * (ratio * lr))
    if master is not p:
        p.copy_(master)
    loss_scale = 1.0 if scale is None else scale.to(by).reshape(())
    return s.seen(p_sq.sqrt(), g_sq.sqrt() * by / loss_scale, u_norm, ratio)


def lars_step(
    inputs: Inputs,
    by: Tensor,
    scale: Tensor | None,
    numbers: tuple[Number, ...],
    skip: Tensor | None,
) -> Tensor:
    """One step; ‖p‖, ‖g‖, ‖u‖ and the ratio."""
    s = _Step(inputs, skip)
    p, entry, group, excluded = inputs
    grad = p.grad
    master = entry["master"] if group["master_weights"] and "master" in entry else p
    lr, momentum, dampening, decay, trust_coeff, eps, factor = map(s.number, numbers)
    adapted = (decay != 0 or group["always_adapt"]) and not excluded
    if excluded and group["exclude_decay"]:
        decay = 0.0
    m = entry["momentum_buffer"] if group["momentum"] != 0 else master

    def gradient(g_i: Tensor) -> Tensor:
        g = g_i.to(s.wide) / by
        return -g if group["maximize"] else g

    p_sq, g_sq, u_sq = s.zero(), s.zero(), s.zero()
    for p_i, g_i in pieces((master, grad)):
        p_wide, g = p_i.to(s.wide), gradient(g_i)
        p_sq += p_wide.square().sum()
        g_sq += g.square().sum()
        u_sq += (g + p_wide * decay).square().sum()
    p_norm, g_norm, u_norm = p_sq.sqrt(), g_sq.sqrt(), u_sq.sqrt()
    ratio = torch.ones_like(p_norm)
    kept_decay: Number = decay
    if adapted:
        zero = (p_norm == 0) | (g_norm == 0)
        trust = trust_coeff * p_norm / (g_norm + decay * p_norm + eps)
        trust = torch.where(zero, ratio, trust)
        if group["trust_clip"]:
            trust = (trust / lr).clamp(max=1.0)
        if group["zero_norm_plain"]:
            trust = torch.where(zero, ratio, trust)
            u_norm = torch.where(zero, g_norm, u_norm)
            kept_decay = torch.where(zero, 0.0, torch.ones_like(p_norm) * decay)
        ratio = trust

    inside, outside = (lr, 1.0) if group["lr_in_momentum"] else (1.0, lr)
    if s.on_device:
        # A skipped first step leaves t at 0, and stores nothing anyway.
        mu = torch.where(s.t <= 1, 0.0, torch.ones_like(s.t) * momentum * factor)
        weight = torch.where(s.t <= 1, 1.0, torch.ones_like(s.t) * (1 - dampening))
    else:
        mu, weight = (0.0, 1.0) if s.t <= 1 else (momentum * factor, 1 - dampening)
    for p_i, g_i, m_i in pieces((master, grad, m)):
        p_wide = p_i.to(s.wide)
        G = (gradient(g_i) + p_wide * kept_decay) * (ratio * inside)
        if group["momentum"] != 0:
            s.store(m_i, m_i.to(s.wide) * mu + G * weight)
            stored = m_i.to(s.wide)
            G = G + stored * momentum if group["nesterov"] else stored
        s.store(p_i, p_wide - G * outside)
    if master is not p:
        p.copy_(master)
    loss_scale = 1.0 if scale is None else scale.to(by).reshape(())
    return s.seen(p_norm, g_norm * by / loss_scale, u_norm, ratio)
