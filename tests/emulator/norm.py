"""What the norms' CUDA kernels share when they run on NumPy arrays: problems, memory and calls."""

from __future__ import annotations

import ctypes
from dataclasses import KW_ONLY, dataclass, field
from typing import ClassVar

import numpy as np

from ..reference import ACTIVATIONS, MASKABLE, NormReference
from . import emulator
from .numbers import Numbers

# The numbers of csrc/kernels/common.h.
DTYPES = {"f32": 0, "f16": 1, "bf16": 2, "f64": 3}
LAYOUTS = {"channels_first": 0, "channels_last": 1}
NUMBERS = DTYPES | LAYOUTS | {name: number for number, name in enumerate(ACTIVATIONS)}

BIG = ("x", "y", "dy", "residual", "dx", "dresidual")  # (N, C, HxW)


@dataclass
class Problem:
    """One norm: sizes, dtypes and which of the optional inputs and outputs there are.

    `structures` are the header's Shape, Forward and Backward. What they hold beside pointers is
    taken from the fields of the same names here.
    """

    operation: ClassVar[str]
    structures: ClassVar[tuple[type[ctypes.Structure], ...]]

    N: int
    C: int
    HxW: int
    _: KW_ONLY
    layout: str = "channels_first"
    dtype: str = "f32"
    param_dtype: str = "f32"
    activation: str = "none"
    slope: float = 0.1
    residual: bool = False
    affine: bool = True
    wants_mask: bool = True  # where one can be had
    eps: float = 1e-5
    mean: float = 3.0  # of x
    std: float = 2.0
    misaligned: int = 0  # elements past a 64-byte boundary, of these:
    misaligned_tensors: tuple[str, ...] = (*BIG, "stats")
    without: tuple[str, ...] = ()  # backward outputs not asked for
    known_stats: np.ndarray | None = None  # what a first forward wrote: then y alone comes out
    seed: int = 0
    arrays: dict[str, np.ndarray] = field(default_factory=dict)

    def __post_init__(self) -> None:
        self.arrays = self.inputs(np.random.default_rng(self.seed)) | self.arrays

    def inputs(self, rng: np.random.Generator) -> dict[str, np.ndarray]:
        """float64, rounded to the dtype they are stored in; x is (N, C, HxW)."""
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
        return made

    @property
    def have_stats(self) -> bool:
        return self.known_stats is not None

    @property
    def masked(self) -> bool:
        return self.residual and self.wants_mask and self.activation in MASKABLE

    @property
    def recomputed(self) -> bool:
        """Whether the backward makes z again, of x and the residual."""
        return self.activation != "none" and not self.masked

    @property
    def statistics(self) -> int:
        """How many means there are."""
        raise NotImplementedError

    def reference(self) -> NormReference:
        raise NotImplementedError

    @property
    def rows(self) -> tuple[int, int]:
        """How many rows of how many consecutive elements."""
        if self.layout == "channels_first":
            return self.N * self.C, self.HxW
        return self.N * self.HxW, self.C

    def placed(self, name: str) -> tuple[str, int]:
        """dtype and size of a tensor."""
        if name in BIG:
            return self.dtype, self.N * self.C * self.HxW
        return ("f32", 3 * self.statistics) if name == "stats" else (self.param_dtype, self.C)

    def to_layout(self, logical: np.ndarray) -> np.ndarray:
        return logical if self.layout == "channels_first" else logical.transpose(0, 2, 1)

    def from_layout(self, flat: np.ndarray) -> np.ndarray:
        if self.layout == "channels_first":
            return flat.reshape(self.N, self.C, self.HxW)
        return flat.reshape(self.N, self.HxW, self.C).transpose(0, 2, 1)


def load(library: ctypes.CDLL, problem: type[Problem]) -> ctypes.CDLL:
    """Declares the entry points and checks that the structures match the header's."""
    for direction in ("forward", "backward"):
        workspace = f"emulated_{problem.operation}_{direction}_workspace"
        getattr(library, workspace).restype = ctypes.c_size_t
    library.emulated_size_of.restype = ctypes.c_size_t
    for which, structure in enumerate(problem.structures):
        assert library.emulated_size_of(which) == ctypes.sizeof(structure), structure
    return library


def _filled(structure: type[ctypes.Structure], problem: Problem) -> ctypes.Structure:
    """`structure` with all but its pointers."""

    def value(name: str, kind: type) -> object:
        if issubclass(kind, ctypes.Structure):
            return _filled(kind, problem)
        given = getattr(problem, name)
        return NUMBERS[given] if isinstance(given, str) else given

    plain = [field for field in structure._fields_ if field[1] is not ctypes.c_void_p]
    return structure(**{name: value(name, kind) for name, kind in plain})


class _Call:
    """Arguments, the memory they point to, and what is in it afterwards."""

    def __init__(self, problem: Problem, structure: type[ctypes.Structure]) -> None:
        self.problem, self.args = problem, _filled(structure, problem)
        self.memory: dict[str, emulator.Memory] = {}

    def tensor(self, name: str, value: np.ndarray | None = None) -> None:
        """Memory for the tensor `name`: poison, or `value`."""
        p = self.problem
        dtype, size = p.placed(name)
        numbers = Numbers(dtype)
        offset = p.misaligned * numbers.itemsize if name in p.misaligned_tensors else 0
        memory = self.raw(name, size * numbers.itemsize, offset)
        if value is not None:
            value = np.ascontiguousarray(p.to_layout(value) if name in BIG else value)
            memory.bytes[:] = numbers.encode(value.reshape(-1)).view(np.uint8)

    def raw(self, name: str, nbytes: int, offset: int = 0) -> emulator.Memory:
        memory = self.memory[name] = emulator.Memory(nbytes, offset, name)
        setattr(self.args, name, memory.pointer)
        return memory

    def run(
        self, library: ctypes.CDLL, direction: str, outputs: tuple[str, ...]
    ) -> dict[str, np.ndarray]:
        """The bytes of `outputs`, after checking that nothing beside any memory was written."""
        function = f"emulated_{self.problem.operation}_{direction}"
        size = getattr(library, f"{function}_workspace")(ctypes.byref(self.args))
        workspace = self.memory["workspace"] = emulator.Memory(max(size, 16), name="workspace")
        emulator.call(
            getattr(library, function),
            ctypes.byref(self.args),
            ctypes.c_void_p(workspace.pointer),
        )
        for name, memory in self.memory.items():
            assert memory.guards_intact(), f"{name}: written outside its bounds"
        return {name: self.memory[name].bytes.copy() for name in outputs if name in self.memory}


def forward(library: ctypes.CDLL, problem: Problem) -> dict[str, np.ndarray]:
    """y, stats, mask and running statistics as bytes."""
    p = problem
    call = _Call(p, p.structures[1])
    for name, value in p.arrays.items():
        if name != "dy":
            call.tensor(name, value)
    call.tensor("y")
    call.tensor("stats", None if p.known_stats is None else p.known_stats.view(np.float32))
    if p.masked:
        rows, row = p.rows
        call.raw("mask", rows * -(-row // 8), offset=1)
    return call.run(library, "forward", ("y", "stats", "mask", "running_mean", "running_var"))


def backward(
    library: ctypes.CDLL, problem: Problem, saved: dict[str, np.ndarray]
) -> dict[str, np.ndarray]:
    """dx, dresidual, dweight, dbias as bytes, from the forward's stats and mask."""
    p = problem
    call = _Call(p, p.structures[2])
    for name in ("x", "dy", "weight", "bias"):
        if name in p.arrays:
            call.tensor(name, p.arrays[name])
    call.tensor("stats", saved["stats"].view(np.float32))
    if p.masked:
        call.raw("mask", saved["mask"].size, offset=1).bytes[:] = saved["mask"]
    elif p.residual:
        call.tensor("residual", p.arrays["residual"])
    outputs = ("dx", "dresidual", "dweight", "dbias")
    for name in outputs:
        if name not in p.without and (name != "dresidual" or p.activation != "none"):
            call.tensor(name)
    return call.run(library, "backward", outputs)


def run(library: ctypes.CDLL, problem: Problem) -> dict[str, np.ndarray]:
    """What both directions write."""
    outputs = forward(library, problem)
    return outputs | backward(library, problem, outputs)
