"""What is checked of a step of LAMB's or LARS' kernels, against float64."""

from __future__ import annotations

import ctypes
from dataclasses import replace

import pytest
import torch

from .. import lamb_reference, lars_reference
from ..reference import to_float64
from . import optimizers
from .optimizers import CHUNK, SMALL, Problem, State, run

SIZES = {
    0: "nothing at all",
    1: "one element",
    37: "units of four and a tail",
    SMALL: "the most that a warp takes",
    SMALL + 1: "the least that a block takes",
    CHUNK: "one full chunk",
    2 * CHUNK + 5: "three chunks, the last with one unit and a tail",
}
# More than all blocks hold, among others.
LARGE = (3 * CHUNK, 7, 20 * CHUNK + 3, CHUNK + 1, 300, 9 * CHUNK, 40)
# A device and an order of blocks and threads: all of it kept on the chip, and most of it not.
PLACES = (
    ("Hopper", "forward", 0),
    ("Hopper", "reverse", 0),
    ("Hopper", "random", 1),
    ("small", "random", 2),
    ("alone", "forward", 0),
)


def check(problem: Problem, results: list[State], divisor: float) -> None:
    for i, (x, after) in enumerate(zip(problem.parameters, results, strict=True)):
        p0 = to_float64(x.start.get("master", x.start["p"]))
        m, v, g = (to_float64(x.start[name]) for name in "mvg")
        options = replace(problem.groups[x.group], excluded=x.excluded)
        grad = g / divisor / problem.grad_scale
        stepped = [after.get("master", after["p"]), after.get("m")]
        if problem.kind == "lamb":
            exact = lamb_reference.Tensor64(p0, m, v, x.step - 1, options)
            lamb_reference.step([exact], [grad], None)
            lamb_reference.assert_stepped(exact, p0, *stepped, after["v"], f"parameter {i}")
        else:
            exact = lars_reference.Tensor64(p0, m, x.step - 1, options)
            lars_reference.step([exact], [grad], None)
            lars_reference.assert_stepped(exact, p0, *stepped, f"parameter {i}")
        if x.master:
            assert torch.equal(after["p"], after["master"].to(after["p"].dtype))
        p_norm, _, u_norm, ratio = exact.stats
        want = (p_norm, lamb_reference.norm(g) / problem.grad_scale, u_norm, ratio)
        assert after["stats"].tolist() == pytest.approx(want, rel=1e-5)


def divisor_of(problem: Problem) -> float:
    grads = [to_float64(x.start["g"]) / problem.grad_scale for x in problem.parameters]
    return lamb_reference.clip_divisor(grads, problem.max_grad_norm, problem.clip_eps)


def same_bits(one: list[State], other: list[State]) -> bool:
    return all(
        torch.equal(a[name].view(torch.uint8), b[name].view(torch.uint8))
        for a, b in zip(one, other, strict=True)
        for name in a
    )


def check_everywhere(library: ctypes.CDLL, problem: Problem) -> None:
    """Correct, and the same bits whatever the order of threads and blocks, how many there are and
    what they keep on the chip."""
    divisor = divisor_of(problem)
    first = None
    for place in PLACES:
        with optimizers.device(library, *place):
            results = run(library, problem)
        if first is None:
            check(problem, results, divisor)
            first = results
        assert same_bits(first, results), place
