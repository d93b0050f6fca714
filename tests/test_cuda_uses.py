"""How norms are used on a GPU beyond a call: streams, graphs, threads, compilers, devices."""

from __future__ import annotations

import contextlib
import copy
from collections import namedtuple
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from torch import nn
from torch.utils.data import TensorDataset

import batchops
from batchops import functional as BF
from batchops import nn as bnn
from batchops.data import DataLoader
from batchops.optim import LARS

pytestmark = pytest.mark.cuda

NORMS = {
    "batch": lambda: bnn.BatchNorm2d(16, activation="relu"),
    "group": lambda: bnn.GroupNorm(4, 16, activation="silu"),
}
NORM = pytest.mark.parametrize("norm", NORMS)


def net(norm: str) -> nn.Sequential:
    torch.manual_seed(0)
    return nn.Sequential(
        nn.Conv2d(3, 16, 3, bias=False), NORMS[norm](), nn.Conv2d(16, 4, 3), nn.Flatten()
    ).cuda()


def image() -> torch.Tensor:
    return torch.randn(8, 3, 12, 12, device="cuda")


def gradients(model: nn.Module, x: torch.Tensor, context: Any = None) -> list[torch.Tensor]:
    with contextlib.nullcontext() if context is None else context():
        loss = model(x).square().mean()
    return list(torch.autograd.grad(loss, list(model.parameters())))


@pytest.fixture(autouse=True)
def _deterministic(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(torch.backends.cudnn, "deterministic", True)
    monkeypatch.setattr(torch.backends.cudnn, "allow_tf32", False)


@NORM
def test_recompute_in_the_backward_thread_of_the_device(norm: str) -> None:
    model, x = net(norm), image()
    expected = gradients(copy.deepcopy(model), x)
    got = gradients(model, x, batchops.recompute)
    assert all(torch.equal(a, b) for a, b in zip(got, expected, strict=True))


@NORM
def test_on_a_side_stream(norm: str) -> None:
    model, x = net(norm), image()
    expected = gradients(copy.deepcopy(model), x)
    side = torch.cuda.Stream()
    side.wait_stream(torch.cuda.current_stream())
    with torch.cuda.stream(side):
        torch.cuda._sleep(10_000_000)
        got = gradients(model, x)
    torch.cuda.current_stream().wait_stream(side)
    assert all(torch.equal(a, b) for a, b in zip(got, expected, strict=True))


@NORM
def test_graphed_callables(norm: str) -> None:
    model = net(norm).train()
    layer, features = model[1], torch.randn(8, 16, 10, 10, device="cuda", requires_grad=True)
    expected_layer = copy.deepcopy(layer)
    graphed = torch.cuda.make_graphed_callables(
        layer, (features.detach().clone().requires_grad_(),)
    )
    for p, q in zip(layer.buffers(), expected_layer.buffers(), strict=True):
        p.copy_(q)  # warm-up and capture have counted too
    for _ in range(2):
        y, want = graphed(features), expected_layer(features)
        assert torch.equal(y, want)
        (dx,) = torch.autograd.grad(y.square().sum(), features)
        (expected,) = torch.autograd.grad(want.square().sum(), features)
        assert torch.equal(dx, expected)
    for p, q in zip(layer.buffers(), expected_layer.buffers(), strict=True):
        assert torch.equal(p, q)


@pytest.mark.parametrize("mode", ["default", "reduce-overhead"])
@NORM
def test_compiled(norm: str, mode: str) -> None:
    model, x = net(norm), image()
    x = x.contiguous(memory_format=torch.channels_last)
    model = model.to(memory_format=torch.channels_last)
    expected = gradients(copy.deepcopy(model), x)
    torch.compiler.reset()
    compiled = torch.compile(model, mode=mode)
    for _ in range(3):
        torch.compiler.cudagraph_mark_step_begin()
        got = [g.clone() for g in gradients(compiled, x)]
    for a, b in zip(got, expected, strict=True):
        torch.testing.assert_close(a, b, rtol=1e-3, atol=1e-4)


@pytest.mark.parametrize("parameters", [torch.float32, torch.bfloat16, torch.float16])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("cast_output", [False, True])
def test_autocast_with_parameters_of_any_dtype(dtype, parameters, cast_output) -> None:
    x = torch.randn(4, 8, 5, 5, device="cuda", dtype=dtype)
    w, b = torch.rand(8, device="cuda").to(parameters), torch.rand(8, device="cuda").to(parameters)
    with torch.autocast("cuda", dtype=torch.bfloat16):
        stock = F.group_norm(x, 2, w, b)
        ours = BF.group_norm(x, 2, w, b, cast_output=cast_output)
        rows = BF.layer_norm(x.flatten(1), (200,), w.repeat(25), None, cast_output=cast_output)
    assert stock.dtype == torch.float32
    assert ours.dtype == rows.dtype == (torch.float32 if cast_output else dtype)
    torch.testing.assert_close(ours.float(), stock, rtol=2**-7, atol=2**-7)


def test_a_scaled_step() -> None:
    model, x = net("batch"), image()
    optimizer, scaler = LARS(model.parameters(), lr=0.1), torch.amp.GradScaler("cuda")
    before = [p.detach().clone() for p in model.parameters()]
    for k in range(3):
        optimizer.zero_grad()
        with torch.autocast("cuda", dtype=torch.float16):
            loss = model(x).float().square().mean()
        scaler.scale(loss * (float("inf") if k == 0 else 1.0)).backward()
        scaler.step(optimizer)
        scaler.update()
        changed = [
            not torch.equal(p, was) for p, was in zip(model.parameters(), before, strict=True)
        ]
        assert any(changed) is (k > 0), "an infinite gradient changes nothing"


@NORM
def test_double_backward(norm: str) -> None:
    layer = NORMS[norm]()
    x = torch.randn(4, 16, 5, 5, device="cuda", requires_grad=True)
    grads = []
    for device in ("cuda", "cpu"):
        here = copy.deepcopy(layer).to(device)
        leaf = x.detach().to(device).requires_grad_()
        (dx,) = torch.autograd.grad(here(leaf).square().sum(), leaf, create_graph=True)
        (ddx,) = torch.autograd.grad(dx.square().sum(), leaf)
        grads.append(ddx.cpu())
    torch.testing.assert_close(*grads, rtol=1e-3, atol=1e-3)


@pytest.mark.skipif(torch.cuda.device_count() < 2, reason="needs two GPUs")
@NORM
def test_another_device_than_the_current_one(norm: str) -> None:
    layer, x = NORMS[norm](), torch.randn(4, 16, 5, 5)
    there = copy.deepcopy(layer).to("cuda:1")
    y = there(x.to("cuda:1"))
    assert torch.cuda.current_device() == 0
    torch.testing.assert_close(y.cpu(), layer(x), rtol=1e-4, atol=1e-4)
    with pytest.raises(RuntimeError):
        there(x.to("cuda:0"))


Pair = namedtuple("Pair", ["x", "rest"])


def as_pair(samples: list[tuple[torch.Tensor, torch.Tensor]]) -> Pair:
    x = torch.stack([s[0] for s in samples])
    return Pair(x, {"y": torch.stack([s[1] for s in samples]), "n": len(samples)})


@pytest.mark.parametrize("arguments", [{}, {"num_workers": 2}, {"threads": 2}], ids=str)
def test_nested_batches_on_the_device(arguments: dict[str, Any]) -> None:
    source = TensorDataset(torch.randn(64, 40_000), torch.arange(64))
    loader = DataLoader(source, 16, collate_fn=as_pair, device="cuda", **arguments)
    seen = []
    for batch in loader:
        torch.cuda._sleep(2_000_000)
        assert type(batch) is Pair
        assert batch.x.is_cuda
        assert batch.rest["y"].is_cuda
        assert batch.rest["n"] == 16
        seen.append((batch.x.sum(1, dtype=torch.float64), batch.rest["y"]))
    sums, labels = (torch.cat(parts).cpu() for parts in zip(*seen, strict=True))
    assert torch.equal(labels, torch.arange(64))
    torch.testing.assert_close(sums, source.tensors[0].sum(1, dtype=torch.float64))
