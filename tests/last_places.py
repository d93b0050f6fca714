"""States whose step shows in p what is rounded on the way: p, g, m and v, and the options to use.

For LAMB and LARS, on every path.
"""

from __future__ import annotations

from typing import Any

import torch

State = dict[str, torch.Tensor]
Case = tuple[list[State], dict[str, Any]]


def decay_against_quotient(sizes: tuple[int, ...]) -> Case:
    """LAMB: u is a twentieth of either, and lr·r·λ above 1. Halved, m and v are exact."""
    options = {"lr": 0.3, "betas": (0.5, 0.5), "weight_decay": 0.5, "bias_correction": False}
    states = []
    for n in sizes:
        p, v = torch.randn(n) * 0.1, torch.rand(n) + 0.5
        m = -2 * 0.5 * p * (v / 2).sqrt() * (1 + 0.05 * torch.randn(n))
        states.append({"p": p, "g": m * 1e-30, "m": m, "v": v})
    return states, options


def decay_cancels(sizes: tuple[int, ...], left: float) -> Case:
    """LAMB: u is `left` of either, in gradients of m's own size, so that float's sums do not leave
    float's range. m stays as it is and v is exact: m has 10 binary digits, v a small multiple of
    m², and both are averaged with g = m."""
    options = {"lr": 1.0, "betas": (0.5, 0.5), "weight_decay": 0.5, "bias_correction": False}
    options["max_grad_norm"] = None
    states = []
    for n in sizes:
        m = torch.randint(512, 1024, (n,)) * (2.0 * torch.randint(0, 2, (n,)) - 1) / 1024
        times = 2.0 * torch.randint(0, 8, (n,)) + 1
        quotient = m.double() / ((times.double() + 1) / 2 * m.double() ** 2).sqrt()
        p = -quotient / 0.5 * (1 + left * torch.randn(n, dtype=torch.float64))
        states.append({"p": p.float(), "g": m.clone(), "m": m, "v": times * m**2})
    return states, options


def few_elements() -> Case:
    """LAMB: no error of an element averages out in the norm, and updates are as large as p."""
    states = []
    for n in (1, 2, 3, 100) * 25:
        state = {
            "p": torch.randn(n) * 0.1,
            "g": torch.randn(n) * 0.01,
            "m": torch.randn(n) * 0.01,
            "v": torch.rand(n) * 0.05,
        }
        if n == 100:  # one outweighs the others, which are updates alone
            state["p"].zero_()
            state["p"][0] = 0.1
            state["m"][0] *= 1e4
        states.append(state)
    return states, {"lr": 1.0, "weight_decay": 0.5}


def rate_between_floats(n: int) -> Case:
    """LARS: m's rounding counts most, right above a power of two; p's is right below the next, and
    lr is almost halfway between two floats."""
    options = {"lr": float(torch.tensor(1.99)) + 0.45 * 2.0**-23, "momentum": 0.9}
    m = -1 - torch.rand(n)
    g = -1 - 0.004 * torch.rand(n) - 0.9 * m
    return [{"p": 1.9 + 0.09 * torch.rand(n), "g": g, "m": m}], options
