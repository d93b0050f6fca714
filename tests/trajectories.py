"""How far many steps of an optimizer end from the same steps in float64."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import numpy as np
import torch

from .reference import to_float64

SHAPES = [(64, 32), (64,)]
STEPS = 200


def check_drift(
    make: Callable[[list[torch.nn.Parameter], bool], Any],
    oracle: Callable[[Any], list[Any]],
    step: Callable[[list[Any], list[np.ndarray]], None],
) -> None:
    """After 200 steps ‖p - ref‖ / ‖ref - p0‖, fused and plain, is at most 1.5 times that of the
    reference's own formulas with parameters and state rounded to float32 after each step.

    make(params, fused) is the optimizer, oracle(optimizer) the reference's tensors for its present
    state, and step(tensors, grads) a step of the reference.
    """
    torch.manual_seed(17)
    start = [torch.randn(shape) * 0.1 for shape in SHAPES]
    optimizers = [
        make([torch.nn.Parameter(p.clone()) for p in start], fused) for fused in (True, False)
    ]
    exact, rounded = oracle(optimizers[0]), oracle(optimizers[0])
    for _ in range(STEPS):
        grads = [
            torch.randn(shape) * 0.05 + 0.01 * p for shape, p in zip(SHAPES, start, strict=True)
        ]
        for tensors in (exact, rounded):
            step(tensors, [to_float64(g) for g in grads])
        for x in rounded:
            for name in ("p", "m", "v"):
                if getattr(x, name, None) is not None:
                    single = getattr(x, name).astype(np.float32)
                    setattr(x, name, single.astype(np.float64))
        for optimizer in optimizers:
            for p, g in zip(optimizer.param_groups[0]["params"], grads, strict=True):
                p.grad = g
            optimizer.step()

    def drift(ends: list[np.ndarray]) -> float:
        return max(
            float(np.linalg.norm(end - x.p) / np.linalg.norm(x.p - to_float64(p0)))
            for end, x, p0 in zip(ends, exact, start, strict=True)
        )

    bound = 1.5 * drift([x.p for x in rounded])
    for optimizer, kind in zip(optimizers, ("fused", "plain"), strict=True):
        found = drift([to_float64(p) for p in optimizer.param_groups[0]["params"]])
        assert found <= bound, f"{kind}: {found:.2e}, expected at most {bound:.2e}"
