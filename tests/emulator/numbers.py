"""float64 to the bits of a narrower dtype and back; round to nearest, ties to even."""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np

_STORED = {"f64": np.float64, "f32": np.float32, "f16": np.float16, "bf16": np.uint16}


@dataclass(frozen=True)
class Numbers:
    dtype: str  # f64, f32, f16 or bf16

    @property
    def itemsize(self) -> int:
        return np.dtype(_STORED[self.dtype]).itemsize

    def encode(self, values: np.ndarray) -> np.ndarray:
        if self.dtype != "bf16":
            return values.astype(_STORED[self.dtype])
        bits = values.astype(np.float32).view(np.uint32)
        rounded = bits + 0x7FFF + (bits >> 16 & 1)
        quiet_nan = bits >> 16 | 0x40
        return np.where(np.isnan(values), quiet_nan, rounded >> 16).astype(np.uint16)

    def decode(self, stored: np.ndarray) -> np.ndarray:
        """float64 of `stored`, which may be the bytes."""
        stored = stored.view(_STORED[self.dtype])
        if self.dtype != "bf16":
            return stored.astype(np.float64)
        return (stored.astype(np.uint32) << 16).view(np.float32).astype(np.float64)

    def rounded(self, values: np.ndarray) -> np.ndarray:
        return self.decode(self.encode(values)).reshape(values.shape)
