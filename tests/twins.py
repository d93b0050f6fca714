"""Two optimizers over the same values, of which one must not differ from the other by a bit."""

from __future__ import annotations

from collections.abc import Callable

import torch

# More than a GPU keeps on the chip (3.8 million elements on the largest), so that it reads again,
# what it keeps, and small ones.
LARGE = [(2000, 2101), (1000, 1000), *[(256,)] * 2000, (17, 4099)]


def check_twins(
    params: list[torch.nn.Parameter],
    make: Callable[[list[torch.nn.Parameter]], torch.optim.Optimizer],
    last_step: Callable[[torch.optim.Optimizer], None],
) -> None:
    """Three steps each, of which ``last_step`` makes the last of the one."""
    twins = [torch.nn.Parameter(p.detach().clone()) for p in params]
    for p, twin in zip(params, twins, strict=True):
        twin.grad = p.grad
    optimizer, other = make(params), make(twins)
    for k in range(3):
        last_step(optimizer) if k == 2 else optimizer.step()
        other.step()
    assert all(torch.equal(p, twin) for p, twin in zip(params, twins, strict=True))
