"""Batch norm alone, with ReLU, and with add + ReLU: forward, backward, eval, against torch.

Peers: `torch` composes batch_norm, add and relu out of place; `torch in place` reuses the batch
norm's output, as residual networks usually do; `torch.compile` comes with --compile.

The bytes that must move, in passes over the tensor: forward 2 (read x, write y), backward 3 (read
x and dy, write dx), plus 1 for a residual (or its gradient) and one bit an element for the mask of
add + relu. What is reduced before it is used must be read again where it does not stay in the
cache: in contiguous layout a channel's slice does; in channels_last it takes all of x (and dy).
"""

from __future__ import annotations

import itertools
from collections.abc import Iterator
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from common import (
    assert_close,
    dtype_name,
    last_level_cache_bytes,
    one_thread,
    parts_of,
    rotating,
)

from batchops import functional as BF

EPS = 1e-5

# shape: why it is here; quick: the dtypes and layouts kept with --quick
SHAPES = [
    (32, 64, 112, 112),  # ResNet stem: few channels, 103 MB in fp32
    (64, 256, 56, 56),  # ResNet stage 1, past every cache
    (64, 512, 14, 14),  # stage 3: short rows in contiguous layout
    (256, 2048, 7, 7),  # stage 4: 49 elements a row, not a multiple of a vector
    (8, 32, 16, 16),  # small: fits the second-level cache, overhead counts
    (4096, 1024),  # 1-D: features in rows
]
# ResNet-50's at the batches that a GPU trains with
CUDA_SHAPES = [
    (64, 64, 112, 112),
    (256, 64, 112, 112),
    (256, 256, 56, 56),
    (256, 512, 28, 28),
    (256, 1024, 14, 14),
    (256, 2048, 7, 7),
]
CACHED = (8, 32, 16, 16)  # also measured as it is found: in the cache
QUICK_SHAPES = {(32, 64, 112, 112), (64, 512, 14, 14), (8, 32, 16, 16)}
VARIANTS = ["plain", "relu", "add_relu"]
PASSES = ["forward", "backward", "eval"]


def _cases() -> list[Any]:
    cases = []
    for shape in SHAPES:
        for dtype in (torch.float32, torch.bfloat16):
            for layout in ("contiguous", "channels_last"):
                if len(shape) == 2 and layout == "channels_last":
                    continue
                for variant in VARIANTS:
                    for phase in PASSES:
                        quick = (
                            shape in QUICK_SHAPES
                            and dtype is torch.float32
                            and variant == "relu"
                            and (layout == "contiguous" or (shape == SHAPES[0] and phase != "eval"))
                        )
                        size = "x".join(map(str, shape))
                        name = f"{size}-{dtype_name(dtype)}-{layout}-{variant}-{phase}"
                        marks = [pytest.mark.quick] if quick else []
                        values = (shape, dtype, layout, variant, phase)
                        cases.append(pytest.param(*values, False, id=name, marks=marks))
                        if shape == CACHED:
                            cases.append(pytest.param(*values, True, id=f"{name}-cached"))
    for values in itertools.product(
        CUDA_SHAPES,
        (torch.float32, torch.bfloat16),
        ("contiguous", "channels_last"),
        VARIANTS,
        ("forward", "backward"),
    ):
        shape, dtype, *rest = values
        name = "-".join(["x".join(map(str, shape)), dtype_name(dtype), *rest])
        quick = [pytest.mark.quick] if dtype is torch.bfloat16 else []
        marks = [pytest.mark.on_cuda, *quick]
        cases.append(pytest.param(*values, False, id=f"cuda-{name}", marks=marks))
    return cases


class _Set:
    """One set of rotated inputs."""

    def __init__(
        self, x: torch.Tensor, residual: torch.Tensor | None, dy: torch.Tensor | None, grad: bool
    ) -> None:
        self.x = x.requires_grad_(grad)
        self.residual = residual if residual is None else residual.requires_grad_(dy is not None)
        self.dy = dy

    def copy(self) -> _Set:
        """The same values elsewhere in memory, which is all that rotation needs."""
        copies = (t if t is None else t.detach().clone() for t in (self.x, self.residual, self.dy))
        return _Set(*copies, grad=self.x.requires_grad)


class Problem:
    """Inputs of one case, and what they should give, in float64.

    ``cached``: one set of them, which stays in the caches, as what a layer just wrote does.
    """

    def __init__(
        self,
        shape: tuple[int, ...],
        dtype: torch.dtype,
        layout: str,
        variant: str,
        phase: str,
        device: torch.device,
        cached: bool = False,
    ) -> None:
        self.shape, self.dtype, self.layout = shape, dtype, layout
        self.variant, self.phase, self.device = variant, phase, device
        self.last = layout == "channels_last"
        self.memory_format = torch.channels_last if self.last else torch.contiguous_format
        # Stock rounds to bf16 between the steps of a composition: sums of magnitude 8 or less.
        self.margin = 2e-3 if dtype is torch.float32 else 2.0**-4
        channels = shape[1]
        generator = torch.Generator(device).manual_seed(0)
        self.weight = torch.rand(channels, generator=generator, device=device) + 0.5
        self.bias = torch.randn(channels, generator=generator, device=device) * 0.5
        self.mean = torch.randn(channels, generator=generator, device=device) * 0.1
        self.var = torch.rand(channels, generator=generator, device=device) + 0.5
        self.weight.requires_grad_(phase != "eval")
        self.bias.requires_grad_(phase != "eval")
        self.elements = torch.Size(shape).numel()
        self.tensors = {"forward": 2, "backward": 3, "eval": 2}[phase] + (variant == "add_relu")
        tensor_bytes = self.elements * dtype.itemsize
        self.expected: dict[int, list[tuple[slice, list[torch.Tensor]]]] = {}
        first = self._first_set(generator)
        self.sets = (
            [first]
            if cached
            else rotating(
                lambda i: first.copy() if i else first, self.tensors * tensor_bytes, device
            )
        )

    def _first_set(self, generator: torch.Generator) -> _Set:
        def draw() -> torch.Tensor:
            x = torch.randn(self.shape, generator=generator, device=self.device)
            return x.to(self.dtype, memory_format=self.memory_format)

        backward = self.phase == "backward"
        inputs = _Set(
            draw(),
            draw() if self.variant == "add_relu" else None,
            draw() if backward else None,
            grad=self.phase != "eval",
        )
        if backward and self.variant != "plain":
            # Where rounding decides the sign before relu, no gradient comes in: so the masks of
            # all sides are right alike.
            with one_thread():
                for channels in self._channels():
                    x_hat, _ = self._normalized(inputs, channels)
                    before = self._before_activation(inputs, channels, x_hat)
                    inputs.dy[:, channels].masked_fill_(before.abs() < self.margin, 0)
        return inputs

    def bytes_moved(self) -> int:
        tensor_bytes = self.elements * self.dtype.itemsize
        passes = self.tensors
        read_twice = {"forward": 1, "backward": 2, "eval": 0}[self.phase]
        fits = read_twice * tensor_bytes <= last_level_cache_bytes(self.device) // 2
        if self.layout == "channels_last" and not fits:
            passes += read_twice
        mask = self.elements // 8 if self.variant == "add_relu" and self.phase != "eval" else 0
        return passes * tensor_bytes + mask

    def _channels(self) -> Iterator[slice]:
        """Channels have nothing to do with each other: a few at a time stay in the caches, in
        float64, with what is made of them."""
        each = self.elements // self.shape[1]
        # A line of memory holds sixteen channels of a pixel.
        return parts_of(self.shape[1], each, self.device, 16 if self.last else 1)

    def _per_channel(self, value: torch.Tensor, channels: slice) -> torch.Tensor:
        return value.detach()[channels].double().view(1, -1, *[1] * (len(self.shape) - 2))

    def _normalized(self, inputs: _Set, channels: slice) -> tuple[torch.Tensor, torch.Tensor]:
        """x̂ and 1/σ."""
        x = inputs.x.detach()[:, channels].double()
        if self.phase == "eval":
            mean, var = (self._per_channel(t, channels) for t in (self.mean, self.var))
        else:
            axes = [d for d in range(x.dim()) if d != 1]
            mean = x.mean(axes, keepdim=True)
            var = (x - mean).square().mean(axes, keepdim=True)
        rstd = (var + EPS).rsqrt()
        return (x - mean) * rstd, rstd

    def _before_activation(
        self, inputs: _Set, channels: slice, x_hat: torch.Tensor
    ) -> torch.Tensor:
        weight, bias = (self._per_channel(t, channels) for t in (self.weight, self.bias))
        y = x_hat * weight + bias
        if inputs.residual is None:
            return y
        return y + inputs.residual.detach()[:, channels].double()

    def _expected(self, inputs: _Set, channels: slice) -> list[torch.Tensor]:
        """y, or dx, dweight, dbias and, if there is a residual, its gradient."""
        x_hat, rstd = self._normalized(inputs, channels)
        before = self._before_activation(inputs, channels, x_hat)
        if self.phase != "backward":
            return [before if self.variant == "plain" else before.clamp(min=0)]
        # dx = w·rstd·(dz − Σdz/M − x̂·Σ(dz·x̂)/M), dw = Σ dz·x̂, db = Σ dz; dz = dy where y > 0
        dz = inputs.dy[:, channels].double()
        if self.variant != "plain":
            dz = dz * (before > 0)
        axes = [d for d in range(dz.dim()) if d != 1]
        projection = (dz * x_hat).mean(axes, keepdim=True)
        dx = dz - dz.mean(axes, keepdim=True) - x_hat * projection
        dx = dx * rstd * self._per_channel(self.weight, channels)
        residual = [dz] if self.variant == "add_relu" else []
        return [dx, (dz * x_hat).sum(axes), dz.sum(axes), *residual]

    def check(self, ours: bool) -> Any:
        """Elementwise bounds: one rounding to the dtype for ours, three for a composition.

        Sums over M elements: dweight and dbias grow as √M, and so does the bound.
        """
        fp32 = self.dtype is torch.float32
        summed = self.elements / self.shape[1]
        rtol = (2e-6 if fp32 else 2.0**-8) * (1 if ours else 3)
        # torch sums channels_last statistics in fp32, one row after the other
        drift = 0.0 if ours else summed**0.5 * 2e-6
        atol = (1e-5 if fp32 else (2.0**-8 if ours else self.margin)) + drift
        # a stock sum may add its M terms one after the other in fp32
        scale = summed**0.5 * 1e-5 if ours else max(summed * 2.0**-24, summed**0.5 * 1e-4)

        def check(output: Any, index: int) -> None:
            outputs = output if self.phase == "backward" else [output]
            for channels, expected in self._expected_once(index):
                for position, (got, want) in enumerate(zip(outputs, expected, strict=True)):
                    if want.dim() == 1:  # dweight, dbias
                        assert_close(got[channels], want.double(), 1e-4, scale, position)
                    else:
                        assert_close(got[:, channels], want.double(), rtol, atol, position)

        return check

    def _expected_once(self, index: int) -> list[tuple[slice, list[torch.Tensor]]]:
        """Worked out in float64 once for all sides, and kept in float32: a thirtieth of the least
        bound."""
        if index not in self.expected:
            self.expected[index] = [
                (channels, [t.float() for t in self._expected(self.sets[index], channels)])
                for channels in self._channels()
            ]
        return self.expected[index]

    def side(self, forward: Any) -> Any:
        """What is timed: `forward(x, residual, mean, var, weight, bias, training)`, or its
        backward through graphs that are built here, before any timing."""
        mean, var = self.mean.clone(), self.var.clone()
        training = self.phase != "eval"

        def run(index: int) -> torch.Tensor:
            inputs = self.sets[index]
            return forward(inputs.x, inputs.residual, mean, var, self.weight, self.bias, training)

        if self.phase != "backward":
            return run
        outputs = [run(index) for index in range(len(self.sets))]

        def backward(index: int) -> tuple[torch.Tensor, ...]:
            inputs = self.sets[index]
            leaves = [inputs.x, self.weight, self.bias]
            if inputs.residual is not None:
                leaves.append(inputs.residual)
            return torch.autograd.grad(outputs[index], leaves, inputs.dy, retain_graph=True)

        return backward


def _ours(activation: str | None) -> Any:
    def forward(x, residual, mean, var, weight, bias, training):
        return BF.batch_norm(
            x, mean, var, weight, bias, training, 0.1, EPS, activation=activation, residual=residual
        )

    return forward


def _torch(variant: str, in_place: bool) -> Any:
    def forward(x, residual, mean, var, weight, bias, training):
        y = F.batch_norm(x, mean, var, weight, bias, training, 0.1, EPS)
        if residual is not None:
            y = y.add_(residual) if in_place else y + residual
        if variant == "plain":
            return y
        return F.relu_(y) if in_place else F.relu(y)

    return forward


@pytest.mark.parametrize(("shape", "dtype", "layout", "variant", "phase", "cached"), _cases())
def test_batch_norm(request, pair, device, threads, shape, dtype, layout, variant, phase, cached):
    problem = Problem(shape, dtype, layout, variant, phase, device, cached)
    stock = _torch(variant, in_place=False)
    peers = {"torch": problem.side(stock)}
    if variant != "plain":
        peers["torch in place"] = problem.side(_torch(variant, in_place=True))
    if request.config.getoption("--compile"):
        torch.compiler.reset()
        peers["torch.compile"] = problem.side(torch.compile(stock, fullgraph=True))
    with torch.set_grad_enabled(phase != "eval"):
        pair(
            ours=problem.side(_ours(None if variant == "plain" else "relu")),
            peers=peers,
            check=problem.check(ours=True),
            peer_check=problem.check(ours=False),
            bytes_moved=None if cached else problem.bytes_moved(),
            rotate=len(problem.sets),
            cached=cached,
            op=f"batch_norm {variant.replace('_', ' + ')}, {phase}",
            case={
                "shape": "×".join(map(str, shape)),
                "dtype": dtype_name(dtype),
                "layout": layout,
                **({"inputs": "cached"} if cached else {}),
            },
        )
