"""Two optimizers over the same values, of which one must not differ from the other by a bit."""

from __future__ import annotations

from collections.abc import Callable

import torch

# What a GPU keeps on the chip, what it reads again, and small ones.
LARGE = [(3000, 3001), (1000, 1000), *[(256,)] * 2000, (17, 4099)]


def check_twins(
    params: list[torch.nn.Parameter],
    make: Callable[[list[torch.nn.Parameter]], torch.optim.Optimizer],
    assert_one_step: Callable[[torch.optim.Optimizer], None],
) -> None:
    twins = [torch.nn.Parameter(p.detach().clone()) for p in params]
    for p, twin in zip(params, twins, strict=True):
        twin.grad = p.grad
    optimizer, other = make(params), make(twins)
    for _ in range(3):
        assert_one_step(optimizer)
        other.step()
    assert all(torch.equal(p, twin) for p, twin in zip(params, twins, strict=True))
