"""Every group norm kernel once or more, for a process that runs under sanitizers.

python -m tests.emulator.sanitized_group_norm LIBRARY
"""

from __future__ import annotations

import ctypes
import itertools
import sys
from collections.abc import Iterator

from . import emulator, group_norm
from .group_norm import Problem

SHAPES = (
    (2, 16, 64, 2),  # whole units
    (3, 10, 49, 5),  # units in two channels
    (3, 33, 1, 1),  # layer norm
)
LARGE = (1, 20, 1111, 2)  # streamed on a small device, a cluster with clusters


TENSORS = ("x", "y", "dy", "residual", "dx", "dresidual")


def problems() -> Iterator[tuple[str, Problem]]:
    """Every dtype, layout and unit width, kept and streamed, with and without a mask."""
    variants = (("none", False), ("silu", True), ("relu", True))
    for dtype, layout in itertools.product(("f32", "f16", "bf16"), group_norm.LAYOUTS):
        for activation, residual in variants:
            given = {
                "layout": layout,
                "dtype": dtype,
                "activation": activation,
                "residual": residual,
            }
            for shape in SHAPES:
                yield "Hopper", Problem(*shape, **given)
            for device in ("small", "small with clusters"):
                yield device, Problem(*LARGE, **given)
        # Rows would allow whole units, the pointers do not.
        yield "Hopper", Problem(2, 16, 64, 2, layout=layout, dtype=dtype, misaligned=1)
    given = {"activation": "silu", "misaligned": 1, "misaligned_tensors": ("bias",)}
    yield "Hopper", Problem(5, 48, 1, 1, **given)
    for layout, tensor in itertools.product(group_norm.LAYOUTS, TENSORS):  # one pointer alone
        given = {"layout": layout, "dtype": "bf16", "activation": "gelu", "residual": True}
        given |= {"misaligned": 1, "misaligned_tensors": (tensor,)}
        yield "Hopper", Problem(2, 16, 64, 2, **given)


def main() -> None:
    emulator.Memory.exact = True
    library = group_norm.load(ctypes.CDLL(sys.argv[1]))
    count = 0
    for device, problem in problems():
        with (
            group_norm.device(library, device),
            emulator.schedule(library, "random", seed=count),
        ):
            saved = group_norm.forward(library, problem)
            group_norm.backward(library, problem, saved)
        count += 1
    print(f"ran {count} problems")


if __name__ == "__main__":
    main()
