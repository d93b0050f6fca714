"""Batch norm's CUDA kernels on NumPy arrays: mirrors csrc/kernels/batch_norm.h."""

from __future__ import annotations

import ctypes
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass

import numpy as np

from ..reference import BatchNormReference
from . import build, emulator, norm
from .numbers import Numbers

KERNELS = [
    "csrc/kernels/cuda/batch_norm_forward.cu",
    "csrc/kernels/cuda/batch_norm_forward_resident.cu",
    "csrc/kernels/cuda/batch_norm_backward.cu",
    "csrc/kernels/cuda/batch_norm_backward_resident.cu",
]
API = ["batch_norm_api.cpp"]

LAYOUTS, forward, backward, run = norm.LAYOUTS, norm.forward, norm.backward, norm.run


class Shape(ctypes.Structure):
    _fields_ = (
        ("N", ctypes.c_int64),
        ("C", ctypes.c_int64),
        ("HxW", ctypes.c_int64),
        ("layout", ctypes.c_int32),
        ("dtype", ctypes.c_int32),
        ("param_dtype", ctypes.c_int32),
        ("running_dtype", ctypes.c_int32),
        ("activation", ctypes.c_int32),
        ("slope", ctypes.c_double),
        ("ghost", ctypes.c_int64),
    )


class Forward(ctypes.Structure):
    _fields_ = (
        ("shape", Shape),
        *((name, ctypes.c_void_p) for name in ("x", "residual", "weight", "bias")),
        *((name, ctypes.c_void_p) for name in ("y", "stats", "mask")),
        ("have_stats", ctypes.c_bool),
        *((name, ctypes.c_void_p) for name in ("running_mean", "running_var")),
        ("training", ctypes.c_bool),
        ("momentum", ctypes.c_double),
        ("eps", ctypes.c_double),
    )


class Backward(ctypes.Structure):
    _fields_ = (
        ("shape", Shape),
        *((name, ctypes.c_void_p) for name in ("dy", "x", "residual", "weight", "bias")),
        *((name, ctypes.c_void_p) for name in ("stats", "mask")),
        *((name, ctypes.c_void_p) for name in ("dx", "dresidual", "dweight", "dbias")),
        ("training", ctypes.c_bool),
    )


class GhostReference:
    """BatchNormReference of each ghost batch; running statistics of all samples together."""

    def __init__(self, p: Problem) -> None:
        self.parts, self.count = p.ghosts, min(s.stop - s.start for s in p.ghosts) * p.HxW
        whole = self._reference(p, slice(None))
        self.derivative, self.running = whole.derivative, whole.running
        self.each = [self._reference(p, part) for part in self.parts]
        self.y, self.z = (np.concatenate([getattr(e, n) for e in self.each]) for n in "yz")
        self.mean, self.rstd = (
            np.stack([getattr(e, n) for e in self.each]) for n in ("mean", "rstd")
        )

    @staticmethod
    def _reference(p: Problem, part: slice) -> BatchNormReference:
        residual = p.arrays["residual"][part] if p.residual else None
        fixed = () if p.training else (p.arrays["running_mean"], p.arrays["running_var"])
        return BatchNormReference(
            p.arrays["x"][part],
            p.arrays.get("weight"),
            p.arrays.get("bias"),
            residual,
            *fixed,
            eps=p.eps,
            act=p.activation,
        )

    def backward(self, dy: np.ndarray, derivative: np.ndarray) -> tuple[np.ndarray, ...]:
        found = [
            e.backward(dy[part], derivative[part])
            for e, part in zip(self.each, self.parts, strict=True)
        ]
        dx, dz, dweight, dbias = zip(*found, strict=True)
        return np.concatenate(dx), np.concatenate(dz), sum(dweight), sum(dbias)


@dataclass(kw_only=True)
class Problem(norm.Problem):
    operation = "batch_norm"
    structures = (Shape, Forward, Backward)

    running_dtype: str = "f32"
    running: bool = True
    training: bool = True
    ghost: int = 0  # samples that share statistics; 0: all
    momentum: float = 0.1

    def inputs(self, rng: np.random.Generator) -> dict[str, np.ndarray]:
        made = super().inputs(rng)
        numbers = Numbers(self.running_dtype)
        if self.running or not self.training:
            made["running_mean"] = numbers.rounded(self.mean + rng.standard_normal(self.C))
            made["running_var"] = numbers.rounded(rng.uniform(0.5, 2.0, self.C))
        return made

    @property
    def ghosts(self) -> list[slice]:
        """Samples that share statistics: what is left over is the last of them, except for a single
        value, which joins the ones before."""
        first = list(range(0, self.N, self.ghost)) if 0 < self.ghost < self.N else [0]
        if len(first) > 1 and (self.N - first[-1]) * self.HxW == 1:
            first.pop()
        return [slice(*pair) for pair in zip(first, [*first[1:], self.N], strict=True)]

    @property
    def statistics(self) -> int:
        return len(self.ghosts) * self.C

    def reference(self) -> BatchNormReference | GhostReference:
        whole = GhostReference(self)
        return whole if len(self.ghosts) > 1 else whole.each[0]

    def placed(self, name: str) -> tuple[str, int]:
        return (self.running_dtype, self.C) if name.startswith("running") else super().placed(name)


def load(library: ctypes.CDLL) -> ctypes.CDLL:
    return norm.load(library, Problem)


def library(instrument: bool = False) -> ctypes.CDLL:
    return load(build.library("batch_norm", KERNELS, API, instrument))


@dataclass(frozen=True)
class Device:
    """By what batch norm's kernels do there with the shapes of these tests."""

    multiprocessors: int
    shared: int = 227 * 1024  # bytes that a block may have
    compute: int = 9
    keep: bool = True  # on the chip what fits


DEVICES = {
    "Hopper": Device(2),  # one block, or a cluster
    "Turing": Device(5, 64 * 1024, 7),  # one block, or a team that meets in the workspace
    "Ampere": Device(5, 100 * 1024, 8),  # room for two blocks of every kernel
    "small": Device(2, 64 * 1024, 7),  # the same, with room for a part only of large tensors
    "streams": Device(2, keep=False),
}


RESIDENT = {  # and the registers that launch bounds allow
    "batch_norm_forward_resident": 128,
    "batch_norm_backward_resident": 128,
    "batch_norm_forward_flow": 80,
    "batch_norm_backward_flow": 80,
}


@contextmanager
def device(
    library: ctypes.CDLL,
    name: str,
    order: str = "forward",
    seed: int = 0,
    multiprocessors: int | None = None,
) -> Iterator[None]:
    """A device of this name, and a schedule."""
    known = DEVICES[name]
    library.emulator_set_device(ctypes.c_size_t(known.shared), known.compute)
    library.emulated_batch_norm_keep(known.keep)
    for kernel, registers in RESIDENT.items():
        library.emulator_set_registers(kernel.encode(), registers)
    try:
        with emulator.schedule(library, order, seed, multiprocessors or known.multiprocessors):
            yield
    finally:
        library.emulator_set_device(ctypes.c_size_t(Device.shared), Device.compute)
        library.emulated_batch_norm_keep(True)
        for kernel in RESIDENT:
            library.emulator_set_registers(kernel.encode(), 0)
