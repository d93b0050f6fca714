"""Checks of arguments that more than one part makes."""

from __future__ import annotations

import operator
from typing import Any


def as_integer(name: str, value: Any, least: int) -> int:
    """Whatever Python takes for an index, as an int; but no truth value, of any library."""
    if type(value) is int and value >= least:
        return value
    try:
        if isinstance(value, bool) or str(getattr(value, "dtype", "")) in ("bool", "torch.bool"):
            raise TypeError
        number = operator.index(value)
    except TypeError:
        number = least - 1
    if number < least:
        raise ValueError(f"{name}: expected an integer >= {least}, got {value!r}")
    return number
