"""LAMB's CUDA kernels on torch tensors: mirrors csrc/kernels/lamb.h."""

from __future__ import annotations

import ctypes
from dataclasses import dataclass, field

import numpy as np
import torch

from ..lamb_reference import Options
from . import build, emulator

KERNELS = ["csrc/kernels/cuda/lamb.cu"]
API = ["lamb_api.cpp"]

DTYPES = {"f32": 0, "f16": 1, "bf16": 2}
TORCH = {"f32": torch.float32, "f16": torch.float16, "bf16": torch.bfloat16}
FLAGS = (
    "bias_correction",
    "grad_averaging",
    "always_adapt",
    "maximize",
    "decoupled_decay",
    "caution",
    "step_size_correction",
    "eps_inside_sqrt",
)
CHUNK = 16 * 1024


class Call(ctypes.Structure):
    _fields_ = [
        ("tensor_count", ctypes.c_int64),
        ("tensors", ctypes.c_void_p),
        ("steps", ctypes.c_void_p),
        ("group_count", ctypes.c_int64),
        ("numbers", ctypes.c_void_p),
        ("flags", ctypes.c_void_p),
        ("max_grad_norm", ctypes.c_double),
        ("clip_eps", ctypes.c_double),
        ("grad_scale", ctypes.c_double),
    ]


@dataclass
class Parameter:
    numel: int
    p_dtype: str = "f32"
    g_dtype: str = "f32"
    group: int = 0
    step: int = 7
    offset: int = 0  # elements past 64-byte alignment
    master: bool = False
    excluded: bool = False
    start: dict[str, torch.Tensor] = field(init=False)

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


@dataclass
class Problem:
    parameters: list[Parameter]
    groups: list[Options] = field(default_factory=lambda: [Options()])
    max_grad_norm: float | None = 0.05
    grad_scale: float = 1.0


def library(instrument: bool = False) -> ctypes.CDLL:
    lib = build.library("lamb", KERNELS, API, instrument)
    lib.emulated_lamb_table_bytes.restype = ctypes.c_size_t
    lib.emulated_lamb_workspace_bytes.restype = ctypes.c_size_t
    return lib


def run(
    lib: ctypes.CDLL, problem: Problem, grad_sum_sq: float | None = None
) -> list[dict[str, torch.Tensor]]:
    """The tensors after one step; what lies around each in memory is checked to be untouched."""
    rows, steps, memories = [], [], []
    for x in problem.parameters:
        row, mine = [], {}
        for name, start in x.start.items():
            size = start.element_size()
            memory = emulator.Memory(x.numel * size, x.offset * size, f"{name}{len(rows)}")
            memory.bytes[:] = start.view(torch.uint8).numpy()
            row.append(memory.pointer)
            mine[name] = memory
        if not x.master:
            row.append(0)
        kinds = (DTYPES[x.p_dtype], DTYPES[x.g_dtype])
        rows.append([*row, x.numel, *kinds, x.group, x.excluded])
        steps.append(float(x.step))
        memories.append(mine)
    tensors = np.array(rows, dtype=np.int64).reshape(-1, 10)
    counts = np.array(steps)
    numbers = np.array(
        [[o.lr, *o.betas, o.eps, o.weight_decay, o.decay_lr, *o.clamp] for o in problem.groups]
    )
    flags = np.array(
        [sum(getattr(o, f) << b for b, f in enumerate(FLAGS)) for o in problem.groups],
        dtype=np.int64,
    )
    call = Call(
        len(rows),
        tensors.ctypes.data,
        counts.ctypes.data,
        len(problem.groups),
        numbers.ctypes.data,
        flags.ctypes.data,
        problem.max_grad_norm or 0.0,
        0.0,
        problem.grad_scale,
    )
    stats = torch.full((len(rows), 4), float("nan"))
    table = emulator.Memory(lib.emulated_lamb_table_bytes(ctypes.byref(call)), name="table")
    workspace = emulator.Memory(
        lib.emulated_lamb_workspace_bytes(ctypes.byref(call)), name="workspace"
    )
    total = None if grad_sum_sq is None else ctypes.byref(ctypes.c_double(grad_sum_sq))
    emulator.call(
        lib.emulated_lamb_step,
        ctypes.byref(call),
        ctypes.c_void_p(table.pointer),
        ctypes.c_void_p(workspace.pointer),
        total,
        ctypes.c_void_p(stats.data_ptr()),
    )
    results = []
    for x, mine in zip(problem.parameters, memories, strict=True):
        after = {}
        for name, start in x.start.items():
            assert mine[name].guards_intact(), f"{name}: written outside its bounds"
            after[name] = torch.empty_like(start)
            after[name].view(torch.uint8).numpy()[:] = mine[name].bytes
        assert torch.equal(after["g"].view(torch.uint8), x.start["g"].view(torch.uint8))
        after["stats"] = stats[len(results)]
        results.append(after)
    return results
