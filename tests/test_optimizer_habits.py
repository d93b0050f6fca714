"""LAMB and LARS under what users of torch.optim do by habit."""

from __future__ import annotations

import collections
import copy
import gc
import io
import math
import subprocess
import sys
import weakref

import numpy as np
import pytest
import torch
from torch._subclasses.fake_tensor import FakeTensorMode

from batchops import _optimizer_plain as plain
from batchops.optim import LAMB, LARS

BOTH = pytest.mark.parametrize("kind", [LAMB, LARS])
FUSED = pytest.mark.parametrize("fused", [True, False])


def parameter(*size: int, grad: bool = True) -> torch.nn.Parameter:
    p = torch.nn.Parameter(torch.randn(size))
    if grad:
        p.grad = torch.randn(size)
    return p


@FUSED
@pytest.mark.parametrize("bad", [math.nan, math.inf])
def test_caution_hides_no_gradient_that_is_not_finite(fused, bad):
    """The sign of a NaN is 0 in torch, as that of an element that caution masks."""
    p = torch.nn.Parameter(torch.ones(4))
    p.grad = torch.tensor([bad, 1.0, 1.0, 1.0])
    optimizer = LAMB([p], caution=True, max_grad_norm=None, fused=fused)
    optimizer.step()
    assert p.isnan().all()


@FUSED
def test_caution_masks_the_same_in_both_forms(fused):
    grad, m = torch.tensor([1.0, -1.0, 1.0]), torch.tensor([1.0, 1.0, -1.0])
    p = torch.nn.Parameter(torch.ones(3))
    optimizer = LAMB([p], lr=0.1, weight_decay=0.0, caution=True, max_grad_norm=None, fused=fused)
    p.grad = torch.zeros(3)
    optimizer.step()
    start = p.detach().clone()
    optimizer.state[p]["exp_avg"].copy_(10 * m)
    p.grad = grad
    optimizer.step()
    assert ((p.detach() != start).tolist()) == [True, False, False]


@BOTH
@FUSED
@pytest.mark.parametrize("number", [np.float32(0.5), np.float64(0.5), np.int64(1)])
def test_a_rate_may_be_a_numpy_number(kind, fused, number):
    ours, same = parameter(3), torch.nn.Parameter(torch.zeros(3))
    same.data.copy_(ours.data)
    same.grad = ours.grad.clone()
    kind([ours], lr=number, fused=fused).step()
    kind([same], lr=float(number), fused=fused).step()
    assert torch.equal(ours, same)
    optimizer = kind([parameter(3)], lr=1.0, fused=fused)
    schedule = torch.optim.lr_scheduler.LambdaLR(optimizer, lambda _: np.float32(0.5))
    optimizer.step()
    schedule.step()
    optimizer.step()


@pytest.mark.parametrize("fused", [True, None, False])
def test_a_step_count_that_a_checkpoint_lacks_is_on_the_host(fused):
    p = torch.nn.Parameter(torch.empty(3, device="meta"))
    optimizer = LAMB([p], fused=fused)
    saved = optimizer.state_dict()
    saved["state"] = {0: {"exp_avg": torch.zeros(3), "exp_avg_sq": torch.zeros(3)}}
    saved["param_groups"][0]["step"] = 4
    for default in ("cpu", "meta"):
        with torch.device(default):
            optimizer.load_state_dict(copy.deepcopy(saved))
        step = optimizer.state[p]["step"]
        assert step.device.type == "cpu"
        assert step.dtype == torch.float32
        assert float(step) == 4


@BOTH
def test_parameters_without_a_size_yet_are_passed_over(kind):
    lazy = torch.nn.LazyLinear(3)
    p = parameter(4)
    before = p.detach().clone()
    optimizer = kind([*lazy.parameters(), p], lr=0.1)
    optimizer.step()
    assert not torch.equal(p, before)
    lazy(torch.randn(2, 5)).sum().backward()
    before = lazy.weight.detach().clone()
    optimizer.step()
    assert not torch.equal(lazy.weight, before)


def test_the_peak_of_the_rate_survives_a_checkpoint_without_it():
    def make(p: torch.nn.Parameter) -> LAMB:
        return LAMB([p], lr=0.1, decoupled_decay=True, corrected_weight_decay=True)

    p = parameter(4)
    optimizer = make(p)
    saved = optimizer.state_dict()
    del saved["param_groups"][0]["max_lr_snapshot"]
    saved["param_groups"][0]["lr"] = 0.05
    optimizer.load_state_dict(saved)
    assert optimizer.param_groups[0]["max_lr_snapshot"] == 0.1
    assert optimizer.param_groups[0]["lr"] == 0.05


def copied(optimizer: torch.optim.Optimizer) -> torch.optim.Optimizer:
    return copy.deepcopy(optimizer)


def pickled(optimizer: torch.optim.Optimizer) -> torch.optim.Optimizer:
    file = io.BytesIO()
    torch.save(optimizer, file)
    file.seek(0)
    return torch.load(file, weights_only=False)


@BOTH
@pytest.mark.parametrize("again", [copied, pickled])
def test_later_groups_of_a_copy_are_excluded_by_the_same_rule(kind, again):
    model = torch.nn.Linear(3, 2)
    optimizer = again(kind(model.named_parameters(), exclude=["bias"]))
    optimizer.add_param_group({"params": [("x.weight", parameter(2)), ("x.bias", parameter(2))]})
    assert [group["exclude"] for group in optimizer.param_groups] == [[1], [1]]
    optimizer = again(LARS.preset("mlperf", model.parameters()))  # by a function of the module
    optimizer.add_param_group({"params": [parameter(2, 2), parameter(2)]})
    assert optimizer.param_groups[1]["exclude"] == [1]


@BOTH
@pytest.mark.parametrize("again", [copied, pickled])
def test_a_rule_that_a_copy_cannot_hold_is_asked_for(kind, again):
    optimizer = again(kind([parameter(2, 2), parameter(2)], exclude=lambda _, p: p.ndim < 2))
    assert optimizer.param_groups[0]["exclude"] == [1]
    with pytest.raises(ValueError, match="exclude of its own"):
        optimizer.add_param_group({"params": [parameter(3)]})
    optimizer.add_param_group({"params": [parameter(3)], "exclude": True})
    assert optimizer.param_groups[1]["exclude"] == [0]


@BOTH
def test_multiprocessors_for_others_belong_to_the_run(kind):
    optimizer = kind([parameter(3)], sm_margin=8)
    assert copied(optimizer).sm_margin == pickled(optimizer).sm_margin == 8
    optimizer.step()
    other = kind([parameter(3)])
    other.load_state_dict(optimizer.state_dict())
    assert other.sm_margin == 0
    for wrong in (-1, 0.5, None):
        with pytest.raises(ValueError, match=f"expected sm_margin to be an int >= 0, got {wrong}"):
            other.sm_margin = wrong
        with pytest.raises(ValueError, match="sm_margin"):
            kind([parameter(3)], sm_margin=wrong)


@BOTH
def test_empty_groups(kind):
    optimizer = kind([{"params": []}, {"params": [parameter(3)]}])
    optimizer.step()
    stats = optimizer.stats()
    assert stats.names == ["1.0"]
    assert stats.values.isfinite().all()
    optimizer.param_groups.clear()
    assert optimizer.step(lambda: torch.tensor(2.0)) == 2.0
    assert optimizer.stats().values.shape == (0, 4)


@BOTH
@pytest.mark.parametrize("fused", [None, False])
def test_under_fake_tensors(kind, fused):
    with FakeTensorMode():
        p = parameter(3)
        kind([p], lr=0.1, fused=fused).step()
        assert p.shape == (3,)


@pytest.mark.parametrize("kind", [LAMB, LARS])
def test_the_plain_form_forms_the_norm_of_all_gradients_once(kind, monkeypatch):
    """Not once for each parameter: of thousands, that would take seconds."""
    params = [torch.nn.Parameter(torch.randn(4)) for _ in range(50)]
    for p in params:
        p.grad = torch.randn(4)
    optimizer = kind(params, lr=0.1, max_grad_norm=1.0, fused=False)
    calls = []
    total = plain.total
    monkeypatch.setattr(plain, "total", lambda *arguments: calls.append(1) or total(*arguments))
    optimizer.step()
    assert len(calls) == 1


@pytest.mark.parametrize("kind", [LAMB, LARS])
def test_many_parameters_are_read_by_all_threads_as_by_one(kind):
    """Some without a gradient, some with one in a layout of its own; errors are the first one's."""

    def trained(threads: int) -> tuple[list[torch.Tensor], list[int]]:
        before = torch.get_num_threads()
        torch.set_num_threads(threads)
        try:
            torch.manual_seed(3)
            params = [torch.nn.Parameter(torch.randn(6, 4)) for _ in range(700)]
            optimizer = kind(params, lr=0.1, weight_decay=0.1, max_grad_norm=1.0, fused=True)
            for step in range(3):
                for i, p in enumerate(params):
                    p.grad = None if (i + step) % 7 == 0 else torch.randn(6, 4)
                if step:
                    params[600].grad = torch.randn(4, 6).t()
                    params[20].grad = torch._neg_view(torch.randn(6, 4))
                optimizer.step()
            for bad in (650, 410):
                params[bad].grad = torch.zeros(6, 4).to_sparse()
            saved = [p.detach().clone() for p in params]
            with pytest.raises(RuntimeError, match=r"parameter 410 .* has a sparse gradient"):
                optimizer.step()
            assert all(torch.equal(p, q) for p, q in zip(params, saved, strict=True))
            return saved, [p._version for p in params]
        finally:
            torch.set_num_threads(before)

    one, one_versions = trained(1)
    two, two_versions = trained(2)
    assert all(torch.equal(a, b) for a, b in zip(one, two, strict=True))
    assert one_versions == two_versions
    assert min(one_versions) >= 2


@pytest.mark.parametrize("kind", [LAMB, LARS])
def test_a_graph_is_captured_of_counts_on_the_device_alone(kind, monkeypatch):
    params = [torch.nn.Parameter(torch.ones(5)) for _ in range(2)]
    for p in params:
        p.grad = torch.ones(5)
    groups = [{"params": [params[0]], "capturable": True}, {"params": [params[1]]}]
    optimizer = kind(groups, lr=0.1)
    before = [p.clone() for p in params]
    monkeypatch.setattr(torch.cuda, "is_initialized", lambda: True)
    monkeypatch.setattr(torch.cuda, "is_current_stream_capturing", lambda: True)
    with pytest.raises(RuntimeError, match="expected capturable=True in every parameter group"):
        optimizer.step()
    assert all(torch.equal(p, was) for p, was in zip(params, before, strict=True))
    optimizer.param_groups[1]["capturable"] = True
    optimizer._check_capture()
    monkeypatch.setattr(torch.cuda, "is_current_stream_capturing", lambda: False)
    optimizer.param_groups[1]["capturable"] = False
    optimizer.step()
    assert not any(torch.equal(p, was) for p, was in zip(params, before, strict=True))


@pytest.mark.parametrize("kind", [LAMB, LARS])
def test_rows_of_parameters_without_gradient_lie_between_others(kind):
    params = [torch.nn.Parameter(torch.full((3,), float(i + 1))) for i in range(7)]
    optimizer = kind(params, lr=0.1, max_grad_norm=None)
    with_gradient = [0, 1, 4, 6]
    for i in with_gradient:
        params[i].grad = torch.full((3,), 10.0 + i)
    optimizer.step()
    stats = optimizer.stats()
    for i in range(7):
        row = dict(zip(stats.columns, stats.values[i].tolist(), strict=True))
        if i in with_gradient:
            assert row["p_norm"] == pytest.approx((i + 1) * 3**0.5)
            assert row["g_norm"] == pytest.approx((i + 10) * 3**0.5)
        else:
            assert all(math.isnan(v) for v in row.values())


@pytest.mark.cuda
@pytest.mark.parametrize("kind", [LAMB, LARS])
def test_a_capture_without_capturable_is_refused(kind):
    p = torch.nn.Parameter(torch.ones(5, device="cuda"))
    p.grad = torch.ones_like(p)
    optimizer = kind([p], lr=0.1)
    optimizer.step()
    torch.cuda.synchronize()
    with (
        pytest.raises(RuntimeError, match="expected capturable=True in every parameter group"),
        torch.cuda.graph(torch.cuda.CUDAGraph()),
    ):
        optimizer.step()


@pytest.mark.parametrize("kind", [LAMB, LARS])
def test_a_scaler_that_met_no_gradient(kind):
    """It adds up nothing to the number 0."""
    optimizer = kind([torch.nn.Parameter(torch.ones(3))], lr=0.1, capturable=True)
    optimizer.found_inf = 0
    optimizer.step()


SHARDED = """
import torch, torch.distributed as dist
from torch.distributed.tensor import DTensor, Replicate, distribute_tensor
from batchops import functional as BF, nn as bnn
from batchops.optim import LAMB, LARS

dist.init_process_group("gloo", store=dist.HashStore(), rank=0, world_size=1)
mesh = dist.device_mesh.init_device_mesh("cpu", (1,))
x = torch.randn(4, 6)
theirs = torch.nn.LayerNorm(6)
ours = bnn.LayerNorm(6)
for norm in (theirs, ours):
    for name, p in list(norm.named_parameters()):
        setattr(norm, name, torch.nn.Parameter(distribute_tensor(p.detach(), mesh, [Replicate()])))
spread = distribute_tensor(x, mesh, [Replicate()])
got, want = ours(spread), theirs(spread)
assert type(got) is type(want) is DTensor
assert torch.equal(got.to_local(), want.to_local())
for kind in (LAMB, LARS):
    optimizer = kind(ours.parameters(), lr=0.1)
    ours.weight.grad = torch.ones_like(ours.weight)
    try:
        optimizer.step()
    except TypeError as error:
        assert "expected whole parameters, got" in str(error) and "DTensor" in str(error)
    else:
        raise AssertionError("not refused")
    assert not optimizer.state
dist.destroy_process_group()
"""


def test_distributed_tensors():
    """Norms leave them to torch, optimizers refuse them before anything has changed."""
    done = subprocess.run(
        [sys.executable, "-c", SHARDED], capture_output=True, text=True, timeout=300
    )
    assert done.returncode == 0, done.stderr


FLATTENED = """
import os, sys, torch, torch.distributed as dist
from torch.distributed.fsdp import FullyShardedDataParallel as FSDP
from batchops.optim import LAMB, LARS

rank, world, path = int(sys.argv[1]), int(sys.argv[2]), sys.argv[3]
dist.init_process_group("gloo", store=dist.FileStore(path, world), rank=rank, world_size=world)
for original in (True, False):
    for kind in (LAMB, LARS):
        model = FSDP(torch.nn.Linear(6, 4), device_id=torch.device("cpu"), use_orig_params=original)
        model(torch.randn(3, 6)).sum().backward()
        try:
            kind(model.parameters(), lr=0.1).step()
            print("stepped")
        except TypeError as error:
            print(str(error))
dist.destroy_process_group()
"""


@pytest.mark.parametrize("world", [1, 2])
def test_flattened_parameters(world, tmp_path):
    """FSDP's: refused where they are stretches of a shard, or several parameters in one. A single
    rank's own parameters are whole."""
    command = [sys.executable, "-W", "ignore", "-c", FLATTENED]
    started = [
        subprocess.Popen(
            [*command, str(rank), str(world), str(tmp_path / "store")],
            stdout=subprocess.PIPE,
            stderr=subprocess.PIPE,
            text=True,
        )
        for rank in range(world)
    ]
    for process in started:
        output, errors = process.communicate(timeout=300)
        assert process.returncode == 0, errors
        original, flat = output.splitlines()[:2], output.splitlines()[2:]
        for line in original:
            if world == 1:
                assert line == "stepped"
            else:
                assert "expected whole parameters, got" in line
                assert "a stretch of FSDP's flat parameter" in line
        assert len(flat) == 2
        for line in flat:
            assert "FSDP's FlatParameter, several tensors in one" in line


OVERLAPS = {
    "the end of one and the beginning of the next": [(0, 90), (80, 170)],
    "one inside another": [(0, 100), (40, 60)],
    "the later one begins before": [(50, 100), (0, 51)],
    "with the second of two": [(0, 50), (100, 150), (149, 200)],
    "with both of two": [(0, 50), (60, 100), (40, 70)],
}


@BOTH
@pytest.mark.parametrize("stretches", OVERLAPS.values(), ids=OVERLAPS.keys())
def test_parameters_that_overlap_step_one_after_the_other(kind, stretches):
    """As AdamW's: each sees what the ones before have left."""
    start, grad = torch.randn(200), torch.randn(200)

    def made(memory: torch.Tensor, **options: object) -> torch.optim.Optimizer:
        params = [torch.nn.Parameter(memory[begin:end]) for begin, end in stretches]
        for p, (begin, end) in zip(params, stretches, strict=True):
            p.grad = grad[begin:end]
        return kind(params, lr=0.1, weight_decay=0.1, max_grad_norm=None, **options)

    shared, plain_shared = start.clone(), start.clone()
    optimizer = made(shared)
    optimizer.step()
    assert len(optimizer._plan.plain) == 1
    made(plain_shared, fused=False).step()
    torch.testing.assert_close(shared, plain_shared, rtol=1e-6, atol=1e-7)
    with pytest.raises(RuntimeError, match="an earlier parameter has some of its memory"):
        made(shared, fused=True).step()


@BOTH
def test_neighbours_in_one_buffer_do_not_overlap(kind):
    memory = torch.randn(90)
    parts = [memory[40:60], memory[:40].view(5, 8).t(), memory[60:], memory[10:10]]
    params = [torch.nn.Parameter(part) for part in parts]
    for p in params:
        p.grad = torch.ones_like(p)
    kind(params, lr=0.1, fused=True).step()


@BOTH
@pytest.mark.parametrize("fused", [None, True, False])
@pytest.mark.parametrize("dtype", [torch.int64, torch.int32, torch.bool])
def test_integers_are_refused(kind, fused, dtype):
    p = torch.full((3,), 1, dtype=dtype)
    p.grad = torch.ones(3, dtype=dtype)
    with pytest.raises(RuntimeError, match=rf"expected floating-point parameters, got .*{dtype}"):
        kind([p], lr=0.1, fused=fused).step()
    low = torch.nn.Parameter(torch.ones(3, dtype=torch.bfloat16))
    low.grad_dtype = None
    low.grad = torch.ones(3, dtype=dtype)
    with pytest.raises(RuntimeError, match=rf"expects a floating-point gradient.* got {dtype}"):
        kind([low], lr=0.1, fused=fused).step()
    assert torch.equal(low, torch.ones_like(low))
    assert torch.equal(p, torch.full((3,), 1, dtype=dtype))


# ----------------------------------------------------------- whose the tensors are between steps


def stepped(kind, params, **options):
    optimizer = kind(params, **{"lr": 0.1, **options})
    if kind is LARS:
        optimizer.param_groups[0]["momentum"] = 0.9
    for p in params:
        p.grad = torch.ones_like(p)
    optimizer.step()
    return optimizer


MOMENT = {LAMB: "exp_avg", LARS: "momentum_buffer"}
ANY_FORM = pytest.mark.parametrize("fused", [None, True, False])


@BOTH
@ANY_FORM
def test_tensors_can_be_swapped_after_a_step(kind, fused):
    p, other = parameter(4, grad=False), torch.nn.Parameter(torch.full((4,), 2.0))
    optimizer = stepped(kind, [p], fused=fused)
    torch.utils.swap_tensors(p, other)
    assert torch.equal(p, torch.full((4,), 2.0))
    p.grad = torch.ones(4)
    left_alone = other.detach().clone()
    optimizer.step()
    assert not torch.equal(p, torch.full((4,), 2.0))
    assert torch.equal(other, left_alone)


@BOTH
def test_modules_convert_by_swapping(kind):
    module = torch.nn.Linear(3, 2)
    optimizer = stepped(kind, list(module.parameters()))
    optimizer.zero_grad()
    torch.__future__.set_swap_module_params_on_conversion(True)
    try:
        module.double()
        module.load_state_dict({k: torch.ones_like(v) for k, v in module.state_dict().items()})
    finally:
        torch.__future__.set_swap_module_params_on_conversion(False)
    module(torch.ones(1, 3, dtype=torch.float64)).sum().backward()
    optimizer.step()
    assert module.weight.dtype == torch.float64
    assert not torch.equal(module.weight, torch.ones_like(module.weight))


@BOTH
@ANY_FORM
def test_a_cycle_through_a_parameter_and_its_optimizer_is_collected(kind, fused):
    p = parameter(4, grad=False)
    p.optimizer = stepped(kind, [p], fused=fused)
    gone = weakref.ref(p)
    del p
    gc.collect()
    assert gone() is None


@BOTH
@ANY_FORM
def test_replaced_and_cleared_states_are_freed_at_once(kind, fused):
    params = [parameter(4, grad=False), parameter(3, grad=False)]
    optimizer = stepped(kind, params, fused=fused)
    entry = optimizer.state[params[0]]
    gone = [weakref.ref(entry[MOMENT[kind]]), weakref.ref(params[1])]
    kept = weakref.ref(optimizer.state[params[1]][MOMENT[kind]])
    entry[MOMENT[kind]] = entry[MOMENT[kind]].clone()
    assert gone[0]() is None
    optimizer.state.clear()
    assert kept() is None
    optimizer.param_groups.clear()
    del params, entry
    gc.collect()
    assert gone[1]() is None


@BOTH
def test_another_kind_of_object_at_a_known_address(kind):
    class Subclass(torch.Tensor):
        pass

    p = parameter(4, grad=False)
    optimizer = stepped(kind, [p])
    optimizer.state[p][MOMENT[kind]].__class__ = Subclass
    before = p.detach().clone()
    optimizer.step()
    assert not torch.equal(p, before)
    assert not optimizer._plan.tables
    optimizer.param_groups[0]["fused"] = True
    with pytest.raises(RuntimeError, match=rf"expected state '{MOMENT[kind]}' as a torch.Tensor"):
        optimizer.step()


@BOTH
def test_states_in_another_mapping_take_the_plain_form(kind):
    """A table looks for tensors in dicts, before every step."""
    params = [parameter(4, grad=False), parameter(3, grad=False)]
    optimizer = stepped(kind, params)
    optimizer.state[params[0]] = collections.UserDict(optimizer.state[params[0]])
    before = [p.detach().clone() for p in params]
    optimizer.step()
    assert len(optimizer._plan.plain) == 1
    assert not any(torch.equal(p, was) for p, was in zip(params, before, strict=True))
    optimizer.state = collections.UserDict(optimizer.state)
    with pytest.raises(TypeError, match="dict"):
        optimizer.step()


@BOTH
def test_masters_are_made_when_parameters_become_low(kind):
    for fused in (None, True, False):
        module = torch.nn.Linear(3, 2)
        params = list(module.parameters())
        optimizer = stepped(kind, params, master_weights=True, fused=fused)
        assert "master" not in optimizer.state[module.weight]
        module.bfloat16()
        for p in params:
            p.grad = None
            p.grad = torch.ones_like(p)
        optimizer.step()
        for p in params:
            assert torch.equal(p, optimizer.state[p]["master"].bfloat16())


@BOTH
def test_stats_after_a_skipped_step_are_each_ones_own(kind):
    """The table has read the gradients of the skipped step, and no norms of it."""
    params = [torch.nn.Parameter(torch.full((4,), float(i + 1))) for i in range(2)]
    params.append(torch.nn.Parameter(torch.ones(4, dtype=torch.float64)))  # the plain form's
    optimizer = stepped(kind, params, capturable=True, max_grad_norm=None)
    params[0].grad = None
    optimizer.found_inf = torch.tensor(1.0)
    optimizer.step()
    norms = optimizer.stats().values[:, 0].tolist()
    assert norms[1] == pytest.approx(4.0)
    assert norms[0] == pytest.approx(2.0)


# ---------------------------------------------------------------------------------------- options


@BOTH
def test_excluded_parts_may_come_from_a_generator(kind):
    groups = [{"params": [(f"{i}.bias", parameter(3))]} for i in range(2)]
    optimizer = kind(groups, exclude=(part for part in ["bias"]))
    assert [group["exclude"] for group in optimizer.param_groups] == [[0], [0]]


@BOTH
@ANY_FORM
def test_excluded_positions_may_change_between_steps(kind, fused):
    optimizer = stepped(kind, [parameter(4, grad=False)], weight_decay=0.1, fused=fused)
    assert optimizer.stats().values[0, 3] != 1
    optimizer.param_groups[0]["exclude"].append(0)
    optimizer.step()
    assert optimizer.stats().values[0, 3] == 1
    optimizer.param_groups[0]["exclude"] = True
    with pytest.raises(TypeError, match="expected exclude of a group to be a list of positions"):
        optimizer.step()


@BOTH
@pytest.mark.parametrize("position", [99, 2, -1])
def test_excluded_positions_are_in_the_group(kind, position):
    with pytest.raises(ValueError, match=f"expects numbers from 0 to 1, got {position}"):
        kind([{"params": [parameter(2), parameter(2)], "exclude": [position]}])


@BOTH
def test_keywords_that_ask_for_nothing_else_are_taken(kind):
    """As callers give them to every optimizer of torch and timm."""
    optimizer = kind([parameter(3)], foreach=None, differentiable=False)
    kind([parameter(3)], foreach=False).step()
    assert not {"foreach", "differentiable"} & optimizer.param_groups[0].keys()
    for name in ("foreach", "differentiable"):
        with pytest.raises(RuntimeError, match=f"`{name}` is not supported"):
            kind([parameter(3)], **{name: True})


@pytest.mark.parametrize(
    ("kind", "options"),
    [
        *[
            (kind, {name: value})
            for kind in (LAMB, LARS)
            for name, value in [
                ("eps", None),
                ("eps", "1"),
                ("weight_decay", None),
                ("max_grad_norm", "1"),
                ("exclude", 3),
                ("exclude", [None]),
            ]
        ],
        (LAMB, {"betas": 0.9}),
        (LAMB, {"betas": "ab"}),
        (LAMB, {"betas": (0.9, None)}),
        (LAMB, {"ratio_clamp": 1.0}),
        (LAMB, {"ratio_clamp": ("0", "1")}),
        (LAMB, {"clip_eps": None}),
        (LARS, {"momentum": None}),
        (LARS, {"dampening": "0"}),
        (LARS, {"trust_coeff": None}),
    ],
    ids=str,
)
def test_options_of_another_kind(kind, options):
    (name,) = options
    with pytest.raises(TypeError, match=rf"{kind.__name__}: .*{name}"):
        kind([parameter(3)], **options)
