"""Steps of an optimizer on a GPU that wait for nothing on it."""

from __future__ import annotations

from typing import Any

import torch


def check_nothing_is_read_back(
    optimizer_class: Any, params: list[torch.nn.Parameter], options: dict[str, Any]
) -> None:
    """With capturable, in eager steps and in a graph: the same as the plain form, whose lr follows
    the tensor's, and one step fewer for the one that found_inf skips."""
    twins = [torch.nn.Parameter(p.detach().clone()) for p in params]
    for p, twin in zip(params, twins, strict=True):
        twin.grad = p.grad
    first, last = options["lr"], 3 * options["lr"]
    lr, found_inf = torch.tensor(first, device="cuda"), torch.zeros((), device="cuda")
    plain = optimizer_class(twins, **options, fused=False)
    optimizer = optimizer_class(params, **(options | {"lr": lr}), capturable=True, fused=True)
    optimizer.grad_scale, optimizer.found_inf = torch.ones((), device="cuda"), found_inf
    optimizer.step()
    torch.cuda.set_sync_debug_mode("error")
    try:
        optimizer.step()
    finally:
        torch.cuda.set_sync_debug_mode("default")
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        optimizer.step()
    for skipped in (0.0, 1.0, 0.0):
        found_inf.fill_(skipped)
        graph.replay()
    lr.fill_(last)
    graph.replay()
    for step in range(5):
        plain.param_groups[0]["lr"] = last if step == 4 else first
        plain.step()
    for p, twin in zip(params, twins, strict=True):
        assert optimizer.state[p]["step"].item() == 5
        torch.testing.assert_close(p, twin, rtol=1e-6, atol=1e-6)
