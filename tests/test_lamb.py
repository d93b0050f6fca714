from __future__ import annotations

import copy
import io
import itertools
import pickle
from dataclasses import replace

import numpy as np
import pytest
import torch
from torch.optim.lr_scheduler import CosineAnnealingLR, LambdaLR

from batchops.optim import LAMB

from . import lamb_reference as reference
from . import last_places, native
from .capturable import check_nothing_is_read_back
from .lamb_reference import Options, Tensor64, to_extended
from .memory import bytes_at_its_height
from .reference import to_float64
from .replacements import replacements
from .trajectories import check_drift
from .twins import LARGE, check_twins

FUSED = pytest.mark.parametrize("fused", [True, False], ids=["fused", "plain"])

SHAPES = {
    "scalar": (),
    "one": (1,),
    "below a vector": (3,),
    "vectors and a tail": (37, 5),
    "several chunks, one thread": (5, 8191),
    "largest done whole": (96, 1024),
    "smallest split": (98305,),
    "split, ragged last chunk": (3, 16384 * 3 + 11),
}


def parameter(shape, dtype=torch.float32, device="cpu", scale=0.1) -> torch.nn.Parameter:
    p = torch.nn.Parameter((torch.randn(shape) * scale).to(device, dtype))
    p.grad = torch.randn(shape).to(device, dtype) * 0.01
    return p


def warm_state(optimizer: LAMB, step: int = 7) -> None:
    """Moments as after some steps, not zeros."""
    for group in optimizer.param_groups:
        for p in group["params"]:
            wide = torch.float64 if p.dtype == torch.float64 else torch.float32
            optimizer.state[p] = {
                "step": torch.tensor(float(step)),
                "exp_avg": torch.randn_like(p, dtype=wide) * 1e-3,
                "exp_avg_sq": torch.rand_like(p, dtype=wide) * 1e-5,
            }


def oracle_of(optimizer: LAMB) -> list[Tensor64]:
    tensors = []
    for group in optimizer.param_groups:
        names = Options.__dataclass_fields__
        options = Options(**{k: v for k, v in group.items() if k in names})
        options.lr = float(options.lr)
        for i, p in enumerate(group["params"]):
            options = replace(options, excluded=i in group["exclude"])
            state = optimizer.state.get(p, None)
            m = to_extended(state["exp_avg"]) if state else np.zeros(p.shape)
            v = to_extended(state["exp_avg_sq"]) if state else np.zeros(p.shape)
            step = int(state["step"]) if state else 0
            exact = state.get("master", p) if state else p
            tensors.append(Tensor64(to_extended(exact), m, v, step, options))
    return tensors


def params_of(optimizer: LAMB) -> list[torch.nn.Parameter]:
    return [p for group in optimizer.param_groups for p in group["params"]]


def grads_of(optimizer: LAMB) -> list[np.ndarray | None]:
    return [None if p.grad is None else to_extended(p.grad) for p in params_of(optimizer)]


def assert_one_step(optimizer: LAMB) -> None:
    """One step from the present state agrees with the oracle, and gradients keep their bits."""
    params = params_of(optimizer)
    expected = oracle_of(optimizer)
    before = [x.p.copy() for x in expected]
    bits = [None if p.grad is None else p.grad.clone() for p in params]
    first = optimizer.param_groups[0]
    reference.step(expected, grads_of(optimizer), first["max_grad_norm"], first["clip_eps"])
    optimizer.step()
    rows = optimizer.stats().values.tolist()
    for i, (p, x, p0, grad) in enumerate(zip(params, expected, before, bits, strict=True)):
        what = f"parameter {i}, {tuple(p.shape)} {p.dtype}"
        if grad is None:
            assert p.grad is None
            assert np.array_equal(to_float64(p), p0), what
            continue
        assert torch.equal(as_bits(p.grad), as_bits(grad)), f"{what}: the gradient was written"
        state = optimizer.state[p]
        assert float(state["step"]) == x.step
        exact_moments = state["exp_avg"].dtype in (torch.float32, torch.float64)
        if exact_moments and np.isfinite(x.stats).all() and max(x.stats) < 1e30:
            assert rows[i] == pytest.approx(x.stats, rel=1e-5), what
        if "master" in state:
            assert torch.equal(p, state["master"].to(p.dtype))
        exact = state.get("master", p)
        reference.assert_stepped(x, p0, exact, state["exp_avg"], state["exp_avg_sq"], what)


def as_bits(t: torch.Tensor) -> torch.Tensor:
    integer = {2: torch.int16, 4: torch.int32, 8: torch.int64}[t.element_size()]
    return t.detach().contiguous().view(integer)


# --------------------------------------------------------------------------------- the numbers


@FUSED
@pytest.mark.parametrize("shape", SHAPES.values(), ids=SHAPES.keys())
@pytest.mark.parametrize("max_grad_norm", [None, 0.01, 1e6], ids=["no clip", "clip", "in bounds"])
def test_one_step(device, fused, shape, max_grad_norm):
    optimizer = LAMB([parameter(shape, device=device)], max_grad_norm=max_grad_norm, fused=fused)
    warm_state(optimizer)
    assert_one_step(optimizer)


@FUSED
def test_first_steps_from_nothing(device, fused):
    params = [parameter(shape, device=device) for shape in SHAPES.values()]
    optimizer = LAMB(params, lr=0.01, fused=fused)
    for _ in range(3):
        assert_one_step(optimizer)
        for p in params:
            p.grad = torch.randn_like(p) * 0.01


# Under a sanitizer nobody waits for the reference.
LAST_STEP = pytest.mark.parametrize(
    "last_step",
    [assert_one_step, pytest.param(LAMB.step, marks=pytest.mark.reduced)],
    ids=["checked", "twins"],
)


@pytest.mark.cuda
@LAST_STEP
@pytest.mark.parametrize("caution", [False, True])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_tensors_that_a_gpu_holds_and_others(dtype, caution, last_step):
    params = [parameter(shape, dtype, "cuda") for shape in LARGE]
    options = {"lr": 0.01, "caution": caution, "master_weights": True, "fused": True}
    check_twins(params, lambda params: LAMB(params, **options), last_step)


@pytest.mark.reduced
@pytest.mark.cuda
def test_two_streams_at_once():
    optimizers = []
    for _ in range(4):  # two that step together, and a twin of each that steps alone
        torch.manual_seed(len(optimizers) % 2)
        params = [parameter(shape, device="cuda") for shape in LARGE]
        optimizers.append(LAMB(params, lr=0.01, fused=True))
    streams = [torch.cuda.Stream(), torch.cuda.Stream()]
    torch.cuda.synchronize()
    for _ in range(5):
        for optimizer, stream in zip(optimizers[:2], streams, strict=True):
            with torch.cuda.stream(stream):
                optimizer.step()
    torch.cuda.synchronize()
    for optimizer, twin in zip(optimizers[:2], optimizers[2:], strict=True):
        for _ in range(5):
            twin.step()
        pairs = zip(params_of(optimizer), params_of(twin), strict=True)
        assert all(torch.equal(p, other) for p, other in pairs)


VARIANTS = {
    "defaults": {},
    "no bias correction": {"bias_correction": False},
    "no grad averaging": {"grad_averaging": False},
    "trust clip": {"trust_clip": True},
    "no decay": {"weight_decay": 0.0},
    "no decay, always adapted": {"weight_decay": 0.0, "always_adapt": True},
    "maximize": {"maximize": True},
    "strong decay": {"weight_decay": 0.5},
    "eps above the root": {"eps": 0.1},
    "other betas": {"betas": (0.63, 0.9)},
    "no averaging over time": {"betas": (0.0, 0.0)},
    "lr 0": {"lr": 0.0},
    "tensor lr": {"lr": torch.tensor(0.004)},
    "decoupled decay": {"decoupled_decay": True, "lr": 0.3},
    "corrected decay": {"decoupled_decay": True, "corrected_weight_decay": True, "lr": 0.3},
    "caution": {"caution": True},
    "caution, strong decay": {"caution": True, "weight_decay": 0.5},
    "clamped from below": {"ratio_clamp": (1e3, 1e4)},
    "clamped from above": {"ratio_clamp": (0.0, 1e-3)},
    "corrections in the step size": {"step_size_correction": True},
    "eps inside the root": {"eps_inside_sqrt": True, "eps": 1e-8},
    "large eps inside the root": {"eps_inside_sqrt": True, "eps": 0.01},
    "deepspeed": LAMB.PRESETS["deepspeed"],
    "one excluded": {"exclude": lambda name, p: p.ndim == 1},
    "all at once": {
        "bias_correction": False,
        "grad_averaging": False,
        "trust_clip": True,
        "always_adapt": True,
        "maximize": True,
        "weight_decay": 0.0,
    },
}


@FUSED
@pytest.mark.parametrize("variant", VARIANTS.values(), ids=VARIANTS.keys())
def test_variants(device, fused, variant):
    params = [parameter((300, 7), device=device), parameter((70001,), device=device)]
    optimizer = LAMB(params, **{"max_grad_norm": 0.5, **variant}, fused=fused)
    warm_state(optimizer)
    assert_one_step(optimizer)


@FUSED
def test_update_larger_than_the_parameter(device, fused):
    """Where p is 0 or small against lr·r·u, nothing hides the update's own rounding."""
    params = [parameter((20000,), device=device) for _ in range(3)]
    with torch.no_grad():
        params[0].zero_()
        params[1][::2] = 0
        params[2] *= 1e-6
    optimizer = LAMB(params, lr=0.3, fused=fused)
    warm_state(optimizer)
    assert_one_step(optimizer)


def stands_at(case: last_places.Case, device, **options) -> LAMB:
    states, own = case
    params = [torch.nn.Parameter(state["p"].to(device)) for state in states]
    optimizer = LAMB(params, **own, **options)
    for p, state in zip(params, states, strict=True):
        p.grad = state["g"].to(device)
        moments = {"exp_avg": state["m"].to(device), "exp_avg_sq": state["v"].to(device)}
        optimizer.state[p] = {"step": torch.tensor(1.0), **moments}
    return optimizer


@FUSED
@pytest.mark.parametrize("caution", [False, True])
def test_decay_against_the_quotient(device, fused, caution):
    case = last_places.decay_against_quotient((300, 70001))
    assert_one_step(stands_at(case, device, caution=caution, fused=fused))


@FUSED
@pytest.mark.parametrize(
    "left",
    [
        pytest.param(0.3, id="little, near where sums in double begin"),
        pytest.param(1e-3, id="the norm's last places"),
        pytest.param(1e-6, id="all the places of a float"),
    ],
)
def test_decay_that_cancels_the_quotient(device, fused, left):
    assert_one_step(
        stands_at(last_places.decay_cancels((300, 70001), left), device, eps=0.0, fused=fused)
    )


@FUSED
def test_norms_of_few_elements_and_of_one_that_outweighs(device, fused):
    assert_one_step(stands_at(last_places.few_elements(), device, fused=fused))


@FUSED
@pytest.mark.parametrize("scale", [1e-10, 1e-6, 1e4, 1e17])
def test_scales_far_from_one(device, fused, scale):
    """Squares of updates and parameters that float32 cannot hold. v itself it must hold, with all
    its places."""
    params = [parameter((4000,), device=device), parameter((70000,), device=device)]
    params[1].data *= scale**2
    for p in params:
        p.grad *= scale
    for bound in (1.0, None):
        optimizer = LAMB(params, max_grad_norm=bound, eps=1e-20, fused=fused)
        assert_one_step(optimizer)


LOW = [torch.bfloat16, torch.float16]


@FUSED
@pytest.mark.parametrize("dtype", LOW, ids=str)
@pytest.mark.parametrize("shape", [(37, 5), (3, 40000)], ids=["whole", "split"])
def test_low_precision(device, fused, dtype, shape):
    optimizer = LAMB([parameter(shape, dtype, device)], lr=0.02, fused=fused)
    for _ in range(3):
        assert_one_step(optimizer)
        (p,) = params_of(optimizer)
        assert optimizer.state[p]["exp_avg"].dtype == torch.float32
        p.grad = (torch.randn(shape) * 0.01).to(p)


@pytest.mark.reduced
@FUSED
@pytest.mark.parametrize("dtype", LOW, ids=str)
def test_masters(device, fused, dtype):
    """Steps far below the parameter's own precision add up; fp32 parameters need no master."""
    params = [parameter((37, 5), dtype, device), parameter((3, 30000), dtype, device)]
    params.append(parameter((9,), device=device))
    optimizer = LAMB(params, lr=1e-5, master_weights=True, caution=True, fused=fused)
    before = params[0].detach().clone()
    for _ in range(3):
        assert_one_step(optimizer)
    state = optimizer.state[params[0]]
    assert state["master"].dtype == torch.float32
    assert (params[0] == before).float().mean() > 0.8, "too large a step for this test"
    assert not torch.equal(state["master"], before.float())
    assert "master" not in optimizer.state[params[2]]
    twin = LAMB(params, lr=1e-5, master_weights=True, fused=fused)
    twin.load_state_dict(copy.deepcopy(optimizer.state_dict()))
    assert torch.equal(twin.state[params[0]]["master"], state["master"])


@FUSED
def test_dtypes_mixed_in_one_group(device, fused):
    dtypes = [torch.float32, torch.bfloat16, torch.float16] * 2
    params = [parameter((100 * (i + 1),), dtype, device) for i, dtype in enumerate(dtypes)]
    optimizer = LAMB(params, max_grad_norm=0.1, fused=fused)
    assert_one_step(optimizer)


def test_float64_takes_the_plain_path_under_one_norm(device):
    params = [parameter((50, 40), device=device), parameter((900,), torch.float64, device)]
    optimizer = LAMB(params, max_grad_norm=0.01)
    assert_one_step(optimizer)
    assert optimizer.state[params[1]]["exp_avg"].dtype == torch.float64
    with pytest.raises(RuntimeError, match=r"parameter 1 of group 0.*float64"):
        LAMB(params, fused=True).step()


@FUSED
def test_groups_with_their_own_options(device, fused):
    groups = [
        {"params": [parameter((500,), device=device)], "lr": 0.01},
        {"params": [parameter((500,), device=device)], "weight_decay": 0.0, "betas": (0.8, 0.99)},
        {"params": [parameter((80000,), device=device)], "maximize": True, "eps": 1e-3},
    ]
    optimizer = LAMB(groups, max_grad_norm=0.1, fused=fused)
    for _ in range(2):
        assert_one_step(optimizer)
    optimizer.add_param_group({"params": [parameter((33,), device=device)], "trust_clip": True})
    for _ in range(2):  # the newcomer's step count lags behind
        assert_one_step(optimizer)
    assert [int(optimizer.state[p]["step"]) for p in params_of(optimizer)] == [4, 4, 4, 2]


@FUSED
@pytest.mark.parametrize("bad", [float("inf"), float("nan")], ids=["inf", "nan"])
def test_non_finite_norms_are_not_hidden(device, fused, bad):
    params = [parameter((100,), device=device), parameter((100,), device=device)]
    params[0].grad[3] = bad
    LAMB(params, max_grad_norm=None, fused=fused).step()
    assert not params[0].isfinite().any(), "r of an inf or NaN norm belongs to the whole tensor"
    assert params[1].isfinite().all()

    params = [parameter((100,), device=device), parameter((100,), device=device)]
    before = params[1].detach().clone()
    params[0].grad[3] = bad
    optimizer = LAMB(params, max_grad_norm=1.0, fused=fused)
    optimizer.step()
    if bad != bad:
        assert params[1].isnan().all(), "a NaN norm clips every tensor to NaN"
    else:  # g / inf = 0: only weight decay is left
        assert torch.all(optimizer.state[params[1]]["exp_avg"] == 0)
        assert not torch.equal(params[1], before)


@FUSED
def test_trust_clip_keeps_a_nan(device, fused):
    p = parameter((100,), device=device)
    p.grad[0] = float("nan")
    LAMB([p], trust_clip=True, max_grad_norm=None, fused=fused).step()
    assert p.isnan().all()


@pytest.mark.parametrize("clip", [None, 1.0], ids=["no clip", "clip"])
@FUSED
def test_200_steps_no_further_than_timm(fused, clip):
    """‖p - ref‖ / ‖ref - p0‖ at most 1.5 times timm's in float32."""
    Lamb = reference.timm_optimizer("Lamb")
    if isinstance(Lamb, str):
        pytest.skip(Lamb)
    shapes = [(64, 32), (64,), (300, 250), (10, 64, 3, 3)]
    start = [torch.randn(shape) * 0.1 for shape in shapes]
    ours = [torch.nn.Parameter(p.clone()) for p in start]
    theirs = [torch.nn.Parameter(p.clone()) for p in start]
    optimizer = LAMB(ours, lr=2e-3, max_grad_norm=clip, fused=fused)
    timm = Lamb(theirs, lr=2e-3, max_grad_norm=clip)
    exact = [Tensor64(to_float64(p), np.zeros(p.shape), np.zeros(p.shape)) for p in start]
    for x in exact:
        x.options.lr = 2e-3
    for t in range(200):
        torch.manual_seed(1000 + t)
        grads = [torch.randn(s) * 0.05 + 0.01 * p for s, p in zip(shapes, start, strict=True)]
        for params in (ours, theirs):
            for p, g in zip(params, grads, strict=True):
                p.grad = g.clone()
        reference.step(exact, [to_float64(g) for g in grads], clip)
        optimizer.step()
        timm.step()

    def error(params):
        return max(
            np.linalg.norm(to_float64(p) - x.p) / np.linalg.norm(x.p - to_float64(p0))
            for p, x, p0 in zip(params, exact, start, strict=True)
        )

    assert error(ours) <= 1.5 * error(theirs)


LONG = {**VARIANTS, **{f"preset {name}": options for name, options in LAMB.PRESETS.items()}}
del LONG["lr 0"]  # goes nowhere


@pytest.mark.parametrize("variant", LONG.values(), ids=LONG.keys())
def test_200_steps_of_every_variant(variant):
    variant = {"lr": 2e-3, "max_grad_norm": 1.0, **variant}
    check_drift(
        lambda params, fused: LAMB(params, **variant, fused=fused),
        oracle_of,
        lambda tensors, grads: reference.step(
            tensors, grads, variant["max_grad_norm"], variant.get("clip_eps", 0.0)
        ),
    )


@pytest.mark.parametrize("count", [1, 2, 5])
def test_same_bits_for_any_number_of_threads(threads, count):
    shapes = [(64, 3, 7, 7), (64,), (300_000,), (1_200_000,), (70_000,), *[(256,)] * 300]

    def run(n):
        torch.manual_seed(3)
        threads(n)
        params = [parameter(shape) for shape in shapes]
        optimizer = LAMB(params, max_grad_norm=0.5, fused=True)
        for _ in range(3):
            optimizer.step()
        return [*params, *(s["exp_avg_sq"] for s in optimizer.state.values())]

    for a, b in zip(run(1), run(count), strict=True):
        assert torch.equal(a, b)


@pytest.mark.parametrize("capability", native.other_instruction_sets())
def test_the_other_instruction_sets(capability, tmp_path):
    """The same bounds; the choice is made once a process, so each has one of its own. This process
    has the best set of the machine."""
    import os
    import subprocess
    import sys

    environment = {**os.environ, "BATCHOPS_CPU_CAPABILITY": capability}
    tests = "test_one_step or test_low or test_update_larger or test_scales"
    command = [sys.executable, "-m", "pytest", "-q", "-x", "-p", "no:cacheprovider", __file__]
    command += ["-k", f"({tests}) and fused and cpu and not instruction"]
    result = subprocess.run(command, env=environment, capture_output=True, text=True, check=False)
    assert result.returncode == 0, result.stdout[-3000:] + result.stderr[-1000:]


# -------------------------------------------------------------------------------------- memory


@FUSED
def test_layouts_meet_element_by_element(device, fused):
    """p, g, m and v each with strides of their own."""

    shape = (6, 5, 4, 3)
    formats = [torch.contiguous_format, torch.channels_last]
    params, states = [], []
    for p_format, g_format, m_format, v_format in itertools.product(formats, repeat=4):
        p = torch.nn.Parameter(torch.randn(shape, device=device).to(memory_format=p_format))
        # Assigning .grad keeps its strides.
        p.grad = (torch.randn(shape, device=device) * 0.01).to(memory_format=g_format)
        assert p.grad.is_contiguous(memory_format=g_format)
        params.append(p)
        m = (torch.randn(shape, device=device) * 1e-3).to(memory_format=m_format)
        v = (torch.rand(shape, device=device) * 1e-5).to(memory_format=v_format)
        states.append({"step": torch.tensor(4.0), "exp_avg": m, "exp_avg_sq": v})
    optimizer = LAMB(params, fused=None if fused else False)
    for p, state in zip(params, states, strict=True):
        optimizer.state[p] = state
    assert_one_step(optimizer)


def test_no_buffer_of_the_parameters_size():
    p = parameter((4 << 20,))
    optimizer = LAMB([p], fused=True)
    optimizer.step()
    assert bytes_at_its_height(lambda: p.detach().clone()) > 0.9 * p.nbytes, "measures nothing"
    assert bytes_at_its_height(optimizer.step) < 0.1 * p.nbytes


def test_new_state_has_the_parameters_format(device):
    p = parameter((4, 8, 3, 3), device=device)
    p.data = p.data.to(memory_format=torch.channels_last)
    p.grad = p.grad.to(memory_format=torch.channels_last)
    optimizer = LAMB([p], fused=True)
    assert_one_step(optimizer)
    assert optimizer.state[p]["exp_avg"].stride() == p.stride()


def test_parameters_with_gaps_take_the_plain_path(device):
    base = torch.randn(40, 60, device=device)
    gaps = torch.nn.Parameter(base[:, ::2])
    shifted = torch.nn.Parameter(torch.randn(1001, device=device)[1:])  # 4-byte aligned only
    transposed = torch.nn.Parameter(torch.randn(30, 20, device=device).t())
    expanded_grad = parameter((8, 9), device=device)
    params = [gaps, shifted, transposed, expanded_grad]
    for p in params:
        p.grad = torch.randn(p.shape, device=device) * 0.01
    expanded_grad.grad = torch.randn(8, 1, device=device).expand(8, 9)
    untouched = base[:, 1::2].clone()
    optimizer = LAMB(params)
    for _ in range(2):
        assert_one_step(optimizer)
    assert torch.equal(base[:, 1::2], untouched)
    with pytest.raises(RuntimeError, match=r"parameter 0 of group 0.*without gaps"):
        LAMB([gaps], fused=True).step()


@FUSED
@pytest.mark.parametrize("caution", [False, True])
def test_empty_tensors_and_missing_gradients(device, fused, caution):
    params = [parameter(s, device=device) for s in [(0,), (4, 0, 3), (1,), (5,), (6,)]]
    params[3].grad = None
    optimizer = LAMB(params, fused=fused, caution=caution)
    assert_one_step(optimizer)
    assert params[3] not in optimizer.state
    params[3].grad = torch.ones_like(params[3])  # joins later, with a step count of its own
    params[4].grad = None
    assert_one_step(optimizer)
    assert [int(optimizer.state[p]["step"]) for p in params] == [2, 2, 2, 1, 1]


@FUSED
def test_no_gradient_anywhere(fused):
    p = torch.nn.Parameter(torch.ones(3))
    optimizer = LAMB([p], fused=fused)
    optimizer.step()
    assert torch.equal(p, torch.ones(3))
    assert not optimizer.state


@FUSED
def test_autograd_sees_the_update(fused):
    """A parameter saved for a backward and changed by step() is an error there, as with torch's."""
    p = parameter((5,))
    loss = (p * p).sum()
    LAMB([p], fused=fused).step()
    with pytest.raises(RuntimeError, match="modified by an inplace operation"):
        loss.backward()


# ---------------------------------------------------------------------- what the table must notice


def test_replaced_gradients_storages_and_states_are_seen():
    params = [parameter((70000,)), parameter((50,)), parameter((5, 4, 3, 3))]
    optimizer = LAMB(params, fused=True)
    for _ in replacements(optimizer, "exp_avg"):
        assert_one_step(optimizer)
    assert [int(optimizer.state[p]["step"]) for p in params] == [1, 1, 1]


def test_moved_parameters_are_seen():
    params = [parameter((70000,)), parameter((6, 5, 3, 3))]
    optimizer = LAMB(params)
    assert_one_step(optimizer)
    params[1].data = params[1].data.to(memory_format=torch.channels_last)
    params[1].grad = torch.randn_like(params[1]) * 0.01
    assert_one_step(optimizer)
    for p in params:  # module.bfloat16() does this
        p.data = p.data.bfloat16()
        p.grad = None
        p.grad = torch.randn_like(p) * 0.01
    assert_one_step(optimizer)
    for p in params:
        p.grad = None
        p.data = p.data.double()
        p.grad = torch.randn_like(p) * 0.01
    optimizer.step()
    assert all(p.isfinite().all() for p in params)


@pytest.mark.parametrize("container", [list, tuple])
def test_replaced_parameter_lists_are_seen(container):
    a, b = parameter((50,)), parameter((50,))
    optimizer = LAMB([a], fused=True)
    assert_one_step(optimizer)
    optimizer.param_groups[0]["params"] = container([b])
    before = a.detach().clone()
    optimizer.step()
    assert torch.equal(a, before)
    assert int(optimizer.state[b]["step"]) == 1


# ------------------------------------------------------------------------------------ manners


def fresh(dtype=torch.float32, **options):
    torch.manual_seed(11)
    params = [parameter((33, 7), dtype), parameter((66000,), dtype), parameter((5,), dtype)]
    return LAMB(params, **options)


def same_states(a: LAMB, b: LAMB) -> None:
    for p, q in zip(params_of(a), params_of(b), strict=True):
        assert torch.equal(p, q)
        for name, value in a.state[p].items():
            assert value.dtype == b.state[q][name].dtype
            assert torch.equal(value, b.state[q][name]), name


@pytest.mark.parametrize(("one", "two"), [*itertools.product([True, False, None], repeat=2)])
def test_state_dict_goes_both_ways(one, two):
    first, second = fresh(fused=one), fresh(fused=two)
    for _ in range(2):
        first.step()
    second.load_state_dict(copy.deepcopy(first.state_dict()))
    for p, q in zip(params_of(first), params_of(second), strict=True):
        q.data.copy_(p.data)
    same_states(first, second)
    assert all(group["fused"] is two for group in second.param_groups)
    assert_one_step(second)
    first.step()
    if one == two:
        same_states(first, second)


@pytest.mark.parametrize("dtype", LOW, ids=str)
def test_loading_keeps_every_dtype_bit_for_bit(dtype):
    first, second = fresh(dtype), fresh(dtype)
    first.step()
    file = io.BytesIO()
    torch.save(first.state_dict(), file)
    file.seek(0)
    second.load_state_dict(torch.load(file, weights_only=True))
    for p, q in zip(params_of(first), params_of(second), strict=True):
        q.data.copy_(p.data)
        assert second.state[q]["exp_avg"].dtype == torch.float32
    same_states(first, second)


def test_states_of_another_dtype_take_the_plain_path():
    """A checkpoint with bfloat16 moments is kept as it is."""
    optimizer = fresh(torch.bfloat16)
    optimizer.step()
    dicts = copy.deepcopy(optimizer.state_dict())
    for state in dicts["state"].values():
        state["exp_avg"] = state["exp_avg"].bfloat16()
    optimizer.load_state_dict(dicts)
    assert_one_step(optimizer)
    assert all(s["exp_avg"].dtype == torch.bfloat16 for s in optimizer.state.values())


def test_load_state_dict_hooks_and_errors():
    optimizer = fresh()
    optimizer.step()
    saved = copy.deepcopy(optimizer.state_dict())
    with pytest.raises(ValueError, match="different number of parameter groups"):
        optimizer.load_state_dict({"state": {}, "param_groups": []})
    assert not optimizer._optimizer_load_state_dict_pre_hooks

    def halve(_, loaded):
        for state in loaded["state"].values():
            state["exp_avg"] = state["exp_avg"] / 2
        return loaded

    seen = []
    optimizer.register_load_state_dict_pre_hook(halve)
    optimizer.register_load_state_dict_post_hook(
        lambda o: seen.extend(type(s["exp_avg"]) for s in o.state.values())
    )
    optimizer.load_state_dict(copy.deepcopy(saved))
    assert seen == [torch.Tensor] * 3
    state = optimizer.state[params_of(optimizer)[0]]
    assert torch.equal(state["exp_avg"], saved["state"][0]["exp_avg"] / 2)


@FUSED
@pytest.mark.parametrize("copier", [copy.deepcopy, lambda o: pickle.loads(pickle.dumps(o))])
def test_copies_step_on_their_own(fused, copier):
    optimizer = fresh(fused=fused)
    optimizer.step()
    twin = copier(optimizer)
    for p, q in zip(params_of(optimizer), params_of(twin), strict=True):
        q.grad = p.grad.clone()
    before = [p.detach().clone() for p in params_of(optimizer)]
    twin.step()
    for p, b in zip(params_of(optimizer), before, strict=True):
        assert torch.equal(p, b)
    optimizer.step()
    same_states(optimizer, twin)


@FUSED
def test_closure(fused):
    model = torch.nn.Linear(4, 1)
    x = torch.randn(16, 4)
    optimizer = LAMB(model.parameters(), lr=0.05, fused=fused)

    def closure():
        optimizer.zero_grad()
        loss = model(x).square().mean()
        loss.backward()
        return loss

    losses = [optimizer.step(closure).item() for _ in range(30)]
    assert losses[-1] < 0.5 * losses[0]


@FUSED
@pytest.mark.parametrize("tensor_lr", [False, True])
def test_schedulers(fused, tensor_lr):
    def run(schedule):
        p = parameter((50,))
        optimizer = LAMB([p], lr=torch.tensor(0.1) if tensor_lr else 0.1, fused=fused)
        scheduler = schedule(optimizer)
        for _ in range(4):
            assert_one_step(optimizer)
            scheduler.step()
        return float(optimizer.param_groups[0]["lr"])

    assert run(lambda o: LambdaLR(o, lambda t: 0.5**t)) == pytest.approx(0.1 * 0.5**4)
    run(lambda o: CosineAnnealingLR(o, T_max=4))


@FUSED
@pytest.mark.parametrize("set_to_none", [True, False])
def test_zero_grad(fused, set_to_none):
    p = parameter((50,))
    optimizer = LAMB([p], weight_decay=0.0, fused=fused)
    optimizer.step()
    before = p.detach().clone()
    optimizer.zero_grad(set_to_none=set_to_none)
    optimizer.step()
    assert torch.equal(p, before) is set_to_none  # zeros still decay m and move p
    assert int(optimizer.state[p]["step"]) == (1 if set_to_none else 2)


def test_grad_scaler_unscales_before_the_step():
    p = parameter((50,))
    scaler = torch.amp.GradScaler("cpu", init_scale=1024.0)
    optimizer = LAMB([p])
    optimizer.zero_grad()
    expected = LAMB([torch.nn.Parameter(p.detach().clone())])
    (q,) = params_of(expected)
    (q**2).sum().backward()
    scaler.scale((p**2).sum()).backward()
    scaler.step(optimizer)
    scaler.update()
    expected.step()
    assert torch.equal(p, q)
    optimizer.zero_grad()
    before = p.detach().clone()
    scaler.scale((p * float("inf")).sum()).backward()
    scaler.step(optimizer)
    assert torch.equal(p, before)
    assert int(optimizer.state[p]["step"]) == 1


def test_hooks_run_around_the_step():
    optimizer = fresh()
    calls = []
    optimizer.register_step_pre_hook(lambda *_: calls.append("pre"))
    optimizer.register_step_post_hook(lambda *_: calls.append("post"))
    optimizer.step()
    assert calls == ["pre", "post"]


def test_named_parameters_are_named_in_errors():
    model = torch.nn.Linear(3, 2)
    for p in model.parameters():
        p.grad = torch.zeros_like(p)
    model.bias.grad = torch.zeros(2).to_sparse()
    optimizer = LAMB(model.named_parameters())
    with pytest.raises(RuntimeError, match=r"'bias'.*sparse gradient"):
        optimizer.step()


# ------------------------------------------------------------------------------------- errors


@pytest.mark.parametrize(
    "options",
    [
        {"lr": -1.0},
        {"lr": float("nan")},
        {"lr": torch.tensor([0.1, 0.2])},
        {"eps": -1e-8},
        {"betas": (1.0, 0.9)},
        {"betas": (0.9, -0.1)},
        {"betas": (0.9,)},
        {"weight_decay": -0.1},
        {"max_grad_norm": 0.0},
        {"max_grad_norm": -1.0},
        {"max_grad_norm": float("nan")},
        {"fused": "yes"},
    ],
    ids=str,
)
def test_invalid_options(options):
    with pytest.raises(ValueError, match=r"LAMB.*(expected|must be)"):
        LAMB([parameter((2,))], **options)
    optimizer = LAMB([parameter((2,))])
    with pytest.raises(ValueError, match=r"LAMB.*(expected|must be|one number)"):
        optimizer.add_param_group({"params": [parameter((2,))], **options})
    assert len(optimizer.param_groups) == 1


def test_unsupported_options_are_refused():
    for name in ("foreach", "differentiable"):
        with pytest.raises(RuntimeError, match=f"LAMB: `{name}` is not supported, got {name}=True"):
            LAMB([parameter((2,))], **{name: True})
        with pytest.raises(RuntimeError, match=name):
            LAMB([{"params": [parameter((2,))], name: True}])


def test_max_grad_norm_is_one_number():
    optimizer = LAMB([parameter((2,))])
    with pytest.raises(ValueError, match=r"max_grad_norm.*expected 1\.0, got 2\.0"):
        optimizer.add_param_group({"params": [parameter((2,))], "max_grad_norm": 2.0})
    optimizer.add_param_group({"params": [parameter((2,))]})
    optimizer.param_groups[1]["max_grad_norm"] = 3.0
    with pytest.raises(ValueError, match="max_grad_norm"):
        optimizer.step()


def snapshot(optimizer: LAMB):
    state = {
        i: {k: v.clone() for k, v in optimizer.state[p].items()}
        for i, p in enumerate(params_of(optimizer))
        if p in optimizer.state
    }
    return [p.detach().clone() for p in params_of(optimizer)], state


def assert_unchanged(optimizer: LAMB, before) -> None:
    params, state = before
    for i, (p, old) in enumerate(zip(params_of(optimizer), params, strict=True)):
        assert torch.equal(p, old)
        assert (p in optimizer.state) == (i in state)
        for name, value in state.get(i, {}).items():
            assert torch.equal(optimizer.state[p][name], value)


def bad_gradient(kind: str, p: torch.nn.Parameter) -> None:
    if kind == "sparse":
        p.grad = torch.zeros(p.shape).to_sparse()
    elif kind == "complex":
        p.data = torch.zeros(p.shape, dtype=torch.complex64)
        p.grad = torch.zeros(p.shape, dtype=torch.complex64)


@FUSED
@pytest.mark.parametrize("kind", ["sparse", "complex"])
@pytest.mark.parametrize("warm", [False, True], ids=["first step", "later"])
def test_bad_gradients_change_nothing(fused, kind, warm):
    """The bad parameter is the last of three, and of a mixed plan: all is checked before anything
    is written."""
    params = [parameter((9,)), parameter((9,), torch.float64), parameter((9,))]
    optimizer = LAMB(params, fused=None if fused else False)
    if warm:
        optimizer.step()
    else:
        params[2].grad = None
        params[2].data = params[2].data.clone()
    params[2].grad = None
    bad_gradient(kind, params[2])
    before = snapshot(optimizer)
    with pytest.raises(RuntimeError, match=rf"parameter 2 of group 0.*{kind} gradient"):
        optimizer.step()
    assert_unchanged(optimizer, before)


@FUSED
def test_states_that_do_not_fit_change_nothing(fused):
    params = [parameter((9,)), parameter((9,))]
    optimizer = LAMB(params, fused=None if fused else False)
    optimizer.step()
    good = dict(optimizer.state[params[1]])
    for bad, message in [
        ({"exp_avg": torch.zeros(4)}, r"'exp_avg'.*of its size.*\(4,\)"),
        ({"exp_avg_sq": torch.zeros(9, dtype=torch.int64)}, r"'exp_avg_sq'.*int64"),
        ({"step": None}, "'step'"),
    ]:
        optimizer.state[params[1]] = {**good, **bad}
        before = [p.detach().clone() for p in params]
        first = {k: v.clone() for k, v in optimizer.state[params[0]].items()}
        with pytest.raises(RuntimeError, match=message):
            optimizer.step()
        assert all(torch.equal(p, b) for p, b in zip(params, before, strict=True))
        assert all(torch.equal(optimizer.state[params[0]][k], v) for k, v in first.items())


def test_parameters_that_overlap_themselves_are_refused():
    p = torch.nn.Parameter(torch.randn(3, 1).expand(3, 4))
    p.grad = torch.zeros(3, 4)
    for fused in (None, True, False):
        with pytest.raises(RuntimeError, match=r"parameter 0 of group 0.*share memory"):
            LAMB([p], fused=fused).step()


def test_gradients_without_memory_of_their_own():
    p = parameter((70,))
    before = p.detach().clone()
    p.grad = torch._efficientzerotensor((70,))
    optimizer = LAMB([p], weight_decay=0.0)
    optimizer.step()
    assert torch.equal(p, before)
    p.grad = torch.randn(70)
    p.grad.untyped_storage().resize_(0)
    with pytest.raises(RuntimeError, match="storage is too small"):
        optimizer.step()
    assert torch.equal(p, before)


@pytest.mark.parametrize("fused", [True, False, None])
def test_step_stays_on_the_cpu_whatever_the_default_device(fused):
    p = parameter((5,))
    optimizer = LAMB([p], fused=fused)
    before = torch.get_default_device()
    torch.set_default_device("meta")
    try:
        optimizer.step()
    finally:
        torch.set_default_device(None if before.type == "cpu" else before)
    assert optimizer.state[p]["step"].device.type == "cpu"
    assert optimizer.state[p]["step"] == 1


def test_parameters_over_one_memory_do_not_race():
    data = torch.randn(300_000)
    results = []
    for fused in (None, False):
        shared = data.clone()
        params = [torch.nn.Parameter(shared), torch.nn.Parameter(shared)]
        for p in params:
            p.grad = torch.ones_like(p)
        LAMB(params, fused=fused).step()
        results.append(shared)
    torch.testing.assert_close(results[0], results[1], rtol=1e-6, atol=1e-7)
    with pytest.raises(RuntimeError, match="an earlier parameter has some of its memory"):
        LAMB(params, fused=True).step()


@pytest.mark.parametrize(
    ("name", "value", "error"),
    [("lr", -1.0, ValueError), ("lr", None, TypeError), ("max_grad_norm", 0.0, ValueError)],
)
def test_options_changed_between_steps_are_checked(name, value, error):
    p = parameter((5,))
    optimizer = LAMB([p])
    optimizer.param_groups[0][name] = value
    with pytest.raises(error, match=name.replace("lr", "l.*r")):
        optimizer.step()
    assert not optimizer.state[p]


@pytest.mark.cuda
def test_nothing_is_read_back_with_capturable():
    """lr, step counts, loss scale and found_inf on the device, in eager steps and in a graph."""
    params = [parameter(shape, device="cuda") for shape in ((3, 5), (70000,), (1000, 1000))]
    check_nothing_is_read_back(LAMB, params, {"lr": 0.01})
