"""What is checked of a step of LAMB's or LARS' kernels, against float64."""

from __future__ import annotations

import ctypes
import itertools
from dataclasses import replace

import pytest
import torch

from .. import lamb_reference, lars_reference
from ..reference import to_float64
from . import emulator, optimizers
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
        numbers = (p_norm, lamb_reference.norm(g) / problem.grad_scale, u_norm, ratio)
        want = torch.tensor(numbers, dtype=torch.float32)  # which may be too small for them
        assert after["stats"].tolist() == pytest.approx(want.tolist(), rel=1e-5)


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


# A device and how many multiprocessors it has; and the chunks of one tensor that its blocks keep,
# of one that they do not keep whole, and the blocks.
IN_TURN = {
    ("Ada", 1): (4, 3, 1),
    ("alone", 1): (2, 1, 1),
    ("small", 1): (1, 0, 1),
    ("Hopper", 1): (5, 4, 2),
}


def in_turn(place: tuple[str, int], groups: int) -> list[optimizers.Parameter]:
    """Tensors of every size that a device treats in a way of its own, each followed by each: kept
    whole and not, by every block or by some, with as many chunks left out as wait for an outcome,
    one less and more. Then small ones."""
    most, some, blocks = IN_TURN[place]
    own = {1, most, most + 1, some + 2, some + 3, some + 4}
    chunks = sorted({n * blocks for n in own} | {n * blocks - 1 for n in own if blocks > 1})
    order = []
    for first, second in itertools.combinations_with_replacement(chunks, 2):
        order += [first, second]
    if blocks == 1:
        order += order[::-1]
    sizes = [n * CHUNK - 5 * (i % 2) for i, n in enumerate(order)]
    sizes += [SMALL - i for i in range(9)]
    return [optimizers.Parameter(n, group=i % groups) for i, n in enumerate(sizes)]


def check_in_turn(library: ctypes.CDLL, problem: Problem, place: tuple[str, int]) -> None:
    """Correct, and the same bits as where all of it is kept."""
    name, multiprocessors = place
    many = emulator.schedule(library, "random", 5, 4)  # 40 chunks
    with optimizers.device(library, "Hopper"), many:
        kept = run(library, problem)
    check(problem, kept, divisor_of(problem))
    for order, seed in (("forward", 0), ("random", 6)):
        schedule = emulator.schedule(library, order, seed, multiprocessors)
        with optimizers.device(library, name), schedule:
            assert same_bits(kept, run(library, problem)), order
