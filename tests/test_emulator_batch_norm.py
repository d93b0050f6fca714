"""Batch norm's CUDA kernels, run by the emulator against float64."""

from __future__ import annotations

import ctypes
import itertools

import numpy as np
import pytest
import torch

from .emulator import batch_norm, build, emulator
from .emulator.batch_norm import Problem
from .emulator.numbers import Numbers
from .reference import ACTIVATIONS, KINKS, SLOPE, BatchNormReference
from .tolerances import UNIT, elementwise

DTYPES = ("f32", "f16", "bf16")
TORCH = {"f32": torch.float32, "f16": torch.float16, "bf16": torch.bfloat16, "f64": torch.float64}
LAYOUTS = ("channels_first", "channels_last")

SHAPES = {  # N, C, HxW
    (2, 8, 64): "rows of whole 16-byte units in both layouts",
    (5, 6, 49): "7 x 7: no unit fits a plane; an odd count of everything",
    (1, 3, 7): "less than a warp; mask rows of less than a byte",
    (2, 12, 196): "14 x 14 and 12 channels: units of 4, mask rows that end on half a byte",
    (5, 8, 1): "(N, C) as planes of one element: read as channels_last",
    (5, 1, 49): "one channel: read as channels_first",
    (2, 33, 49): "33 channels: one element more than a warp",
    (5, 160, 64): "channels_last: tiles of 20 units, three chunks",
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


@pytest.fixture(scope="module")
def library() -> ctypes.CDLL:
    return batch_norm.library()


def run(library: ctypes.CDLL, problem: Problem) -> dict[str, np.ndarray]:
    outputs = batch_norm.forward(library, problem)
    return outputs | batch_norm.backward(library, problem, outputs)


def close(got: np.ndarray, expected: np.ndarray, dtype: str, length: int, what: str) -> None:
    assert not np.isnan(got).any(), f"{what}: not written, or NaN"
    bound = elementwise(TORCH[dtype], length) * max(1.0, float(np.abs(expected).max()))
    worst = float(np.abs(got - expected).max())
    assert worst <= bound, f"{what}: error {worst:.3e}, bound {bound:.3e}"


def reference_of(problem: Problem) -> BatchNormReference:
    assert problem.slope == SLOPE
    given = problem.arrays
    fixed = {}
    if not problem.training:
        fixed = {"mean": given["running_mean"], "var": given["running_var"]}
    return BatchNormReference(
        given["x"],
        given.get("weight"),
        given.get("bias"),
        given.get("residual"),
        eps=problem.eps,
        act=problem.activation,
        **fixed,
    )


def check(problem: Problem, outputs: dict[str, np.ndarray]) -> None:
    """Every output against float64, within bounds from the dtype and the reduction's length."""
    expected = reference_of(problem)
    elements, params = Numbers(problem.dtype), Numbers(problem.param_dtype)
    M = problem.N * problem.HxW

    y = problem.from_layout(elements.decode(outputs["y"]))
    close(y, expected.y, problem.dtype, M, "y")
    derivative = derivative_at(problem, expected, y, outputs)
    if problem.masked:
        positive = y > 0
        rows, row = problem.rows
        bits = problem.to_layout(positive).reshape(rows, row)
        packed = np.packbits(bits, axis=1, bitorder="little")
        np.testing.assert_array_equal(outputs["mask"].reshape(packed.shape), packed)

    stats = outputs["stats"].view(np.float32).reshape(3, problem.C).astype(np.float64)
    mean, rstd = expected.batch_mean, expected.rstd
    # High and low part together hold the mean to more than float32 can.
    assert np.abs(stats[0] + stats[1] - mean).max() <= 1e-6 * (1 / rstd).max()
    assert np.abs(stats[2] / rstd - 1).max() <= elementwise(TORCH["f32"], M)
    if problem.training and problem.running:
        running = Numbers(problem.running_dtype)
        before = problem.arrays["running_mean"], problem.arrays["running_var"]
        after = expected.running(*before, problem.momentum)
        for name, value in zip(("running_mean", "running_var"), after, strict=True):
            got = running.decode(outputs[name])
            # The statistics themselves are float32 at best, whatever they are stored in.
            coarser = max(problem.running_dtype, "f32", key=lambda d: UNIT[TORCH[d]])
            close(got, value, coarser, M, name)

    dx, dresidual, dweight, dbias = expected.backward(problem.arrays["dy"], derivative)
    largest = np.abs(dresidual).sum((0, 2)).max()  # what the terms of a sum could amount to
    for name, value, numbers in (("dweight", dweight, params), ("dbias", dbias, params)):
        if name in outputs:
            got = numbers.decode(outputs[name])
            assert not np.isnan(got).any(), f"{name}: not written, or NaN"
            bound = UNIT[TORCH[numbers.dtype]] * np.abs(value) + 8 * UNIT[torch.float32] * largest
            assert (np.abs(got - value) <= bound).all(), name
    if "dx" in outputs:
        close(problem.from_layout(elements.decode(outputs["dx"])), dx, problem.dtype, M, "dx")
    if "dresidual" in outputs:
        got = problem.from_layout(elements.decode(outputs["dresidual"]))
        if problem.activation in ("none", "relu"):
            np.testing.assert_array_equal(got, dresidual)
        else:
            close(got, dresidual, problem.dtype, M, "dresidual")


def derivative_at(
    problem: Problem, expected: BatchNormReference, y: np.ndarray, outputs: dict[str, np.ndarray]
) -> np.ndarray:
    """activation'(z). Which side of a jump a z within rounding of it falls on is the kernel's to
    say; of 0 the backward has to agree with its own forward."""
    z, slopes = expected.z, expected.derivative(expected.z)
    rounding = elementwise(TORCH["f32"], problem.N * problem.HxW) * 8
    if problem.activation in batch_norm.MASKABLE:
        positive = y > 0
        wrong = positive != (z > 0)
        assert np.abs(z[wrong]).max(initial=0.0) <= rounding
        return np.where(positive, 1.0, SLOPE if problem.activation == "leaky_relu" else 0.0)
    derivative = ACTIVATIONS[problem.activation][1]
    for kink in KINKS.get(problem.activation, ()):
        near = np.abs(z - kink) <= rounding
        if near.any():
            got = problem.from_layout(Numbers(problem.dtype).decode(outputs["dresidual"]))
            left, right = (derivative(np.full_like(z, kink + s)) for s in (-rounding, rounding))
            dy = problem.arrays["dy"]
            of_left = np.abs(got - dy * left) < np.abs(got - dy * right)
            slopes = np.where(near, np.where(of_left, left, right), slopes)
    return slopes


def check_under_all_schedules(library: ctypes.CDLL, problem: Problem) -> None:
    """Correct, and the same bits whatever the order of threads and blocks."""
    first = None
    for order, seed in emulator.SCHEDULES:
        with emulator.schedule(library, order, seed):
            outputs = run(library, problem)
        if first is None:
            first = outputs
            check(problem, outputs)
        for name, value in outputs.items():
            np.testing.assert_array_equal(value, first[name], f"{name} under {order}:{seed}")


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
@pytest.mark.parametrize("activation", batch_norm.MASKABLE)
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
def test_any_activation_with_misaligned_tensors(library, tensor, monkeypatch):
    # One pointer that is less aligned than the others decides for all.
    place = batch_norm._Buffers.tensor

    def misplaced(self, name, *args):
        self.problem.misaligned = 1 if name == tensor else 0
        return place(self, name, *args)

    monkeypatch.setattr(batch_norm._Buffers, "tensor", misplaced)
    problem = Problem(2, 16, 64, dtype="bf16", activation="gelu", residual=True)
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
    numbers = Numbers("f32")
    y, dz = (problem.from_layout(numbers.decode(outputs[k])) for k in ("y", "dresidual"))
    close(y, np.where(z > 0, z, slope * z), "f32", 30, "y")
    dy = problem.arrays["dy"]
    np.testing.assert_array_equal(dz, np.where(z > 0, dy, numbers.rounded(slope * dy)))


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
        with emulator.schedule(library, "forward", multiprocessors=multiprocessors):
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


def norm_error(got: np.ndarray, expected: np.ndarray) -> float:
    return float(np.linalg.norm(got - expected) / np.linalg.norm(expected))


@pytest.mark.parametrize("layout", LAYOUTS)
@pytest.mark.parametrize(
    "shape",
    [
        pytest.param((5, 3, 4096), id="several chunks"),
        pytest.param((2, 32, 49), id="one chunk, element accesses"),
    ],
)
def test_large_offset(library, layout, shape):
    # |mean| / std = 1e4: E[x^2] - E[x]^2 would leave nothing, a mean rounded to float32 a dweight
    # 1.75 % off.
    problem = Problem(*shape, layout=layout, mean=1e4, std=1.0)
    outputs = run(library, problem)
    expected = reference_of(problem)
    dx, _, dweight, _ = expected.backward(problem.arrays["dy"])
    numbers = Numbers("f32")
    for name, value in (("y", expected.y), ("dx", dx)):
        assert norm_error(problem.from_layout(numbers.decode(outputs[name])), value) <= 1e-5, name
    assert norm_error(numbers.decode(outputs["dweight"]), dweight) <= 1e-5


@pytest.mark.parametrize("layout", LAYOUTS)
@pytest.mark.parametrize("case", ["outlier first", "trend", "constant"])
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
    expected = reference_of(problem)
    y = problem.from_layout(Numbers("f32").decode(outputs["y"]))
    stats = outputs["stats"].view(np.float32).reshape(3, 3).astype(np.float64)
    if case == "constant":
        np.testing.assert_allclose(stats[2], 1 / np.sqrt(problem.eps), rtol=1e-6)
        np.testing.assert_allclose(y, expected.y, atol=1e-6 * np.abs(x).max())
    else:
        np.testing.assert_allclose(stats[2], expected.rstd, rtol=1e-5)
        assert norm_error(y, expected.y) <= 1e-5


@pytest.mark.parametrize("layout", LAYOUTS)
def test_nan_and_infinity_stay_in_their_channel(library, layout):
    x = np.random.default_rng(0).standard_normal((2, 6, 10))
    x[0, 1, 3] = np.nan
    x[1, 4, 2] = np.inf
    problem = Problem(2, 6, 10, layout=layout, activation="relu", arrays={"x": x})
    y = problem.from_layout(Numbers("f32").decode(run(library, problem)["y"]))
    assert np.isnan(y).all((0, 2)).tolist() == [False, True, False, False, True, False]
    assert np.isfinite(y[:, [0, 2, 3, 5]]).all()


@pytest.mark.parametrize("layout", LAYOUTS)
def test_eval_gradient_ignores_infinite_x(library, layout):
    # dx = scale * dz there: an infinite x has no part in it, where 0 * inf would make a NaN of it.
    x = np.random.default_rng(0).standard_normal((2, 6, 10))
    x[1, 4, 2] = np.inf
    problem = Problem(2, 6, 10, layout=layout, activation="relu", training=False, arrays={"x": x})
    dx = problem.from_layout(Numbers("f32").decode(run(library, problem)["dx"]))
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
    assert result.stdout.startswith("ran 112 problems"), result.stdout
