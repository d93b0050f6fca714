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
import itertools
from collections.abc import Iterator
from dataclasses import dataclass

from . import batch_norm, group_norm, norm, optimizers, ptx

BATCH_NORM = (8, 64, 3136)  # N, C, HxW
GROUP_NORM = (1, 320, 4096, 32)  # N, C, HxW, G
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


def _problems(
    kind: type[norm.Problem], shape: tuple[int, ...], variant: tuple[str, bool]
) -> Iterator[tuple[str, norm.Problem]]:
    for dtype, layout, how in itertools.product(SIZES, norm.LAYOUTS, (("none", False), variant)):
        activation, residual = how
        name = f"{kind.operation} {dtype} {layout} {activation}{' + residual' * residual}"
        options = {"dtype": dtype, "layout": layout}
        yield name, kind(*shape, activation=activation, residual=residual, **options)


def norms(wanted: str = "") -> Iterator[Row]:
    """Forward and backward of each norm whose name `wanted` is a part of."""
    for module, shape, variant in (
        (group_norm, GROUP_NORM, ("silu", False)),
        (batch_norm, BATCH_NORM, ("relu", True)),
    ):
        problems = [
            (name, p) for name, p in _problems(module.Problem, shape, variant) if wanted in name
        ]
        if not problems:
            continue
        library = module.library()
        with ptx.running(library):
            ptx.take_counts(library)
            for name, p in problems:
                elements, size = p.N * p.C * p.HxW, SIZES[p.dtype]
                saved = norm.forward(library, p)
                counts = ptx.take_counts(library)
                yield Row(f"{name}, forward", elements, (2 + p.residual) * size, counts)
                norm.backward(library, p, saved)
                counts = ptx.take_counts(library)
                yield Row(f"{name}, backward", elements, (3 + p.residual) * size, counts)


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
    for row in itertools.chain(norms(wanted), steps(wanted)):
        print(row, flush=True)


if __name__ == "__main__":
    main()
