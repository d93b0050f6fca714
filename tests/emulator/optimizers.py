"""LAMB's and LARS' CUDA kernels on torch tensors: mirrors csrc/kernels/lamb.h and lars.h."""

from __future__ import annotations

import ctypes
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field
from typing import Any, ClassVar

import numpy as np
import torch

from .. import lamb_reference, lars_reference
from . import build, emulator

KERNELS = [f"csrc/kernels/cuda/{name}.cu" for name in ("lamb", "lars", "optimizers")]
API = ["optimizer_api.cpp"]

DTYPES = {"f32": 0, "f16": 1, "bf16": 2}
TORCH = {"f32": torch.float32, "f16": torch.float16, "bf16": torch.bfloat16}
CHUNK = 2048  # elements of a block
SMALL = CHUNK // 8  # elements of a tensor that is one warp's

State = dict[str, torch.Tensor]


class Call(ctypes.Structure):
    _fields_ = (
        ("tensor_count", ctypes.c_int64),
        ("tensors", ctypes.c_void_p),
        ("steps", ctypes.c_void_p),
        ("group_count", ctypes.c_int64),
        ("numbers", ctypes.c_void_p),
        ("flags", ctypes.c_void_p),
        ("rates", ctypes.c_void_p),
        ("max_grad_norm", ctypes.c_double),
        ("clip_eps", ctypes.c_double),
        ("grad_scale", ctypes.c_double),
        ("device_grad_scale", ctypes.c_void_p),
        ("found_inf", ctypes.c_void_p),
        ("sm_margin", ctypes.c_int64),
    )


@dataclass
class Parameter:
    numel: int
    p_dtype: str = "f32"
    g_dtype: str = "f32"
    group: int = 0
    step: int = 7
    offset: int = 0  # elements past 64-byte alignment
    apart: str = ""  # an array that lies one element further
    master: bool = False
    excluded: bool = False
    start: State = field(init=False)

    def __post_init__(self) -> None:
        n = self.numel
        self.start = {
            "p": (torch.randn(n) * 0.1).to(TORCH[self.p_dtype]),
            "g": (torch.randn(n) * 0.01).to(TORCH[self.g_dtype]),
            "m": torch.randn(n) * 1e-3,
            "v": torch.rand(n) * 1e-5,
        }
        if self.master:
            self.start["master"] = torch.randn(n) * 0.1
            self.start["p"] = self.start["master"].to(TORCH[self.p_dtype])


def starting(start: State, **options: Any) -> Parameter:
    x = Parameter(len(start["p"]), **options)
    x.start |= start
    return x


@dataclass
class Problem:
    """Of LAMB; Lars is the other."""

    parameters: list[Parameter]
    groups: list[Any] = field(default_factory=lambda: [lamb_reference.Options()])
    max_grad_norm: float | None = 0.05
    clip_eps: float = 0.0  # LARS has none
    grad_scale: float = 1.0
    # Step counts, learning rates and the loss scale on the device: the host does not know them.
    on_device: bool = False
    found_inf: float | None = None
    sm_margin: int = 0

    kind: ClassVar[str] = "lamb"
    rates: ClassVar[tuple[int, int]] = (0, 5)  # of numbers(), those that may be on the device
    flags: ClassVar[tuple[str, ...]] = (
        "bias_correction",
        "grad_averaging",
        "always_adapt",
        "maximize",
        "decoupled_decay",
        "caution",
        "step_size_correction",
        "eps_inside_sqrt",
    )

    def numbers(self, o: Any) -> list[float]:
        return [o.lr, *o.betas, o.eps, o.weight_decay, o.decay_lr, *o.clamp]

    def arrays(self, x: Parameter) -> list[str]:
        """Those of `x.start` that the kernels are given."""
        return list(x.start)


@dataclass
class Lars(Problem):
    groups: list[Any] = field(default_factory=lambda: [lars_reference.Options()])

    kind: ClassVar[str] = "lars"
    rates: ClassVar[tuple[int, int]] = (0, 6)
    flags: ClassVar[tuple[str, ...]] = (
        "nesterov",
        "trust_clip",
        "always_adapt",
        "exclude_decay",
        "lr_in_momentum",
        "zero_norm_plain",
        "maximize",
    )

    def numbers(self, o: Any) -> list[float]:
        factor = o.lr / o.last_lr if o.momentum_correction and o.last_lr else 1.0
        return [o.lr, o.momentum, o.dampening, o.weight_decay, o.trust_coeff, o.eps, factor]

    def arrays(self, x: Parameter) -> list[str]:
        without = {"v"} if self.groups[x.group].momentum else {"m", "v"}
        return [name for name in x.start if name not in without]


@dataclass(frozen=True)
class Device:
    multiprocessors: int
    shared: int = 227 * 1024  # bytes that a block may have
    blocks: int = 0  # of a multiprocessor; 0: as many as there is room for


DEVICES = {
    # One slot is for the next chunk's copies; the others keep chunks.
    "Hopper": Device(2),  # 4 blocks of 6 slots: what most tests have stays on the chip
    "small": Device(2, 56 * 1024),  # 2 blocks of 2 slots, alone on their multiprocessors
    "alone": Device(1, 72 * 1024, blocks=1),  # one block of 3 slots
    # 2 slots for each of 2 blocks would be too few: one block of 5, and more shared memory than a
    # kernel has unasked
    "Ada": Device(1, 99 * 1024),
}


@contextmanager
def device(
    library: ctypes.CDLL, name: str, order: str = "forward", seed: int = 0
) -> Iterator[None]:
    """A device of this name, and a schedule."""
    known = DEVICES[name]
    library.emulator_set_device(ctypes.c_size_t(known.shared), 9)
    library.emulator_set_blocks_per_multiprocessor(known.blocks)
    steps = [f"{kind}_step".encode() for kind in ("lamb", "lars")]
    for step in steps:  # as launch bounds ask: two blocks
        library.emulator_set_registers(step, 96)
    try:
        with emulator.schedule(library, order, seed, known.multiprocessors):
            yield
    finally:
        library.emulator_set_device(ctypes.c_size_t(Device.shared), 9)
        library.emulator_set_blocks_per_multiprocessor(0)
        for step in steps:
            library.emulator_set_registers(step, 0)


def load(library: ctypes.CDLL) -> ctypes.CDLL:
    for name in ("table", "lamb_workspace", "lars_workspace", "grad_sum_sq_workspace"):
        getattr(library, f"emulated_{name}_bytes").restype = ctypes.c_size_t
    return library


def library(instrument: bool = False) -> ctypes.CDLL:
    return load(build.library("optimizers", KERNELS, API, instrument))


def scalar(value: float, name: str) -> emulator.Memory:
    memory = emulator.Memory(4, name=name)
    memory.bytes.view(np.float32)[:] = value
    return memory


class Placed:
    """A problem's tensors in memory of the emulator's, and the call that names them."""

    def __init__(self, lib: ctypes.CDLL, problem: Problem) -> None:
        self.problem = problem
        self.memories: list[dict[str, emulator.Memory]] = []
        rows, groups = [], problem.groups
        away, nan = problem.on_device, float("nan")
        for x in problem.parameters:
            mine = {}
            for name in problem.arrays(x):
                start = x.start[name]
                size = start.element_size()
                offset = (x.offset + (name == x.apart)) * size
                memory = emulator.Memory(x.numel * size, offset, f"{name}{len(rows)}")
                memory.bytes[:] = start.view(torch.uint8).numpy()
                mine[name] = memory
            pointers = [mine[n].pointer if n in mine else 0 for n in ("p", "g", "m", "v", "master")]
            kinds = (DTYPES[x.p_dtype], DTYPES[x.g_dtype])
            count = 0
            if away:
                mine["step"] = scalar(x.step - 1, f"step{len(rows)}")
                count = mine["step"].pointer
            rows.append([*pointers, x.numel, *kinds, x.group, x.excluded, count])
            self.memories.append(mine)
        flags = [sum(getattr(o, f) << b for b, f in enumerate(problem.flags)) for o in groups]
        numbers = np.array([problem.numbers(o) for o in groups], dtype=np.float64)
        self.rates = []
        for row in numbers if away else ():
            self.rates.append(emulator.Memory(16, name="rates"))
            self.rates[-1].bytes.view(np.float64)[:] = row[list(problem.rates)]
            row[list(problem.rates)] = nan
        pointers = [memory.pointer for memory in self.rates] or [0] * len(groups)
        self.kept = (  # for as long as the call names them
            np.array(rows, dtype=np.int64).reshape(-1, 11),
            np.array([1.0 if away else float(x.step) for x in problem.parameters]),
            numbers,
            np.array(flags, dtype=np.int64),
            np.array(pointers, dtype=np.int64),
        )
        tensors, steps, *of_groups = (array.ctypes.data for array in self.kept)
        clip = problem.max_grad_norm or 0.0
        fields = (len(rows), tensors, steps, len(groups), *of_groups, clip, problem.clip_eps)
        self.scale = scalar(problem.grad_scale, "scale") if away else None
        self.found = None if problem.found_inf is None else scalar(problem.found_inf, "found")
        device = (None if memory is None else memory.pointer for memory in (self.scale, self.found))
        scale = nan if away else problem.grad_scale
        self.call = ctypes.pointer(Call(*fields, scale, *device, problem.sm_margin))
        self.table = emulator.Memory(lib.emulated_table_bytes(self.call), name="table")
        needed = getattr(lib, f"emulated_{problem.kind}_workspace_bytes")(self.call)
        self.workspace = emulator.Memory(needed, name="workspace")

    def results(self) -> list[State]:
        """The tensors as they are now; what lies around each is checked to be untouched."""
        results = []
        for x, mine in zip(self.problem.parameters, self.memories, strict=True):
            after = {}
            for name, memory in mine.items():
                assert memory.guards_intact(), f"{name}: written outside its bounds"
                like = torch.zeros(1) if name == "step" else x.start[name]
                after[name] = torch.empty_like(like)
                after[name].view(torch.uint8).numpy()[:] = memory.bytes
            assert torch.equal(after["g"].view(torch.uint8), x.start["g"].view(torch.uint8))
            results.append(after)
        return results


def step(
    lib: ctypes.CDLL,
    placed: Placed,
    stats: emulator.Memory | None = None,
    grad_sum_sq: float | None = None,
) -> None:
    emulator.call(
        getattr(lib, f"emulated_{placed.problem.kind}_step"),
        placed.call,
        ctypes.c_void_p(placed.table.pointer),
        ctypes.c_void_p(placed.workspace.pointer),
        None if grad_sum_sq is None else ctypes.byref(ctypes.c_double(grad_sum_sq)),
        None if stats is None else ctypes.c_void_p(stats.pointer),
    )


def run(lib: ctypes.CDLL, problem: Problem, grad_sum_sq: float | None = None) -> list[State]:
    """The tensors after one step, and their statistics."""
    placed = Placed(lib, problem)
    stats = emulator.Memory(16 * len(problem.parameters), name="stats")
    if problem.found_inf:
        stats.bytes[:] = 0  # NaN is what a skipped step has to write
    step(lib, placed, stats, grad_sum_sq)
    for memory in (placed.table, placed.workspace, stats):
        assert memory.guards_intact(), f"{memory.name}: written outside its bounds"
    results = placed.results()
    rows = stats.bytes.view(np.float32).reshape(-1, 4)
    for after, row in zip(results, rows, strict=True):
        after["stats"] = torch.from_numpy(row.copy())
    return results


def run_in_streams(lib: ctypes.CDLL, problems: list[Problem]) -> list[list[State]]:
    """A step of each, all at once, in a stream of its own."""
    placed = [Placed(lib, problem) for problem in problems]
    pointers = ctypes.c_void_p * len(placed)
    emulator.call(
        lib.emulated_lamb_steps_in_streams,
        ctypes.c_int64(len(placed)),
        pointers(*(ctypes.addressof(one.call.contents) for one in placed)),
        pointers(*(one.table.pointer for one in placed)),
        pointers(*(one.workspace.pointer for one in placed)),
    )
    return [one.results() for one in placed]


def grad_sum_sq(lib: ctypes.CDLL, problem: Problem) -> float:
    placed = Placed(lib, problem)
    needed = lib.emulated_grad_sum_sq_workspace_bytes(placed.call)
    workspace, total = emulator.Memory(needed, name="workspace"), emulator.Memory(8, name="total")
    emulator.call(
        lib.emulated_grad_sum_sq,
        placed.call,
        ctypes.c_void_p(placed.table.pointer),
        ctypes.c_void_p(workspace.pointer),
        ctypes.c_void_p(total.pointer),
    )
    return float(total.bytes.view(np.float64)[0])
