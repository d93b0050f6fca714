"""LARS in float64 from the papers' formulas, in NumPy, and how far from it a result may be.

You et al. 2017, arXiv:1708.03888, algorithm 1; momentum correction from Goyal et al. 2017,
arXiv:1706.02677, remark 3. Shares neither code nor storage with batchops.
"""

from __future__ import annotations

from dataclasses import dataclass, field

import numpy as np
import torch

from .lamb_reference import clip_divisor, last_places, norm, ulp
from .reference import to_float64


@dataclass
class Options:
    lr: float = 1.0
    momentum: float = 0.0
    dampening: float = 0.0
    weight_decay: float = 0.0
    nesterov: bool = False
    trust_coeff: float = 1e-3
    eps: float = 1e-8
    trust_clip: bool = False
    always_adapt: bool = False
    exclude_decay: bool = False
    lr_in_momentum: bool = False
    momentum_correction: bool = False
    zero_norm_plain: bool = False
    maximize: bool = False
    excluded: bool = False
    last_lr: float | None = None


@dataclass
class Tensor64:
    p: np.ndarray
    m: np.ndarray
    step: int = 0
    options: Options = field(default_factory=Options)
    moved: np.ndarray | None = None
    addend: np.ndarray | None = None  # the largest of what `moved` is the sum of
    m_addend: np.ndarray | None = None
    stats: tuple[float, float, float, float] | None = None


def step(
    tensors: list[Tensor64], grads: list[np.ndarray | None], max_grad_norm: float | None = None
) -> None:
    divisor = clip_divisor([g for g in grads if g is not None], max_grad_norm)
    for x, grad in zip(tensors, grads, strict=True):
        if grad is not None:
            _step_one(x, grad / divisor, norm(grad))


def _step_one(x: Tensor64, g: np.ndarray, grad_norm: float) -> None:
    o = x.options
    if o.maximize:
        g = -g
    x.step += 1
    decay = 0.0 if o.excluded and o.exclude_decay else o.weight_decay
    p_norm, g_norm = norm(x.p), norm(g)
    local = 1.0
    if (o.weight_decay != 0 or o.always_adapt) and not o.excluded:
        if p_norm != 0 and g_norm != 0:
            local = o.trust_coeff * p_norm / (g_norm + decay * p_norm + o.eps)
        elif o.zero_norm_plain:
            decay = 0.0
        if o.trust_clip and not (o.zero_norm_plain and (p_norm == 0 or g_norm == 0)):
            local = min(local / o.lr, 1.0)
    x.stats = (p_norm, grad_norm, norm(g + decay * x.p), local)
    G = local * (g + decay * x.p)
    if o.lr_in_momentum:
        G = o.lr * G
    rate = 1.0 if o.lr_in_momentum else o.lr
    if o.momentum == 0:
        x.moved = rate * G
        x.addend = np.abs(x.moved)
    else:
        mu = o.momentum
        if o.momentum_correction and o.last_lr:
            mu = mu * o.lr / o.last_lr
        fresh = G if x.step == 1 else (1 - o.dampening) * G
        kept = np.zeros_like(x.m) if x.step == 1 else mu * x.m
        x.m_addend = np.maximum(np.abs(kept), np.abs(fresh))
        x.m = kept + fresh
        x.moved = rate * (G + o.momentum * x.m if o.nesterov else x.m)
        x.addend = np.maximum(np.abs(x.moved), rate * np.maximum(np.abs(G), np.abs(x.m)))
    x.p = x.p - x.moved


def assert_stepped(
    x: Tensor64, p0: np.ndarray, p: torch.Tensor, m: torch.Tensor | None, what: str
) -> None:
    """m within last_places of its largest addend, p within 2 ulp of the larger of |p| and the
    update's largest addend."""
    if m is not None:
        error = np.abs(to_float64(m) - x.m) / ulp(np.maximum(x.m_addend, np.abs(x.m)), m.dtype)
        assert np.all(error <= last_places(m.dtype)), f"{what}: m off by {error.max()} ulp"
    scale = ulp(np.maximum(np.abs(p0), x.addend), p.dtype)
    error = np.abs(to_float64(p) - x.p) / scale
    assert np.all(error <= 2), f"{what}: p off by {error.max()} ulp"
