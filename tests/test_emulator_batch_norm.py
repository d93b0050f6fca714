"""Batch norm's CUDA kernels, run by the emulator against float64."""

from __future__ import annotations

import ctypes
import itertools
from collections.abc import Iterator
from functools import partial

import numpy as np
import pytest
import torch

from .emulator import batch_norm, build, emulator, norm_checks
from .emulator.batch_norm import LAYOUTS, Problem, run
from .emulator.norm_checks import (
    DTYPES,
    check,
    check_norm_wise,
    check_statistics,
    decoded,
)
from .emulator.numbers import Numbers
from .emulator.recording import Recording, record
from .emulator.traffic import Passes, assert_traffic
from .reference import MASKABLE, BatchNormReference
from .tolerances import assert_close, elementwise

SHAPES = {  # N, C, HxW
    (2, 8, 64): "rows of whole 16-byte units in both layouts",
    (5, 6, 49): "7 x 7: no unit fits a plane; an odd count of everything",
    (1, 3, 7): "less than a warp; mask rows of less than a byte",
    (2, 12, 196): "14 x 14 and 12 channels: units of 4, mask rows that end on half a byte",
    (5, 8, 1): "(N, C) as planes of one element: read as channels_last",
    (5, 1, 49): "one channel: read as channels_first",
    (2, 33, 49): "33 channels: one element more than a warp",
    (7, 16, 49): "7 x 7 and 16 channels: planes of four or eight make whole units",
}
TILES = {  # of channels_last
    (5, 160, 64): "tiles of 20 units, three chunks; three tiles where they are kept",
    (1, 264, 12): "more channels than a tile has",
}

# The activations that one kernel takes, and its shapes.
ANY = ("leaky_relu", "silu", "gelu", "gelu_tanh", "hardswish")
ANY_SHAPES = {  # N, C, HxW
    (2, 8, 32): "whole units in both layouts",
    (3, 12, 20): "units of 4 of 16-bit elements; mask rows that end on half a byte",
    (3, 5, 7): "single elements in both layouts; mask rows of less than a byte",
    (5, 8, 1): "(N, C) as planes of one element: read as channels_last",
}


GHOSTS = {  # N, C, HxW, ghost
    (6, 8, 64, 2): "three of two samples",
    (7, 6, 49, 3): "the last one has a single sample of many values; element accesses",
    (9, 12, 1, 4): "(N, C): the single value left over joins the ones before it",
    (5, 1, 49, 2): "one channel, which may not be read as longer rows",
    (4, 9, 20, 1): "instance norm's limit: each sample for itself",
}
MANY_GHOSTS = {(66, 2, 5, 2): "33: more than a warp has lanes"}
TILED_GHOSTS = {(5, 72, 16, 4): "channels_last: two tiles"}
GHOSTS_IN_LAYOUTS = [
    *itertools.product(GHOSTS, LAYOUTS),
    *itertools.product(TILED_GHOSTS, ["channels_last"]),
]


@pytest.fixture(scope="module")
def library() -> ctypes.CDLL:
    return batch_norm.library()


@pytest.fixture(params=["Hopper", "streams"])
def device(library, request) -> Iterator[str]:
    with batch_norm.device(library, request.param):
        yield request.param


@pytest.fixture(scope="module")
def watched() -> ctypes.CDLL:
    return batch_norm.library(instrument=True)


def check_under_all_schedules(library: ctypes.CDLL, problem: Problem, *devices: str) -> None:
    """Where x is kept on the chip and where it is streamed, unless other devices are named."""
    for device in devices or ("Hopper", "streams"):
        schedule = partial(batch_norm.device, library, device)
        norm_checks.check_under_all_schedules(library, problem, schedule)


@pytest.mark.parametrize("training", [True, False], ids=["train", "eval"])
@pytest.mark.parametrize("layout", LAYOUTS)
@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("shape", SHAPES, ids=lambda s: "x".join(map(str, s)))
def test_matches_float64(library, shape, dtype, layout, training):
    for activation, residual in itertools.product(("none", "relu"), (False, True)):
        problem = Problem(
            *shape,
            layout=layout,
            dtype=dtype,
            activation=activation,
            residual=residual,
            training=training,
        )
        check_under_all_schedules(library, problem)


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("shape", TILES, ids=lambda s: "x".join(map(str, s)))
def test_tiles_of_channels(library, shape, dtype):
    for activation, residual in (("none", False), ("relu", True)):
        problem = Problem(
            *shape,
            layout="channels_last",
            dtype=dtype,
            activation=activation,
            residual=residual,
        )
        check_under_all_schedules(library, problem)


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize(
    ("shape", "layout"),
    GHOSTS_IN_LAYOUTS,
    ids=lambda s: s if isinstance(s, str) else "x".join(map(str, s)),
)
def test_ghost_batches(library, shape, dtype, layout):
    check_ghost_batches(library, shape, dtype, layout)


@pytest.mark.parametrize("layout", LAYOUTS)
@pytest.mark.parametrize("shape", MANY_GHOSTS, ids=lambda s: "x".join(map(str, s)))
def test_many_ghost_batches(library, shape, layout):
    check_ghost_batches(library, shape, "bf16", layout)


def check_ghost_batches(library, shape, dtype, layout):
    *sizes, ghost = shape
    for activation, residual in (("none", False), ("relu", True), ("silu", True)):
        problem = Problem(
            *sizes,
            layout=layout,
            dtype=dtype,
            activation=activation,
            residual=residual,
            ghost=ghost,
        )
        check_under_all_schedules(library, problem)


@pytest.mark.parametrize("layout", LAYOUTS)
def test_ghost_batches_of_many_chunks(library, layout):
    # 2 or 3 chunks a channel in channels_first, 16 in channels_last; the last ghost batch has one
    # or 4. Kept, they are shared out among several blocks.
    problem = Problem(5, 3, 4096, layout=layout, activation="relu", ghost=4)
    check_under_all_schedules(library, problem, "Hopper", "Turing", "small", "streams")


def test_a_ghost_batch_of_everything_is_none(library):
    first, *others = (
        run(library, Problem(4, 6, 10, activation="relu", ghost=ghost)) for ghost in (0, 4, 9)
    )
    for other, (name, value) in itertools.product(others, first.items()):
        np.testing.assert_array_equal(value, other[name], name)


@pytest.mark.parametrize("layout", LAYOUTS)
@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("ghost", [0, 2])
def test_known_statistics(library, ghost, dtype, layout):
    # From those of the first call y comes out again, bit for bit, and nothing else.
    shapes, variants = ((5, 12, 49), (2, 16, 64)), (("none", False), ("relu", True), ("gelu", True))
    for shape, (activation, residual) in itertools.product(shapes, variants):
        problem = Problem(
            *shape,
            layout=layout,
            dtype=dtype,
            activation=activation,
            residual=residual,
            ghost=ghost,
        )
        for device in ("Hopper", "streams"):
            problem.known_stats = None
            with batch_norm.device(library, device):
                first = batch_norm.forward(library, problem)
            problem.known_stats = first["stats"]
            for order, seed in emulator.SCHEDULES:
                with batch_norm.device(library, device, order, seed):
                    again = batch_norm.forward(library, problem)
                for name in ("y", "stats", *(["mask"] if problem.masked else [])):
                    np.testing.assert_array_equal(again[name], first[name], name)
                for name in ("running_mean", "running_var"):
                    np.testing.assert_array_equal(
                        decoded(problem, again, name), problem.arrays[name], name
                    )


def test_known_statistics_need_no_others(library):
    problem = Problem(3, 6, 10, running=False)
    first = batch_norm.forward(library, problem)
    problem.known_stats, problem.training = first["stats"], False
    again = batch_norm.forward(library, problem)
    np.testing.assert_array_equal(again["y"], first["y"])


def test_statistics_do_not_depend_on_the_mask(library):
    # y of a forward without gradients has the same bits.
    for shape in ((3, 12, 10), (6, 9, 1), (6, 1, 9)):
        with_mask, without = (
            batch_norm.forward(
                library, Problem(*shape, activation="relu", residual=True, wants_mask=wants_mask)
            )
            for wants_mask in (True, False)
        )
        for name, value in without.items():
            np.testing.assert_array_equal(value, with_mask[name], name)


@pytest.mark.parametrize("residual", [False, True], ids=["", "add"])
@pytest.mark.parametrize("layout", LAYOUTS)
@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("device", ["Hopper", "Turing", "small"])
def test_parts_meet(library, device, dtype, layout, residual):
    # What is shared out among a cluster's blocks, or among a team's; on the small device a part is
    # read twice. Whole units, and single elements of odd lengths.
    for shape in ((5, 3, 4096), (9, 6, 1225)):
        problem = Problem(*shape, layout=layout, dtype=dtype, activation="relu", residual=residual)
        check_under_all_schedules(library, problem, device)


def recorded(
    watched: ctypes.CDLL, problem: Problem, device: str, multiprocessors: int | None = None
) -> tuple[Recording, Recording]:
    """Forward and backward, without a race."""
    with batch_norm.device(watched, device, "random", 3, multiprocessors):
        with record(watched, races=True) as forward:
            saved = batch_norm.forward(watched, problem)
        with record(watched, races=True) as backward:
            batch_norm.backward(watched, problem, saved)
    for recording, outputs in ((forward, ("y", "stats")), (backward, ("dx", "dweight", "dbias"))):
        recording.assert_in_bounds()
        recording.assert_race_free()
        for name in outputs:
            recording.assert_written(name)
    return forward, backward


@pytest.mark.parametrize("ghost", [0, 4])
@pytest.mark.parametrize("dtype", ["f32", "bf16"])
@pytest.mark.parametrize("layout", LAYOUTS)
def test_teams_read_once(watched, layout, dtype, ghost):
    shape = (5, 2, 4096) if layout == "channels_first" else (5, 16, 512)
    problem = Problem(*shape, layout=layout, dtype=dtype, activation="relu", ghost=ghost)
    forward, backward = recorded(watched, problem, "Ampere", multiprocessors=24)
    small = problem.arrays["x"].size * Numbers(dtype).itemsize // 8
    small += 4 * 128  # a line for each set's counter
    passes = {"x": Passes(read=1), "y": Passes(written=1)}
    assert_traffic(forward, passes, other=small, efficiency={"x": 1, "y": 1})
    passes = {"x": Passes(read=1), "dy": Passes(read=1), "dx": Passes(written=1)}
    passes["dresidual"] = Passes(written=1)
    assert_traffic(backward, passes, other=small, efficiency={"x": 1, "dx": 1})
    for recording, direction in ((forward, "forward"), (backward, "backward")):
        kernel = "flow" if layout == "channels_first" else "resident"
        launches = ["cudaMemsetAsync", f"batch_norm_{direction}_{kernel}"]
        launches += [f"batch_norm{'_backward' * (direction == 'backward')}_finish"] * (ghost > 0)
        assert [launch.kernel for launch in recording.launches] == launches


@pytest.mark.parametrize("layout", LAYOUTS)
def test_what_does_not_fit_is_read_again(watched, layout):
    # Some of it stays on the chip all the same; most of it where a block has no second set.
    shape = (9, 3, 4096) if layout == "channels_first" else (5, 8, 512)
    problem = Problem(*shape, layout=layout)
    forward, backward = recorded(watched, problem, "small")
    tensors = {"forward": (forward, ["x"])}
    if layout == "channels_last":
        tensors = {"backward": (backward, ["x", "dy"])}
    kernel, most = ("flow", 1.9) if layout == "channels_first" else ("resident", 1.5)
    for direction, (recording, names) in tensors.items():
        assert f"batch_norm_{direction}_{kernel}" in {one.kernel for one in recording.launches}
        for name in names:
            reads = recording.buffers[name].reads
            assert set(np.unique(reads)) == {1, 2}
            assert reads.mean() <= most


def test_the_device_says_how_many_blocks_it_takes(watched):
    # Launch bounds ask for three on a multiprocessor; the device has the last word. Where one is
    # all, sets are cut for one; where none is, they are streamed.
    problem = Problem(5, 3, 4096, activation="relu")
    with batch_norm.device(watched, "streams"):
        streamed = run(watched, problem)
    with batch_norm.device(watched, "small"):
        met = run(watched, problem)
        for registers, blocks in ((255, 2), (300, 0)):
            for name in batch_norm.RESIDENT:
                watched.emulator_set_registers(name.encode(), registers)
            with record(watched) as recording:
                got = batch_norm.forward(watched, problem)
            flows = [x.blocks for x in recording.launches if x.kernel.endswith("_flow")]
            assert flows == [blocks] * (blocks > 0)
            got |= batch_norm.backward(watched, problem, got)
            check(problem, got)
    assert (met["stats"] != streamed["stats"]).any()
    for name, value in streamed.items():
        np.testing.assert_array_equal(got[name], value, name)


@pytest.mark.parametrize("shape", [(4, 16, 81), (8, 64, 49)], ids=str)
def test_what_is_kept_beside_static_memory(library, shape):
    """Tensors in some 36 KB, with the kernel's own 20 more than it has without being asked."""
    problem = Problem(
        *shape, layout="channels_last", dtype="bf16", activation="silu", residual=True
    )
    check_under_all_schedules(library, problem, "Hopper")


def test_a_team_that_is_refused_is_streamed(library):
    # As under MPS, or in a stream that has some of the multiprocessors.
    problem = Problem(5, 3, 4096, activation="relu")
    with batch_norm.device(library, "streams"):
        streamed = run(library, problem)
    with batch_norm.device(library, "small"):
        library.emulator_set_blocks_held(1)
        try:
            got = run(library, problem)
        finally:
            library.emulator_set_blocks_held(0)
    for name, value in streamed.items():
        np.testing.assert_array_equal(got[name], value, name)


@pytest.mark.parametrize(("version", "clusters"), [(80, False), (90, True), (0, True)])
def test_clusters_are_for_code_that_knows_of_them(library, watched, version, clusters):
    """Not for what a device makes of code for an older one, whatever it can do itself."""
    problem = Problem(5, 3, 4096, layout="channels_last", activation="relu")
    for lib in (library, watched):
        lib.emulator_set_code_version(version)
    try:
        check_under_all_schedules(library, problem, "Hopper")
        forward, backward = recorded(watched, problem, "Hopper")
    finally:
        for lib in (library, watched):
            lib.emulator_set_code_version(0)
    sizes = {launch.cluster for one in (forward, backward) for launch in one.launches}
    assert (max(sizes) > 1) is clusters


@pytest.mark.parametrize("spared", [0, 2, 3])
def test_teams_leave_multiprocessors_to_others(watched, spared):
    problem = Problem(5, 3, 4096, activation="relu")
    watched.emulated_batch_norm_spare(spared)
    try:
        check_under_all_schedules(watched, problem, "Turing")
        forward, backward = recorded(watched, problem, "Turing")
    finally:
        watched.emulated_batch_norm_spare(0)
    most = 3 * (5 - spared)
    for recording in (forward, backward):
        flows = [x for x in recording.launches if x.kernel.endswith("_flow")]
        assert flows, "a team of some size"
        assert all(most / 2 < x.blocks <= most for x in flows)


@pytest.mark.parametrize("residual", [False, True], ids=["", "add"])
@pytest.mark.parametrize("layout", LAYOUTS)
@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("activation", ANY)
def test_every_activation(library, activation, dtype, layout, residual):
    # Those without an instance of their own: units of 8, of 4 and of one element, rows of masks
    # that end within a byte, and one thread with a channel of its own.
    for shape in ANY_SHAPES:
        problem = Problem(
            *shape,
            layout=layout,
            dtype=dtype,
            activation=activation,
            residual=residual,
            training=shape != (3, 12, 20),
        )
        check_under_all_schedules(library, problem)


@pytest.mark.parametrize("layout", LAYOUTS)
@pytest.mark.parametrize("activation", MASKABLE)
def test_the_mask_stands_for_z(library, activation, layout):
    # From the residual the backward must find what the mask says, bit for bit.
    problems = [
        Problem(
            3,
            12,
            10,
            layout=layout,
            dtype="bf16",
            activation=activation,
            residual=True,
            wants_mask=wants_mask,
        )
        for wants_mask in (True, False)
    ]
    masked, recomputed = (run(library, problem) for problem in problems)
    check(problems[1], recomputed)
    assert "mask" in masked
    assert "mask" not in recomputed
    for name, value in recomputed.items():
        np.testing.assert_array_equal(value, masked[name], name)


@pytest.mark.parametrize("layout", LAYOUTS)
def test_any_activation_with_many_chunks(library, layout):
    # In channels_first 3 chunks a channel, in channels_last 20, of x, dy and residual.
    problem = Problem(5, 3, 4096, layout=layout, activation="silu", residual=True)
    check_under_all_schedules(library, problem)


@pytest.mark.parametrize("tensor", ["x", "residual"])
def test_any_activation_with_misaligned_tensors(library, tensor):
    # One pointer that is less aligned than the others decides for all.
    problem = Problem(
        2,
        16,
        64,
        dtype="bf16",
        activation="gelu",
        residual=True,
        misaligned=1,
        misaligned_tensors=(tensor,),
    )
    check_under_all_schedules(library, problem)


@pytest.mark.parametrize("slope", [-0.5, 0.0, 1.0, 2.0])
def test_slopes(library, slope):
    # The sign of y says nothing of that of z where the slope is not positive: the mask has to.
    problem = Problem(3, 6, 10, activation="leaky_relu", slope=slope, residual=True)
    outputs = run(library, problem)
    z = BatchNormReference(*(problem.arrays[k] for k in ("x", "weight", "bias", "residual"))).z
    assert np.abs(z).min() > 1e-5
    bits = np.unpackbits(outputs["mask"].reshape(18, 2), axis=1, bitorder="little")[:, :10]
    np.testing.assert_array_equal(bits.reshape(z.shape), z > 0)
    y, dz = (decoded(problem, outputs, name) for name in ("y", "dresidual"))
    assert_close(y, np.where(z > 0, z, slope * z), elementwise(torch.float32, 30), "y")
    dy = problem.arrays["dy"]
    np.testing.assert_array_equal(dz, np.where(z > 0, dy, Numbers("f32").rounded(slope * dy)))


@pytest.mark.parametrize("layout", LAYOUTS)
@pytest.mark.parametrize("dtype", DTYPES)
def test_many_chunks(library, dtype, layout):
    # channels_first: 3 chunks a channel, the last one short; channels_last: 20 chunks.
    problem = Problem(
        5, 3, 4096, layout=layout, dtype=dtype, activation="relu", residual=dtype == "f16"
    )
    check_under_all_schedules(library, problem)


@pytest.mark.parametrize("layout", LAYOUTS)
def test_more_pieces_than_blocks(library, layout):
    # One multiprocessor is given 64 blocks at most; there are 160 and 384 pieces of reduction, and
    # the same bits must come out as with more blocks than pieces.
    problem = Problem(2, 160, 24576 // 160, layout=layout, activation="relu")
    if layout == "channels_last":
        problem = Problem(3, 8, 131072 // 8, layout=layout, activation="relu")
    results = []
    for multiprocessors in (1, 132):
        with batch_norm.device(library, "streams", multiprocessors=multiprocessors):
            results.append(run(library, problem))
    check(problem, results[0])
    for name, value in results[0].items():
        np.testing.assert_array_equal(value, results[1][name], name)


@pytest.mark.parametrize("misaligned", [1, 4, 8])
@pytest.mark.parametrize("layout", LAYOUTS)
@pytest.mark.parametrize("dtype", DTYPES)
def test_misaligned_tensors(library, dtype, layout, misaligned):
    # 1: only element accesses are aligned; 4: 16 bytes of float32 and 8 of the others; 8: all.
    problem = Problem(
        2, 16, 64, layout=layout, dtype=dtype, activation="relu", misaligned=misaligned
    )
    check_under_all_schedules(library, problem)


@pytest.mark.parametrize(
    ("dtype", "param_dtype", "running_dtype"),
    [
        ("f16", "f16", "f16"),
        ("bf16", "bf16", "bf16"),
        ("f32", "f64", "f64"),
        ("bf16", "f32", "bf16"),
        ("f32", "bf16", "f16"),
    ],
)
def test_parameter_dtypes(library, dtype, param_dtype, running_dtype):
    for training in (True, False):
        problem = Problem(
            3,
            6,
            10,
            dtype=dtype,
            param_dtype=param_dtype,
            running_dtype=running_dtype,
            activation="relu",
            training=training,
        )
        check_under_all_schedules(library, problem)


@pytest.mark.parametrize("layout", LAYOUTS)
def test_without_parameters_and_running_statistics(library, layout):
    problem = Problem(3, 6, 10, layout=layout, affine=False, running=False, activation="relu")
    check_under_all_schedules(library, problem)


@pytest.mark.parametrize("training", [True, False], ids=["train", "eval"])
@pytest.mark.usefixtures("device")
def test_every_choice_of_gradients(library, training):
    names = ("dx", "dresidual", "dweight", "dbias")
    everything = Problem(3, 6, 10, activation="relu", residual=True, training=training)
    full = run(library, everything)
    for count in range(1, len(names) + 1):
        for without in itertools.combinations(names, count):
            some = Problem(
                3, 6, 10, activation="relu", residual=True, training=training, without=without
            )
            outputs = batch_norm.backward(library, some, full)
            assert set(outputs) == set(names) - set(without)
            for name, value in outputs.items():
                np.testing.assert_array_equal(value, full[name], name)


@pytest.mark.parametrize("layout", LAYOUTS)
@pytest.mark.parametrize(
    "shape",
    [
        pytest.param((5, 3, 4096), id="several chunks"),
        pytest.param((2, 32, 49), id="one chunk, element accesses"),
    ],
)
@pytest.mark.usefixtures("device")
def test_large_offset(library, layout, shape):
    # |mean| / std = 1e4: E[x^2] - E[x]^2 would leave nothing, a mean rounded to float32 a dweight
    # 1.75 % off.
    problem = Problem(*shape, layout=layout, mean=1e4, std=1.0)
    outputs = run(library, problem)
    check_norm_wise(problem, outputs)


@pytest.mark.parametrize("layout", LAYOUTS)
@pytest.mark.parametrize("case", ["outlier first", "trend", "constant"])
@pytest.mark.usefixtures("device")
def test_statistics_of_awkward_data(library, layout, case):
    rng = np.random.default_rng(0)
    x = rng.standard_normal((5, 3, 4096))
    if case == "outlier first":
        x[0, :, 0] = 1e6  # where a shift by the first element would ruin the sums
    elif case == "trend":
        x[2:] += 1e4  # the chunks' means lie far apart
    else:
        x[:] = 12345.678  # the variance is 0, and rounding must not make it negative
    x = Numbers("f32").rounded(x)
    problem = Problem(5, 3, 4096, layout=layout, arrays={"x": x})
    outputs = run(library, problem)
    check_statistics(problem, outputs, case == "constant")


@pytest.mark.parametrize("layout", LAYOUTS)
@pytest.mark.usefixtures("device")
def test_nan_and_infinity_stay_in_their_channel(library, layout):
    x = np.random.default_rng(0).standard_normal((2, 6, 10))
    x[0, 1, 3] = np.nan
    x[1, 4, 2] = np.inf
    problem = Problem(2, 6, 10, layout=layout, activation="relu", arrays={"x": x})
    y = decoded(problem, run(library, problem), "y")
    assert np.isnan(y).all((0, 2)).tolist() == [False, True, False, False, True, False]
    assert np.isfinite(y[:, [0, 2, 3, 5]]).all()


@pytest.mark.parametrize("layout", LAYOUTS)
@pytest.mark.usefixtures("device")
def test_eval_gradient_ignores_infinite_x(library, layout):
    # dx = scale * dz there: an infinite x has no part in it, where 0 * inf would make a NaN of it.
    x = np.random.default_rng(0).standard_normal((2, 6, 10))
    x[1, 4, 2] = np.inf
    problem = Problem(2, 6, 10, layout=layout, activation="relu", training=False, arrays={"x": x})
    dx = decoded(problem, run(library, problem), "dx")
    assert np.isfinite(dx).all()
    assert dx[1, 4, 2] != 0


def test_refuses_float64(library):
    with pytest.raises(emulator.Refused, match=r"batch_norm_forward_cuda.*float64.*expected"):
        batch_norm.forward(library, Problem(2, 3, 4, dtype="f64"))


def test_refuses_eval_without_statistics(library):
    problem = Problem(2, 3, 4, training=False)
    del problem.arrays["running_var"]
    with pytest.raises(emulator.Refused, match="eval needs running_mean and running_var"):
        batch_norm.forward(library, problem)


def test_refuses_a_mask_without_use(library, monkeypatch):
    monkeypatch.setattr(Problem, "masked", True)
    with pytest.raises(emulator.Refused, match="expected no mask"):
        batch_norm.forward(library, Problem(2, 3, 4))


@pytest.mark.parametrize("shape", [(0, 3, 4), (2, 3, 0)], ids=["N=0", "HxW=0"])
def test_empty_writes_nothing(library, shape):
    outputs = run(library, Problem(*shape))
    assert (outputs["stats"] == 0xFF).all()
    assert (outputs["dweight"] == 0xFF).all()
    problem = Problem(*shape)
    np.testing.assert_array_equal(
        outputs["running_mean"].view(np.float32), problem.arrays["running_mean"]
    )


@pytest.mark.sanitizer
def test_under_sanitizers():
    """Out-of-bounds and misaligned accesses, in global and shared memory; undefined behaviour."""
    path = build.build("batch_norm", batch_norm.KERNELS, batch_norm.API, sanitize=True)
    result = build.run_sanitized("tests.emulator.sanitized_batch_norm", str(path))
    assert result.returncode == 0, result.stderr[-4000:]
    assert result.stdout.startswith("ran 113 problems"), result.stdout
