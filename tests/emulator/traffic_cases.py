"""Every operation with its shapes and variants, and the traffic that each should have.

`least` is what kernels.md's floors allow for a tensor that fits on the chip, where a kernel does
not reach it: batch norm that is streamed because nothing is kept there, and LAMB.
"""

from __future__ import annotations

import itertools
from collections.abc import Callable, Iterable, Iterator
from dataclasses import dataclass, replace
from functools import cache

from . import batch_norm, optimizers
from .numbers import Numbers
from .recording import Recording, record
from .traffic import Passes, assert_traffic


@dataclass
class Case:
    operation: str
    shape: str
    variant: str
    record: Callable[[], Recording]
    passes: dict[str, Passes]
    written: tuple[str, ...]  # outputs, each byte written once
    other: int  # bytes of small data, see assert_traffic
    efficiency: float  # of sectors, at least; of all tensors of `passes` but masks
    unit: int  # bytes that one pass is
    least: float  # passes in units

    def assert_holds(self, recording: Recording) -> None:
        efficiency = {name: self.efficiency for name in self.passes if name != "mask"}
        recording.assert_in_bounds()
        assert_traffic(recording, self.passes, other=self.other, efficiency=efficiency)
        for name in self.written:
            recording.assert_written(name)

    def __str__(self) -> str:
        return "-".join((self.operation, self.shape, self.variant)).replace(" ", "_")


@cache
def _batch_norm_library():
    return batch_norm.library(instrument=True)


@cache
def _optimizers_library():
    return optimizers.library(instrument=True)


# ---- batch norm

SHAPES = {  # N, C, HxW: why, chunks a channel in each layout
    (2, 8, 64): ("rows of whole 16-byte units in both layouts", (1, 1)),
    (5, 6, 49): ("7 x 7: element accesses, rows that end inside sectors", (1, 2)),
    (2, 12, 196): ("14 x 14 and 12 channels: units of 4", (1, 4)),
    (4, 2, 3072): ("several chunks a channel, cut within a plane; clusters", (2, 12)),
}
MOST_PARTS = 6  # of a set that flows through the chip, here: three blocks on each of two


# Activation and whether there is a residual: without z, with z of x, with a bit, with z of both, by
# the kernels of one activation and by those of any.
BATCH_NORM_VARIANTS = (
    ("none", False),
    ("relu", False),
    ("relu", True),
    ("leaky_relu", True),
    ("silu", False),
    ("gelu", True),
)


def _sector_efficiency(problem: batch_norm.Problem) -> float:
    """What alignment alone allows: 1 where rows are whole sectors.

    Else a warp's units of 4 two-byte elements, 256 bytes, lie in 9 sectors at worst and in one more
    where its row ends; its single elements, 64 bytes, in 3 and one more.
    """
    _, row = problem.rows
    if row * Numbers(problem.dtype).itemsize % 32 == 0:
        return 1.0
    return 256 / (10 * 32) if row % 4 == 0 else 64 / (4 * 32)


def _batch_norm_cases() -> Iterator[Case]:
    for (shape, (_, chunks)), layout, training in itertools.product(
        SHAPES.items(), batch_norm.LAYOUTS, (True, False)
    ):
        # f16 has bf16's size and goes by the same code: with one shape only.
        dtypes = ("f32", "bf16", "f16") if shape == next(iter(SHAPES)) else ("f32", "bf16")
        for dtype, (activation, residual) in itertools.product(dtypes, BATCH_NORM_VARIANTS):
            problem = batch_norm.Problem(
                *shape,
                layout=layout,
                dtype=dtype,
                activation=activation,
                residual=residual,
                training=training,
            )
            in_layout = chunks[batch_norm.LAYOUTS[layout]]
            yield _forward(problem, in_layout, "streams")
            yield _backward(problem, in_layout, "Hopper")
            if training:
                yield _forward(problem, in_layout, "Hopper")
                yield _backward(problem, in_layout, "streams")
                yield _apply(problem)


def _variant(problem: batch_norm.Problem, device: str) -> str:
    layout = {"channels_first": "first", "channels_last": "last"}[problem.layout]
    words = [problem.dtype, layout, "train" if problem.training else "eval"]
    words += ["add"] if problem.residual else []
    words += [problem.activation] if problem.activation != "none" else []
    words += ["streamed"] if device == "streams" and problem.training else []
    return " ".join(words)


def _case(
    problem: batch_norm.Problem,
    operation: str,
    device: str,
    before: Callable[[], None],
    run: Callable[[], object],
    passes: dict[str, Passes],
    written: Iterable[str],
    small: int,
    least: int,
) -> Case:
    """Of run(), after before(). `small`: bytes of a channel's data; `least`: passes over tensors of
    x's size."""
    p, library = problem, _batch_norm_library()

    def recorded() -> Recording:
        with batch_norm.device(library, device):
            before()
            with record(library) as recording:
                run()
        return recording

    itemsize = Numbers(p.dtype).itemsize
    return Case(
        f"batch_norm {operation}",
        f"{p.N}x{p.C}x{p.HxW}",
        _variant(p, device),
        recorded,
        passes,
        tuple(written),
        p.C * small,
        _sector_efficiency(p),
        p.N * p.C * p.HxW * itemsize,
        least + p.masked / 8 / itemsize,
    )


def _elementwise(problem: batch_norm.Problem) -> dict[str, Passes]:
    passes = {"y": Passes(written=1)}
    passes |= {"residual": Passes(read=1)} if problem.residual else {}
    return passes | ({"mask": Passes(written=1)} if problem.masked else {})


def _forward(problem: batch_norm.Problem, chunks: int, device: str) -> Case:
    p, streams = problem, device == "streams"
    passes = {"x": Passes(read=2 if p.training and streams else 1)} | _elementwise(p)
    written = ["y", "stats"]
    written += ["mask"] if p.masked else []
    written += ["running_mean", "running_var"] if p.training else []
    # weight, bias; running statistics; mean, rstd; what the apply reads: written and read.
    small = 2 * 4 + (4 if p.training else 2) * 4 + 3 * 4 + (2 * 16 if streams else 0)
    moments = 2 * 16 * chunks if p.training and chunks > 1 and streams else 0
    moments += _passed(p, 16) if p.training and not streams else 0
    return _case(
        p,
        "forward",
        device,
        lambda: None,
        lambda: batch_norm.forward(_batch_norm_library(), p),
        passes,
        written,
        small + moments,
        2 + p.residual,
    )


def _passed(p: batch_norm.Problem, sums: int) -> int:
    """What a channel's blocks tell each other in channels_first: each part's sums, written and
    read, and a counter in a line of its own, set to 0 and read."""
    if p.layout == "channels_last" or p.N * p.HxW <= 8192:
        return 0
    return 2 * MOST_PARTS * sums + 128 + 4


def _apply(problem: batch_norm.Problem) -> Case:
    """y once more, from known statistics."""
    p, library = replace(problem), _batch_norm_library()

    def before() -> None:
        p.known_stats = batch_norm.forward(library, problem)["stats"]

    return _case(
        p,
        "apply",
        "Hopper",
        before,
        lambda: batch_norm.forward(library, p),
        {"x": Passes(read=1)} | _elementwise(p),
        ("y", *(["mask"] if p.masked else [])),
        2 * 4 + 3 * 4 + 2 * 16,
        2 + p.residual,
    )


def _backward(problem: batch_norm.Problem, chunks: int, device: str) -> Case:
    p, streams = problem, device == "streams"
    needs_z = p.activation != "none"
    reads_x = p.training or p.recomputed  # in the apply
    adds = p.residual and p.recomputed
    times = 2 if streams else 1
    passes = {
        "dy": Passes(read=times),
        "x": Passes(read=times if reads_x else 1),
        "dx": Passes(written=1),
    }
    if needs_z:
        passes["dresidual"] = Passes(written=1)
    if p.masked:  # its bits are not kept
        planes = p.layout == "channels_first" and not streams
        apart = planes and p.HxW % (16 // Numbers(p.dtype).itemsize) != 0
        passes["mask"] = Passes(read=2, bits=True, again=2.0 if apart else 1.25)
    if adds:
        passes["residual"] = Passes(read=times)
    saved, library = {}, _batch_norm_library()

    def before() -> None:
        saved.update(saved or batch_norm.forward(library, p))

    # weight, bias, stats; dweight, dbias; what the apply reads: written and read.
    small = 2 * 4 + 3 * 4 + 2 * 4 + (2 * (16 + 4) if streams else 0)
    sums = 2 * 8 * chunks if chunks > 1 and streams else 0
    sums += 0 if streams else _passed(p, 8)
    return _case(
        p,
        "backward",
        device,
        before,
        lambda: batch_norm.backward(library, p, saved),
        passes,
        (*(name for name in passes if name.startswith("d") and name != "dy"), "dweight", "dbias"),
        small + sums,
        3 + needs_z + adds,
    )


# ---- LAMB and LARS

OPTIMIZER_SIZES = (  # elements, past a 64-byte boundary: why
    (4096, 0, "whole units"),
    (37, 0, "a warp's tensor; units of four and a tail"),
    (4 * optimizers.CHUNK + 5, 0, "five chunks"),
    (1030, 1, "no unit fits"),
)
OPTIMIZER_DTYPES = (  # p, g, with a master
    ("f32", "f32", False),
    ("bf16", "bf16", False),
    ("f16", "f32", False),
    ("bf16", "bf16", True),
)


def _optimizer_cases() -> Iterator[Case]:
    """On a device that keeps all of it on the chip."""
    for kind, (numel, offset, _), (p, g, master), clip in itertools.product(
        (optimizers.Problem, optimizers.Lars), OPTIMIZER_SIZES, OPTIMIZER_DTYPES, (0.05, None)
    ):
        yield _optimizer_case(
            kind, optimizers.Parameter(numel, p, g, offset=offset, master=master), clip
        )


def _optimizer_case(kind: type, x: optimizers.Parameter, clip: float | None) -> Case:
    problem = kind([x], max_grad_norm=clip)
    if kind is optimizers.Lars:
        problem.groups[0].momentum = 0.9
    changed = [name for name in problem.arrays(x) if name != "g"]
    passes = {f"{name}0": Passes(read=1, written=1) for name in changed}
    if x.master:
        passes["p0"] = Passes(written=1)
    passes["g0"] = Passes(read=2 if clip else 1)
    chunks = -(-x.numel // optimizers.CHUNK) if x.numel > optimizers.SMALL else 0
    groups = -(-chunks // 32)
    sums = 5 if kind is optimizers.Problem else 3

    def run() -> Recording:
        library = _optimizers_library()
        with record(library) as recording, optimizers.device(library, "Hopper"):
            optimizers.run(library, problem)
        return recording

    sizes = {name: start.element_size() for name, start in x.start.items()}
    return Case(
        problem.kind,
        f"{x.numel}" + (f"+{x.offset}" if x.offset else ""),
        f"p {x.p_dtype} g {x.g_dtype}" + " master" * x.master + " clip" * bool(clip),
        run,
        passes,
        tuple(f"{name}0" for name in changed),
        # The table's entry and the chunks' tensor, and squares of a piece, sums of a chunk and the
        # outcome, all written and read; three kinds of counters, set to 0 by 16 bytes, read and
        # written; stats. Of groups of chunks the sums are written.
        2 * (72 + 4 * max(chunks, 1) + 8 * max(chunks, 1) + 8 * sums * chunks + 52)
        + 3 * 16
        + 2 * 8
        + 16
        + (8 + 8 * sums) * groups,
        # Single elements of 2 bytes: a warp's 64 lie in 3 sectors. A tail is one more access.
        0.5 if x.offset or x.numel < 64 else 0.99,
        x.numel,
        sum(sizes[n[:-1]] * (both.read + both.written) for n, both in passes.items()),
    )


def cases() -> Iterator[Case]:
    yield from _batch_norm_cases()
    yield from _optimizer_cases()
