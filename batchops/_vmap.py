"""Rules of ``torch.vmap`` for the norms' operators: one call for each example."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any

import torch
from torch import Tensor

from . import _binding  # noqa: F401  (registers the operators)

__all__ = ["register"]

_ops = torch.ops.batchops


def _stacked(parts: Sequence[Tensor | None]) -> tuple[Tensor | None, int | None]:
    """Outputs that nobody wanted are None in every call."""
    if parts[0] is None:
        return None, None
    return torch.stack([part for part in parts if part is not None]), 0


def _rule(op: Any) -> Callable[..., Any]:
    arguments = op._schema.arguments
    written = [(i, a.name) for i, a in enumerate(arguments) if a.alias_info is not None]

    def rule(info: Any, in_dims: tuple[Any, ...], *args: Any) -> Any:
        # torch's words, so that what matches on them goes on working
        for i, name in written:
            if in_dims[i] is None:
                raise RuntimeError(
                    "Batch norm got a batched tensor as input while the running_mean or "
                    "running_var, which will be updated in place, were not batched: "
                    f"{name} is shared by all examples of vmap. Give each example running "
                    "statistics of its own, None for both, or use eval mode"
                )
        if info.batch_size == 0:
            raise RuntimeError(f"{op}: vmap over a dimension of size 0 is not supported")
        calls = [
            op(
                *(
                    arg.select(dim, i) if isinstance(dim, int) else arg
                    for arg, dim in zip(args, in_dims, strict=True)
                )
            )
            for i in range(info.batch_size)
        ]
        if isinstance(calls[0], Tensor):
            return _stacked(calls)
        outputs, out_dims = zip(*map(_stacked, zip(*calls, strict=True)), strict=True)
        return outputs, out_dims

    return rule


def register() -> None:
    """For each operator: torch's own way for those without a rule warns, and updates nothing."""
    for op in (
        _ops.batch_norm,
        _ops.batch_norm_update,
        _ops.batch_norm_eval,
        _ops.batch_norm_apply,
        _ops.batch_norm_backward,
        _ops.group_norm,
        _ops.group_norm_apply,
        _ops.group_norm_backward,
        _ops.instance_norm,
        _ops.instance_norm_update,
        _ops.layer_norm,
        _ops.activation,
    ):
        torch.library.register_vmap(op.default, _rule(op.default))
