"""LAMB's CUDA kernels, run by the emulator against float64."""

from __future__ import annotations

import ctypes
from dataclasses import replace

import numpy as np
import pytest
import torch

from . import lamb_reference as reference
from . import last_places
from .emulator import build, emulator, optimizers
from .emulator.optimizer_checks import (
    IN_TURN,
    LARGE,
    PLACES,
    SIZES,
    check,
    check_everywhere,
    check_in_turn,
    divisor_of,
    in_turn,
    same_bits,
)
from .emulator.optimizers import CHUNK, DEVICES, DTYPES, SMALL, Parameter, Problem, run
from .lamb_reference import Options
from .reference import to_float64


@pytest.fixture(scope="module")
def library() -> ctypes.CDLL:
    return optimizers.library()


@pytest.mark.parametrize("g_dtype", DTYPES)
@pytest.mark.parametrize("p_dtype", DTYPES)
def test_every_dtype_and_size(library_both_ways, p_dtype, g_dtype):
    problem = Problem([Parameter(n, p_dtype, g_dtype) for n in SIZES])
    check_everywhere(library_both_ways, problem)


@pytest.mark.parametrize("offset", [1, 2, 3])
def test_memory_that_no_unit_fits(library_both_ways, offset):
    dtypes = [("f32", "f32"), ("bf16", "bf16"), ("f16", "f32")]
    problem = Problem([Parameter(1030, *d, offset=offset) for d in dtypes])
    check_everywhere(library_both_ways, problem)


VARIANTS = {
    "no bias correction": Options(bias_correction=False),
    "no grad averaging": Options(grad_averaging=False),
    "trust clip": Options(trust_clip=True),
    "no decay": Options(weight_decay=0.0),
    "always adapted": Options(weight_decay=0.0, always_adapt=True),
    "maximize": Options(maximize=True),
    "large lr": Options(lr=0.3),
    "decoupled": Options(lr=0.3, decoupled_decay=True),
    "cautious": Options(caution=True),
    "clamped": Options(ratio_clamp=(0.5, 0.75)),
    "corrections in the step size": Options(step_size_correction=True, eps_inside_sqrt=True),
}


@pytest.mark.parametrize("clip", [None, 1e6], ids=["no clip", "in bounds"])
def test_groups_of_every_variant(library_both_ways, clip):
    """Mixed in one call, with step counts of their own."""
    parameters = [Parameter(900 + i, group=i, step=1 + 3 * i) for i in range(len(VARIANTS))]
    check_everywhere(library_both_ways, Problem(parameters, [*VARIANTS.values()], clip))


def test_decay_against_the_quotient(library_both_ways):
    states, options = last_places.decay_against_quotient((300, 3 * CHUNK + 5))
    parameters = [optimizers.starting(s, group=group) for s in states for group in (0, 1)]
    groups = [Options(**options), Options(**options, caution=True)]
    check_everywhere(library_both_ways, Problem(parameters, groups, None))


def test_norms_of_few_elements_and_of_one_that_outweighs(library_both_ways):
    states, options = last_places.few_elements()
    problem = Problem([optimizers.starting(s) for s in states], [Options(**options)], None)
    check(problem, run(library_both_ways, problem), 1.0)


def test_masters_exclusion_and_loss_scale(library_both_ways):
    """Of each low precision, with units and without; g leaves the kernel's scale by a factor."""
    parameters = [
        Parameter(1030, "bf16", "bf16", master=True),
        Parameter(1030, "f16", "f32", offset=1, master=True),
        Parameter(300, excluded=True),
        Parameter(300),
    ]
    problem = Problem(parameters, max_grad_norm=1e-3, grad_scale=384.0)
    check_everywhere(library_both_ways, problem)


@pytest.mark.parametrize("count", [32, 33, 71], ids=["all", "one more", "two launches more"])
def test_step_counts_that_a_launch_takes_and_more(library, count):
    problem = Problem([Parameter(40, step=1 + t) for t in range(count)])
    with optimizers.device(library, "Hopper", "random", 5):
        results = run(library, problem)
    check(problem, results, divisor_of(problem))


@pytest.mark.parametrize("clip", [None, 0.05], ids=["no clip", "clip"])
@pytest.mark.parametrize(
    "options", [Options(), Options(caution=True, maximize=True)], ids=["plain", "cautious uphill"]
)
def test_tensors_larger_than_what_all_blocks_hold(library_both_ways, options, clip):
    """Among others that are not; the last chunks of the large ones stay on the chip."""
    problem = Problem([Parameter(n) for n in LARGE], [options], clip)
    check_everywhere(library_both_ways, problem)


def test_more_chunks_than_a_block_has_threads(library):
    """A lane adds up several chunks, and a thread several pieces of the clip's sum; it enters
    several chunks of one tensor in the table."""
    problem = Problem([Parameter(CHUNK), Parameter(300 * CHUNK + 3), Parameter(300)])
    with optimizers.device(library, "Hopper", "random", 4):
        results = run(library, problem)
    check(problem, results, divisor_of(problem))


@pytest.mark.parametrize("clip", [None, 0.05], ids=["no clip", "clip"])
@pytest.mark.parametrize("place", IN_TURN, ids=str)
def test_sizes_that_follow_each_other(library, place, clip):
    """Of groups of their own, whose factors are others."""
    groups = [Options(), Options(betas=(0.8, 0.99), eps=1e-4), Options(caution=True)]
    check_in_turn(library, Problem(in_turn(place, len(groups)), groups, clip), place)


def test_the_largest_tensors_come_first(library):
    """In the order of their work; statistics and step counts stay where the tensors are."""
    large = 2**20  # the most of one that takes its turn
    sizes = (CHUNK, large + 1, 300, SMALL, large, 2 * CHUNK, large + 2 * CHUNK, 0)
    parameters = [
        Parameter(n, "bf16", "bf16", step=1 + t, excluded=t % 3 == 0) for t, n in enumerate(sizes)
    ]
    problem = Problem(parameters)
    with optimizers.device(library, "Hopper", "random", 3):
        results = run(library, problem)
        placed = optimizers.Placed(library, problem)
        optimizers.step(library, placed)
    check(problem, results, divisor_of(problem))
    rows = placed.table.bytes[: 72 * len(sizes)].view(np.int32).reshape(len(sizes), 18)
    chunks = [-(-n // CHUNK) for n in sizes]
    # By what comes before: the large ones, then the others; small ones count by themselves.
    order = [1, 6, 0, 2, 4, 5]
    assert [rows[i, 12] for i in order] == list(np.cumsum([0] + [chunks[i] for i in order[:-1]]))
    assert [rows[i, 15] for i in order] == list(range(6))
    assert [rows[i, 12] for i in (3, 7)] == [0, 1]


@pytest.mark.parametrize("dtypes", [("bf16", "bf16", True), ("f16", "f32", False)])
def test_large_tensors_of_low_precision(library, dtypes):
    p, g, master = dtypes
    problem = Problem([Parameter(n, p, g, master=master) for n in (20 * CHUNK + 3, 5 * CHUNK)])
    check_everywhere(library, problem)


@pytest.mark.parametrize("place", DEVICES)
def test_many_small_tensors(library, place):
    problem = Problem([Parameter(SMALL) for _ in range(70)], [Options()], None)
    with optimizers.device(library, place, "random", 3):
        results = run(library, problem)
    check(problem, results, 1.0)


@pytest.mark.parametrize("blocks", [1, 3])
def test_a_part_of_the_device_does_as_well(library, blocks):
    """As under MPS, or in a stream that has some of the multiprocessors."""
    problem = Problem([Parameter(n) for n in (*LARGE, SMALL)])
    with optimizers.device(library, "Hopper"):
        expected = run(library, problem)
        library.emulator_set_blocks_held(blocks)
        try:
            got = run(library, problem)
        finally:
            library.emulator_set_blocks_held(0)
    assert same_bits(expected, got)


def test_the_sum_is_that_of_the_clip_inside(library):
    """To the last bit: no order of blocks or launches is in it."""
    problem = Problem([Parameter(n, g_dtype=g) for n in LARGE for g in DTYPES])
    sums = []
    for place in PLACES:
        with optimizers.device(library, *place):
            sums.append(optimizers.grad_sum_sq(library, problem))
    assert len(set(sums)) == 1
    assert sums[0] == pytest.approx(divisor_of(problem) ** 2 * problem.max_grad_norm**2, rel=1e-12)
    with optimizers.device(library, "Hopper"):
        assert same_bits(run(library, problem), run(library, problem, grad_sum_sq=sums[0]))


def test_more_items_than_pieces_of_the_sum(library):
    problem = Problem([Parameter(4100 * CHUNK + 3, g_dtype="bf16"), Parameter(70)])
    want = sum(reference.norm(to_float64(x.start["g"])) ** 2 for x in problem.parameters)
    assert optimizers.grad_sum_sq(library, problem) == pytest.approx(want, rel=1e-12)


def test_eps_of_the_clip(library):
    """Which is added to the norm of what the loss scale has been taken off."""
    parameters = [Parameter(500), Parameter(CHUNK + 1)]
    problem = Problem(parameters, max_grad_norm=0.05, clip_eps=0.025, grad_scale=8.0)
    check_everywhere(library, problem)


def test_sum_of_gradients_elsewhere(library):
    """The clip counts what another device holds, when it is given the sum over all."""
    problem = Problem([Parameter(500), Parameter(CHUNK + 1)], max_grad_norm=1.0)
    results = run(library, problem, grad_sum_sq=81.0)
    check(problem, results, 9.0)


def test_zero_norms_and_non_finite_ones(library):
    zero_p, zero_u, bad = Parameter(600), Parameter(600), Parameter(600)
    zero_p.start["p"].zero_()
    for name in ("p", "g", "m"):
        zero_u.start[name].zero_()
    bad.start["g"][5] = float("inf")
    problem = Problem([zero_p, zero_u, bad], max_grad_norm=None)
    results = run(library, problem)
    check(Problem([zero_p, zero_u], max_grad_norm=None), results[:2], 1.0)
    assert torch.equal(results[1]["p"], torch.zeros(600))
    assert not results[2]["p"].isfinite().any()

    problem.max_grad_norm = 1.0
    bad.start["g"][5] = float("nan")
    results = run(library, problem)
    assert all(r["p"].isnan().all() for r in results)


def test_numbers_on_the_device(library_both_ways):
    """Step counts, lr and the loss scale, of every variant and of more groups than one launch has
    room for; the counts go on."""
    groups = [replace(o, lr=o.lr * (1 + i)) for i in range(4) for o in VARIANTS.values()]
    parameters = [Parameter(30 * i, group=i, step=1 + i % 5) for i in range(len(groups))]
    parameters += [
        Parameter(5 * CHUNK, step=3),
        Parameter(700, step=4),
        Parameter(9, excluded=True),
    ]
    problem = Problem(parameters, groups, grad_scale=8.0, on_device=True, found_inf=0.0)
    check_everywhere(library_both_ways, problem)
    results = run(library_both_ways, problem)
    assert [r["step"].item() for r in results] == [x.step for x in parameters]


@pytest.mark.parametrize(("place", "blocks"), [("Hopper", 4), ("small", 2), ("alone", 1)])
def test_blocks_that_a_device_has_room_for(library, place, blocks):
    """Two a multiprocessor. For the clip each adds 1 to the workspace's first counter."""
    placed = optimizers.Placed(library, Problem([Parameter(8 * CHUNK)]))
    with optimizers.device(library, place):
        optimizers.step(library, placed)
    assert placed.workspace.bytes[:4].view(np.uint32) == blocks


def test_no_more_blocks_than_items(library):
    placed = optimizers.Placed(library, Problem([Parameter(2 * CHUNK), Parameter(70)]))
    with optimizers.device(library, "Hopper"):
        optimizers.step(library, placed)
    assert placed.workspace.bytes[:4].view(np.uint32) == 3


@pytest.mark.parametrize(("margin", "blocks"), [(1, 6), (3, 2), (4, 2), (2**30, 2)])
def test_multiprocessors_left_to_other_kernels(library, margin, blocks):
    """At least one is the step's own. The same bits come of it, from chip and in two sweeps."""
    problem = Problem([Parameter(n) for n in LARGE])
    four = emulator.schedule(library, "random", 7, 4)
    with optimizers.device(library, "Hopper"), four:
        want = run(library, problem)
        problem.sm_margin = margin
        assert same_bits(want, run(library, problem))
        placed = optimizers.Placed(library, problem)
        optimizers.step(library, placed)
    assert placed.workspace.bytes[:4].view(np.uint32) == blocks


def test_no_tensors(library):
    problem = Problem([])
    assert run(library, problem) == []
    assert optimizers.grad_sum_sq(library, problem) == 0


def test_statistics_of_no_elements(library):
    problem = Problem([Parameter(0), Parameter(5)], [Options(caution=True)], None)
    empty, _ = run(library, problem)
    assert empty["stats"].tolist() == [0, 0, 0, 1]


@pytest.mark.parametrize("place", DEVICES)
def test_a_skipped_step_changes_nothing(library, place):
    parameters = [Parameter(5 * CHUNK + 3), Parameter(70, "bf16", master=True), Parameter(0)]
    parameters += [Parameter(1) for _ in range(300)]  # more than a block has threads
    problem = Problem(parameters, on_device=True, found_inf=1.0)
    with optimizers.device(library, place, "random", 6):
        results = run(library, problem)
    for x, after in zip(parameters, results, strict=True):
        assert all(torch.equal(after[name], start) for name, start in x.start.items())
        assert after["step"].item() == x.step - 1
        assert after["stats"].isnan().all()
    optimizers.step(library, optimizers.Placed(library, problem))  # nobody wants statistics


@pytest.mark.sanitizer
def test_sanitizers_find_nothing():
    """Of LARS too."""
    path = build.build("optimizers", optimizers.KERNELS, optimizers.API, sanitize=True)
    result = build.run_sanitized("tests.emulator.sanitized_optimizers", str(path))
    assert result.returncode == 0, result.stderr[-3000:]
    assert "ran 40 problems" in result.stdout
