"""How many instructions of PTX threads run for each element and byte of norms and optimizers.

    python -m tests.emulator.instructions [part of a row's name]

An H200 issues about seven for each byte that its memory moves (132 multiprocessors, 128 a
clock, 1.98 GHz, 4.8 TB/s): a kernel beyond that is bound by its instructions. ptxas leaves out most
mov and ld.param and makes two of some 64-bit ones, so this tells which kernels to look at, and not
their time. The emulated device has two multiprocessors: a larger one may spread a problem over more
blocks.
"""

from __future__ import annotations

import argparse
import ctypes
import itertools
from collections.abc import Iterator
from dataclasses import dataclass

from . import batch_norm, group_norm, norm, optimizers, ptx

GROUP_NORM = (1, 320, 4096, 32)  # N, C, HxW, G
BATCH_NORM = (8, 64, 3136)  # N, C, HxW
SIZES = {"bf16": 2, "f32": 4}


@dataclass
class Row:
    name: str
    elements: int
    bytes_each: int  # of an element, that move at least
    counts: dict[str, int]

    @property
    def an_element(self) -> float:
        return sum(self.counts.values()) / self.elements

    @property
    def a_byte(self) -> float:
        return self.an_element / self.bytes_each

    def __str__(self) -> str:
        most = sorted(self.counts.items(), key=lambda item: -item[1])[:6]
        each = ", ".join(f"{name} {count / self.elements:.1f}" for name, count in most)
        return f"{self.name:<52} {self.an_element:6.1f} {self.a_byte:6.2f}   {each}"


def problems() -> Iterator[tuple[str, norm.Problem]]:
    variants = (("none", False), ("silu", False))
    for dtype, layout, (activation, residual) in itertools.product(SIZES, norm.LAYOUTS, variants):
        how = {"dtype": dtype, "layout": layout, "activation": activation, "residual": residual}
        name = f"group_norm {dtype} {layout} {activation}"
        yield name, group_norm.Problem(*GROUP_NORM, **how)
    variants = (("none", False), ("relu", True))
    for dtype, layout, (activation, residual) in itertools.product(SIZES, norm.LAYOUTS, variants):
        how = {"dtype": dtype, "layout": layout, "activation": activation, "residual": residual}
        name = f"batch_norm {dtype} {layout} {activation}{' + residual' * residual}"
        yield name, batch_norm.Problem(*BATCH_NORM, **how)


def rows(wanted: str = "") -> Iterator[Row]:
    """Forward and backward of each problem whose name `wanted` is a part of."""
    libraries: dict[str, ctypes.CDLL] = {}
    for name, problem in problems():
        if wanted not in name:
            continue
        module = {"group_norm": group_norm, "batch_norm": batch_norm}[problem.operation]
        if problem.operation not in libraries:
            libraries[problem.operation] = module.library()
        library = libraries[problem.operation]
        elements, size = problem.N * problem.C * problem.HxW, SIZES[problem.dtype]
        with ptx.running(library):
            ptx.take_counts(library)
            saved = norm.forward(library, problem)
            counts = ptx.take_counts(library)
            yield Row(f"{name}, forward", elements, (2 + problem.residual) * size, counts)
            norm.backward(library, problem, saved)
            counts = ptx.take_counts(library)
            yield Row(f"{name}, backward", elements, (3 + problem.residual) * size, counts)


def steps(wanted: str = "") -> Iterator[Row]:
    """The same of an optimizer's step over float32 tensors that stay on the chip."""
    kinds = ((optimizers.Problem, 28), (optimizers.Lars, 20))
    for (kind, bytes_each), clip in itertools.product(kinds, (None, 0.05)):
        name = f"{kind.kind} f32{' clipped' if clip else ''}"
        if wanted not in name:
            continue
        library = optimizers.library()
        tensors = [optimizers.Parameter(16 * optimizers.CHUNK) for _ in range(4)]
        elements = sum(x.numel for x in tensors)
        with ptx.running(library), optimizers.device(library, "Hopper"):
            ptx.take_counts(library)
            optimizers.run(library, kind(tensors, max_grad_norm=clip))
            counts = ptx.take_counts(library)
        yield Row(name, elements, bytes_each + 4 * (clip is not None), counts)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("wanted", nargs="?", default="", help="a part of the rows' names")
    print(f"{'instructions of PTX':<52} {'elem.':>6} {'byte':>6}   of each, for an element")
    wanted = parser.parse_args().wanted
    for row in itertools.chain(rows(wanted), steps(wanted)):
        print(row, flush=True)


if __name__ == "__main__":
    main()
