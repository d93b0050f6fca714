"""Group norm's CUDA kernels, run by the emulator against float64."""

from __future__ import annotations

import ctypes
import itertools
from dataclasses import replace

import numpy as np
import pytest

from .emulator import build, emulator, group_norm
from .emulator.group_norm import LAYOUTS, Problem, run
from .emulator.norm_checks import (
    DTYPES,
    check_norm_wise,
    check_statistics,
    check_under_all_schedules,
    decoded,
)
from .emulator.numbers import Numbers
from .emulator.recording import record
from .emulator.traffic import Passes, assert_traffic
from .reference import ACTIVATIONS
from .tolerances import norm_error

SHAPES = {  # N, C, HxW, G
    (2, 8, 64, 2): "groups of whole 16-byte units in both layouts",
    (3, 6, 49, 3): "7 x 7: units that lie in two channels and in two groups; odd counts",
    (2, 12, 196, 2): "14 x 14, 6 channels a group: units of 8 that lie in two channels",
    (3, 5, 7, 5): "instance norm, rows of less than a byte of mask, single elements in last",
    (2, 40, 20, 4): "10 channels a group: in channels_last units lie in two groups",
    (5, 48, 1, 1): "layer norm",
    (7, 33, 1, 1): "layer norm of an odd length",
    (203, 64, 1, 1): "layer norm of many samples: several to a part and several parts to a block",
    (3, 24, 1, 4): "groups of 6 single elements: units in two groups, mask bytes in two groups",
    (3, 32, 1, 4): "groups of 8 single elements: mask bytes of their own",
    (1, 16, 700, 2): "one large group of 5600 elements for each block",
    (2, 4, 3, 1): "fewer elements than a warp",
}
LARGE = {  # which no block of the small devices holds
    (1, 6, 5000, 2): "15000 elements a group",
    (1, 20, 1111, 2): "10 channels of an odd length: parts begin within units and channels",
    (1, 8000, 1, 1): "layer norm beyond a block; more channels than elements of a part",
    (1, 2000, 9, 2): "tiles of parts of a group in channels_last; many channels to a part",
}


@pytest.fixture(scope="module")
def library() -> ctypes.CDLL:
    return group_norm.library()


@pytest.fixture(scope="module")
def watched() -> ctypes.CDLL:
    return group_norm.library(instrument=True)


VARIANTS = (("none", False), ("silu", False), ("relu", False), ("relu", True), ("silu", True))


def name_of(value: object) -> str:
    return "x".join(map(str, value)) if isinstance(value, tuple) else str(value)


@pytest.mark.parametrize("layout", LAYOUTS)
@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("shape", SHAPES, ids=name_of)
def test_matches_float64(library, shape, dtype, layout):
    for activation, residual in VARIANTS:
        problem = Problem(
            *shape, layout=layout, dtype=dtype, activation=activation, residual=residual
        )
        check_under_all_schedules(library, problem)


@pytest.mark.parametrize("layout", LAYOUTS)
@pytest.mark.parametrize("device", group_norm.DEVICES)
@pytest.mark.parametrize("shape", LARGE, ids=name_of)
def test_groups_beyond_a_block(library, shape, device, layout):
    variants = (("f32", "none", False), ("bf16", "silu", True), ("f16", "relu", True))
    with group_norm.device(library, device):
        for dtype, activation, residual in variants:
            problem = Problem(
                *shape, layout=layout, dtype=dtype, activation=activation, residual=residual
            )
            check_under_all_schedules(library, problem)


@pytest.mark.parametrize("layout", LAYOUTS)
@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("activation", ACTIVATIONS)
def test_every_activation(library, activation, dtype, layout):
    for residual, wants_mask in ((False, False), (True, True), (True, False)):
        problem = Problem(
            *(2, 24, 28, 4),
            layout=layout,
            dtype=dtype,
            activation=activation,
            residual=residual,
            wants_mask=wants_mask,
        )
        check_under_all_schedules(library, problem)


@pytest.mark.parametrize("layout", LAYOUTS)
@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("device", group_norm.DEVICES)
def test_known_statistics(library, device, dtype, layout):
    # From those of the first call y comes out again, bit for bit, and they stay as they are: of
    # several groups to a part, of a group in several parts, of layer norm.
    shapes = (3, 24, 20, 4), (1, 6, 5000, 2), (5, 48, 1, 1)
    variants = ("none", False), ("relu", True), ("gelu", True)
    for shape, (activation, residual) in itertools.product(shapes, variants):
        problem = Problem(
            *shape, layout=layout, dtype=dtype, activation=activation, residual=residual
        )
        with group_norm.device(library, device):
            first = group_norm.forward(library, problem)
            problem.known_stats = first["stats"]
            for order, seed in emulator.SCHEDULES:
                with emulator.schedule(library, order, seed):
                    again = group_norm.forward(library, problem)
                for name, value in first.items():
                    np.testing.assert_array_equal(again[name], value, name)


@pytest.mark.parametrize("misaligned", [1, 4, 8])
@pytest.mark.parametrize("layout", LAYOUTS)
@pytest.mark.parametrize("dtype", DTYPES)
def test_misaligned_tensors(library, dtype, layout, misaligned):
    # 1: only element accesses are aligned; 4: 16 bytes of float32 and 8 of the others; 8: all.
    for activation, residual in (("silu", False), ("relu", True)):
        problem = Problem(
            *(2, 16, 64, 2),
            layout=layout,
            dtype=dtype,
            activation=activation,
            residual=residual,
            misaligned=misaligned,
        )
        check_under_all_schedules(library, problem)


@pytest.mark.parametrize("param_dtype", DTYPES)
@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("shape", [(3, 6, 10, 2), (5, 48, 1, 1)], ids=name_of)
def test_parameter_dtypes(library, shape, dtype, param_dtype):
    for affine in (True, False):
        problem = Problem(
            *shape, dtype=dtype, param_dtype=param_dtype, activation="silu", affine=affine
        )
        check_under_all_schedules(library, problem)


@pytest.mark.parametrize("device", ["Hopper", "small"])
@pytest.mark.parametrize("layout", LAYOUTS)
@pytest.mark.parametrize(
    ("dtype", "activation", "residual"),
    [("f32", "relu", True), ("f32", "silu", False), ("bf16", "silu", False), ("f16", "silu", True)],
)
@pytest.mark.parametrize("shape", [(2, 6, 1500, 2), (5, 48, 1, 1)], ids=name_of)
def test_every_choice_of_gradients(library, shape, dtype, activation, residual, layout, device):
    """The same bits, whatever else is asked for: without a residual the only element is dx."""
    names = ("dx", "dresidual", "dweight", "dbias")
    given = {"dtype": dtype, "activation": activation, "residual": residual, "layout": layout}
    with group_norm.device(library, device):
        full = run(library, Problem(*shape, **given))
        every = [c for k in range(1, 5) for c in itertools.combinations(names, k)]
        # Of the others those that decide what is done for an element.
        few = [("dresidual",), ("dx",), ("dresidual", "dweight", "dbias")]
        for without in every if activation == "relu" and layout == "channels_first" else few:
            some = Problem(*shape, **given, without=without)
            outputs = group_norm.backward(library, some, full)
            assert set(outputs) == set(names) - set(without)
            for name, value in outputs.items():
                np.testing.assert_array_equal(value, full[name], name)


@pytest.mark.parametrize("layout", LAYOUTS)
@pytest.mark.parametrize("device", group_norm.DEVICES)
def test_large_offset(library, device, layout):
    # |mean| / std = 1e4: E[x^2] - E[x]^2 would leave nothing, a mean rounded to float32 a dweight
    # 1.75 % off.
    problem = Problem(*(2, 8, 2500, 2), layout=layout, mean=1e4, std=1.0)
    with group_norm.device(library, device):
        outputs = run(library, problem)
    check_norm_wise(problem, outputs)


@pytest.mark.parametrize("layout", LAYOUTS)
def test_all_bfloat16_far_from_zero(library, layout):
    # At 50 σ statistics rounded to bfloat16 would leave only noise.
    problem = Problem(
        *(4, 32, 256, 4), layout=layout, dtype="bf16", param_dtype="f32", mean=50.0, std=1.0
    )
    got = decoded(problem, run(library, problem), "dweight")
    assert norm_error(got, problem.reference().backward(problem.arrays["dy"])[2]) <= 2e-3


@pytest.mark.parametrize("layout", LAYOUTS)
@pytest.mark.parametrize("case", ["outlier first", "trend", "constant"])
@pytest.mark.parametrize("device", ["Hopper", "small"])
def test_statistics_of_awkward_data(library, device, case, layout):
    rng = np.random.default_rng(0)
    x = rng.standard_normal((1, 6, 4096))
    if case == "outlier first":
        x[0, :, 0] = 1e6  # where a shift by the first element would ruin the sums
    elif case == "trend":
        x[..., 2048:] += 1e4  # the parts' means lie far apart
    else:
        x[:] = 12345.678  # the variance is 0, and rounding must not make it negative
    x = Numbers("f32").rounded(x)
    problem = Problem(*(1, 6, 4096, 2), layout=layout, arrays={"x": x})
    with group_norm.device(library, device):
        outputs = run(library, problem)
    check_statistics(problem, outputs, case == "constant")


@pytest.mark.parametrize("layout", LAYOUTS)
def test_nan_and_infinity_stay_in_their_group(library, layout):
    x = np.random.default_rng(0).standard_normal((2, 6, 10))
    x[0, 1, 3] = np.nan
    x[1, 4, 2] = np.inf
    problem = Problem(*(2, 6, 10, 3), layout=layout, activation="relu", arrays={"x": x})
    y = decoded(problem, run(library, problem), "y")
    assert np.isnan(y).any(2).tolist() == [
        [True, True, False, False, False, False],
        [False, False, False, False, True, True],
    ]


# ---- memory

TRAFFIC = {  # N, C, HxW, G; device: passes over the inputs, and why
    ((2, 64, 64, 8), "Hopper"): (1, "several groups to a block"),
    ((1, 8, 3200, 2), "Hopper"): (1, "a group to a cluster"),
    ((1, 8, 3200, 2), "small"): (2, "a group streamed"),
    ((66, 64, 1, 1), "Hopper"): (1, "layer norm"),
    ((8, 32, 49, 32), "Hopper"): (1, "instance norm of 7 x 7"),
}


@pytest.mark.parametrize("layout", LAYOUTS)
@pytest.mark.parametrize("dtype", ["f32", "bf16"])
@pytest.mark.parametrize(("shape", "device"), TRAFFIC, ids=name_of)
def test_passes_over_memory_without_races(watched, shape, device, dtype, layout):
    """Each tensor exactly as often as meant, in and out of bounds counted, and no race."""
    times, _ = TRAFFIC[shape, device]
    for activation, residual in (("none", False), ("silu", True), ("relu", True)):
        p = Problem(*shape, layout=layout, dtype=dtype, activation=activation, residual=residual)
        with group_norm.device(watched, device), emulator.schedule(watched, "random", 1):
            with record(watched, races=True) as forward:
                saved = group_norm.forward(watched, p)
            with record(watched, races=True) as backward:
                group_norm.backward(watched, p, saved)
            known = replace(p, known_stats=saved["stats"])
            with record(watched, races=True) as apply:
                group_norm.forward(watched, known)
        numel = p.N * p.C * p.HxW
        passes = {"x": Passes(read=times), "y": Passes(written=1)}
        if residual:
            passes["residual"] = Passes(read=1)
        if p.masked:
            passes["mask"] = Passes(written=1)
        # weight, bias, statistics and sums by part: small beside the tensors.
        small = 64 * (p.C + p.N * p.G) + numel // 2
        assert_traffic(forward, passes, other=small, efficiency={})
        assert_traffic(apply, passes | {"x": Passes(read=1)}, other=small, efficiency={})
        passes = {name: Passes(read=times) for name in ("x", "dy")} | {"dx": Passes(written=1)}
        if activation != "none":
            passes["dresidual"] = Passes(written=1)
        if p.masked:
            # Its bytes are not kept, but dz is where it has dy's place: layer norm reads them for
            # sums by sample and by channel.
            leaves_dz = dtype == "f32" and times == 1
            reads = 1 if leaves_dz else 3 if p.HxW == p.G == 1 else 2
            passes["mask"] = Passes(read=reads, bits=True)
        elif residual:
            passes["residual"] = Passes(read=times)
        by_channel = 2 * 8 * p.N * p.C * (1 if times == 1 else 16)
        assert_traffic(backward, passes, other=small + by_channel, efficiency={})
        for recording in (forward, backward, apply):
            recording.assert_in_bounds()
            recording.assert_race_free()
        for name in ("y", "stats"):
            forward.assert_written(name)
        for name in ("dx", "dweight", "dbias"):
            backward.assert_written(name)


@pytest.mark.parametrize("layout", LAYOUTS)
@pytest.mark.parametrize(
    ("device", "shape", "dtype"),
    [
        ("Hopper", (1, 8, 3200, 2), "f32"),
        ("small with clusters", (1, 8, 750, 1), "f32"),
        ("small with clusters", (1, 8, 1000, 1), "bf16"),
    ],
    ids=["then in one block", "then forward streamed", "then backward streamed"],
)
def test_clusters_that_are_refused(library, watched, device, shape, dtype, layout):
    """As under MPS, or in a stream that has some of the multiprocessors."""
    problem = Problem(*shape, layout=layout, dtype=dtype, activation="silu")
    sizes = []
    for held in (0, 1):
        for lib in (library, watched):
            lib.emulator_set_blocks_held(held)
        try:
            with group_norm.device(library, device):
                check_under_all_schedules(library, problem)
            with group_norm.device(watched, device), record(watched) as recording:
                group_norm.backward(watched, problem, group_norm.forward(watched, problem))
        finally:
            for lib in (library, watched):
                lib.emulator_set_blocks_held(0)
        recording.assert_in_bounds()
        sizes.append({launch.cluster for launch in recording.launches})
    assert max(sizes[0]) > 1
    assert sizes[1] == {1}


# ---- what is refused


def test_refuses_float64(library):
    with pytest.raises(emulator.Refused, match=r"group_norm_forward_cuda.*float64.*expected"):
        group_norm.forward(library, Problem(2, 4, 4, 2, dtype="f64"))


def test_refuses_groups_that_do_not_divide_the_channels(library):
    problem = Problem(2, 6, 4, 3)
    problem.G = 4
    with pytest.raises(emulator.Refused, match=r"expected G that divides C, got G = 4 and C = 6"):
        group_norm.forward(library, problem)


def test_refuses_a_mask_without_use(library, monkeypatch):
    monkeypatch.setattr(Problem, "masked", True)
    with pytest.raises(emulator.Refused, match="expected no mask"):
        group_norm.forward(library, Problem(2, 4, 4, 2))


@pytest.mark.parametrize("shape", [(0, 4, 4, 2), (2, 4, 0, 2)], ids=["N=0", "HxW=0"])
def test_empty_writes_nothing(library, shape):
    outputs = run(library, Problem(*shape))
    assert (outputs["stats"] == 0xFF).all()
    assert (outputs["dweight"] == 0xFF).all()


@pytest.mark.sanitizer
def test_under_sanitizers():
    """Out-of-bounds and misaligned accesses, in global and shared memory; undefined behaviour."""
    path = build.build("group_norm", group_norm.KERNELS, group_norm.API, sanitize=True)
    result = build.run_sanitized("tests.emulator.sanitized_group_norm", str(path))
    assert result.returncode == 0, result.stderr[-4000:]
    assert result.stdout.startswith("ran 109 problems"), result.stdout
