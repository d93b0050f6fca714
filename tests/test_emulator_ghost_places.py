"""As test_emulator_places.py, of ghost batches: every element once, in the column of its ghost
batch, for tensors up to 2^35 elements."""

from __future__ import annotations

import ctypes
import itertools

import numpy as np
import pytest

from .emulator import build
from .emulator.batch_norm import LAYOUTS
from .test_emulator_places import STEPS, check_entries, places


@pytest.fixture(scope="module")
def library() -> ctypes.CDLL:
    return build.library("places", [], ["places_api.cpp"])


def check(visited, shape, layout, step, width, row, ghost):
    N, C, HxW = shape
    by_channel = visited | {"channel": visited["channel"] % C}
    check_entries(by_channel, shape, layout, width, row)
    offset = visited["offset"]
    channel = by_channel["channel"]
    if step == "apply":  # a column of the statistics
        full, left = N // ghost, N % ghost
        ghosts = full + (left * HxW > 1)
        channel = channel + np.minimum(offset // (C * HxW) // ghost, ghosts - 1) * C
    np.testing.assert_array_equal(visited["channel"], channel)


GHOSTS = [
    pytest.param((1 << 30, 8, 4), 1 << 20, id="1024 of 2^23 rows"),
    pytest.param((1 << 30, 8, 4), 1 << 29, id="two of 2^32 rows"),
    pytest.param(((1 << 30) + 1, 8, 1), 1 << 29, id="a value more"),
]


@pytest.mark.parametrize("masked", [False, True])
@pytest.mark.parametrize("layout", LAYOUTS)
@pytest.mark.parametrize(("shape", "ghost"), GHOSTS)
def test_ghost_batches_beyond_32_bits(library, shape, ghost, layout, masked):
    for step, width in itertools.product(STEPS, (1, 4, 8)):
        _, _, row = places(library, shape, layout, step, 1, 0, masked, ghost)
        if row % width:
            continue
        first, pieces, _ = places(library, shape, layout, step, width, 0, masked, ghost)
        last, _, _ = places(library, shape, layout, step, width, -1, masked, ghost)
        middle, _, _ = places(library, shape, layout, step, width, pieces // 2 + 1, masked, ghost)
        for visited in (first, middle, last):
            assert visited["offset"].size > 0
            check(visited, shape, layout, step, width, row, ghost)
        assert first["offset"].min() == 0


SMALL = [((5, 3, 7), 2), ((9, 40, 64), 4), ((257, 64, 1), 128), ((129, 264, 1), 64)]


@pytest.mark.parametrize("masked", [False, True])
@pytest.mark.parametrize("layout", LAYOUTS)
@pytest.mark.parametrize(("shape", "ghost"), SMALL)
def test_each_element_of_ghost_batches_once(library, shape, ghost, layout, masked):
    for step, width in itertools.product(STEPS, (1, 4, 8)):
        _, _, row = places(library, shape, layout, step, 1, 0, masked, ghost)
        if row % width:
            continue
        _, pieces, _ = places(library, shape, layout, step, width, 0, masked, ghost)
        counts = np.zeros(int(np.prod(shape)), dtype=np.int64)
        for piece in range(pieces):
            visited, _, _ = places(library, shape, layout, step, width, piece, masked, ghost)
            check(visited, shape, layout, step, width, row, ghost)
            for j in range(width):
                np.add.at(counts, visited["offset"] + j, 1)
        assert (counts == 1).all()
