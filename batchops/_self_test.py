"""Checks that an installation works where it is: each area once, on each device, against torch in
float64."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

from . import _binding, data, functional, optim

# Largest error allowed, relative to the largest element: some roundings to the dtype, and sums.
_BOUNDS = {torch.float32: 1e-5, torch.bfloat16: 2.0**-6, torch.float16: 2.0**-9}


class Failure(Exception):
    """What a check found wrong."""


def devices() -> list[str]:
    """The devices there are kernels for: cpu, and cuda where the build and the machine have it."""
    cuda = _binding.core.built_with_cuda() and torch.cuda.is_available()
    return ["cpu", "cuda"] if cuda else ["cpu"]


def _compare(got: dict[str, Tensor], want: dict[str, Tensor], bound: float) -> str:
    """Raises Failure where an entry of `got` is off by more than `bound` of the largest element."""
    worst = 0.0
    for name, value in want.items():
        error = (got[name].double() - value).abs().max() / value.abs().max()
        if not error <= bound:  # a NaN fails as well
            raise Failure(f"{name} is off by {error:.2g} of its largest element, bound {bound:.2g}")
        worst = max(worst, float(error))
    return f"largest error {worst:.1g}, bound {bound:.1g}"


def _norm(
    ours: Callable[..., Tensor], stock: Callable[..., Tensor], dtype: torch.dtype, device: str
) -> str:
    """Output and gradients of `ours(x, weight, bias, residual)` against `stock`'s in float64."""
    generator = torch.Generator().manual_seed(0)

    def draw(*shape: int) -> Tensor:
        return torch.randn(*shape, generator=generator).to(device)

    x, residual, dy = (draw(4, 16, 9, 9).to(dtype) for _ in range(3))
    x = x.contiguous(memory_format=torch.channels_last)
    leaves = {"input": x, "weight": 1 + draw(16) / 4, "bias": draw(16), "residual": residual}
    results = []
    for function, double in ((ours, False), (stock, True)):
        inputs = [t.double() if double else t.clone() for t in leaves.values()]
        for t in inputs:
            t.requires_grad_()
        y = function(*inputs)
        grads = torch.autograd.grad(y, inputs, dy.to(y.dtype))
        names = (f"gradient of {name}" for name in leaves)
        results.append({"output": y.detach(), **dict(zip(names, grads, strict=True))})
    return _compare(*results, _BOUNDS[dtype])


def _batch_norm(dtype: torch.dtype, device: str) -> str:
    def ours(x: Tensor, w: Tensor, b: Tensor, z: Tensor) -> Tensor:
        return functional.batch_norm(x, None, None, w, b, True, activation="gelu", residual=z)

    def stock(x: Tensor, w: Tensor, b: Tensor, z: Tensor) -> Tensor:
        return F.gelu(F.batch_norm(x, None, None, w, b, True) + z)

    return _norm(ours, stock, dtype, device)


def _group_norm(dtype: torch.dtype, device: str) -> str:
    def ours(x: Tensor, w: Tensor, b: Tensor, z: Tensor) -> Tensor:
        return functional.group_norm(x, 4, w, b, activation="silu", residual=z)

    def stock(x: Tensor, w: Tensor, b: Tensor, z: Tensor) -> Tensor:
        return F.silu(F.group_norm(x, 4, w, b) + z)

    return _norm(ours, stock, dtype, device)


def _optimizer(kind: type[optim.LAMB | optim.LARS], device: str) -> str:
    """Parameters after three steps of the kernels and of torch's operators in float64."""
    generator = torch.Generator().manual_seed(0)
    start = [torch.randn(*shape, generator=generator) for shape in ((64, 33), (7,), (1,))]
    grads = [[torch.randn(t.shape, generator=generator) for t in start] for _ in range(3)]
    results = []
    for fused, dtype in ((True, torch.float32), (False, torch.float64)):
        params = [t.to(device, dtype, copy=True).requires_grad_() for t in start]
        optimizer = kind(params, lr=0.1, weight_decay=0.01, fused=fused)
        for step in grads:
            for p, grad in zip(params, step, strict=True):
                p.grad = grad.to(device, dtype)
            optimizer.step()
        results.append({f"parameter {i}": p.detach() for i, p in enumerate(params)})
    return _compare(*results, 1e-6)


def _loader(device: str) -> str:
    """Batches of the native loader against torch's for the same seed."""
    images = torch.arange(1000 * 12, dtype=torch.int32).reshape(1000, 3, 2, 2)
    dataset = torch.utils.data.TensorDataset(images, torch.arange(1000))

    def loader(kind: Callable[..., Any], **options: Any) -> Any:
        generator = torch.Generator().manual_seed(0)
        return kind(dataset, batch_size=96, shuffle=True, generator=generator, **options)

    stock = loader(torch.utils.data.DataLoader)
    native = loader(data.DataLoader, device=None if device == "cpu" else device)
    count = 0
    for got, want in zip(native, stock, strict=True):
        for a, b in zip(got, want, strict=True):
            if not torch.equal(a.cpu(), b):
                raise Failure(f"batch {count} differs from torch's")
        count += 1
    return f"{count} batches equal"


def _collate(device: str) -> str:
    """A batch of nested samples against torch's."""
    samples = [{"x": torch.full((3, 4), i), "y": (i, 0.5 * i), "name": str(i)} for i in range(9)]
    got, want = data.collate(samples), torch.utils.data.default_collate(samples)
    for name in want:
        alike = [
            torch.equal(a, b) if isinstance(b, Tensor) else a == b
            for a, b in zip(_leaves(got[name]), _leaves(want[name]), strict=True)
        ]
        if not all(alike):
            raise Failure(f"{name} differs from torch's")
    return "equal to torch's"


def _leaves(value: Any) -> list[Any]:
    return list(value) if isinstance(value, list | tuple) else [value]


def checks(device: str) -> Iterator[tuple[str, Callable[[], str]]]:
    """Names and checks for `device`; a check returns what it saw or raises."""
    for dtype in _BOUNDS:
        name = str(dtype).removeprefix("torch.")
        yield f"batch_norm, {name}", lambda dtype=dtype: _batch_norm(dtype, device)
        yield f"group_norm, {name}", lambda dtype=dtype: _group_norm(dtype, device)
    yield "LAMB", lambda: _optimizer(optim.LAMB, device)
    yield "LARS", lambda: _optimizer(optim.LARS, device)
    yield "DataLoader", lambda: _loader(device)
    if device == "cpu":
        yield "collate", lambda: _collate(device)


def run(device: str | None = None) -> bool:
    """Runs the checks of one device or of all, prints a line for each, and tells whether all
    passed."""
    passed = True
    for where in [device] if device else devices():
        for name, check in checks(where):
            try:
                words = f"ok      {check()}"
            except Exception as error:  # whatever a broken installation raises is a finding
                passed, words = False, f"FAILED  {type(error).__name__}: {error}"
            print(f"{where:<5} {name:<22} {words}")
    return passed
