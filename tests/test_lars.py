from __future__ import annotations

import copy
import itertools
import pickle
from dataclasses import replace

import numpy as np
import pytest
import torch

from batchops.optim import LARS

from . import lars_reference as reference
from . import last_places
from .capturable import check_nothing_is_read_back
from .lamb_reference import timm_optimizer, to_extended
from .lars_reference import Options, Tensor64
from .memory import bytes_at_its_height
from .reference import to_float64
from .replacements import replacements
from .trajectories import check_drift
from .twins import LARGE, check_twins

FUSED = pytest.mark.parametrize("fused", [True, False], ids=["fused", "plain"])


def parameter(shape, dtype=torch.float32, device="cpu") -> torch.nn.Parameter:
    p = torch.nn.Parameter((torch.randn(shape) * 0.1).to(device, dtype))
    p.grad = (torch.randn(shape) * 0.01).to(device, dtype)
    return p


def params_of(optimizer: LARS) -> list[torch.nn.Parameter]:
    return [p for group in optimizer.param_groups for p in group["params"]]


def oracle_of(optimizer: LARS) -> list[Tensor64]:
    tensors = []
    for group in optimizer.param_groups:
        names = Options.__dataclass_fields__
        options = Options(**{k: v for k, v in group.items() if k in names})
        options.lr = float(options.lr)
        for i, p in enumerate(group["params"]):
            own = replace(options, excluded=i in group["exclude"])
            state = optimizer.state.get(p) or {}
            m = state.get("momentum_buffer")
            # A buffer that is not there yet has its first step when it is.
            step = 0 if m is None and own.momentum else int(state.get("step", 0))
            m = np.zeros(p.shape) if m is None else to_extended(m)
            exact = to_extended(state.get("master", p))
            tensors.append(Tensor64(exact, m, step, own))
    return tensors


def assert_one_step(optimizer: LARS) -> None:
    params = params_of(optimizer)
    expected = oracle_of(optimizer)
    before = [x.p.copy() for x in expected]
    bits = [None if p.grad is None else p.grad.clone() for p in params]
    grads = [None if p.grad is None else to_extended(p.grad) for p in params]
    reference.step(expected, grads, optimizer.param_groups[0]["max_grad_norm"])
    optimizer.step()
    rows = optimizer.stats().values.tolist()
    for i, (p, x, p0, grad) in enumerate(zip(params, expected, before, bits, strict=True)):
        what = f"parameter {i}, {tuple(p.shape)} {p.dtype}"
        if grad is None:
            assert np.array_equal(to_float64(p), p0), what
            continue
        assert torch.equal(p.grad, grad), f"{what}: the gradient was written"
        state = optimizer.state[p]
        assert float(state["step"]) == x.step
        if p.numel() and max(x.stats) < 1e30:
            assert rows[i] == pytest.approx(x.stats, rel=1e-5), what
        m = state.get("momentum_buffer") if x.options.momentum else None
        assert m is None or m.dtype == torch.promote_types(p.dtype, torch.float32)
        if "master" in state:
            assert torch.equal(p, state["master"].to(p.dtype))
        reference.assert_stepped(x, p0, state.get("master", p), m, what)


def renew(optimizer: LARS, scale: float = 0.01) -> None:
    for p in params_of(optimizer):
        p.grad = (torch.randn(p.shape) * scale).to(p)


VARIANTS = {
    "defaults": {},
    "adapted, no momentum": {"weight_decay": 1e-4},
    "momentum": {"weight_decay": 1e-4, "momentum": 0.9},
    "plain SGD": {"momentum": 0.9},
    "dampening": {"weight_decay": 0.01, "momentum": 0.9, "dampening": 0.3},
    "nesterov": {"weight_decay": 0.01, "momentum": 0.9, "nesterov": True},
    "always adapted": {"always_adapt": True, "momentum": 0.5},
    "large eps": {"always_adapt": True, "eps": 1.0},
    "clip": {"weight_decay": 0.01, "trust_clip": True, "lr": 1e-4, "momentum": 0.9},
    "clip that does not bite": {"weight_decay": 0.01, "trust_clip": True, "lr": 3.0},
    "lr in the momentum": {"weight_decay": 0.01, "momentum": 0.9, "lr_in_momentum": True, "lr": 7},
    "both": {"momentum": 0.9, "nesterov": True, "lr_in_momentum": True, "lr": 0.3},
    "strong decay": {"weight_decay": 5.0, "momentum": 0.9, "trust_coeff": 1.0},
    "maximize": {"weight_decay": 0.01, "momentum": 0.9, "maximize": True},
    "global clip": {"weight_decay": 0.01, "momentum": 0.9, "max_grad_norm": 0.03},
    "tensor lr": {"lr": torch.tensor(0.3), "weight_decay": 0.01},
    "excluded": {"weight_decay": 0.01, "momentum": 0.9, "exclude": lambda _, p: p.ndim < 2},
    **{f"preset {name}": options for name, options in LARS.PRESETS.items()},
}


@FUSED
@pytest.mark.parametrize("variant", VARIANTS.values(), ids=VARIANTS.keys())
def test_variants(device, fused, variant):
    """Three steps, the first of which has no buffer yet; whole tensors, split ones and tails."""
    shapes = [(300, 7), (70001,), (5,), (), (0, 3)]
    optimizer = LARS([parameter(shape, device=device) for shape in shapes], **variant, fused=fused)
    for _ in range(3):
        assert_one_step(optimizer)
        renew(optimizer)
    if not variant.get("momentum"):
        assert all("momentum_buffer" not in state for state in optimizer.state.values())


@FUSED
@pytest.mark.parametrize("which", ["p", "g", "both"])
@pytest.mark.parametrize("preset", LARS.PRESETS)
def test_zero_norms(device, fused, which, preset):
    p = parameter((40, 3), device=device)
    if which != "g":
        p.data.zero_()
    if which != "p":
        p.grad.zero_()
    optimizer = LARS.preset(preset, [p], lr=0.05, weight_decay=0.1, momentum=0.9, fused=fused)
    for _ in range(2):
        assert_one_step(optimizer)


@FUSED
def test_momentum_correction(device, fused):
    p = parameter((50, 4), device=device)
    optimizer = LARS.preset("paper", [p], lr=0.1, momentum_correction=True, fused=fused)
    for lr in (0.1, 0.4, 0.0, 0.2, 0.1):
        optimizer.param_groups[0]["lr"] = lr
        assert_one_step(optimizer)
        assert optimizer.param_groups[0]["last_lr"] == lr
        renew(optimizer)
    twin = LARS.preset("paper", [p], momentum_correction=True, fused=fused)
    twin.load_state_dict(copy.deepcopy(optimizer.state_dict()))
    assert twin.param_groups[0]["last_lr"] == 0.1
    optimizer.param_groups[0]["lr"] = 5.0
    optimizer.found_inf = torch.tensor(1.0)
    optimizer.step()
    assert optimizer.param_groups[0]["last_lr"] == 0.1, "a skipped step changes nothing"


DTYPES = [torch.float32, torch.bfloat16, torch.float16, torch.float64]


@FUSED
def test_rates_between_two_floats(device, fused):
    (state,), options = last_places.rate_between_floats(20000)
    p = torch.nn.Parameter(state["p"].to(device))
    p.grad = state["g"].to(device)
    optimizer = LARS([p], **options, fused=fused)
    optimizer.state[p] = {"step": torch.tensor(1.0), "momentum_buffer": state["m"].to(device)}
    assert_one_step(optimizer)


@pytest.mark.parametrize("fused", [None, False], ids=["fused", "plain"])
@pytest.mark.parametrize("master", [False, True])
def test_dtypes_mixed_in_one_group(device, fused, master):
    params = [parameter((100 * (i + 1), 3), dtype, device) for i, dtype in enumerate(DTYPES * 2)]
    options = {"lr": 2.0, "weight_decay": 1e-3, "momentum": 0.9, "max_grad_norm": 0.5}
    optimizer = LARS(params, **options, master_weights=master, fused=fused)
    for _ in range(3):
        assert_one_step(optimizer)
        renew(optimizer)
    assert ("master" in optimizer.state[params[1]]) is master
    assert "master" not in optimizer.state[params[0]]
    if fused is None:
        with pytest.raises(RuntimeError, match=r"LARS: fused=True.*parameter 3.*float64"):
            LARS(params, fused=True).step()


@pytest.mark.cuda
@pytest.mark.parametrize(
    "last_step",
    [assert_one_step, pytest.param(LARS.step, marks=pytest.mark.reduced)],
    ids=["checked", "twins"],
)
@pytest.mark.parametrize("momentum", [0.0, 0.9])
def test_tensors_that_a_gpu_holds_and_others(momentum, last_step):
    params = [parameter(shape, device="cuda") for shape in LARGE]
    options = {"weight_decay": 1e-3, "momentum": momentum, "max_grad_norm": 0.5, "fused": True}
    check_twins(params, lambda params: LARS(params, **options), last_step)


@FUSED
@pytest.mark.parametrize("scale", [1e-20, 1e-10, 1e10, 1e17])
def test_scales_far_from_one(device, fused, scale):
    """Squares that float32 cannot hold."""
    params = [parameter((4000,), device=device), parameter((70000,), device=device)]
    params[1].data *= scale
    for p in params:
        p.grad *= scale
    for bound in (1.0, None):
        optimizer = LARS(
            params, weight_decay=1e-3, momentum=0.9, eps=0.0, max_grad_norm=bound, fused=fused
        )
        assert_one_step(optimizer)


@FUSED
@pytest.mark.parametrize("options", [{}, {"momentum": 0.9}, {"momentum": 0.9, "nesterov": True}])
@pytest.mark.parametrize(
    ("scale", "clip"),
    [
        pytest.param(1e-43, None, id="λ_l above the largest float"),
        pytest.param(1e38, None, id="λ_l below the smallest normal one"),
        pytest.param(1e38, 1.0, id="the clip's power of two is in the scale already"),
        pytest.param(1e-22, None, id="λ_l a float, and the squares not"),
    ],
)
def test_gradients_at_the_ends_of_floats_range(fused, scale, clip, options):
    p = torch.nn.Parameter(torch.randn(5000) * 0.1)
    p.grad = ((torch.rand(5000, dtype=torch.float64) * 2 - 1) * scale).float()
    optimizer = LARS([p], **options, always_adapt=True, eps=0.0, max_grad_norm=clip, fused=fused)
    for _ in range(3):
        assert_one_step(optimizer)


@pytest.mark.parametrize("fused", [None, False], ids=["fused", "plain"])
def test_layouts_meet_element_by_element(fused):
    formats = [torch.contiguous_format, torch.channels_last]
    params, states = [], []
    for p_format, g_format, m_format in itertools.product(formats, repeat=3):
        p = torch.nn.Parameter(torch.randn(6, 5, 4, 3).to(memory_format=p_format))
        p.grad = (torch.randn(6, 5, 4, 3) * 0.01).to(memory_format=g_format)
        m = (torch.randn(6, 5, 4, 3) * 1e-3).to(memory_format=m_format)
        params.append(p)
        states.append({"step": torch.tensor(4.0), "momentum_buffer": m})
    gaps = torch.nn.Parameter(torch.randn(40, 60)[:, ::2])
    gaps.grad = torch.randn(40, 30)
    optimizer = LARS([*params, gaps], weight_decay=0.01, momentum=0.9, fused=fused)
    for p, state in zip(params, states, strict=True):
        optimizer.state[p] = state
    assert_one_step(optimizer)
    if fused is None:  # and once more from the plan
        assert_one_step(optimizer)


@FUSED
@pytest.mark.parametrize("options", [{}, {"nesterov": True}, {"trust_clip": True}], ids=str)
def test_200_steps_no_further_than_timm(fused, options):
    """‖p - ref‖ / ‖ref - p0‖ at most 1.5 times timm's in float32."""
    Lars = timm_optimizer("Lars")
    if isinstance(Lars, str):
        pytest.skip(Lars)
    shapes = [(64, 32), (64,), (300, 250)]
    start = [torch.randn(shape) * 0.1 for shape in shapes]
    ours = [torch.nn.Parameter(p.clone()) for p in start]
    theirs = [torch.nn.Parameter(p.clone()) for p in start]
    options = {"lr": 0.5, "momentum": 0.9, "weight_decay": 1e-3, **options}
    optimizer, timm = LARS(ours, **options, fused=fused), Lars(theirs, **options)
    exact = [Tensor64(to_float64(p), np.zeros(p.shape), 0, Options(**options)) for p in start]
    for t in range(200):
        torch.manual_seed(1000 + t)
        grads = [torch.randn(s) * 0.05 + 0.01 * p for s, p in zip(shapes, start, strict=True)]
        for params in (ours, theirs):
            for p, g in zip(params, grads, strict=True):
                p.grad = g.clone()
        reference.step(exact, [to_float64(g) for g in grads])
        optimizer.step()
        timm.step()

    def error(params):
        return max(
            np.linalg.norm(to_float64(p) - x.p) / np.linalg.norm(x.p - to_float64(p0))
            for p, x, p0 in zip(params, exact, start, strict=True)
        )

    assert error(ours) <= 1.5 * error(theirs)


@pytest.mark.parametrize("variant", VARIANTS.values(), ids=VARIANTS.keys())
def test_200_steps_of_every_variant(variant):
    check_drift(
        lambda params, fused: LARS(params, **variant, fused=fused),
        oracle_of,
        lambda tensors, grads: reference.step(tensors, grads, variant.get("max_grad_norm")),
    )


def test_no_buffer_of_the_parameters_size():
    p = parameter((4 << 20,))
    optimizer = LARS([p], weight_decay=0.01, momentum=0.9, fused=True)
    optimizer.step()
    assert bytes_at_its_height(lambda: p.detach().clone()) > 0.9 * p.nbytes, "measures nothing"
    assert bytes_at_its_height(optimizer.step) < 0.1 * p.nbytes


def test_same_bits_for_any_number_of_threads(threads):
    shapes = [(64, 3, 7, 7), (64,), (300_000,), (1_200_000,), *[(256,)] * 100]

    def run(n):
        torch.manual_seed(3)
        threads(n)
        params = [parameter(shape) for shape in shapes]
        optimizer = LARS(params, weight_decay=0.01, momentum=0.9, max_grad_norm=0.5, fused=True)
        for _ in range(3):
            optimizer.step()
        return params

    for a, *others in zip(run(1), run(2), run(5), strict=True):
        assert all(torch.equal(a, b) for b in others)


@FUSED
def test_non_finite_norms_are_not_hidden(fused):
    params = [parameter((100,)), parameter((100,))]
    params[0].grad[3] = float("nan")
    LARS(params, weight_decay=0.1, momentum=0.9, trust_clip=True, fused=fused).step()
    assert params[0].isnan().all()
    assert params[1].isfinite().all()


@FUSED
@pytest.mark.parametrize("copier", [copy.deepcopy, lambda o: pickle.loads(pickle.dumps(o))])
def test_copies_and_states_go_both_ways(fused, copier):
    options = {"weight_decay": 0.1, "momentum": 0.9}
    optimizer = LARS.preset("mlperf", [parameter((33, 7)), parameter((66000,))], fused=fused)
    optimizer.step()
    twin = copier(optimizer)
    for p, q in zip(params_of(optimizer), params_of(twin), strict=True):
        q.grad = p.grad.clone()
    optimizer.step()
    twin.step()
    for p, q in zip(params_of(optimizer), params_of(twin), strict=True):
        assert torch.equal(p, q)
    other = LARS(params_of(twin), **options, fused=not fused)
    other.load_state_dict(copy.deepcopy(optimizer.state_dict()))
    assert other.param_groups[0]["exclude"] == [1]
    assert other.param_groups[0]["fused"] is not fused
    assert_one_step(other)


def test_states_of_timm():
    Lars = timm_optimizer("Lars")
    if isinstance(Lars, str):
        pytest.skip(Lars)
    options = {"lr": 0.5, "momentum": 0.9, "weight_decay": 0.1, "dampening": 0.2}
    ours, theirs = [parameter((9, 3)), parameter((4,))], []
    for p in ours:
        theirs.append(torch.nn.Parameter(p.detach().clone()))
        theirs[-1].grad = p.grad.clone()
    timm = Lars(theirs, **options, foreach=True)
    timm.step()
    optimizer = LARS(ours)
    optimizer.load_state_dict(copy.deepcopy(timm.state_dict()))
    for p, q in zip(ours, theirs, strict=True):
        p.data.copy_(q.data)
    for _ in range(3):
        timm.step()
        assert_one_step(optimizer)
    for p, q in zip(ours, theirs, strict=True):
        torch.testing.assert_close(p, q, rtol=1e-6, atol=1e-7)


@pytest.mark.parametrize(
    "options",
    [
        {"lr": -1.0},
        {"momentum": -0.1},
        {"momentum": float("nan")},
        {"dampening": float("inf")},
        {"weight_decay": -1.0},
        {"nesterov": True},
        {"nesterov": True, "momentum": 0.9, "dampening": 0.1},
        {"trust_coeff": -1.0},
        {"eps": -1.0},
        {"max_grad_norm": 0.0},
        {"exclude": ["bias"]},
    ],
    ids=str,
)
def test_invalid_options(options):
    with pytest.raises(ValueError, match=r"LARS.*(expected|expects|must be)"):
        LARS([parameter((2,))], **options)


def test_names_are_excluded_and_reported():
    model = torch.nn.Sequential(torch.nn.Linear(3, 2), torch.nn.LayerNorm(2))
    for p in model.parameters():
        p.grad = torch.randn_like(p)
    optimizer = LARS(
        model.named_parameters(), weight_decay=0.1, exclude=("bias", "1."), exclude_decay=True
    )
    assert optimizer.param_groups[0]["exclude"] == [1, 2, 3]
    assert_one_step(optimizer)
    stats = optimizer.stats()
    assert stats.names == ["0.weight", "0.bias", "1.weight", "1.bias"]
    assert stats.values[1:, 3].tolist() == [1.0] * 3
    with pytest.raises(ValueError, match="expected one of paper, mlperf"):
        LARS.preset("nvlamb", model.parameters())


def test_momentum_that_comes_and_goes():
    """As a schedule does that cycles momentum."""
    optimizer = LARS([parameter((30, 3)), parameter((70000,))], weight_decay=0.1)
    assert_one_step(optimizer)
    for momentum in (0.9, 0.0, 0.5):
        optimizer.param_groups[0]["momentum"] = momentum
        assert_one_step(optimizer)


def test_replaced_gradients_storages_and_states_are_seen():
    params = [parameter((70000,)), parameter((50,)), parameter((5, 4, 3, 3))]
    optimizer = LARS(params, weight_decay=0.01, momentum=0.9, fused=True)
    for _ in replacements(optimizer, "momentum_buffer"):
        assert_one_step(optimizer)
    assert [int(optimizer.state[p]["step"]) for p in params] == [1, 1, 1]


def test_replaced_and_moved_parameters_are_seen():
    a, b, c = parameter((50,)), parameter((50,)), parameter((6, 5, 3, 3))
    optimizer = LARS([a, c], weight_decay=0.01, momentum=0.9)
    assert_one_step(optimizer)
    optimizer.param_groups[0]["params"] = [b, c]
    before = a.detach().clone()
    assert_one_step(optimizer)
    optimizer.param_groups[0]["params"][0] = a  # in the same list
    assert_one_step(optimizer)
    assert not torch.equal(a, before)
    assert [int(optimizer.state[p]["step"]) for p in (a, b, c)] == [2, 1, 3]
    c.data = c.data.to(memory_format=torch.channels_last)
    c.grad = torch.randn_like(c) * 0.01
    assert_one_step(optimizer)
    for p in (a, c):  # module.bfloat16() does this
        p.data = p.data.bfloat16()
        p.grad = None
        p.grad = torch.randn_like(p) * 0.01
    assert_one_step(optimizer)


@pytest.mark.cuda
def test_nothing_is_read_back_with_capturable():
    """lr, step counts, loss scale and found_inf on the device, in eager steps and in a graph."""
    params = [parameter(shape, device="cuda") for shape in ((3, 5), (70000,), (1000, 1000))]
    check_nothing_is_read_back(LARS, params, {"lr": 0.01, "momentum": 0.9, "weight_decay": 1e-3})


@FUSED
def test_a_momentum_that_is_turned_on_later_begins_as_in_sgd(fused):
    p = [parameter((40,)), parameter((40,))]
    p[1].data.copy_(p[0].data)
    ours = LARS([p[0]], lr=0.1, fused=fused)
    sgd = torch.optim.SGD([p[1]], lr=0.1)
    for step in range(6):
        if step == 2:
            for group in (ours.param_groups[0], sgd.param_groups[0]):
                group.update(momentum=0.9, dampening=0.5)
        p[0].grad = torch.randn(40)
        p[1].grad = p[0].grad.clone()
        ours.step()
        sgd.step()
        torch.testing.assert_close(p[0], p[1], rtol=1e-6, atol=1e-6)
    again = LARS([p[0]], lr=0.1, momentum=0.9, dampening=0.5, fused=fused)
    again.load_state_dict(ours.state_dict())
    assert again.state[p[0]]["step"] == 4
    p[0].grad = torch.randn(40)
    p[1].grad = p[0].grad.clone()
    again.step()
    sgd.step()
    torch.testing.assert_close(p[0], p[1], rtol=1e-6, atol=1e-6)
