"""Batch norm's CUDA kernels on NumPy arrays: mirrors csrc/kernels/batch_norm.h."""

from __future__ import annotations

import ctypes
from dataclasses import dataclass

import numpy as np

from ..reference import BatchNormReference
from . import build, norm
from .numbers import Numbers

KERNELS = [
    "csrc/kernels/cuda/batch_norm_forward.cu",
    "csrc/kernels/cuda/batch_norm_backward.cu",
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


@dataclass(kw_only=True)
class Problem(norm.Problem):
    operation = "batch_norm"
    structures = (Shape, Forward, Backward)

    running_dtype: str = "f32"
    running: bool = True
    training: bool = True
    momentum: float = 0.1

    def inputs(self, rng: np.random.Generator) -> dict[str, np.ndarray]:
        made = super().inputs(rng)
        numbers = Numbers(self.running_dtype)
        if self.running or not self.training:
            made["running_mean"] = numbers.rounded(self.mean + rng.standard_normal(self.C))
            made["running_var"] = numbers.rounded(rng.uniform(0.5, 2.0, self.C))
        return made

    @property
    def statistics(self) -> int:
        return self.C

    def reference(self) -> BatchNormReference:
        names = ["x", "weight", "bias", "residual"]
        names += [] if self.training else ["running_mean", "running_var"]
        tensors = map(self.arrays.get, names)
        return BatchNormReference(*tensors, eps=self.eps, act=self.activation)

    def placed(self, name: str) -> tuple[str, int]:
        return (self.running_dtype, self.C) if name.startswith("running") else super().placed(name)


def load(library: ctypes.CDLL) -> ctypes.CDLL:
    return norm.load(library, Problem)


def library(instrument: bool = False) -> ctypes.CDLL:
    return load(build.library("batch_norm", KERNELS, API, instrument))
