"""Every element visited once, and the right one, for tensors from one element to 2^38.

Runs the batch norm kernels' own index arithmetic in the emulator with no tensor behind it.
"""

from __future__ import annotations

import ctypes
import itertools

import numpy as np
import pytest

from .emulator import build, emulator
from .emulator.batch_norm import LAYOUTS, Shape

ENTRY = ("offset", "row", "column", "channel", "valid")
STEPS = ("chunk", "apply")


@pytest.fixture(scope="module")
def library() -> ctypes.CDLL:
    return build.library("places", [], ["places_api.cpp"])


# One piece at most; -1 wherever no thread has left an entry.
BUFFER = np.full((1 << 20, len(ENTRY)), -1, dtype=np.int64)


def places(library, shape, layout, step, width, piece, masked=False, ghost=0, resident=1 << 40):
    """The visited units of one piece by field, how many pieces there are, and which of them has the
    first element."""
    N, C, HxW = shape
    arguments = Shape(N, C, HxW, LAYOUTS[layout], 0, 0, 0, 0, 0.0, ghost)
    info = np.zeros(5, dtype=np.int64)
    emulator.call(
        library.emulated_places,
        ctypes.byref(arguments),
        step.encode(),
        ctypes.c_int(width),
        ctypes.c_bool(masked),
        ctypes.c_int64(resident),
        ctypes.c_int64(piece),
        ctypes.c_int64(len(BUFFER)),
        BUFFER.ctypes.data_as(ctypes.c_void_p),
        info.ctypes.data_as(ctypes.c_void_p),
    )
    entries = BUFFER[: info[1] * 4 * 256].copy()
    BUFFER[: len(entries)] = -1
    assert (entries[:, 4] >= 0).all(), "a thread left no entry"
    entries = entries[entries[:, 4] == 1]
    return dict(zip(ENTRY, entries.T, strict=True)), *(int(info[k]) for k in (0, 3, 4))


def check_entries(visited, shape, layout, step, width, row, ghost):
    """Rows, columns and channels against the definition of the layouts in common.h; a channel of
    "apply" is a column of the statistics, which each ghost batch has its own of."""
    N, C, HxW = shape
    offset = visited["offset"]
    assert ((offset >= 0) & (offset + width <= N * C * HxW)).all()
    np.testing.assert_array_equal(visited["row"], offset // row)
    np.testing.assert_array_equal(visited["column"], offset % row)
    channel = offset // HxW % C if layout == "channels_first" else offset % C
    if step == "apply" and ghost > 0:
        full, left = N // ghost, N % ghost
        ghosts = full + (left * HxW > 1)
        channel = channel + np.minimum(offset // (C * HxW) // ghost, ghosts - 1) * C
    np.testing.assert_array_equal(visited["channel"], channel)


SMALL = [  # N, C, HxW, and the samples of a ghost batch
    ((1, 1, 1), 0),
    ((5, 3, 7), 0),
    ((2, 8, 49), 0),
    ((3, 16, 196), 0),
    ((70, 264, 1), 0),
    ((1, 2, 9000), 0),
    ((4, 1, 5000), 0),
    ((9, 40, 64), 0),
    ((5, 3, 7), 2),
    ((9, 40, 64), 4),
    ((257, 64, 1), 128),
    ((129, 264, 1), 64),
]


@pytest.mark.parametrize("masked", [False, True])
@pytest.mark.parametrize("layout", LAYOUTS)
@pytest.mark.parametrize(("shape", "ghost"), SMALL, ids=str)
@pytest.mark.parametrize("resident", [3, 100])
def test_each_element_once(library, resident, shape, ghost, layout, masked):
    numel = int(np.prod(shape))
    given = {"masked": masked, "ghost": ghost, "resident": resident}
    for step, width in itertools.product(STEPS, (1, 4, 8)):
        _, pieces, row, _ = places(library, shape, layout, step, 1, 0, **given)
        if row % width:
            continue
        _, pieces, _, _ = places(library, shape, layout, step, width, 0, **given)
        counts = np.zeros(numel, dtype=np.int64)
        for piece in range(pieces):
            visited, *_ = places(library, shape, layout, step, width, piece, **given)
            check_entries(visited, shape, layout, step, width, row, ghost)
            for j in range(width):
                np.add.at(counts, visited["offset"] + j, 1)
        assert (counts == 1).all(), f"{step}, units of {width}"


LARGE = [
    pytest.param((1 << 20, 64, 3136), 0, id="2^37 elements in ordinary rows"),
    pytest.param((3, 5, (1 << 30) + 8), 0, id="planes of more than 2^30"),
    pytest.param((3, 1, 1 << 33), 0, id="one row of 2^34"),
    pytest.param((1 << 31, 8, 1), 0, id="2^31 rows of 8"),
    pytest.param((2, (1 << 29) + 8, 4), 0, id="2^29 channels"),
    pytest.param((1 << 30, 8, 4), 1 << 20, id="1024 ghost batches of 2^22 rows"),
    pytest.param((1 << 30, 8, 4), 1 << 29, id="two of 2^31 rows"),
    pytest.param(((1 << 30) + 1, 8, 1), 1 << 29, id="a value that joins a ghost batch"),
]


@pytest.mark.parametrize("masked", [False, True])
@pytest.mark.parametrize("layout", LAYOUTS)
@pytest.mark.parametrize(("shape", "ghost"), LARGE)
def test_beyond_32_bits(library, shape, ghost, layout, masked):
    numel = int(np.prod([int(n) for n in shape]))
    for step, width in itertools.product(STEPS, (1, 4, 8)):
        given = {"masked": masked, "ghost": ghost}
        _, _, row, _ = places(library, shape, layout, step, 1, 0, **given)
        if row % width:
            continue
        _, pieces, _, of_first = places(library, shape, layout, step, width, 0, **given)
        first, *_ = places(library, shape, layout, step, width, of_first, **given)
        last, *_ = places(library, shape, layout, step, width, -1, **given)
        middle, *_ = places(library, shape, layout, step, width, pieces // 2 + 1, **given)
        for visited in (first, middle, last):
            assert visited["offset"].size > 0
            assert (np.diff(np.sort(visited["offset"])) > 0).all()
            check_entries(visited, shape, layout, step, width, row, ghost)
        assert first["offset"].min() == 0
        assert last["offset"].max() + width == numel


def test_division_by_multiplication(library):
    rng = np.random.default_rng(0)
    powers = 2 ** np.arange(2, 31)
    divisors = np.concatenate(
        (np.arange(1, 2000), powers - 1, powers, powers + 1, rng.integers(1, 2**31, 20000))
    )
    largest = 2**31 - 1
    anywhere = rng.integers(0, largest, divisors.size)
    # A multiplier one off shows first just below and at multiples, the greatest above all.
    multiples = np.concatenate((anywhere // divisors * divisors, largest // divisors * divisors))
    numerators = np.concatenate((anywhere, multiples - 1, multiples, multiples + 1))
    numerators = np.clip(numerators, 0, largest)
    divisors = np.tile(divisors, numerators.size // divisors.size)
    arrays = [array.astype(np.uint32) for array in (numerators, divisors, numerators)]
    pointers = (array.ctypes.data_as(ctypes.c_void_p) for array in arrays)
    library.emulated_quotients(*pointers, ctypes.c_int64(numerators.size))
    np.testing.assert_array_equal(arrays[2], numerators // divisors)
