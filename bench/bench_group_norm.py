"""Group norm alone and with SiLU, and layer norm: forward and backward, against torch.

Peers: `torch` composes group_norm and silu out of place; `torch in place` reuses group norm's
output for silu; `torch.compile` comes with --compile.

The bytes that must move, in passes over the tensor: forward 2 (read x, write y), backward 3 (read x
and dy, write dx). What is reduced before it is used must be read again where it does not stay in
the cache: a group's slice does in contiguous layout, and in channels_last a sample.
"""

from __future__ import annotations

import functools
import itertools
from collections.abc import Iterator
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from common import assert_close, dtype_name, last_level_cache_bytes, parts_of, rotating
from peers import group_norms, layer_norms, prepared

from batchops import functional as BF

EPS = 1e-5
GROUPS = 32

# Group norm: (N, C, H, W). Layer norm: (rows, D), which is one group over a row.
SHAPES = [
    (8, 320, 64, 64),  # diffusion UNet, ten channels a group
    (4, 512, 64, 64),  # image decoder: 134 MB in fp32
    (16, 64, 112, 112),  # two channels a group
    (2, 1280, 16, 16),  # UNet's middle: fits the cache
    (4096, 1024),  # a transformer's rows
    (256, 4096),  # few long rows, in the cache
]
# Stable Diffusion's, and its decoder's
CUDA_SHAPES = [(32, 320, 64, 64), (32, 640, 32, 32), (32, 1280, 16, 16), (4, 128, 512, 512)]
QUICK_SHAPES = {(8, 320, 64, 64), (4096, 1024)}
PHASES = ["forward", "backward"]


def _cases() -> list[Any]:
    cases = []
    for shape in SHAPES:
        rows = len(shape) == 2
        for dtype in (torch.float32, torch.bfloat16):
            for layout in ("contiguous",) if rows else ("contiguous", "channels_last"):
                for variant in ("plain",) if rows else ("plain", "silu"):
                    for phase in PHASES:
                        quick = shape in QUICK_SHAPES and dtype is torch.float32
                        size = "x".join(map(str, shape))
                        name = f"{size}-{dtype_name(dtype)}-{layout}-{variant}-{phase}"
                        marks = [pytest.mark.quick] if quick else []
                        values = (shape, dtype, layout, variant, phase)
                        cases.append(pytest.param(*values, id=name, marks=marks))
    for values in itertools.product(
        CUDA_SHAPES,
        (torch.float32, torch.bfloat16),
        ("contiguous", "channels_last"),
        ("plain", "silu"),
        PHASES,
    ):
        shape, dtype, *rest = values
        name = "-".join(["x".join(map(str, shape)), dtype_name(dtype), *rest])
        quick = [pytest.mark.quick] if dtype is torch.bfloat16 else []
        marks = [pytest.mark.on_cuda, *quick]
        cases.append(pytest.param(*values, id=f"cuda-{name}", marks=marks))
    return cases


class _Set:
    """One set of rotated inputs."""

    def __init__(self, x: torch.Tensor, dy: torch.Tensor | None) -> None:
        self.x = x.requires_grad_()
        self.dy = dy

    def copy(self) -> _Set:
        """The same values elsewhere in memory, which is all that rotation needs."""
        return _Set(self.x.detach().clone(), None if self.dy is None else self.dy.clone())


class Problem:
    """Inputs of one case, and what they should give, in float64."""

    def __init__(
        self,
        shape: tuple[int, ...],
        dtype: torch.dtype,
        layout: str,
        variant: str,
        phase: str,
        device: torch.device,
    ) -> None:
        self.shape, self.dtype, self.layout = shape, dtype, layout
        self.variant, self.phase = variant, phase
        self.groups = GROUPS if len(shape) > 2 else 1
        memory_format = (
            torch.channels_last if layout == "channels_last" else torch.contiguous_format
        )
        generator = torch.Generator(device).manual_seed(0)

        def draw(*size: int) -> torch.Tensor:
            return torch.randn(*size, generator=generator, device=device)

        # torch's CPU kernels take parameters of x's dtype, or float32
        self.weight = (draw(shape[1]).abs() + 0.5).to(dtype).requires_grad_()
        self.bias = (draw(shape[1]) * 0.5).to(dtype).requires_grad_()
        self.elements = torch.Size(shape).numel()
        self.tensors = {"forward": 2, "backward": 3}[phase]
        first = _Set(
            draw(*shape).to(dtype, memory_format=memory_format),
            draw(*shape).to(dtype, memory_format=memory_format) if phase == "backward" else None,
        )
        self.sets = rotating(
            lambda i: first.copy() if i else first,
            self.tensors * self.elements * dtype.itemsize,
            device,
        )
        self.device = device

    def bytes_moved(self) -> int:
        tensor_bytes = self.elements * self.dtype.itemsize
        passes = self.tensors
        read_twice = {"forward": 1, "backward": 2}[self.phase]
        parts = self.shape[0] if self.layout == "channels_last" else self.shape[0] * self.groups
        if read_twice * tensor_bytes // parts > last_level_cache_bytes(self.device) // 2:
            passes += read_twice
        return passes * tensor_bytes

    def _expected(self, inputs: _Set) -> Iterator[tuple[slice, torch.Tensor]]:
        """y or dx of a few samples at a time, which have nothing to do with each other and stay in
        the caches, in float64, with what is made of them. The backward's last items are dweight and
        dbias, of all samples."""
        weight, bias = (t.detach().double().requires_grad_() for t in (self.weight, self.bias))
        view = (1, -1, *[1] * (len(self.shape) - 2))
        sums = [torch.zeros_like(weight), torch.zeros_like(bias)]
        for samples in parts_of(self.shape[0], self.elements // self.shape[0], self.device):
            x = inputs.x.detach()[samples].double().contiguous().requires_grad_()
            grouped = x.view(x.shape[0], self.groups, -1)
            centred = grouped - grouped.mean(2, keepdim=True)
            rstd = (centred.square().mean(2, keepdim=True) + EPS).rsqrt()
            z = (centred * rstd).view(x.shape) * weight.view(view) + bias.view(view)
            y = z * torch.sigmoid(z) if self.variant == "silu" else z
            if inputs.dy is None:
                yield samples, y.detach()
                continue
            grads = torch.autograd.grad(y, (x, weight, bias), inputs.dy[samples].double())
            yield samples, grads[0]
            for total, part in zip(sums, grads[1:], strict=True):
                total += part
        if inputs.dy is not None:
            yield from ((slice(None), total) for total in sums)

    def check(self, ours: bool) -> Any:
        """Elementwise bounds: one rounding to the dtype for ours, several for a composition; sums
        over M elements grow as √M, and stock adds them up in the parameters' dtype."""
        fp32 = self.dtype is torch.float32
        summed = self.elements / self.shape[1]
        rtol = (4e-6 if fp32 else 2.0**-8) * (1 if ours else 4)
        atol = 2e-5 if fp32 else 2.0 ** (-7 if ours else -4)
        scale = summed**0.5 * (1e-5 if fp32 else 2.0**-7) * (1 if ours else 20)

        def check(output: Any, index: int) -> None:
            tensor, *sums = output if self.phase == "backward" else [output]
            for part, want in self._expected(self.sets[index]):
                if want.dim() == 1:  # dweight, then dbias
                    position = 3 - len(sums)
                    assert_close(sums.pop(0), want, 1e-4 if fp32 else 2.0**-7, scale, position)
                else:
                    assert_close(tensor[part], want, rtol, atol, 0)
            assert not sums, f"{len(sums)} outputs too many"

        return check

    def side(self, forward: Any) -> Any:
        """What is timed: `forward(x, groups, weight, bias)`, or its backward through graphs that
        are built here, before any timing."""

        def run(index: int) -> torch.Tensor:
            return forward(self.sets[index].x, self.groups, self.weight, self.bias)

        if self.phase != "backward":
            return run
        outputs = [run(index) for index in range(len(self.sets))]

        def backward(index: int) -> tuple[torch.Tensor, ...]:
            inputs = self.sets[index]
            leaves = (inputs.x, self.weight, self.bias)
            return torch.autograd.grad(outputs[index], leaves, inputs.dy, retain_graph=True)

        return backward


def _ours(x, groups, weight, bias, *, activation=None):
    if x.dim() == 2:
        return BF.layer_norm(x, x.shape[1:], weight, bias, EPS)
    return BF.group_norm(x, groups, weight, bias, EPS, activation=activation)


def _torch(x, groups, weight, bias, *, silu=False, in_place=False):
    if x.dim() == 2:
        return F.layer_norm(x, x.shape[1:], weight, bias, EPS)
    y = F.group_norm(x, groups, weight, bias, EPS)
    return F.silu(y, inplace=in_place) if silu else y


@pytest.mark.parametrize(("shape", "dtype", "layout", "variant", "phase"), _cases())
def test_group_norm(request, pair, device, threads, shape, dtype, layout, variant, phase):
    problem = Problem(shape, dtype, layout, variant, phase, device)
    silu = variant == "silu"
    stock = functools.partial(_torch, silu=silu)
    peers = {"torch": problem.side(stock)}
    if silu and phase == "forward":
        # without gradients: silu's backward needs what is overwritten
        in_place = functools.partial(_torch, silu=True, in_place=True)
        peers["torch in place"] = problem.side(torch.no_grad()(in_place))
    rows = len(shape) == 2
    theirs = layer_norms(device, EPS) if rows else group_norms(device, EPS, silu)
    peers |= {name: prepared(problem.side, norm) for name, norm in theirs.items()}
    if request.config.getoption("--compile"):
        torch.compiler.reset()
        peers["torch.compile"] = problem.side(torch.compile(stock, fullgraph=True))
    op = "layer_norm" if rows else "group_norm" + (" + silu" if silu else "")
    pair(
        ours=problem.side(functools.partial(_ours, activation="silu" if silu else None)),
        peers=peers,
        check=problem.check(ours=True),
        peer_check=problem.check(ours=False),
        bytes_moved=problem.bytes_moved(),
        rotate=len(problem.sets),
        op=f"{op}, {phase}",
        case={
            "shape": "×".join(map(str, shape)),
            "dtype": dtype_name(dtype),
            "layout": layout,
        },
    )
