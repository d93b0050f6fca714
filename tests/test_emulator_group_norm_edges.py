"""Where group norm's CUDA kernels come to an end: loops over more parts than there are blocks,
options by themselves, pointers alone out of line, statistics far from zero."""

from __future__ import annotations

import ctypes
import itertools
from collections.abc import Iterator
from contextlib import contextmanager
from functools import partial

import numpy as np
import pytest

from .emulator import emulator, group_norm
from .emulator.group_norm import LAYOUTS, Problem, run
from .emulator.norm_checks import check, check_norm_wise, check_under_all_schedules
from .emulator.recording import record

LAYOUT = pytest.mark.parametrize("layout", LAYOUTS)
SMALL = [(3, 6, 10, 2), (5, 48, 1, 1)]


@pytest.fixture(scope="module")
def library() -> ctypes.CDLL:
    return group_norm.library()


@pytest.fixture(scope="module")
def watched() -> ctypes.CDLL:
    return group_norm.library(instrument=True)


@contextmanager
def with_shared(library: ctypes.CDLL, nbytes: int, compute: int) -> Iterator[None]:
    library.emulator_set_device(ctypes.c_size_t(nbytes), compute)
    try:
        yield
    finally:
        library.emulator_set_device(ctypes.c_size_t(227 * 1024), 9)


@LAYOUT
@pytest.mark.parametrize(
    ("shape", "shared"),
    [
        ((140, 8, 128, 1), 227 * 1024),  # kept, a group a block; 140 rows of sums
        ((70, 2, 550, 1), 6144),  # streamed
        ((900, 64, 1, 1), 227 * 1024),  # layer norm
        ((140, 9, 113, 1), 227 * 1024),  # kept; who applies an element has not kept it
    ],
    ids=str,
)
def test_more_parts_than_blocks(watched, shape, shared, layout):
    problem = Problem(*shape, layout=layout, activation="relu", residual=shape[2] == 113)
    with with_shared(watched, shared, 9 if shared > 8192 else 7):
        schedule = partial(emulator.schedule, watched, multiprocessors=1)
        check_under_all_schedules(watched, problem, schedule)
        with emulator.schedule(watched, "random", 3, 1):
            with record(watched, races=True) as forward:
                saved = group_norm.forward(watched, problem)
            with record(watched, races=True) as backward:
                group_norm.backward(watched, problem, saved)
    if shape[2] > 1:
        assert forward.launches[0].blocks == backward.launches[0].blocks == 64
    forward.assert_race_free()
    backward.assert_race_free()


def test_more_groups_than_warps(library):
    problem = Problem(520, 2, 550, 1)
    with with_shared(library, 4096, 7), emulator.schedule(library, "forward", multiprocessors=1):
        check(problem, run(library, problem))


@LAYOUT
@pytest.mark.parametrize(
    "shape", [(5, 48, 1, 1), (6, 33, 1, 1), (40, 6, 3, 3), (1, 6, 5000, 2)], ids=str
)
@pytest.mark.parametrize("device", ["Hopper", "small"])
def test_small_groups_far_from_zero(library, shape, device, layout):
    problem = Problem(*shape, layout=layout, mean=1e4, std=1.0)
    with group_norm.device(library, device):
        check_norm_wise(problem, run(library, problem))


@pytest.mark.parametrize("tensor", ["weight", "bias"])
@pytest.mark.parametrize("param_dtype", ["f32", "bf16"])
@pytest.mark.parametrize("dtype", ["f32", "bf16"])
def test_parameters_out_of_line(library, tensor, param_dtype, dtype):
    given = {"dtype": dtype, "param_dtype": param_dtype, "activation": "silu"}
    problem = Problem(5, 48, 1, 1, **given, misaligned=1, misaligned_tensors=(tensor,))
    check_under_all_schedules(library, problem)


@pytest.mark.parametrize("shape", SMALL, ids=str)
def test_double_parameters(library, shape):
    check_under_all_schedules(library, Problem(*shape, param_dtype="f64", activation="silu"))


@LAYOUT
@pytest.mark.parametrize("shape", SMALL, ids=str)
@pytest.mark.parametrize("absent", ["weight", "bias"])
def test_one_parameter(library, shape, absent, layout):
    problem = Problem(*shape, layout=layout, activation="silu")
    del problem.arrays[absent]
    check_under_all_schedules(library, problem)


@pytest.mark.parametrize("device", ["Hopper", "small"])
@pytest.mark.parametrize("shape", [(3, 6, 10, 2), (1, 6, 5000, 2)], ids=str)
def test_eps(library, shape, device):
    with group_norm.device(library, device):
        check_under_all_schedules(library, Problem(*shape, eps=0.5))


@LAYOUT
@pytest.mark.parametrize("device", ["Hopper", "small"])
def test_choice_of_gradients_where_z_is_made_again(library, device, layout):
    names = ("dx", "dresidual", "dweight", "dbias")
    given = {"activation": "silu", "residual": True, "layout": layout}
    with group_norm.device(library, device):
        full = run(library, Problem(2, 6, 1500, 2, **given))
        for count in range(1, len(names) + 1):
            for without in itertools.combinations(names, count):
                some = Problem(2, 6, 1500, 2, **given, without=without)
                for name, value in group_norm.backward(library, some, full).items():
                    np.testing.assert_array_equal(value, full[name], name)


@LAYOUT
@pytest.mark.parametrize("tensor", ["x", "y", "dy", "residual", "dx", "dresidual"])
def test_each_tensor_out_of_line(library, tensor, layout):
    given = {"layout": layout, "dtype": "bf16", "activation": "gelu", "residual": True}
    problem = Problem(2, 16, 64, 2, **given, misaligned=1, misaligned_tensors=(tensor,))
    check_under_all_schedules(library, problem)


@pytest.mark.parametrize("dtype", ["f32", "bf16"])
def test_streamed_tiles_of_many_groups(library, dtype):
    given = {"layout": "channels_last", "dtype": dtype, "activation": "silu"}
    with group_norm.device(library, "small"):
        check_under_all_schedules(library, Problem(1, 192, 300, 32, **given))


@pytest.mark.parametrize("device", group_norm.DEVICES)
@pytest.mark.parametrize("dtype", ["f32", "f16"])
def test_parts_that_begin_within_units(library, device, dtype):
    problem = Problem(1, 16, 1250, 2, dtype=dtype, activation="relu", residual=True)
    with group_norm.device(library, device):
        check_under_all_schedules(library, problem)
