"""Tensors of which this process has a part: torch's distributed tensors."""

from __future__ import annotations

import sys
from typing import Any


def is_sharded(t: Any) -> bool:
    """Whether ``t`` is a DTensor; without importing what defines it."""
    module = sys.modules.get("torch.distributed.tensor")
    kind = getattr(module, "DTensor", None)
    return kind is not None and isinstance(t, kind)
