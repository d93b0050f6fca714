"""``Normalize``: images from bytes to floats, in the pass that makes the batch."""

from __future__ import annotations

import math
from collections.abc import Sequence
from typing import Any

import numpy as np
import torch

from batchops import _C
from batchops.data._memory import shared_memory

_FLOATS = {torch.float32: "float32", torch.bfloat16: "bfloat16", torch.float16: "float16"}


def check_format(name: str, memory_format: torch.memory_format) -> None:
    if memory_format not in (torch.contiguous_format, torch.channels_last):
        raise ValueError(
            f"{name}: memory_format: expected torch.contiguous_format or torch.channels_last, got "
            f"{memory_format}"
        )


class Normalize:
    """y[n, c, h, w] = (x · scale − mean[c]) / std[c], for uint8 images x.

    mean, std: one for each channel, in units of x · scale; std ≠ 0. scale: 1/255 by default.
    layout: "HWC" or "CHW", of the samples: uint8 tensors or arrays, alike in shape. dtype: float32,
    bfloat16 or float16, computed as one fused multiply-add in float32 and rounded once.
    memory_format: of the batch (N, C, H, W): contiguous, or torch.channels_last.

    Called with a list of samples it gives the batch. Raises ValueError for other arguments and
    shapes, TypeError for other types.
    """

    def __init__(
        self,
        mean: Sequence[float],
        std: Sequence[float],
        *,
        scale: float = 1 / 255,
        layout: str = "HWC",
        dtype: torch.dtype = torch.float32,
        memory_format: torch.memory_format = torch.contiguous_format,
    ) -> None:
        self.mean = [float(m) for m in mean]
        self.std = [float(s) for s in std]
        self.scale = float(scale)
        if len(self.mean) != len(self.std) or not self.mean:
            raise ValueError(
                f"Normalize: expected as many means as standard deviations, at least one, got "
                f"{len(self.mean)} and {len(self.std)}"
            )
        if not all(map(math.isfinite, (*self.mean, *self.std, self.scale))) or 0 in self.std:
            raise ValueError(
                f"Normalize: expected finite numbers and std other than 0, got mean {self.mean}, "
                f"std {self.std}, scale {self.scale}"
            )
        if layout not in ("HWC", "CHW"):
            raise ValueError(f'Normalize: layout: expected "HWC" or "CHW", got {layout!r}')
        if dtype not in _FLOATS:
            raise ValueError(
                f"Normalize: dtype: expected float32, bfloat16 or float16, got {dtype}"
            )
        check_format("Normalize", memory_format)
        self.layout = layout
        self.dtype = dtype
        self.memory_format = memory_format
        # x · (scale / std) − mean / std, rounded to float32 once each.
        self._a = [self.scale / s for s in self.std]
        self._b = [-m / s for m, s in zip(self.mean, self.std, strict=True)]

    def __call__(self, samples: Sequence[Any], memory: Any = None) -> torch.Tensor:
        samples = list(samples)
        if not samples:
            raise ValueError("Normalize: expected at least one image, got none")
        first = samples[0]
        if isinstance(first, torch.Tensor):
            dense = [t.contiguous() if isinstance(t, torch.Tensor) else t for t in samples]
            read, is_bytes = _C.Samples.of_tensors(dense), first.dtype is torch.uint8
        elif isinstance(first, np.ndarray):
            dense = [np.ascontiguousarray(a) if isinstance(a, np.ndarray) else a for a in samples]
            read, is_bytes = _C.Samples.of_arrays(dense), first.dtype == np.uint8
        else:
            raise TypeError(f"Normalize: expected tensors or arrays, got {type(first).__name__}")
        channels = len(self.mean)
        axis = -1 if self.layout == "HWC" else 0
        if not is_bytes or first.ndim != 3 or first.shape[axis] != channels or read is None:
            self._refuse(samples)
        height, width = first.shape[:2] if self.layout == "HWC" else first.shape[1:]
        last = self.memory_format is torch.channels_last
        n = len(samples)
        shape = (n, height, width, channels) if last else (n, channels, height, width)
        memory = shared_memory() if memory is None else memory
        out = memory.empty(shape, self.dtype)
        read.normalize_to(
            out.data_ptr(),
            out.numel() * out.element_size(),
            channels,
            self.layout == "HWC",
            last,
            _FLOATS[self.dtype],
            self._a,
            self._b,
            torch.get_num_threads() - 1,
        )
        return out.permute(0, 3, 1, 2) if last else out

    def _refuse(self, samples: Sequence[Any]) -> None:
        c = len(self.mean)
        wanted = f"(H, W, {c})" if self.layout == "HWC" else f"({c}, H, W)"
        for position, sample in enumerate(samples):
            shape, dtype = getattr(sample, "shape", None), getattr(sample, "dtype", None)
            first = samples[0]
            alike = (type(sample), shape, dtype) == (type(first), first.shape, first.dtype)
            if not alike or position == len(samples) - 1:
                raise ValueError(
                    f"Normalize: expected uint8 images of shape {wanted}, alike and in host "
                    f"memory, got {type(sample).__name__} of shape {tuple(shape or ())}, {dtype} "
                    f"at position {position}; position 0 is of shape {tuple(first.shape)}"
                )

    def __repr__(self) -> str:
        return (
            f"Normalize(mean={self.mean}, std={self.std}, scale={self.scale}, "
            f"layout={self.layout!r}, dtype={self.dtype}, memory_format={self.memory_format})"
        )
