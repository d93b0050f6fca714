"""Batch norm's CUDA kernels on NumPy arrays: mirrors csrc/kernels/batch_norm.h."""

from __future__ import annotations

import ctypes
from dataclasses import dataclass, field

import numpy as np

from . import build, emulator
from .numbers import Numbers

KERNELS = [
    "csrc/kernels/cuda/batch_norm_forward.cu",
    "csrc/kernels/cuda/batch_norm_backward.cu",
]
API = ["batch_norm_api.cpp"]

DTYPES = {"f32": 0, "f16": 1, "bf16": 2, "f64": 3}
LAYOUTS = {"channels_first": 0, "channels_last": 1}
ACTIVATIONS = ("none", "relu", "leaky_relu", "silu", "gelu", "gelu_tanh", "hardswish")
MASKABLE = ("relu", "leaky_relu")  # a bit can stand for z


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
    )


class Forward(ctypes.Structure):
    _fields_ = (
        ("shape", Shape),
        *((name, ctypes.c_void_p) for name in ("x", "residual", "weight", "bias")),
        *((name, ctypes.c_void_p) for name in ("y", "stats", "mask")),
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


def load(library: ctypes.CDLL) -> ctypes.CDLL:
    """Declares the entry points and checks that the structures above match the header's."""
    for name in ("emulated_batch_norm_forward_workspace", "emulated_batch_norm_backward_workspace"):
        getattr(library, name).restype = ctypes.c_size_t
    library.emulated_size_of.restype = ctypes.c_size_t
    for which, structure in enumerate((Shape, Forward, Backward)):
        assert library.emulated_size_of(which) == ctypes.sizeof(structure), structure
    return library


def library(instrument: bool = False) -> ctypes.CDLL:
    return load(build.library("batch_norm", KERNELS, API, instrument))


@dataclass
class Problem:
    """One batch norm: sizes, dtypes and which of the optional inputs and outputs there are."""

    N: int
    C: int
    HxW: int
    layout: str = "channels_first"
    dtype: str = "f32"
    param_dtype: str = "f32"
    running_dtype: str = "f32"
    activation: str = "none"
    slope: float = 0.1
    residual: bool = False
    affine: bool = True
    running: bool = True
    wants_mask: bool = True  # where one can be had
    training: bool = True
    momentum: float = 0.1
    eps: float = 1e-5
    mean: float = 3.0  # of x
    std: float = 2.0
    misaligned: int = 0  # elements that big tensors start past a 64-byte boundary
    without: tuple[str, ...] = ()  # backward outputs not asked for
    seed: int = 0
    arrays: dict[str, np.ndarray] = field(default_factory=dict)

    def __post_init__(self) -> None:
        """float64 inputs, rounded to the dtype they are stored in; x is (N, C, HxW)."""
        rng = np.random.default_rng(self.seed)
        elements, params = Numbers(self.dtype), Numbers(self.param_dtype)
        running = Numbers(self.running_dtype)
        size = (self.N, self.C, self.HxW)
        made = {
            "x": elements.rounded(self.mean + self.std * rng.standard_normal(size)),
            "dy": elements.rounded(rng.standard_normal(size)),
        }
        if self.residual:
            made["residual"] = elements.rounded(rng.standard_normal(size))
        if self.affine:
            made["weight"] = params.rounded(rng.uniform(0.5, 1.5, self.C))
            made["bias"] = params.rounded(rng.standard_normal(self.C))
        if self.running or not self.training:
            made["running_mean"] = running.rounded(self.mean + rng.standard_normal(self.C))
            made["running_var"] = running.rounded(rng.uniform(0.5, 2.0, self.C))
        self.arrays = made | self.arrays

    @property
    def masked(self) -> bool:
        return self.residual and self.wants_mask and self.activation in MASKABLE

    @property
    def recomputed(self) -> bool:
        """Whether the backward makes z again, of x and the residual."""
        return self.activation != "none" and not self.masked

    @property
    def rows(self) -> tuple[int, int]:
        """How many rows of how many consecutive elements."""
        if self.layout == "channels_first":
            return self.N * self.C, self.HxW
        return self.N * self.HxW, self.C

    def shape(self) -> Shape:
        return Shape(
            self.N,
            self.C,
            self.HxW,
            LAYOUTS[self.layout],
            DTYPES[self.dtype],
            DTYPES[self.param_dtype],
            DTYPES[self.running_dtype],
            ACTIVATIONS.index(self.activation),
            self.slope,
        )

    def to_layout(self, logical: np.ndarray) -> np.ndarray:
        return logical if self.layout == "channels_first" else logical.transpose(0, 2, 1)

    def from_layout(self, flat: np.ndarray) -> np.ndarray:
        if self.layout == "channels_first":
            return flat.reshape(self.N, self.C, self.HxW)
        return flat.reshape(self.N, self.HxW, self.C).transpose(0, 2, 1)


class _Buffers:
    """Named memory for one call, and what was in it afterwards."""

    def __init__(self, problem: Problem) -> None:
        self.problem = problem
        self.memory: dict[str, tuple[emulator.Memory, Numbers]] = {}

    def tensor(self, name: str, dtype: str, size: int, value: np.ndarray | None = None) -> int:
        """Memory for `size` numbers: poison, or `value`."""
        numbers = Numbers(dtype)
        offset = self.problem.misaligned * numbers.itemsize if size > self.problem.C else 0
        memory = emulator.Memory(size * numbers.itemsize, offset, name)
        if value is not None:
            memory.bytes[:] = numbers.encode(np.ascontiguousarray(value).reshape(-1)).view(np.uint8)
        self.memory[name] = memory, numbers
        return memory.pointer

    def raw(self, name: str, nbytes: int, offset: int = 0) -> emulator.Memory:
        memory = emulator.Memory(nbytes, offset, name)
        self.memory[name] = memory, Numbers("f32")
        return memory

    def results(self, names: tuple[str, ...]) -> dict[str, np.ndarray]:
        """The bytes of `names`, after checking that nothing beside any buffer was written."""
        for name, (memory, _) in self.memory.items():
            assert memory.guards_intact(), f"{name}: written outside its bounds"
        return {name: self.memory[name][0].bytes.copy() for name in names if name in self.memory}


def forward(library: ctypes.CDLL, problem: Problem) -> dict[str, np.ndarray]:
    """y, stats, mask, running_mean, running_var as bytes."""
    p, given = problem, problem.arrays
    buffers = _Buffers(p)
    numel = p.N * p.C * p.HxW
    args = Forward(shape=p.shape(), training=p.training, momentum=p.momentum, eps=p.eps)
    args.x = buffers.tensor("x", p.dtype, numel, p.to_layout(given["x"]))
    args.y = buffers.tensor("y", p.dtype, numel)
    args.stats = buffers.tensor("stats", "f32", 3 * p.C)
    if p.residual:
        args.residual = buffers.tensor("residual", p.dtype, numel, p.to_layout(given["residual"]))
    for name, dtype in (
        ("weight", p.param_dtype),
        ("bias", p.param_dtype),
        ("running_mean", p.running_dtype),
        ("running_var", p.running_dtype),
    ):
        if name in given:
            setattr(args, name, buffers.tensor(name, dtype, p.C, given[name]))
    if p.masked:
        rows, row = p.rows
        args.mask = buffers.raw("mask", rows * -(-row // 8), offset=1).pointer
    size = library.emulated_batch_norm_forward_workspace(ctypes.byref(args.shape))
    emulator.call(
        library.emulated_batch_norm_forward,
        ctypes.byref(args),
        ctypes.c_void_p(buffers.raw("workspace", max(size, 16)).pointer),
    )
    return buffers.results(("y", "stats", "mask", "running_mean", "running_var"))


def backward(
    library: ctypes.CDLL, problem: Problem, saved: dict[str, np.ndarray]
) -> dict[str, np.ndarray]:
    """dx, dresidual, dweight, dbias as bytes, from the forward's stats and mask."""
    p, given = problem, problem.arrays
    buffers = _Buffers(p)
    numel = p.N * p.C * p.HxW
    args = Backward(shape=p.shape(), training=p.training)
    args.x = buffers.tensor("x", p.dtype, numel, p.to_layout(given["x"]))
    args.dy = buffers.tensor("dy", p.dtype, numel, p.to_layout(given["dy"]))
    args.stats = buffers.tensor("stats", "f32", 3 * p.C, saved["stats"].view(np.float32))
    if p.residual:
        args.residual = buffers.tensor("residual", p.dtype, numel, p.to_layout(given["residual"]))
    for name in ("weight", "bias"):
        if name in given:
            setattr(args, name, buffers.tensor(name, p.param_dtype, p.C, given[name]))
    if p.masked:
        memory = buffers.raw("mask", saved["mask"].size, offset=1)
        memory.bytes[:] = saved["mask"]
        args.mask = memory.pointer
    wanted = {"dx": numel, "dweight": p.C, "dbias": p.C}
    if p.activation != "none":
        wanted["dresidual"] = numel
    for name, size in wanted.items():
        if name not in p.without:
            dtype = p.dtype if size == numel and name.startswith(("dx", "dr")) else p.param_dtype
            setattr(args, name, buffers.tensor(name, dtype, size))
    size = library.emulated_batch_norm_backward_workspace(ctypes.byref(args.shape))
    emulator.call(
        library.emulated_batch_norm_backward,
        ctypes.byref(args),
        ctypes.c_void_p(buffers.raw("workspace", max(size, 16)).pointer),
    )
    return buffers.results(("dx", "dresidual", "dweight", "dbias"))
