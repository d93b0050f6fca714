"""Device times of every CUDA kernel over the shapes that count, in about a minute: for tuning.

    python bench/sweep.py                            all, as a table
    python bench/sweep.py --only "batch_norm relu"   cases whose names have all of these words
    python bench/sweep.py --kernels                  and each kernel's own time, by torch's profiler
    python bench/sweep.py --out sweep.json           the figures too

Nothing is checked here: the tests and the benches do that. Each case is a CUDA graph of calls on
inputs that together are four times the L2 cache, replayed a few times; the figure is the median
replay's time for one call. The floor is what must move at least (benchmarks.md) at the speed of a
copy in the same run. Optimizer steps are timed by events around five steps, `host` is the host's
time for issuing one.
"""

from __future__ import annotations

import argparse
import itertools
import json
import statistics
import time
from collections.abc import Callable, Iterator
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch
import torch.nn.functional as F
from bench_batch_norm import CUDA_SHAPES as BATCH_NORM_SHAPES
from bench_group_norm import CUDA_SHAPES as GROUP_NORM_SHAPES
from bench_group_norm import GROUPS
from bench_optimizers import LARS_OPTIONS, bert, resnet50
from common import dtype_name, last_level_cache_bytes

from batchops import functional as BF
from batchops.optim import LAMB, LARS

SMALL = [(8, 32, 16, 16), (2, 8, 4, 4)]
ROWS = [(8192, 1024), (8192, 4096), (8, 256)]
REPLAYS = 5
STEPS = 5
CAPTURED_SECONDS = 4e-4  # of calls in a graph, at least
COPY_BYTES = 256 << 20
MODELS: dict[str, Callable[[], list[tuple[int, ...]]]] = {
    "ResNet-50": resnet50,
    "BERT, 24 layers": lambda: bert(24),
    "2,000 tensors of 256": lambda: [(256,)] * 2000,
}

Call = Callable[[], Any]


@dataclass
class Norm:
    """One case: `make(side, fill)` gives a call on inputs of its own."""

    name: str
    bytes: int
    make: Callable[[str, Callable[..., torch.Tensor]], Call]


@dataclass
class Row:
    name: str
    bytes: int
    us: dict[str, float] = field(default_factory=dict)
    host_us: dict[str, float] = field(default_factory=dict)
    kernels: list[tuple[str, float]] = field(default_factory=list)
    failed: dict[str, str] = field(default_factory=dict)


def norms(batch: int | None) -> Iterator[Norm]:
    """`batch`: in the place of each shape's own, but for rows."""

    def sizes(shapes: list[tuple[int, ...]]) -> Iterator[tuple[int, ...]]:
        for shape in [*shapes, *SMALL]:
            yield shape if batch is None else (batch, *shape[1:])

    layouts = {"contiguous": torch.contiguous_format, "channels_last": torch.channels_last}
    dtypes = (torch.float32, torch.bfloat16)
    for shape, dtype, layout, variant, phase in itertools.product(
        sizes(GROUP_NORM_SHAPES), dtypes, layouts, ("plain", "silu"), ("forward", "backward")
    ):
        elements = torch.Size(shape).numel()
        groups = min(GROUPS, shape[1])
        silu = variant == "silu"

        def group_norm(side, x, weight, bias, residual, groups=groups, silu=silu):
            if side == "batchops":
                activation = "silu" if silu else None
                return BF.group_norm(x, groups, weight, bias, activation=activation)
            y = F.group_norm(x, groups, weight, bias)
            return F.silu(y) if silu else y

        yield Norm(
            _name("group_norm", variant, phase, shape, dtype, layout),
            elements * dtype.itemsize * (2 if phase == "forward" else 3),
            _maker(group_norm, shape, dtype, dtype, layouts[layout], phase, residual=False),
        )
    for shape, dtype, layout, variant, phase in itertools.product(
        sizes(BATCH_NORM_SHAPES),
        dtypes,
        layouts,
        ("plain", "relu", "add_relu"),
        ("forward", "backward"),
    ):
        elements = torch.Size(shape).numel()
        added = variant == "add_relu"
        relu = variant != "plain"

        def batch_norm(side, x, weight, bias, residual, relu=relu):
            if side == "batchops":
                activation = "relu" if relu else None
                return BF.batch_norm(
                    x, None, None, weight, bias, True, activation=activation, residual=residual
                )
            y = F.batch_norm(x, None, None, weight, bias, True)
            y = y if residual is None else y.add_(residual)
            return F.relu_(y) if relu else y

        passes = (2 if phase == "forward" else 3) + added
        yield Norm(
            _name("batch_norm", variant, phase, shape, dtype, layout),
            elements * dtype.itemsize * passes + (elements // 8 if added else 0),
            _maker(batch_norm, shape, dtype, torch.float32, layouts[layout], phase, added),
        )

    for shape, dtype, phase in itertools.product(ROWS, dtypes, ("forward", "backward")):

        def layer_norm(side, x, weight, bias, residual, width=shape[1]):
            norm = BF.layer_norm if side == "batchops" else F.layer_norm
            return norm(x, (width,), weight, bias)

        yield Norm(
            _name("layer_norm", "plain", phase, shape, dtype, "contiguous"),
            torch.Size(shape).numel() * dtype.itemsize * (2 if phase == "forward" else 3),
            _maker(layer_norm, shape, dtype, dtype, torch.contiguous_format, phase, residual=False),
        )


def _name(op, variant, phase, shape, dtype, layout) -> str:
    size = "×".join(map(str, shape))
    return f"{op} {variant} {phase}, {size}, {dtype_name(dtype)}, {layout}"


def _maker(norm, shape, dtype, param_dtype, memory_format, phase, residual):
    def make(side: str, fill: Callable[..., torch.Tensor]) -> Call:
        def tensor() -> torch.Tensor:
            return fill(shape).to(dtype).contiguous(memory_format=memory_format)

        weight, bias = (fill((shape[1],)).to(param_dtype).requires_grad_() for _ in range(2))
        leaves = [tensor().requires_grad_(), weight, bias]
        added = tensor().requires_grad_() if residual else None
        arguments = (side, *leaves, added)
        if phase == "forward":
            return lambda: norm(*arguments)
        dy = tensor()
        y = norm(*arguments)
        wanted = leaves if added is None else [*leaves, added]
        return lambda: torch.autograd.grad(y, wanted, dy, retain_graph=True)

    return make


class Clock:
    def __init__(self, device: torch.device) -> None:
        self.device = device
        self.stream = torch.cuda.Stream(device)
        generator = torch.Generator(device).manual_seed(0)
        self.fill = lambda shape: torch.randn(shape, generator=generator, device=device)
        self.cache = last_level_cache_bytes(device)

    def replays(self, make: Callable[[], Call], moved: int) -> float:
        """Microseconds of one call."""
        sets = 1 if moved > 4 * self.cache else min(64, -(-4 * self.cache // moved))
        count = max(sets, min(40, int(CAPTURED_SECONDS * 4e12 / moved)))
        self.stream.wait_stream(torch.cuda.current_stream())
        # The backward of what this stream did runs on it, too, and so can be captured.
        with torch.cuda.stream(self.stream):
            calls = [make() for _ in range(sets)]
            for call in calls:
                call()
        torch.cuda.synchronize()
        graph = torch.cuda.CUDAGraph()
        with torch.cuda.graph(graph, stream=self.stream):
            kept = [calls[k % sets]() for k in range(count)]
        graph.replay()
        times = [self.events(graph.replay) for _ in range(REPLAYS)]
        del kept
        return statistics.median(times) / count

    def events(self, work: Call) -> float:
        start, end = (torch.cuda.Event(enable_timing=True) for _ in range(2))
        start.record()
        work()
        end.record()
        end.synchronize()
        return start.elapsed_time(end) * 1e3

    def steps(self, step: Call) -> tuple[float, float]:
        """Microseconds of the device and of the host for one step."""
        for _ in range(3):
            step()
        device, host = [], []
        for _ in range(REPLAYS):
            torch.cuda.synchronize()
            begun = time.perf_counter()

            def several() -> None:
                for _ in range(STEPS):
                    step()
                host.append((time.perf_counter() - begun) * 1e6 / STEPS)  # noqa: B023

            device.append(self.events(several) / STEPS)
        return statistics.median(device), statistics.median(host)

    def kernels(self, call: Call) -> list[tuple[str, float]]:
        activities = [torch.profiler.ProfilerActivity.CUDA]
        call()
        torch.cuda.synchronize()
        with torch.profiler.profile(activities=activities) as profile:
            call()
            torch.cuda.synchronize()
        events = (e for e in profile.events() if e.device_type == torch.autograd.DeviceType.CUDA)
        ordered = sorted(events, key=lambda e: e.time_range.start)
        return [(e.name.split("(")[0][:80], round(e.time_range.elapsed_us(), 1)) for e in ordered]


def optimizers() -> Iterator[tuple[str, int, dict[str, Callable[[list[Any]], Any]], str, Any]]:
    """Name, bytes an element, the optimizers, the model, dtype."""
    for model, dtype in itertools.product(MODELS, (torch.float32, torch.bfloat16)):
        masters = dtype is torch.bfloat16
        for clip in (None, 1.0):
            name = f"LAMB{'' if clip is None else ', clip'}, {model}, {dtype_name(dtype)}"
            least = (28 if clip is None else 32) if not masters else (30 if clip is None else 32)
            sides = {
                "batchops": lambda p, clip=clip, masters=masters: LAMB(
                    p, max_grad_norm=clip, master_weights=masters
                ),
                "torch": lambda p: torch.optim.AdamW(p, fused=True),
            }
            yield name, least, sides, model, dtype
        sides = {
            "batchops": lambda p: LARS(p, **LARS_OPTIONS),
            "torch": lambda p: torch.optim.SGD(p, **LARS_OPTIONS, fused=True),
        }
        yield f"LARS, {model}, {dtype_name(dtype)}", 5 * dtype.itemsize, sides, model, dtype


def measure(wanted: Callable[[str], bool], clock: Clock, kernels: bool, batch: int | None):
    for case in norms(batch):
        if not wanted(case.name):
            continue
        row = Row(case.name, case.bytes)
        for side in ("batchops", "torch"):
            make = case.make
            try:
                row.us[side] = clock.replays(lambda s=side, m=make: m(s, clock.fill), case.bytes)
            except RuntimeError as error:
                row.failed[side] = str(error).splitlines()[0]
        if kernels:
            row.kernels = clock.kernels(case.make("batchops", clock.fill))
        yield row
        torch.cuda.empty_cache()
    for name, each, sides, model, dtype in optimizers():
        if not wanted(name):
            continue
        shapes = MODELS[model]()
        row = Row(name, each * sum(torch.Size(shape).numel() for shape in shapes))
        for side, optimizer_of in sides.items():
            params = []
            for shape in shapes:
                params.append(torch.nn.Parameter((clock.fill(shape) * 0.05).to(dtype)))
                params[-1].grad = (clock.fill(shape) * 0.01).to(dtype)
            optimizer = optimizer_of(params)
            row.us[side], row.host_us[side] = clock.steps(optimizer.step)
            if kernels and side == "batchops":
                row.kernels = clock.kernels(optimizer.step)
            del optimizer, params
        yield row
        torch.cuda.empty_cache()


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--only", default="", help="words that a case's name must have, all")
    parser.add_argument("--kernels", action="store_true", help="each kernel's own time as well")
    parser.add_argument("--batch", type=int, help="in the place of each shape's own")
    parser.add_argument("--out", type=Path, help="a JSON file for the figures")
    options = parser.parse_args()
    words = options.only.split()
    clock = Clock(torch.device("cuda"))
    source = torch.empty(COPY_BYTES, dtype=torch.uint8, device="cuda").random_()
    target = torch.empty_like(source)
    target.copy_(source)
    copy_us = statistics.median(clock.events(lambda: target.copy_(source)) for _ in range(9))
    speed = 2 * COPY_BYTES / copy_us  # bytes a microsecond
    print(
        f"{torch.cuda.get_device_name(0)}, a copy {speed / 1e6:.2f} TB/s, torch {torch.__version__}"
    )
    rows = []
    wanted = lambda name: all(word in name for word in words)  # noqa: E731
    for row in measure(wanted, clock, options.kernels, options.batch):
        rows.append(row)
        ours = row.us.get("batchops")
        text = f"{row.name:<72}"
        if ours is not None:
            text += f" {ours:9.1f} µs {row.bytes / speed / ours:5.0%} of the floor"
            if "torch" in row.us:
                text += f" {row.us['torch'] / ours:6.2f}x torch's {row.us['torch']:.1f}"
            if row.host_us:
                text += f", host {row.host_us['batchops']:.0f} µs of {row.host_us['torch']:.0f}"
        for side, why in row.failed.items():
            text += f"  {side}: {why[:120]}"
        print(text, flush=True)
        for kernel, us in row.kernels:
            print(f"    {us:9.1f} µs  {kernel}")
        if options.out:
            found = {"copy_bytes_a_us": speed, "rows": [vars(one) for one in rows]}
            options.out.write_text(json.dumps(found, indent=1, ensure_ascii=False) + "\n")


if __name__ == "__main__":
    main()
