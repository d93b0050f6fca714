"""Tensors of which this process has a part: torch's distributed tensors."""

from __future__ import annotations

import sys
from typing import Any


def is_sharded(t: Any) -> bool:
    """Whether ``t`` is a DTensor; without importing what defines it."""
    module = sys.modules.get("torch.distributed.tensor")
    kind = getattr(module, "DTensor", None)
    return kind is not None and isinstance(t, kind)


def how_sharded(t: Any) -> str:
    """As what a parameter is not the whole of one tensor, or "" where it seems to be.

    FullyShardedDataParallel marks the parameters that it flattens. With ``use_orig_params`` such a
    one is a stretch of its rank's shard, in one dimension; where nothing is sharded (``NO_SHARD``,
    or one rank alone) it has the shape it had, which of one dimension does not tell.
    """
    if is_sharded(t):
        return "a DTensor"
    if getattr(t, "_is_flat_param", False):
        return "FSDP's FlatParameter, several tensors in one"
    if getattr(t, "_fsdp_flattened", False) and t.ndim <= 1 and not _one_rank():
        return "a stretch of FSDP's flat parameter (use_orig_params=True)"
    return ""


def _one_rank() -> bool:
    module = sys.modules.get("torch.distributed")
    return module is None or not module.is_initialized() or module.get_world_size() == 1
