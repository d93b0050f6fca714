"""Every batch norm kernel once or more, for a process that runs under sanitizers.

python -m tests.emulator.sanitized_batch_norm LIBRARY
"""

from __future__ import annotations

import ctypes
import itertools
import sys
from collections.abc import Iterator

from . import batch_norm, emulator
from .batch_norm import Problem

SHAPES = (
    (2, 8, 64),  # widest units
    (2, 12, 196),  # units of 4
    (3, 7, 49),  # single elements
    (1, 264, 12),  # two tiles of channels; a block for each, channels first, shows nothing more
)
CASES = [
    (shape, layout)
    for shape, layout in itertools.product(SHAPES, batch_norm.LAYOUTS)
    if shape[1] != 264 or layout == "channels_last"
]


TENSORS = ("x", "y", "dy", "residual", "dx", "dresidual")


def problems() -> Iterator[Problem]:
    """Every dtype, layout, unit width and activation, with and without a mask, train and eval."""
    for (shape, layout), dtype in itertools.product(CASES, ("f32", "f16", "bf16")):
        for activation, residual in (("none", False), ("relu", False), ("relu", True)):
            yield Problem(
                *shape,
                layout=layout,
                dtype=dtype,
                activation=activation,
                residual=residual,
                training=shape[1] != 12,
            )
    for dtype, layout in itertools.product(("f32", "f16", "bf16"), batch_norm.LAYOUTS):
        # Rows would allow whole units, the pointers do not.
        yield Problem(2, 8, 64, layout=layout, dtype=dtype, activation="relu", misaligned=1)
    for layout, tensor in itertools.product(batch_norm.LAYOUTS, TENSORS):  # one pointer alone
        given = {"layout": layout, "dtype": "bf16", "activation": "gelu", "residual": True}
        yield Problem(2, 16, 64, **given, misaligned=1, misaligned_tensors=(tensor,))
    # The activations without an instance of their own, with a mask and with z from the residual.
    for (shape, layout), dtype in itertools.product(CASES, ("f32", "bf16")):
        for activation in ("leaky_relu", "gelu_tanh"):
            yield Problem(*shape, layout=layout, dtype=dtype, activation=activation, residual=True)
    for layout in batch_norm.LAYOUTS:  # several chunks, and blocks that share them
        for ghost in (0, 4):
            yield Problem(5, 3, 4096, layout=layout, activation="relu", ghost=ghost)


def main() -> None:
    emulator.Memory.exact = True
    library = batch_norm.load(ctypes.CDLL(sys.argv[1]))
    count = 0
    for problem in problems():
        # Kept on the chip by one block, and streamed; the large ones by several.
        devices = tuple(batch_norm.DEVICES) if problem.HxW == 4096 else ("Hopper", "streams")
        for device in devices:
            with batch_norm.device(library, device, "random", seed=count):
                saved = batch_norm.forward(library, problem)
                batch_norm.backward(library, problem, saved)
        count += 1
    print(f"ran {count} problems")


if __name__ == "__main__":
    main()
