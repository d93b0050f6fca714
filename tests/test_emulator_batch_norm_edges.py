"""Where batch norm's CUDA kernels come to an end: loops over more work than there are blocks,
options by themselves, pointers alone out of line, statistics far from zero."""

from __future__ import annotations

import ctypes
from functools import partial

import numpy as np
import pytest

from .emulator import batch_norm, norm_checks
from .emulator.batch_norm import LAYOUTS, Problem, run
from .emulator.norm_checks import check, decoded
from .emulator.recording import record
from .tolerances import assert_close

TENSORS = ("x", "y", "dy", "residual", "dx", "dresidual")
DEVICE = pytest.mark.parametrize("device", ["Hopper", "streams"])
LAYOUT = pytest.mark.parametrize("layout", LAYOUTS)


@pytest.fixture(scope="module")
def library() -> ctypes.CDLL:
    return batch_norm.library()


@pytest.fixture(scope="module")
def watched() -> ctypes.CDLL:
    return batch_norm.library(instrument=True)


def check_on(
    library: ctypes.CDLL, problem: Problem, *devices: str, multiprocessors: int | None = None
) -> None:
    for device in devices or ("Hopper", "streams"):
        schedule = partial(batch_norm.device, library, device, multiprocessors=multiprocessors)
        norm_checks.check_under_all_schedules(library, problem, schedule)


@LAYOUT
@pytest.mark.parametrize("activation", ["none", "relu"])
def test_a_value_that_joins_a_full_chunk(library, layout, activation):
    # Ghost batches of one chunk of 128 rows, two pieces of the apply; the last has 129.
    residual = activation == "relu"
    given = {"layout": layout, "ghost": 128, "activation": activation, "residual": residual}
    check_on(library, Problem(257, 64, 1, **given))


@LAYOUT
@pytest.mark.parametrize("tensor", TENSORS)
def test_each_tensor_out_of_line(library, tensor, layout):
    given = {"layout": layout, "dtype": "bf16", "activation": "gelu", "residual": True}
    problem = Problem(2, 16, 64, **given, misaligned=1, misaligned_tensors=(tensor,))
    check_on(library, problem)


@LAYOUT
@pytest.mark.parametrize("device", ["Turing", "small"])
@pytest.mark.parametrize("ghost", [0, 4])
def test_three_tensors_meet(library, device, layout, ghost):
    shape = (5, 3, 4096) if layout == "channels_first" else (5, 16, 512)
    given = {"layout": layout, "activation": "silu", "residual": True, "ghost": ghost}
    check_on(library, Problem(*shape, **given), device)


def test_workspace_of_a_large_team(library):
    given = {"layout": "channels_last", "activation": "silu", "residual": True}
    problem = Problem(1, 32, 2048, **given)
    with batch_norm.device(library, "Turing", multiprocessors=24):
        check(problem, run(library, problem))


@DEVICE
@pytest.mark.parametrize("ghost", [0, 2])
def test_running_mean_far_from_zero(library, device, ghost):
    problem = Problem(5, 6, 49, running_dtype="f64", mean=1e4, std=1.0, ghost=ghost)
    with batch_norm.device(library, device):
        out = batch_norm.forward(library, problem)
    names = ("running_mean", "running_var")
    before = (problem.arrays[name] for name in names)
    after = problem.reference().running(*before, problem.momentum)
    for name, value in zip(names, after, strict=True):
        assert np.abs(decoded(problem, out, name) - value).max() <= 1e-6, name


@DEVICE
@LAYOUT
def test_a_single_value(library, device, layout):
    problem = Problem(1, 5, 1, layout=layout)
    with batch_norm.device(library, device):
        out = batch_norm.forward(library, problem)
    got = decoded(problem, out, "running_var")
    np.testing.assert_allclose(got, 0.9 * problem.arrays["running_var"], rtol=1e-6)


@pytest.mark.parametrize("momentum", [0.0, 0.25, 1.0])
def test_momentum_and_eps(library, momentum):
    check_on(library, Problem(3, 6, 10, momentum=momentum, eps=0.5))


@DEVICE
@pytest.mark.parametrize("absent", ["running_mean", "running_var"])
@pytest.mark.parametrize("ghost", [0, 2])
def test_one_running_statistic(library, absent, device, ghost):
    problem = Problem(5, 6, 49, ghost=ghost)
    names = ("running_mean", "running_var")
    values = problem.reference().running(*(problem.arrays[n] for n in names), 0.1)
    after = dict(zip(names, values, strict=True))
    del problem.arrays[absent]
    with batch_norm.device(library, device):
        out = batch_norm.forward(library, problem)
    (name,) = set(names) - {absent}
    np.testing.assert_allclose(decoded(problem, out, name), after[name], rtol=1e-5)


@LAYOUT
@pytest.mark.parametrize("absent", ["weight", "bias"])
def test_one_parameter(library, absent, layout):
    problem = Problem(3, 6, 10, layout=layout, activation="silu")
    del problem.arrays[absent]
    check_on(library, problem)


@LAYOUT
@pytest.mark.parametrize("shape", [(5, 6, 20, 2), (9, 12, 1, 4)], ids=str)
def test_ghosts_in_eval(library, shape, layout):
    *sizes, ghost = shape
    given = {"layout": layout, "activation": "silu", "ghost": ghost, "training": False}
    check_on(library, Problem(*sizes, **given))
    some = Problem(*sizes, **given, without=("dweight", "dbias"))
    for device in ("Hopper", "streams"):
        with batch_norm.device(library, device):
            full = run(library, Problem(*sizes, **given))
            got = batch_norm.backward(library, some, full)
        for name, value in got.items():
            np.testing.assert_array_equal(value, full[name], name)


@pytest.mark.parametrize("dtype", ["f32", "bf16"])
@pytest.mark.parametrize(
    ("shape", "layout", "ghost"),
    [((2, 70, 20), "channels_first", 0), ((66, 16, 8), "channels_last", 1)],
)
def test_more_sets_than_blocks(watched, shape, layout, ghost, dtype):
    for activation in ("relu", "silu"):
        given = {"layout": layout, "dtype": dtype, "activation": activation, "ghost": ghost}
        problem = Problem(*shape, **given)
        check_on(watched, problem, "Hopper", multiprocessors=1)
        with batch_norm.device(watched, "Hopper", "random", 3, 1):
            with record(watched, races=True) as forward:
                saved = batch_norm.forward(watched, problem)
            with record(watched, races=True) as backward:
                batch_norm.backward(watched, problem, saved)
        for recording in (forward, backward):
            (kernel,) = (x for x in recording.launches if x.kernel.endswith(("_flow", "_resident")))
            assert kernel.blocks == 64 if layout == "channels_last" else kernel.blocks <= 4
        forward.assert_race_free()
        backward.assert_race_free()


@pytest.mark.parametrize("training", [True, False])
def test_more_channels_than_warps(library, training):
    given = {"ghost": int(training), "activation": "relu", "training": training}
    check_on(library, Problem(2, 600, 3, **given), "streams", multiprocessors=1)


def test_several_batches_a_piece(library):
    problem = Problem(1, 129, 32768, layout="channels_last", training=False)
    with batch_norm.device(library, "streams"):
        out = batch_norm.forward(library, problem)
    assert_close(decoded(problem, out, "y"), problem.reference().y, 1e-6, "y")


@DEVICE
@LAYOUT
@pytest.mark.parametrize("dtype", ["f32", "bf16"])
def test_the_mask_stands_for_z_in_whole_units(library, device, dtype, layout):
    given = {"layout": layout, "dtype": dtype, "activation": "relu", "residual": True}
    problems = [Problem(3, 16, 16, **given, wants_mask=wants) for wants in (True, False)]
    with batch_norm.device(library, device):
        masked, recomputed = (run(library, problem) for problem in problems)
    check(problems[1], recomputed)
    for name, value in recomputed.items():
        np.testing.assert_array_equal(value, masked[name], name)


@pytest.mark.parametrize("activation", ["gelu", "gelu_tanh", "silu", "hardswish"])
def test_huge_z(library, activation):
    residual = np.zeros((2, 4, 8))
    residual[0, :, 0], residual[1, :, 1] = 1e25, -1e25
    given = {"activation": activation, "residual": True, "arrays": {"residual": residual}}
    problem = Problem(2, 4, 8, **given)
    out = run(library, problem)
    y, dz = (decoded(problem, out, name) for name in ("y", "dresidual"))
    np.testing.assert_allclose(y[0, :, 0], 1e25, rtol=1e-6)
    np.testing.assert_allclose(dz[0, :, 0], problem.arrays["dy"][0, :, 0], rtol=1e-6)
    assert (y[1, :, 1] == 0).all()
    assert (dz[1, :, 1] == 0).all()


@pytest.mark.parametrize("rows", [832, 864, 896])
@pytest.mark.parametrize("dtype", ["f32", "bf16"])
def test_a_block_filled_beside_static_memory(library, dtype, rows):
    channels = 32 if dtype == "f32" else 64
    problem = Problem(1, channels, rows, layout="channels_last", dtype=dtype)
    with batch_norm.device(library, "small"):
        check(problem, run(library, problem))


@LAYOUT
@pytest.mark.parametrize("running_dtype", ["f32", "f64"])
def test_infinite_running_mean(library, layout, running_dtype):
    """What is subtracted is infinite, and so is y; a low part of it would be NaN."""
    problem = Problem(2, 3, 4, layout=layout, running_dtype=running_dtype, training=False)
    large = np.inf if running_dtype == "f32" else 1e300  # what float32 has no room for
    problem.arrays["running_mean"][1:] = large, -large
    y = decoded(problem, batch_norm.forward(library, problem), "y")
    assert np.isfinite(y.take(0, axis=1)).all()
    assert (y.take(1, axis=1) == -np.inf).all()
    assert (y.take(2, axis=1) == np.inf).all()
