"""LAMB in float64 from the paper's formulas, in NumPy, and how far from it a result may be.

You et al. 2020, arXiv:1904.00962, algorithm 2, with bias correction as in Adam (Kingma and Ba 2015,
arXiv:1412.6980, algorithm 1). Shares neither code nor storage with batchops.
"""

from __future__ import annotations

import importlib.util
import sys
import types
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import numpy as np
import torch

from .reference import to_float64

MANTISSA_BITS = {torch.float32: 23, torch.float16: 10, torch.bfloat16: 7, torch.float64: 52}
SMALLEST_EXPONENT = {
    torch.float32: -126,
    torch.float16: -14,
    torch.bfloat16: -126,
    torch.float64: -1022,
}


def ulp(x: np.ndarray, dtype: torch.dtype) -> np.ndarray:
    """The distance between neighbours of `dtype` at |x|."""
    exponent = np.frexp(np.abs(x))[1] - 1
    exponent = np.maximum(np.where(x == 0, -5000, exponent), SMALLEST_EXPONENT[dtype])
    return np.ldexp(1.0, exponent - MANTISSA_BITS[dtype])


def last_places(dtype: torch.dtype) -> int:
    """How many ulp of its largest addend a moment may be off. What is stored as float64 has been
    computed in float64: some 16 roundings from the sums of squares to the moment."""
    return 16 if dtype == torch.float64 else 2


@dataclass
class Options:
    """timm's names and defaults."""

    lr: float = 1e-3
    betas: tuple[float, float] = (0.9, 0.999)
    eps: float = 1e-6
    weight_decay: float = 0.01
    bias_correction: bool = True
    grad_averaging: bool = True
    trust_clip: bool = False
    always_adapt: bool = False
    maximize: bool = False
    decoupled_decay: bool = False
    corrected_weight_decay: bool = False
    max_lr_snapshot: float | None = None
    caution: bool = False
    ratio_clamp: tuple[float, float] | None = None
    step_size_correction: bool = False
    eps_inside_sqrt: bool = False
    excluded: bool = False

    @property
    def decay_lr(self) -> float:
        """What multiplies weight_decay where it is decoupled."""
        return self.lr**2 / self.max_lr_snapshot if self.corrected_weight_decay else self.lr

    @property
    def clamp(self) -> tuple[float, float]:
        low, high = self.ratio_clamp or (0.0, np.inf)
        return low, min(high, 1.0) if self.trust_clip else high


@dataclass
class Tensor64:
    """One parameter with its state in logical order, all float64 or wider."""

    p: np.ndarray
    m: np.ndarray
    v: np.ndarray
    step: int = 0
    options: Options = field(default_factory=Options)
    moved: np.ndarray | None = None  # lr · r · u of the last step
    m_addend: np.ndarray | None = None  # the larger of |β1·m| and |β3·g|
    v_addend: np.ndarray | None = None
    g: np.ndarray | None = None  # of the last step, as the moments have taken it
    stats: tuple[float, float, float, float] | None = None  # ‖p‖, ‖grad‖, ‖u‖, r


def to_extended(t: torch.Tensor) -> np.ndarray:
    """As to_float64, with more places where the platform has them: what float64 is checked with.
    Not of millions of elements, which would take a second each."""
    values = to_float64(t)
    return values.astype(np.longdouble) if t.numel() <= 1 << 18 else values


def norm(x: np.ndarray) -> np.floating:
    """‖x‖ in x's dtype that neither overflows nor underflows."""
    largest = np.abs(x).max(initial=0.0)
    if largest == 0 or not np.isfinite(largest):
        return largest
    return largest * np.sqrt(np.square(x / largest).sum())


def clip_divisor(
    grads: list[np.ndarray], max_grad_norm: float | None, clip_eps: float = 0.0
) -> float:
    """C = max(1, (‖g‖_all + clip_eps) / max_grad_norm)."""
    if max_grad_norm is None:
        return 1.0
    return max(1.0, (norm(np.array([norm(g) for g in grads])) + clip_eps) / max_grad_norm)


def step(
    tensors: list[Tensor64],
    grads: list[np.ndarray | None],
    max_grad_norm: float | None = 1.0,
    clip_eps: float = 0.0,
) -> None:
    divisor = clip_divisor([g for g in grads if g is not None], max_grad_norm, clip_eps)
    for x, grad in zip(tensors, grads, strict=True):
        if grad is not None:
            _step_one(x, grad / divisor)
            x.stats = (x.stats[0], norm(grad), *x.stats[2:])


def _step_one(x: Tensor64, g: np.ndarray) -> None:
    o = x.options
    if o.maximize:
        g = -g
    x.step += 1
    beta1, beta2 = o.betas
    beta3 = 1 - beta1 if o.grad_averaging else 1.0
    x.m_addend = np.maximum(np.abs(beta1 * x.m), np.abs(beta3 * g))
    x.v_addend = np.maximum(beta2 * x.v, (1 - beta2) * g * g)
    x.m = beta1 * x.m + beta3 * g
    x.v = beta2 * x.v + (1 - beta2) * g * g
    x.g = g
    x.moved = update(x.p, x.m, x.v, x)
    x.p = x.p - x.moved


def update(p: np.ndarray, m: np.ndarray, v: np.ndarray, x: Tensor64) -> np.ndarray:
    """What goes off p, lr · r · u and a decoupled decay, with these p, m and v."""
    o = x.options
    beta1, beta2 = o.betas
    bc1 = 1 - beta1**x.step if o.bias_correction else 1.0
    bc2 = 1 - beta2**x.step if o.bias_correction else 1.0
    lr = o.lr
    if o.step_size_correction:
        lr, bc1, bc2 = lr * np.sqrt(bc2) / bc1, 1.0, 1.0
    root = np.sqrt(v / bc2 + o.eps) if o.eps_inside_sqrt else np.sqrt(v / bc2) + o.eps
    a = (m / bc1) / root
    if o.caution:
        mask = (np.sign(a) * np.sign(x.g) > 0).astype(np.float64)
        a = a * mask / max(mask.mean() if mask.size else 0.0, 1e-3)
    decayed = p
    u = a
    if o.decoupled_decay:
        decayed = p - o.decay_lr * o.weight_decay * p
    else:
        u = a + o.weight_decay * p
    ratio = 1.0
    p_norm, u_norm = norm(decayed), norm(u)
    adapted = (o.weight_decay != 0 or o.always_adapt) and not o.excluded
    if adapted and p_norm != 0 and u_norm != 0:
        ratio = np.clip(p_norm / u_norm, *o.clamp)
    x.stats = (norm(p), norm(x.g), u_norm, ratio)
    return (p - decayed) + lr * ratio * u


def assert_stepped(
    x: Tensor64, p0: np.ndarray, p: torch.Tensor, m: torch.Tensor, v: torch.Tensor, what: str
) -> None:
    """p, m and v agree with `x`, both one step on from `p0`.

    m and v: within last_places of their largest addend. p, in ulp of max(|p|, |lr·r·u|): within 2
    of the oracle's update from the m and v that are stored now; from end to end within 2 where the
    update is small beside p, and within 3 elsewhere. The difference is what rounding m and v to
    float32 does to u: half an ulp of m and a quarter of v's, each up to twice by the mantissas.
    """
    for name, got, want, addend in (("m", m, x.m, x.m_addend), ("v", v, x.v, x.v_addend)):
        error = np.abs(to_float64(got) - want) / ulp(addend, got.dtype)
        assert np.all(error <= last_places(got.dtype)), f"{what}: {name} off by {error.max()} ulp"
    moved = update(p0, to_float64(m), to_float64(v), x)
    small = np.abs(p0) >= 4 * np.abs(x.moved)
    for label, by, bound in (
        ("from the stored m and v", moved, 2),
        ("from end to end", x.moved, np.where(small, 2, 3)),
    ):
        scale = ulp(np.maximum(np.abs(p0), np.abs(by)), p.dtype)
        error = np.abs((to_float64(p) - p0) + by) / scale
        assert np.all(error <= bound), f"{what}: p {label} off by {error.max()} ulp"


def timm_optimizer(name: str) -> Any:
    """timm's Lamb or Lars without the rest of timm, which needs torchvision; or why it is
    missing."""
    module = f"timm.optim.{name.lower()}"
    if "timm.optim" not in sys.modules:
        try:
            spec = importlib.util.find_spec("timm")
        except (ImportError, ValueError):
            spec = None
        if spec is None or not spec.submodule_search_locations:
            return "timm is not installed"
        root = Path(spec.submodule_search_locations[0])
        for package, folder in (("timm", root), ("timm.optim", root / "optim")):
            sys.modules[package] = types.ModuleType(package)
            sys.modules[package].__path__ = [str(folder)]
    return getattr(importlib.import_module(module), name)
