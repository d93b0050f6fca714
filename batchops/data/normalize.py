"""``Normalize``: images from bytes to floats, in the pass that makes the batch."""

from __future__ import annotations

import math
from collections.abc import Sequence
from typing import Any

import numpy as np
import torch

from batchops import _C
from batchops.data._memory import shared_memory
from batchops.data._source import (
    makes_tensors_on_cpu,
    native_may_stand_in,
    refuse_truncated_ones,
)

_FLOATS = {torch.float32: "float32", torch.bfloat16: "bfloat16", torch.float16: "float16"}


def check_format(name: str, memory_format: torch.memory_format | None) -> None:
    if memory_format not in (None, torch.contiguous_format, torch.channels_last):
        raise ValueError(
            f"{name}: memory_format: expected torch.contiguous_format or torch.channels_last, got "
            f"{memory_format}"
        )


def _kind(image: Any) -> Any:
    """What images of one batch have in common."""
    if isinstance(image, torch.Tensor):
        return (torch.Tensor, tuple(image.shape), image.dtype, image.layout, image.device)
    if isinstance(image, np.ndarray):
        return (np.ndarray, image.shape, image.dtype)
    return type(image)


def _describe(image: Any) -> str:
    if not isinstance(image, torch.Tensor | np.ndarray):
        return type(image).__name__
    text = f"{type(image).__name__} of shape {tuple(image.shape)}, {image.dtype}"
    if not isinstance(image, torch.Tensor) or (
        image.device.type == "cpu" and image.layout is torch.strided
    ):
        return text
    return f"{text}, {image.layout} on {image.device}"


class Normalize:
    """y[n, c, h, w] = (x · scale − mean[c]) / std[c], for uint8 images x.

    mean, std: one for each channel, in units of x · scale; std ≠ 0. scale: 1/255 by default.
    layout: "HWC" or "CHW", of the samples: uint8 tensors or arrays, alike in shape. dtype: float32,
    bfloat16 or float16, computed as one fused multiply-add in float32 and rounded once.
    memory_format: of the batch (N, C, H, W): contiguous, or torch.channels_last. Where dtype or
    memory_format is None, it is that of the call, a :class:`Collator`'s say, else float32 and
    contiguous.

    Called with a list of samples it gives the batch: natively for plain images in host memory, and
    by torch's operators, with the same numbers, for subclasses, images on other devices, and where
    a mode watches. Raises ValueError for other arguments and shapes, TypeError for other types,
    RuntimeError for a memmap whose file was truncated.
    """

    def __init__(
        self,
        mean: Sequence[float],
        std: Sequence[float],
        *,
        scale: float = 1 / 255,
        layout: str = "HWC",
        dtype: torch.dtype | None = None,
        memory_format: torch.memory_format | None = None,
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
        if dtype is not None and dtype not in _FLOATS:
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

    def __call__(
        self,
        samples: Sequence[Any],
        memory: Any = None,
        *,
        dtype: torch.dtype | None = None,
        memory_format: torch.memory_format | None = None,
    ) -> torch.Tensor:
        samples = list(samples)
        if not samples:
            raise ValueError("Normalize: expected at least one image, got none")
        first = samples[0]
        if not isinstance(first, torch.Tensor | np.ndarray):
            raise TypeError(f"Normalize: expected tensors or arrays, got {type(first).__name__}")
        axis = -1 if self.layout == "HWC" else 0
        is_bytes = first.dtype == (torch.uint8 if isinstance(first, torch.Tensor) else np.uint8)
        if not is_bytes or first.ndim != 3 or first.shape[axis] != len(self.mean):
            self._refuse(samples)
        dtype = self.dtype or dtype or torch.float32
        memory_format = self.memory_format or memory_format or torch.contiguous_format
        check_format("Normalize", memory_format)
        made = dtype if dtype in _FLOATS else torch.float32
        read = self._read(samples)
        if read is None:
            out = self._by_torch(samples, made, memory_format)
        else:
            out = self._natively(read, first.shape, made, memory_format, memory)
        return out if made is dtype else out.to(dtype)

    def _read(self, samples: list[Any]) -> _C.Samples | None:
        """The images where they lie, or copies that are dense; None where torch has to do it."""
        if not native_may_stand_in():
            return None
        if isinstance(samples[0], torch.Tensor):
            read = _C.Samples.of_tensors(samples)
            if read is None or read.dense:
                return read
            return _C.Samples.of_tensors([image.contiguous() for image in samples])
        if not makes_tensors_on_cpu():
            return None
        read = _C.Samples.of_arrays(samples)
        if read is not None and read.dense:
            refuse_truncated_ones(samples, read.mapped)
            return read
        if not all(isinstance(image, np.ndarray) for image in samples):
            return None
        refuse_truncated_ones(samples)
        return _C.Samples.of_arrays([np.ascontiguousarray(image) for image in samples])

    def _natively(
        self,
        read: _C.Samples,
        shape: Sequence[int],
        dtype: torch.dtype,
        memory_format: torch.memory_format,
        memory: Any,
    ) -> torch.Tensor:
        channels = len(self.mean)
        height, width = shape[:2] if self.layout == "HWC" else shape[1:]
        last = memory_format is torch.channels_last
        n = len(read)
        memory = shared_memory() if memory is None else memory
        out = memory.empty(
            (n, height, width, channels) if last else (n, channels, height, width), dtype
        )
        read.normalize_to(
            out.data_ptr(),
            out.numel() * out.element_size(),
            channels,
            self.layout == "HWC",
            last,
            _FLOATS[dtype],
            self._a,
            self._b,
            torch.get_num_threads() - 1,
        )
        return out.permute(0, 3, 1, 2) if last else out

    def _by_torch(
        self, samples: list[Any], dtype: torch.dtype, memory_format: torch.memory_format
    ) -> torch.Tensor:
        first = _kind(samples[0])
        if any(_kind(sample) != first for sample in samples):
            self._refuse(samples)
        if isinstance(samples[0], np.ndarray):
            refuse_truncated_ones(samples)
            samples = [torch.as_tensor(np.array(image, order="C")) for image in samples]
        elif samples[0].layout is not torch.strided:
            self._refuse(samples)
        images = torch.stack(samples)
        if self.layout == "HWC":
            images = images.permute(0, 3, 1, 2)
        levels = torch.tensor(self._levels(), dtype=torch.float32, device=images.device)
        channel = torch.arange(len(self.mean), device=images.device).view(-1, 1, 1)
        out = levels.to(dtype)[channel, images.long()]
        return out.contiguous(memory_format=memory_format)

    def _levels(self) -> list[list[float]]:
        """What each byte becomes in each channel, as native code computes it: no torch in here."""
        channels = len(self.mean)
        image = np.arange(256, dtype=np.uint8)[None].repeat(channels, 0)
        out = np.empty((channels, 256), np.float32)
        read = _C.Samples.of_arrays([image])
        read.normalize_to(
            out.ctypes.data, out.nbytes, channels, False, False, "float32", self._a, self._b, 0
        )
        return out.tolist()

    def _refuse(self, samples: Sequence[Any]) -> None:
        c = len(self.mean)
        wanted = f"(H, W, {c})" if self.layout == "HWC" else f"({c}, H, W)"
        first = _kind(samples[0])
        odd = next((k for k, sample in enumerate(samples) if _kind(sample) != first), None)
        beside = "" if odd is None else f" at position {odd}; position 0 is {_describe(samples[0])}"
        raise ValueError(
            f"Normalize: expected dense uint8 images of shape {wanted}, all alike, got "
            f"{_describe(samples[odd or 0])}{beside}"
        )

    def __repr__(self) -> str:
        return (
            f"Normalize(mean={self.mean}, std={self.std}, scale={self.scale}, "
            f"layout={self.layout!r}, dtype={self.dtype}, memory_format={self.memory_format})"
        )
