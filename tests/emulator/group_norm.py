"""Group norm's CUDA kernels on NumPy arrays: mirrors csrc/kernels/group_norm.h."""

from __future__ import annotations

import ctypes
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field

import numpy as np

from . import build, emulator
from .numbers import Numbers

KERNELS = [
    "csrc/kernels/cuda/group_norm_forward.cu",
    "csrc/kernels/cuda/group_norm_backward.cu",
]
API = ["group_norm_api.cpp"]

DTYPES = {"f32": 0, "f16": 1, "bf16": 2, "f64": 3}
LAYOUTS = {"channels_first": 0, "channels_last": 1}
ACTIVATIONS = ("none", "relu", "leaky_relu", "silu", "gelu", "gelu_tanh", "hardswish")
MASKABLE = ("relu", "leaky_relu")


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
        ("eps", ctypes.c_double),
    )


class Backward(ctypes.Structure):
    _fields_ = (
        ("shape", Shape),
        *((name, ctypes.c_void_p) for name in ("dy", "x", "residual", "weight", "bias")),
        *((name, ctypes.c_void_p) for name in ("stats", "mask")),
        *((name, ctypes.c_void_p) for name in ("dx", "dresidual", "dweight", "dbias")),
    )


def load(library: ctypes.CDLL) -> ctypes.CDLL:
    """Declares the entry points and checks that the structures above match the header's."""
    for name in ("emulated_group_norm_forward_workspace", "emulated_group_norm_backward_workspace"):
        getattr(library, name).restype = ctypes.c_size_t
    library.emulated_size_of.restype = ctypes.c_size_t
    for which, structure in enumerate((Shape, Forward, Backward)):
        assert library.emulated_size_of(which) == ctypes.sizeof(structure), structure
    return library


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


@dataclass
class Problem:
    """One group norm: sizes, dtypes and which of the optional inputs and outputs there are."""

    N: int
    C: int
    HxW: int
    G: int
    layout: str = "channels_first"
    dtype: str = "f32"
    param_dtype: str = "f32"
    activation: str = "none"
    slope: float = 0.1
    residual: bool = False
    affine: bool = True
    wants_mask: bool = True
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
        self.arrays = made | self.arrays

    @property
    def masked(self) -> bool:
        return self.residual and self.activation in MASKABLE and self.wants_mask

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
            self.G,
            LAYOUTS[self.layout],
            DTYPES[self.dtype],
            DTYPES[self.param_dtype],
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
        self.memory: dict[str, emulator.Memory] = {}

    def tensor(self, name: str, dtype: str, size: int, value: np.ndarray | None = None) -> int:
        """Memory for `size` numbers: poison, or `value`."""
        numbers = Numbers(dtype)
        big = name in ("x", "y", "dy", "residual", "dx", "dresidual")
        offset = self.problem.misaligned * numbers.itemsize if big else 0
        memory = self.raw(name, size * numbers.itemsize, offset)
        if value is not None:
            memory.bytes[:] = numbers.encode(np.ascontiguousarray(value).reshape(-1)).view(np.uint8)
        return memory.pointer

    def raw(self, name: str, nbytes: int, offset: int = 0) -> emulator.Memory:
        self.memory[name] = emulator.Memory(nbytes, offset, name)
        return self.memory[name]

    def results(self, names: tuple[str, ...]) -> dict[str, np.ndarray]:
        """The bytes of `names`, after checking that nothing beside any buffer was written."""
        for name, memory in self.memory.items():
            assert memory.guards_intact(), f"{name}: written outside its bounds"
        return {name: self.memory[name].bytes.copy() for name in names if name in self.memory}


def forward(library: ctypes.CDLL, problem: Problem) -> dict[str, np.ndarray]:
    """y, stats and mask as bytes."""
    p, given = problem, problem.arrays
    buffers = _Buffers(p)
    numel = p.N * p.C * p.HxW
    args = Forward(shape=p.shape(), eps=p.eps)
    args.x = buffers.tensor("x", p.dtype, numel, p.to_layout(given["x"]))
    args.y = buffers.tensor("y", p.dtype, numel)
    args.stats = buffers.tensor("stats", "f32", 3 * p.N * p.G)
    if p.residual:
        args.residual = buffers.tensor("residual", p.dtype, numel, p.to_layout(given["residual"]))
    for name in ("weight", "bias"):
        if name in given:
            setattr(args, name, buffers.tensor(name, p.param_dtype, p.C, given[name]))
    if p.masked:
        rows, row = p.rows
        args.mask = buffers.raw("mask", rows * -(-row // 8), offset=1).pointer
    size = library.emulated_group_norm_forward_workspace(ctypes.byref(args.shape))
    emulator.call(
        library.emulated_group_norm_forward,
        ctypes.byref(args),
        ctypes.c_void_p(buffers.raw("workspace", max(size, 16)).pointer),
    )
    return buffers.results(("y", "stats", "mask"))


def backward(
    library: ctypes.CDLL, problem: Problem, saved: dict[str, np.ndarray]
) -> dict[str, np.ndarray]:
    """dx, dresidual, dweight, dbias as bytes, from the forward's stats and mask."""
    p, given = problem, problem.arrays
    buffers = _Buffers(p)
    numel = p.N * p.C * p.HxW
    args = Backward(shape=p.shape())
    args.x = buffers.tensor("x", p.dtype, numel, p.to_layout(given["x"]))
    args.dy = buffers.tensor("dy", p.dtype, numel, p.to_layout(given["dy"]))
    args.stats = buffers.tensor("stats", "f32", 3 * p.N * p.G, saved["stats"].view(np.float32))
    for name in ("weight", "bias"):
        if name in given:
            setattr(args, name, buffers.tensor(name, p.param_dtype, p.C, given[name]))
    if p.masked:
        memory = buffers.raw("mask", saved["mask"].size, offset=1)
        memory.bytes[:] = saved["mask"]
        args.mask = memory.pointer
    elif p.residual:
        args.residual = buffers.tensor("residual", p.dtype, numel, p.to_layout(given["residual"]))
    wanted = {"dx": (p.dtype, numel)}
    if p.activation != "none":
        wanted["dresidual"] = (p.dtype, numel)
    wanted |= dict.fromkeys(("dweight", "dbias"), (p.param_dtype, p.C))
    for name, (dtype, size) in wanted.items():
        if name not in p.without:
            setattr(args, name, buffers.tensor(name, dtype, size))
    size = library.emulated_group_norm_backward_workspace(ctypes.byref(args.shape))
    emulator.call(
        library.emulated_group_norm_backward,
        ctypes.byref(args),
        ctypes.c_void_p(buffers.raw("workspace", max(size, 16)).pointer),
    )
    return buffers.results(("dx", "dresidual", "dweight", "dbias"))
