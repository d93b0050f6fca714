"""Group norm's CUDA kernels on NumPy arrays: mirrors csrc/kernels/group_norm.h."""

from __future__ import annotations

import ctypes
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass

from ..reference import GroupNormReference
from . import build, norm

KERNELS = [
    "csrc/kernels/cuda/group_norm_forward.cu",
    "csrc/kernels/cuda/group_norm_backward.cu",
]
API = ["group_norm_api.cpp"]

LAYOUTS, forward, backward, run = norm.LAYOUTS, norm.forward, norm.backward, norm.run


class Shape(ctypes.Structure):
    _fields_ = (
        *((name, ctypes.c_int64) for name in ("N", "C", "HxW", "G")),
        *((name, ctypes.c_int32) for name in ("layout", "dtype", "param_dtype", "activation")),
        ("slope", ctypes.c_double),
    )


class Forward(ctypes.Structure):
    _fields_ = (
        ("shape", Shape),
        *((name, ctypes.c_void_p) for name in ("x", "residual", "weight", "bias")),
        *((name, ctypes.c_void_p) for name in ("y", "stats", "mask")),
        ("have_stats", ctypes.c_bool),
        ("eps", ctypes.c_double),
    )


class Backward(ctypes.Structure):
    _fields_ = (
        ("shape", Shape),
        *((name, ctypes.c_void_p) for name in ("dy", "x", "residual", "weight", "bias")),
        *((name, ctypes.c_void_p) for name in ("stats", "mask")),
        *((name, ctypes.c_void_p) for name in ("dx", "dresidual", "dweight", "dbias")),
    )


@dataclass
class Problem(norm.Problem):
    operation = "group_norm"
    structures = (Shape, Forward, Backward)

    G: int

    @property
    def statistics(self) -> int:
        return self.N * self.G

    def reference(self) -> GroupNormReference:
        tensors = (self.arrays.get(name) for name in ("weight", "bias", "residual"))
        return GroupNormReference(
            self.arrays["x"], self.G, *tensors, eps=self.eps, act=self.activation
        )


def load(library: ctypes.CDLL) -> ctypes.CDLL:
    return norm.load(library, Problem)


def library(instrument: bool = False) -> ctypes.CDLL:
    return load(build.library("group_norm", KERNELS, API, instrument))


# Devices by what the kernels do there with the shapes of these tests: bytes of shared memory that a
# block may have, and the compute capability.
DEVICES = {
    "Hopper": (227 * 1024, 9),
    "small with clusters": (24 * 1024, 9),
    "small": (24 * 1024, 7),
}


@contextmanager
def device(library: ctypes.CDLL, name: str) -> Iterator[None]:
    shared, major = DEVICES[name]
    library.emulator_set_device(ctypes.c_size_t(shared), major)
    try:
        yield
    finally:
        library.emulator_set_device(ctypes.c_size_t(DEVICES["Hopper"][0]), DEVICES["Hopper"][1])
