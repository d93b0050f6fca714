"""Error bounds derived from dtype and reduction length, and how to measure against them."""

from __future__ import annotations

import math

import numpy as np
import torch

from .reference import to_float64

UNIT = {  # unit roundoff: half the distance from 1 to the next number
    torch.float64: 2.0**-53,
    torch.float32: 2.0**-24,
    torch.float16: 2.0**-11,
    torch.bfloat16: 2.0**-8,
}


def accumulation_dtype(dtype: torch.dtype) -> torch.dtype:
    return torch.float64 if dtype == torch.float64 else torch.float32


def elementwise(dtype: torch.dtype, length: int) -> float:
    """Relative to the largest magnitude in play: one rounding to ``dtype``, about eight in the
    accumulation type, and sums of ``length`` terms whose errors grow like the root of the longest
    run in one accumulator (at most 8192 here)."""
    run = math.sqrt(min(max(length, 1), 8192))
    return UNIT[dtype] + (8 + run) * UNIT[accumulation_dtype(dtype)]


def before_rounding(dtype: torch.dtype, length: int) -> float:
    """elementwise() of what is not yet rounded to ``dtype``."""
    return elementwise(accumulation_dtype(dtype), length)


def _wide(values: torch.Tensor | np.ndarray) -> np.ndarray:
    return to_float64(values) if isinstance(values, torch.Tensor) else values


def norm_error(got: torch.Tensor | np.ndarray, expected: np.ndarray) -> float:
    """‖got - expected‖ / ‖expected‖, the absolute norm where expected is all zero."""
    difference = np.linalg.norm(_wide(got) - expected)
    scale = np.linalg.norm(expected)
    return float(difference / scale) if scale > 0 else float(difference)


def assert_close(
    got: torch.Tensor | np.ndarray, expected: np.ndarray, bound: float, what: str = ""
) -> None:
    """Every element within ``bound`` times max(1, the largest expected magnitude)."""
    assert tuple(got.shape) == expected.shape, f"{what}: {tuple(got.shape)} != {expected.shape}"
    if expected.size == 0:
        return
    scale = max(1.0, float(np.abs(expected).max()))
    worst = float(np.abs(_wide(got) - expected).max())
    assert worst <= bound * scale, f"{what}: error {worst:.3e} > {bound:.3e} x {scale:.3e}"
