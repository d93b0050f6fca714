"""What a norm's CUDA kernels write, against its float64 reference."""

from __future__ import annotations

import ctypes
from collections.abc import Callable
from contextlib import AbstractContextManager
from functools import partial

import numpy as np
import torch

from ..reference import KINKS, MASKABLE, SLOPE, NormReference
from ..tolerances import UNIT, assert_close, elementwise, norm_error
from . import emulator, norm
from .norm import Problem
from .numbers import Numbers

DTYPES = ("f32", "f16", "bf16")
TORCH = {"f32": torch.float32, "f16": torch.float16, "bf16": torch.bfloat16, "f64": torch.float64}


def decoded(problem: Problem, outputs: dict[str, np.ndarray], name: str) -> np.ndarray:
    """An output in float64, big ones as (N, C, HxW)."""
    values = Numbers(problem.placed(name)[0]).decode(outputs[name])
    return problem.from_layout(values) if name in norm.BIG else values


def statistics(outputs: dict[str, np.ndarray], expected: NormReference) -> np.ndarray:
    """mean, its low part and rstd."""
    stats = outputs["stats"].view(np.float32).astype(np.float64)
    return stats.reshape(3, *expected.rstd.shape)


def check(problem: Problem, outputs: dict[str, np.ndarray]) -> None:
    """Every output against float64, within bounds from the dtype and the reduction's length."""
    p, expected = problem, problem.reference()
    assert p.slope == SLOPE
    bound = elementwise(TORCH[p.dtype], expected.count)
    in_float = elementwise(torch.float32, expected.count)

    y = decoded(p, outputs, "y")
    assert_close(y, expected.y, bound, "y")
    if p.masked:
        bits = p.to_layout(y > 0).reshape(p.rows)
        packed = np.packbits(bits, axis=1, bitorder="little")
        np.testing.assert_array_equal(outputs["mask"].reshape(packed.shape), packed)

    mean, low, rstd = statistics(outputs, expected)
    # High and low part together hold the mean to more than float32 can.
    assert np.abs(mean + low - expected.mean).max() <= 1e-6 * (1 / expected.rstd).max()
    assert np.abs(rstd / expected.rstd - 1).max() <= in_float
    if "running_mean" in outputs and p.training:
        names = ("running_mean", "running_var")
        after = expected.running(*(p.arrays[name] for name in names), p.momentum)
        # The statistics themselves are float32 at best, whatever they are stored in.
        coarser = max(TORCH[p.running_dtype], torch.float32, key=UNIT.get)
        for name, value in zip(names, after, strict=True):
            assert_close(
                decoded(p, outputs, name), value, elementwise(coarser, expected.count), name
            )

    derivative = _derivative_at(p, expected, outputs)
    dx, dresidual, dweight, dbias = expected.backward(p.arrays["dy"], derivative)
    largest = np.abs(dresidual).sum((0, 2)).max()  # what the terms of a sum could amount to
    for name, value in (("dweight", dweight), ("dbias", dbias)):
        if name in outputs:
            error = np.abs(decoded(p, outputs, name) - value)
            rounding = UNIT[TORCH[p.param_dtype]] * np.abs(value)
            assert (error <= rounding + 8 * UNIT[torch.float32] * largest).all(), name
    if "dx" in outputs:
        assert_close(decoded(p, outputs, "dx"), dx, bound, "dx")
    if "dresidual" in outputs:
        # relu's is dy or 0
        exact = p.activation == "relu"
        assert_close(
            decoded(p, outputs, "dresidual"), dresidual, 0 if exact else bound, "dresidual"
        )


def _derivative_at(
    problem: Problem, expected: NormReference, outputs: dict[str, np.ndarray]
) -> np.ndarray:
    """activation'(z). Which side of a jump a z within rounding of it falls on is the kernel's to
    say; of 0 the backward has to agree with its own forward."""
    z, derivative = expected.z, expected.derivative
    rounding = 8 * elementwise(torch.float32, expected.count)
    if problem.activation in MASKABLE:
        positive = decoded(problem, outputs, "y") > 0
        assert np.abs(z[positive != (z > 0)]).max(initial=0.0) <= rounding
        return derivative(np.where(positive, 1.0, -1.0))
    slopes = derivative(z)
    for kink in KINKS.get(problem.activation, ()):
        near = np.abs(z - kink) <= rounding
        if near.any():
            left, right = (derivative(np.full_like(z, kink + s)) for s in (-rounding, rounding))
            got, dy = decoded(problem, outputs, "dresidual"), problem.arrays["dy"]
            of_left = np.abs(got - dy * left) < np.abs(got - dy * right)
            slopes = np.where(near, np.where(of_left, left, right), slopes)
    return slopes


# A context for an order of threads and its seed.
Schedule = Callable[[str, int], AbstractContextManager[None]]


def check_under_all_schedules(
    library: ctypes.CDLL, problem: Problem, schedule: Schedule | None = None
) -> None:
    """Correct, and the same bits whatever the order of threads and blocks."""
    schedule = schedule or partial(emulator.schedule, library)
    first = None
    for order, seed in emulator.SCHEDULES:
        with schedule(order, seed):
            outputs = norm.run(library, problem)
        if first is None:
            first = outputs
            check(problem, outputs)
        for name, value in outputs.items():
            # assert_array_equal takes 20 times as long to find nothing.
            if value.tobytes() != first[name].tobytes():
                np.testing.assert_array_equal(value, first[name], f"{name} under {order}:{seed}")


def check_norm_wise(problem: Problem, outputs: dict[str, np.ndarray]) -> None:
    """Within 1e-5 where float32 would lose all if it went about it in the wrong way."""
    expected = problem.reference()
    dx, _, dweight, _ = expected.backward(problem.arrays["dy"])
    for name, value in (("y", expected.y), ("dx", dx), ("dweight", dweight)):
        assert norm_error(decoded(problem, outputs, name), value) <= 1e-5, name


def check_statistics(problem: Problem, outputs: dict[str, np.ndarray], constant: bool) -> None:
    """rstd and y of data that other ways to a variance fail on; `constant` data has none."""
    expected, x = problem.reference(), problem.arrays["x"]
    y, rstd = decoded(problem, outputs, "y"), statistics(outputs, expected)[2]
    if constant:
        np.testing.assert_allclose(rstd, 1 / np.sqrt(problem.eps), rtol=1e-6)
        np.testing.assert_allclose(y, expected.y, atol=1e-6 * np.abs(x).max())
    else:
        np.testing.assert_allclose(rstd, expected.rstd, rtol=1e-5)
        assert norm_error(y, expected.y) <= 1e-5
