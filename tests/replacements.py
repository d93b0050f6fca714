"""What may be put in the place of an optimizer's tensors between two steps."""

from __future__ import annotations

from collections.abc import Iterator

import torch


def replacements(optimizer: torch.optim.Optimizer, moment: str) -> Iterator[None]:
    """Steps are to be taken first and at each turn; `moment` names the state that is replaced."""
    params = [p for group in optimizer.param_groups for p in group["params"]]
    yield
    for p in params:  # new gradient tensors
        p.grad = torch.randn_like(p) * 0.02
    yield
    for p in params:  # a backward makes its own
        p.grad = None
    sum((p.sin() * 0.01).sum() for p in params).backward()
    yield
    for p in params:  # new storages under the same Parameter objects
        p.data = p.detach() * 1.5
    yield
    for p in params:  # new storages under the same gradient objects
        p.grad.data = torch.randn_like(p) * 0.01
    yield
    for p in params:  # new storages under the same state tensors
        optimizer.state[p][moment].data = torch.randn_like(p) * 1e-3
    yield
    for p in params:  # new state tensors in the same dicts
        optimizer.state[p][moment] = torch.randn_like(p) * 1e-3
        optimizer.state[p]["step"] = torch.tensor(100.0)
    yield
    for p in params:  # new dicts
        optimizer.state[p] = {k: v.clone() for k, v in optimizer.state[p].items()}
    yield
    with torch.no_grad():  # values changed in place
        optimizer.state[params[0]][moment].mul_(2)
        params[1].fill_(0.5)
    yield
    for p in params:  # states that are gone: the first step again
        del optimizer.state[p]
    yield
