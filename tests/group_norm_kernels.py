"""The CPU group norm kernels without torch's operators: by ctypes, on any partition of the work."""

from __future__ import annotations

import ctypes
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import torch

from .emulator.group_norm import Backward, Forward, Shape
from .emulator.norm import LAYOUTS
from .reference import ACTIVATIONS, MASKABLE
from .tensors import channels_last

# The numbers of csrc/kernels/common.h.
DTYPES = {torch.float32: 0, torch.float16: 1, torch.bfloat16: 2, torch.float64: 3}

pointer = ctypes.c_void_p
BODY = ctypes.CFUNCTYPE(None, pointer, ctypes.c_int64, ctypes.c_int64)
RUN = ctypes.CFUNCTYPE(None, pointer, ctypes.c_int64, BODY, pointer)


class Parallel(ctypes.Structure):
    _fields_ = [("run", RUN), ("context", pointer), ("threads", ctypes.c_int)]


def _library() -> ctypes.CDLL:
    import batchops._binding as binding

    return ctypes.CDLL(next(Path(binding.core.__file__).parent.rglob("libbatchops_core.so")))


def _call(name: str, structure: str, args: ctypes.Structure, threads: int) -> None:
    function = getattr(
        _library(),
        f"_ZN8batchops{len(name)}{name}ERKNS_{len(structure)}{structure}ERKNS_8ParallelE",
    )
    function.restype = ctypes.c_char_p

    def run(_context, count, body, data):
        pieces = min(threads, count)
        bounds = [count * i // pieces for i in range(pieces + 1)]
        with ThreadPoolExecutor(pieces) as pool:
            list(pool.map(lambda i: body(data, bounds[i], bounds[i + 1]), range(pieces)))

    callback = RUN(run)
    parallel = Parallel(callback if threads > 1 else RUN(), None, threads)
    error = function(ctypes.byref(args), ctypes.byref(parallel))
    assert error is None, error.decode()


def _data(t: torch.Tensor | None):
    return None if t is None else t.data_ptr()


class GroupNorm:
    """One call: tensors of logical size (N, C, HxW), kept in the given layout."""

    def __init__(self, x, G, weight, bias, residual, layout, activation, slope=0.1, eps=1e-5):
        self.layout = layout
        self.x, self.residual = self.place(x), None if residual is None else self.place(residual)
        self.weight, self.bias, self.eps = weight, bias, eps
        N, C, HxW = x.shape
        parameters = [p for p in (weight, bias) if p is not None]
        self.param_dtype = parameters[0].dtype if parameters else x.dtype
        self.shape = Shape(
            N,
            C,
            HxW,
            G,
            LAYOUTS[layout],
            DTYPES[x.dtype],
            DTYPES[self.param_dtype],
            list(ACTIVATIONS).index(activation),
            slope,
        )
        last = layout == "channels_last"
        rows, row = (N * HxW, C) if last else (N * C, HxW)
        self.masked = residual is not None and activation in MASKABLE
        self.mask = torch.full((rows, (row + 7) // 8), 255, dtype=torch.uint8)

    def place(self, t):
        return channels_last(t) if self.layout == "channels_last" else t

    def forward(self, threads=1):
        N, G = self.shape.N, self.shape.G
        wide = torch.float64 if self.x.dtype == torch.float64 else torch.float32
        self.y = torch.full_like(self.x, torch.nan)
        self.stats = torch.full((3, N * G), torch.nan, dtype=wide)
        args = Forward(
            self.shape,
            _data(self.x),
            _data(self.residual),
            _data(self.weight),
            _data(self.bias),
            _data(self.y),
            _data(self.stats),
            _data(self.mask) if self.masked else None,
            False,
            self.eps,
        )
        _call("group_norm_forward_cpu", "GroupNormForward", args, threads)
        return self.y

    def backward(self, dy, threads=1, wanted=(True, True, True, True)):
        dy = self.place(dy)
        dx, dresidual = (torch.full_like(self.x, torch.nan) if w else None for w in wanted[:2])
        if self.shape.activation == 0:
            dresidual = None
        dweight, dbias = (
            torch.full((self.shape.C,), torch.nan, dtype=self.param_dtype) if w else None
            for w in wanted[2:]
        )
        args = Backward(
            self.shape,
            _data(dy),
            _data(self.x),
            None if self.masked else _data(self.residual),
            _data(self.weight),
            _data(self.bias),
            _data(self.stats),
            _data(self.mask) if self.masked else None,
            _data(dx),
            _data(dresidual),
            _data(dweight),
            _data(dbias),
        )
        _call("group_norm_backward_cpu", "GroupNormBackward", args, threads)
        return dx, dresidual, dweight, dbias
