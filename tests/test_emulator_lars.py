"""LARS' CUDA kernels, run by the emulator against float64."""

from __future__ import annotations

import ctypes
from dataclasses import replace

import pytest
import torch

from . import last_places
from .emulator import optimizers
from .emulator.optimizer_checks import (
    IN_TURN,
    LARGE,
    SIZES,
    check,
    check_everywhere,
    check_in_turn,
    in_turn,
)
from .emulator.optimizers import CHUNK, DEVICES, DTYPES, SMALL, Lars, Parameter, run
from .lars_reference import Options

MOMENTUM = Options(lr=0.5, momentum=0.9, weight_decay=0.01)
VARIANTS = {
    "defaults": Options(),
    "adapted, no momentum": Options(weight_decay=1e-4),
    "momentum": MOMENTUM,
    "dampening": replace(MOMENTUM, dampening=0.3),
    "nesterov": replace(MOMENTUM, nesterov=True),
    "nesterov without decay": replace(MOMENTUM, nesterov=True, weight_decay=0.0),
    "always adapted": Options(momentum=0.5, always_adapt=True),
    "clip": replace(MOMENTUM, trust_clip=True, lr=1e-4),
    "clip, lr above 1": replace(MOMENTUM, trust_clip=True, lr=7.0),
    "lr in the momentum": replace(MOMENTUM, lr_in_momentum=True, lr=7.0),
    "momentum correction": replace(MOMENTUM, momentum_correction=True, last_lr=0.1),
    "both": replace(MOMENTUM, nesterov=True, momentum_correction=True, last_lr=0.1),
    "maximize": replace(MOMENTUM, maximize=True),
    "no decay where excluded": replace(MOMENTUM, exclude_decay=True),
    "plain where a norm is 0": replace(MOMENTUM, zero_norm_plain=True, trust_clip=True),
}


@pytest.fixture(scope="module")
def library() -> ctypes.CDLL:
    return optimizers.library()


@pytest.mark.parametrize("g_dtype", DTYPES)
@pytest.mark.parametrize("p_dtype", DTYPES)
def test_every_dtype_and_size(library_both_ways, p_dtype, g_dtype):
    problem = Lars([Parameter(n, p_dtype, g_dtype) for n in SIZES], [MOMENTUM])
    check_everywhere(library_both_ways, problem)


@pytest.mark.parametrize("offset", [1, 2, 3])
def test_memory_that_no_unit_fits(library_both_ways, offset):
    dtypes = [("f32", "f32"), ("bf16", "bf16"), ("f16", "f32")]
    problem = Lars([Parameter(1030, *d, offset=offset) for d in dtypes], [MOMENTUM])
    check_everywhere(library_both_ways, problem)


@pytest.mark.parametrize("step", [1, 2], ids=["first step", "second step"])
@pytest.mark.parametrize("clip", [None, 0.05], ids=["no clip", "clip"])
def test_groups_of_every_variant(library_both_ways, clip, step):
    """Mixed in one call, each with a tensor that is excluded and two of which a norm is 0."""
    parameters = []
    for group in range(len(VARIANTS)):
        parameters += [
            Parameter(900 + group, group=group, step=step),
            Parameter(70, group=group, step=step, excluded=True),
            Parameter(30, group=group, step=step),
            Parameter(30, group=group, step=step),
        ]
        parameters[-2].start["p"].zero_()
        parameters[-1].start["g"].zero_()
    check_everywhere(library_both_ways, Lars(parameters, [*VARIANTS.values()], clip))


def test_rates_between_two_floats(library_both_ways):
    (state,), options = last_places.rate_between_floats(2000)
    problem = Lars([optimizers.starting(state)], [Options(**options)], None)
    check(problem, run(library_both_ways, problem), 1.0)


@pytest.mark.parametrize(
    "options",
    [MOMENTUM, Options(weight_decay=0.01), replace(MOMENTUM, maximize=True)],
    ids=["m", "no m", "uphill"],
)
def test_tensors_larger_than_what_all_blocks_hold(library_both_ways, options):
    problem = Lars([Parameter(n) for n in LARGE], [options])
    check_everywhere(library_both_ways, problem)


@pytest.mark.parametrize(
    "options",
    [Options(), MOMENTUM, replace(MOMENTUM, nesterov=True)],
    ids=["no m", "m", "nesterov"],
)
@pytest.mark.parametrize(
    ("scale", "clip"),
    [
        pytest.param(1e-43, None, id="λ_l above the largest float"),
        pytest.param(1e38, None, id="λ_l below the smallest normal one"),
        pytest.param(1e38, 1.0, id="the clip's power of two is in the scale already"),
    ],
)
def test_gradients_at_the_ends_of_floats_range(library_both_ways, scale, clip, options):
    """One tensor is kept on chip and one, larger than what all blocks hold, is read again."""
    parameters = [Parameter(5 * CHUNK + 3), Parameter(max(LARGE))]
    for x in parameters:
        g = (torch.rand(x.numel, dtype=torch.float64) * 2 - 1) * scale
        x.start["g"] = g.float()
    group = replace(options, always_adapt=True, eps=0.0, weight_decay=0.0)
    check_everywhere(library_both_ways, Lars(parameters, [group], clip))


@pytest.mark.parametrize("place", IN_TURN, ids=str)
def test_sizes_that_follow_each_other(library, place):
    groups = [MOMENTUM, Options(weight_decay=1e-4), replace(MOMENTUM, nesterov=True)]
    check_in_turn(library, Lars(in_turn(place, len(groups)), groups, 0.05), place)


def test_masters_and_loss_scale(library):
    parameters = [
        Parameter(1030, "bf16", "bf16", master=True),
        Parameter(1030, "f16", "f32", offset=1, master=True),
        Parameter(9 * CHUNK, "bf16", "bf16", master=True),
        Parameter(300, "bf16", "f16"),
    ]
    problem = Lars(parameters, [MOMENTUM], max_grad_norm=1e-3, grad_scale=384.0)
    check_everywhere(library, problem)


def test_sum_of_gradients_elsewhere(library):
    problem = Lars([Parameter(500), Parameter(CHUNK + 1)], [MOMENTUM], max_grad_norm=1.0)
    check(problem, run(library, problem, grad_sum_sq=81.0), 9.0)


@pytest.mark.parametrize("place", DEVICES)
def test_more_small_tensors_and_step_counts_than_fit_at_once(library, place):
    parameters = [Parameter(SMALL, step=1 + t) for t in range(70)]
    problem = Lars(parameters, [MOMENTUM], None)
    with optimizers.device(library, place, "random", 3):
        results = run(library, problem)
    check(problem, results, 1.0)


def test_tensors_of_a_group_and_step_share_what_the_workspace_has_of_them(library):
    one_step, many = (
        optimizers.Placed(library, Lars([Parameter(40, step=1 + t * apart) for t in range(40)]))
        for apart in (0, 1)
    )
    assert len(one_step.workspace.bytes) < len(many.workspace.bytes)


@pytest.mark.parametrize("clip", [None, 0.05], ids=["no clip", "clip"])
def test_numbers_on_the_device(library_both_ways, clip):
    groups = [replace(o, lr=o.lr * (1 + i)) for i in range(3) for o in VARIANTS.values()]
    parameters = [Parameter(30 * i, group=i, step=1 + i % 3) for i in range(len(groups))]
    parameters += [Parameter(5 * CHUNK, step=3), Parameter(9, group=2, excluded=True)]
    problem = Lars(parameters, groups, clip, grad_scale=8.0, on_device=True, found_inf=0.0)
    check_everywhere(library_both_ways, problem)
    results = run(library_both_ways, problem)
    assert [r["step"].item() for r in results] == [x.step for x in parameters]


@pytest.mark.parametrize("found_inf", [1.0, 2.0], ids=["found", "found on two devices"])
def test_a_skipped_step_changes_nothing(library, found_inf):
    parameters = [Parameter(5 * CHUNK + 3), Parameter(70)]
    results = run(library, Lars(parameters, [MOMENTUM], on_device=True, found_inf=found_inf))
    for x, after in zip(parameters, results, strict=True):
        assert all(torch.equal(after[name], x.start[name]) for name in "pm")
        assert after["step"].item() == x.step - 1


def test_non_finite_norms_are_not_hidden(library_both_ways):
    bad, sound = Parameter(600), Parameter(600)
    bad.start["g"][5] = float("nan")
    problem = Lars([bad, sound], [MOMENTUM], None)
    results = run(library_both_ways, problem)
    assert not results[0]["p"].isfinite().any()
    assert results[1]["p"].isfinite().all()
    problem.max_grad_norm = 1.0
    assert all(r["p"].isnan().all() for r in run(library_both_ways, problem))


def test_a_ratio_of_zero_does_not_hide_an_infinite_gradient(library_both_ways):
    """Of a tensor without momentum, whose norm makes the ratio 0."""
    bad = Parameter(600)
    bad.start["g"][5] = float("inf")
    (after,) = run(library_both_ways, Lars([bad], [Options(weight_decay=0.01)], None))
    assert after["p"].isnan().nonzero().flatten().tolist() == [5]


def test_an_infinite_clip_makes_zeros_of_finite_gradients(library):
    bad, sound, still = Parameter(600), Parameter(600), Parameter(600)
    bad.start["g"][5] = float("inf")
    still.start |= sound.start | {"g": torch.zeros(600)}
    *_, one, other = run(library, Lars([bad, sound, still], [MOMENTUM], 1.0))
    assert all(torch.equal(one[name], other[name]) for name in "pm")
    assert one["p"].isfinite().all()
    assert one["stats"][2] == other["stats"][2] > 0  # norm of the decay alone
