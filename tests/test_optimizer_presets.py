"""Presets of LAMB and LARS against literal transcriptions of the implementations they are named
after, in float64, and what both optimizers owe torch.amp and other projects' checkpoints."""

from __future__ import annotations

import copy
import math

import pytest
import torch

from batchops.optim import LAMB, LARS

from .lamb_reference import timm_optimizer

FUSED = pytest.mark.parametrize("fused", [True, False], ids=["fused", "plain"])
SHAPES = [(40, 9), (70, 30), (17,)]
LR = 0.02


def start(dtype=torch.float32):
    torch.manual_seed(5)
    params = [torch.nn.Parameter((torch.randn(s) * 0.1).to(dtype)) for s in SHAPES]
    grads = [[(torch.randn(s) * 0.3).to(dtype) for s in SHAPES] for _ in range(4)]
    return params, grads


def adam(m, v, g, t, b1=0.9, b2=0.999):
    return b1 * m + (1 - b1) * g, b2 * v + (1 - b2) * g * g, 1 - b1**t, 1 - b2**t


def total_norm(grads):
    return math.sqrt(sum(float(g.square().sum()) for g in grads))


def lamb_paper(p, g, m, v, t, _):
    m, v, c1, c2 = adam(m, v, g, t)
    u = (m / c1) / ((v / c2).sqrt() + 1e-6) + 0.01 * p
    return p - LR * p.norm() / u.norm() * u, m, v


def lamb_apex(p, g, m, v, t, total):
    clip = total / 1.0 if total > 1.0 else 1.0
    m, v, c1, c2 = adam(m, v, g / clip, t)
    update = (m / c1) / ((v / c2).sqrt() + 1e-6) + 0.01 * p
    ratio = LR * p.norm() / update.norm() if p.norm() != 0 and update.norm() != 0 else LR
    return p - ratio * update, m, v


def lamb_lambc(p, g, m, v, t, total):
    m, v, c1, c2 = adam(m, v, g / max(total, 1.0), t)
    update = (m / c1) / (v.sqrt() / math.sqrt(c2) + 1e-6) + 0.01 * p
    return p - LR * (p.norm() / update.norm()).clamp(max=1.0) * update, m, v


def lamb_deepspeed(p, g, m, v, t, _):
    m, v, c1, c2 = adam(m, v, g, t)
    step_size = LR * math.sqrt(c2) / c1
    update = m / (v.sqrt() + 1e-8)
    coefficient = min(max(float(p.norm() / update.norm()), 0.01), 10.0)
    return p - step_size * coefficient * update, m, v


def lamb_deepspeed_corrected(p, g, m, v, t, _):
    """FusedLamb's newest source: the moments themselves are corrected."""
    m, v, c1, c2 = adam(m, v, g, t)
    update = (m / c1) / ((v / c2).sqrt() + 1e-8)
    coefficient = min(max(float(p.norm() / update.norm()), 0.01), 10.0)
    return p - LR * coefficient * update, m, v


LAMBS = {
    "paper": lamb_paper,
    "apex": lamb_apex,
    "nvlamb": lamb_apex,  # the same with weight decay everywhere
    "timm": lamb_apex,
    "lambc": lamb_lambc,
    "deepspeed": lamb_deepspeed,
}


def lars_paper(p, g, m):
    local = 1e-3 * p.norm() / (g.norm() + 5e-4 * p.norm())
    m = 0.9 * m + LR * local * (g + 5e-4 * p)
    return p - m, m


def lars_mlperf(p, g, m):
    scaled_lr = LR
    if p.ndim > 1:
        scaled_lr = LR * 1e-3 * p.norm() / (g.norm() + 1e-4 * p.norm() + 1e-7)
        g = g + 1e-4 * p
    m = 0.9 * m + scaled_lr * g
    return p - m, m


def lars_timm(p, g, m):
    ratio = 1e-3 * p.norm() / (g.norm() + p.norm() * 0.1 + 1e-8)
    m = 0.9 * m + (g + 0.1 * p) * ratio
    return p - LR * m, m


def lars_larc(p, g, m):
    ratio = 1e-3 * p.norm() / (g.norm() + p.norm() * 0.1 + 1e-8)
    m = 0.9 * m + (g + 0.1 * p) * min(float(ratio) / LR, 1.0)
    return p - LR * m, m


def lars_apex_larc(p, g, m):
    if p.norm() != 0 and g.norm() != 0:
        rate = 0.02 * p.norm() / (g.norm() + p.norm() * 0.1 + 1e-8)
        g = (g + 0.1 * p) * min(float(rate) / LR, 1.0)
    m = 0.9 * m + g
    return p - LR * m, m


LARSES = {
    "paper": (lars_paper, {}),
    "mlperf": (lars_mlperf, {}),
    "timm": (lars_timm, {"momentum": 0.9, "weight_decay": 0.1}),
    "larc": (lars_larc, {"momentum": 0.9, "weight_decay": 0.1}),
    "apex_larc": (lars_apex_larc, {"momentum": 0.9, "weight_decay": 0.1}),
}


def assert_follows(optimizer, params, grads, transcribed) -> None:
    exact = [p.detach().double() for p in params]
    moved = [torch.zeros_like(p) for p in exact]
    states = [[torch.zeros_like(p)] * 2 for p in exact]
    for t, step_grads in enumerate(grads, start=1):
        wide = [g.double() for g in step_grads]
        for i, g in enumerate(wide):
            before = exact[i]
            exact[i], *states[i] = transcribed(exact[i], g, states[i], t, total_norm(wide))
            moved[i] += (exact[i] - before).abs()
            params[i].grad = step_grads[i]
        optimizer.step()
        for p, want, by in zip(params, exact, moved, strict=True):
            assert torch.all((p.double() - want).abs() <= 4e-7 * (want.abs() + by) + 1e-9)


@FUSED
@pytest.mark.parametrize("name", LAMBS)
def test_lamb_presets(fused, name):
    params, grads = start()
    optimizer = LAMB.preset(name, params, lr=LR, fused=fused)
    f = LAMBS[name]
    assert_follows(optimizer, params, grads, lambda p, g, s, t, n: f(p, g, *s, t, n))


@FUSED
def test_deepspeed_with_corrected_moments(fused):
    params, grads = start()
    optimizer = LAMB.preset("deepspeed", params, lr=LR, step_size_correction=False, fused=fused)
    f = lamb_deepspeed_corrected
    assert_follows(optimizer, params, grads, lambda p, g, s, t, n: f(p, g, *s, t, n))


@FUSED
@pytest.mark.parametrize("name", LARSES)
def test_lars_presets(fused, name):
    params, grads = start()
    f, options = LARSES[name]
    optimizer = LARS.preset(name, params, lr=LR, **options, fused=fused)
    assert_follows(optimizer, params, grads, lambda p, g, s, t, n: f(p, g, s[0]))


@pytest.mark.parametrize("name", ["apex", "nvlamb", "deepspeed"])
def test_who_is_adapted_without_decay(name):
    """Apex leaves tensors without weight decay alone, the two others do not."""
    params, grads = start()
    for p, g in zip(params, grads[0], strict=True):
        p.grad = g
    optimizer = LAMB.preset(name, params, weight_decay=0.0)
    optimizer.step()
    assert bool((optimizer.stats().values[:, 3] == 1).all()) is (name == "apex")


TIMM = [
    {"caution": True},
    {"decoupled_decay": True},
    {"decoupled_decay": True, "corrected_weight_decay": True},
    {"trust_clip": True, "weight_decay": 0.0, "always_adapt": True},
    {"grad_averaging": False, "bias_correction": False},
]


@pytest.mark.parametrize("options", TIMM, ids=str)
def test_timm_lamb_with_the_same_keywords(options):
    Lamb = timm_optimizer("Lamb")
    if isinstance(Lamb, str):
        pytest.skip(Lamb)
    params, grads = start()
    theirs = [torch.nn.Parameter(p.detach().clone()) for p in params]
    optimizer, timm = LAMB(params, lr=LR, **options), Lamb(theirs, lr=LR, **options)
    for lr, step_grads in zip((LR, LR / 2, LR / 4, LR), grads, strict=True):
        for side in (optimizer, timm):
            side.param_groups[0]["lr"] = lr
        for p, q, g in zip(params, theirs, step_grads, strict=True):
            p.grad, q.grad = g, g.clone()
        optimizer.step()
        timm.step()
    for p, q in zip(params, theirs, strict=True):
        torch.testing.assert_close(p, q, rtol=2e-6, atol=2e-7)


def test_states_of_apex_and_timm_lamb():
    """Both count steps by group; ours go on from there."""
    Lamb = timm_optimizer("Lamb")
    if isinstance(Lamb, str):
        pytest.skip(Lamb)
    for apex in (False, True):
        params, grads = start()
        theirs = [torch.nn.Parameter(p.detach().clone()) for p in params]
        timm, optimizer = Lamb(theirs, lr=LR), LAMB(params)
        for q, g in zip(theirs, grads[0], strict=True):
            q.grad = g.clone()
        timm.step()
        saved = copy.deepcopy(timm.state_dict())
        if apex:  # a plain count, and options of its own only
            (group,) = saved["param_groups"]
            own = ("lr", "bias_correction", "betas", "eps", "weight_decay", "grad_averaging")
            kept = {name: group[name] for name in (*own, "max_grad_norm", "params")}
            saved["param_groups"] = [{**kept, "step": 1}]
        optimizer.load_state_dict(saved)
        for p, q, g in zip(params, theirs, grads[1], strict=True):
            p.data.copy_(q.data)
            p.grad, q.grad = g, g.clone()
        timm.step()
        optimizer.step()
        for p, q in zip(params, theirs, strict=True):
            assert float(optimizer.state[p]["step"]) == 2
            torch.testing.assert_close(p, q, rtol=2e-6, atol=2e-7)


BOTH = pytest.mark.parametrize(
    "make",
    [
        lambda params, **o: LAMB(params, lr=LR, **o),
        lambda params, **o: LARS(params, lr=LR, weight_decay=0.1, momentum=0.9, **o),
    ],
    ids=["LAMB", "LARS"],
)


@BOTH
def test_a_loaded_state_dict_comes_out_again(make):
    """torch adds `differentiable` to the defaults of an optimizer that loads."""
    params, grads = start()
    optimizer = make(params)
    for p, g in zip(params, grads[0], strict=True):
        p.grad = g
    optimizer.step()
    saved = copy.deepcopy(optimizer.state_dict())
    for twin in (make(params), copy.deepcopy(optimizer)):
        twin.load_state_dict(copy.deepcopy(saved))
        assert twin.state_dict()["param_groups"] == saved["param_groups"]


@FUSED
@BOTH
def test_grad_scaler(fused, make):
    """Scaled gradients stay scaled, one step equals the unscaled one, a skipped one changes
    nothing."""
    params, grads = start()
    twins = [torch.nn.Parameter(p.detach().clone()) for p in params]
    scaler = torch.amp.GradScaler("cpu", init_scale=1024.0)
    optimizer, plain = make(params, fused=fused), make(twins, fused=fused)
    scaler.scale(torch.ones(()))
    for p, q, g in zip(params, twins, grads[0], strict=True):
        p.grad, q.grad = g * 1024, g
    scaler.step(optimizer)
    scaler.update()
    plain.step()
    for p, q, g in zip(params, twins, grads[0], strict=True):
        assert torch.equal(p, q)
        assert torch.equal(p.grad, g * 1024)
    assert torch.allclose(optimizer.stats().values, plain.stats().values, rtol=1e-6)

    before = copy.deepcopy(optimizer.state_dict())
    params[1].grad[3] = math.inf
    scaler.step(optimizer)
    scaler.update()
    after = optimizer.state_dict()
    for p, q in zip(params, twins, strict=True):
        assert torch.equal(p, q)
    for i, state in before["state"].items():
        assert all(torch.equal(v, after["state"][i][k]) for k, v in state.items())


@BOTH
@pytest.mark.parametrize("skipped", [False, True])
def test_capturable_steps_are_the_same(make, skipped):
    """With found_inf as a tensor that only the step itself reads."""
    params, grads = start()
    twins = [torch.nn.Parameter(p.detach().clone()) for p in params]
    optimizer = make(params, capturable=True, fused=False)
    plain = make(twins, fused=False)
    for round_, skip in enumerate((False, skipped)):
        for p, q, g in zip(params, twins, grads[round_], strict=True):
            p.grad, q.grad = g, g
        optimizer.found_inf = torch.tensor(float(skip))
        optimizer.step()
        if not skip:
            plain.step()
    for p, q in zip(params, twins, strict=True):
        assert torch.equal(p, q)
        for name, value in optimizer.state[p].items():
            assert torch.equal(value, plain.state[q][name]), name


def test_stats_of_parameters_without_gradients():
    params, grads = start()
    params[0].grad, params[2].grad = grads[0][0], grads[0][2]
    optimizer = LAMB(params)
    assert optimizer.stats().values.isnan().all()
    optimizer.step()
    stats = optimizer.stats()
    assert stats.names == ["0.0", "0.1", "0.2"]
    assert stats.columns == ("p_norm", "g_norm", "u_norm", "trust_ratio")
    assert stats.values.isnan().all(dim=1).tolist() == [False, True, False]
    assert stats.values[0, 1] == pytest.approx(float(grads[0][0].norm()), rel=1e-6)
