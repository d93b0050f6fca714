"""How many instructions of PTX threads run for each element and byte of norms and optimizers.

    python -m tests.emulator.instructions [--lines] [part of a row's name]

An H200 issues about seven for each byte that its memory moves (132 multiprocessors, 128 a
clock, 1.98 GHz, 4.8 TB/s): a kernel beyond that is bound by its instructions. ptxas leaves out most
mov and ld.param, makes two of some 64-bit ones and some twenty of a division of integers, so this
tells which kernels to look at, and not their time; divisions have a column of their own. With
--lines each row is followed by the PTX that runs most often.

The emulated device has eight multiprocessors, enough for the largest clusters: a larger one may
spread a problem over more blocks.
"""

from __future__ import annotations

import argparse
import itertools
from collections import Counter
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path

from . import batch_norm, emulator, group_norm, norm, optimizers, ptx

BATCH_NORM = (64, 64, 3136)  # N, C, HxW
GROUP_NORM = (1, 320, 4096, 32)  # N, C, HxW, G
MULTIPROCESSORS = 8
SIZES = {"bf16": 2, "f32": 4}


@dataclass
class Row:
    name: str
    elements: int
    bytes_each: int  # of an element, that move at least
    lines: list[ptx.Count]

    @property
    def counts(self) -> Counter[str]:
        return ptx.by_name(self.lines)

    @property
    def an_element(self) -> float:
        return sum(line.runs for line in self.lines) / self.elements

    @property
    def a_byte(self) -> float:
        return self.an_element / self.bytes_each

    def __str__(self) -> str:
        most = self.counts.most_common(6)
        each = ", ".join(f"{name} {count / self.elements:.1f}" for name, count in most)
        divisions = (self.counts["div"] + self.counts["rem"]) / self.elements
        return (
            f"{self.name:<52} {self.an_element:6.1f} {self.a_byte:6.2f} {divisions:6.3f}   {each}"
        )

    def hottest(self, least: float = 0.02) -> Iterator[str]:
        """Stretches of PTX that run as a whole, the most frequent first: those with this share."""
        lines = sorted(self.lines, key=lambda line: (line.file, line.line))
        whole = [list(of) for _, of in itertools.groupby(lines, lambda x: (x.file, x.runs))]
        whole.sort(key=lambda of: -len(of) * of[0].runs)
        for of in whole:
            share = len(of) * of[0].runs / self.elements
            if share < least * self.an_element:
                return
            first, last = of[0], of[-1]
            yield f"  {share:.2f} an element: {len(of)} x {first.runs / self.elements:.4f}"
            text = Path(first.file).read_text().splitlines()[first.line - 1 : last.line]
            yield from (f"    {first.line + k}  {line.strip()}" for k, line in enumerate(text))


def _problems(
    kind: type[norm.Problem], shape: tuple[int, ...], variant: tuple[str, bool]
) -> Iterator[tuple[str, norm.Problem]]:
    for dtype, layout, how in itertools.product(SIZES, norm.LAYOUTS, (("none", False), variant)):
        activation, residual = how
        name = f"{kind.operation} {dtype} {layout} {activation}{' + residual' * residual}"
        options = {"dtype": dtype, "layout": layout}
        without = () if residual else ("dresidual",)
        yield (
            name,
            kind(*shape, activation=activation, residual=residual, without=without, **options),
        )


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
        with (
            ptx.running(library),
            emulator.schedule(library, "forward", multiprocessors=MULTIPROCESSORS),
        ):
            ptx.take_lines(library)
            for name, p in problems:
                elements, size = p.N * p.C * p.HxW, SIZES[p.dtype]
                saved = norm.forward(library, p)
                lines = ptx.take_lines(library)
                yield Row(f"{name}, forward", elements, (2 + p.residual) * size, lines)
                norm.backward(library, p, saved)
                lines = ptx.take_lines(library)
                yield Row(f"{name}, backward", elements, (3 + p.residual) * size, lines)


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
            ptx.take_lines(library)
            optimizers.run(library, kind(tensors, max_grad_norm=clip))
            lines = ptx.take_lines(library)
        yield Row(name, elements, bytes_each + 4 * (clip is not None), lines)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("wanted", nargs="?", default="", help="a part of the rows' names")
    parser.add_argument("--lines", action="store_true", help="what runs most often, too")
    args = parser.parse_args()
    print(
        f"{'instructions of PTX':<52} {'elem.':>6} {'byte':>6} {'div':>6}   of each, for an element"
    )
    for row in itertools.chain(norms(args.wanted), steps(args.wanted)):
        print(row, flush=True)
        if args.lines:
            print("\n".join(row.hottest()), flush=True)


if __name__ == "__main__":
    main()
