"""Where group norm's parts lie, for tensors up to 2^37 elements.

Runs the kernels' own cutting and walking of parts in the emulator with no tensor behind it.
"""

from __future__ import annotations

import ctypes
import itertools

import numpy as np
import pytest

from .emulator import build, emulator
from .emulator.group_norm import LAYOUTS, Shape

FIELDS = ("first", "end", "group", "groups", "channel", "first_sum", "mask")


@pytest.fixture(scope="module")
def library() -> ctypes.CDLL:
    return build.library("group_places", [], ["group_places_api.cpp"])


def place(library, shape, layout, width, backward, mask, piece):
    arguments = Shape(*shape, LAYOUTS[layout], 0, 0, 0, 0.0)
    out, info = np.zeros(len(FIELDS), dtype=np.int64), np.zeros(3, dtype=np.int64)
    emulator.call(
        library.emulated_group_places,
        ctypes.byref(arguments),
        ctypes.c_int(width),
        ctypes.c_bool(backward),
        ctypes.c_bool(mask),
        ctypes.c_int64(piece),
        out.ctypes.data_as(ctypes.c_void_p),
        info.ctypes.data_as(ctypes.c_void_p),
    )
    return dict(zip(FIELDS, map(int, out), strict=True)), *map(int, info)


SHAPES = [  # N, C, HxW, G
    pytest.param((1 << 20, 64, 3136, 8), id="2^37 elements"),
    pytest.param((3, 6, (1 << 29) + 8, 2), id="groups beyond 2^30"),
    pytest.param((1 << 31, 8, 1, 1), id="layer norm of 2^31 rows"),
    pytest.param((1 << 30, 8, 5, 4), id="rows of odd length"),
]


@pytest.mark.parametrize("mask", [False, True])
@pytest.mark.parametrize("backward", [False, True])
@pytest.mark.parametrize("layout", LAYOUTS)
@pytest.mark.parametrize("shape", SHAPES)
def test_beyond_32_bits(library, shape, layout, backward, mask):
    N, C, HxW, G = shape
    D = C // G
    M = D * HxW
    for width in (4, 1):

        def get(piece: int, width: int = width):
            return place(library, shape, layout, width, backward, mask, piece)

        first, pieces, pixels, parts = get(0)
        last = get(-1)[0]
        assert first["first"] == 0
        assert last["end"] == N * C * HxW
        for piece in (1, pieces // 3, pieces // 2, pieces - 2):
            at = get(piece)[0]
            element = at["first"]
            if pixels:
                assert at["channel"] == element % C
                assert at["group"] == element // C // HxW * G + at["channel"] // D
                n = element // C // HxW
            else:
                assert at["end"] == get(piece + 1)[0]["first"]
                assert at["group"] == element // M
                assert at["channel"] == element // HxW % C
                n = element // (C * HxW)
                row = C if layout == "channels_last" else HxW
                assert at["mask"] == element // row
            assert at["first_sum"] % C == at["channel"]
            assert at["first_sum"] // C // parts == n


@pytest.mark.parametrize("backward", [False, True])
@pytest.mark.parametrize("layout", LAYOUTS)
def test_parts_do_not_depend_on_the_unit(library, layout, backward):
    """The workspace is asked for before the pointers are there that decide about it."""
    for C, side, G in itertools.product((24, 64, 320, 592), (14, 26, 36, 38, 56, 112), (1, 8)):
        shape = (8, C, side * side, G)
        narrow, wide = (
            place(library, shape, layout, width, backward, False, 0)[1:] for width in (1, 4)
        )
        assert narrow == wide, shape
