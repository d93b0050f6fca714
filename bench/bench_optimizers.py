"""A whole LAMB or LARS step from Python: against timm's, the plain path, and fused AdamW or SGD.

AdamW and SGD compute other updates; they are here as what an optimizer over the same state costs at
best. Bytes that must move, for each float32 element: p, g, m, v read and p, m, v written are 28,
without v 20, and with a clip the gradients are read once more.
"""

from __future__ import annotations

from collections.abc import Callable, Collection
from typing import Any

import pytest
import torch
from peers import apex_lamb, compiled, made, other_lambs, timm_optimizer

from batchops.optim import LAMB, LARS

Shape = tuple[int, ...]


def resnet50() -> list[Shape]:
    """161 tensors, 25.6 million elements: convolutions, batch norms and the classifier."""
    shapes: list[Shape] = [(64, 3, 7, 7), (64,), (64,)]
    channels = 64
    for blocks, width in ((3, 64), (4, 128), (6, 256), (3, 512)):
        for block in range(blocks):
            out = 4 * width
            convolutions = [(width, channels, 1, 1), (width, width, 3, 3), (out, width, 1, 1)]
            if block == 0:
                convolutions.append((out, channels, 1, 1))
            for shape in convolutions:
                shapes += [shape, (shape[0],), (shape[0],)]
            channels = out
    return [*shapes, (1000, channels), (1000,)]


def bert(layers: int = 4, hidden: int = 1024, vocabulary: int = 30522) -> list[Shape]:
    """BERT-like: a few tensors, each larger than a core's caches."""
    layer = [(3 * hidden, hidden), (3 * hidden,), (hidden, hidden), (hidden,)]
    layer += [(4 * hidden, hidden), (4 * hidden,), (hidden, 4 * hidden)] + [(hidden,)] * 5
    return [(vocabulary, hidden), (512, hidden), *layer * layers]


MODELS: dict[str, Callable[[], list[Shape]]] = {
    "resnet50": resnet50,
    "bert, 4 layers": bert,
    "2000 tensors of 256": lambda: [(256,)] * 2000,  # nothing but the cost of handling tensors
    "bert, 24 layers": lambda: bert(24),  # 333 million elements
}
MARKS = {
    "resnet50": [pytest.mark.quick],
    "bert, 24 layers": [pytest.mark.on_cuda, pytest.mark.quick],
}


def parameters(
    shapes: list[Shape], device: torch.device, dtype: torch.dtype = torch.float32
) -> list[torch.nn.Parameter]:
    generator = torch.Generator(device).manual_seed(0)
    params = []
    for shape in shapes:
        p = torch.randn(shape, generator=generator, device=device) * 0.05
        params.append(torch.nn.Parameter(p.to(dtype)))
        grad = torch.randn(shape, generator=generator, device=device) * 0.01
        params[-1].grad = grad.to(dtype)
    return params


Update = Callable[[torch.Tensor, torch.Tensor], torch.Tensor]


def lamb_update(p: torch.Tensor, g: torch.Tensor) -> torch.Tensor:
    """p after a first step with the default options."""
    u = g / (g.abs() + 1e-6) + 0.01 * p  # m / bc1 = g and v / bc2 = g² in the first step
    return p - 1e-3 * p.norm() / u.norm() * u


LARS_OPTIONS = {"lr": 0.1, "momentum": 0.9, "weight_decay": 1e-4}


def lars_update(p: torch.Tensor, g: torch.Tensor) -> torch.Tensor:
    """p after a first step with LARS_OPTIONS, in which m is what is added to it."""
    rate = 1e-3 * p.norm() / (g.norm() + 1e-4 * p.norm() + 1e-8)
    return p - 0.1 * rate * (g + 1e-4 * p)


def after_a_step(
    params: list[torch.nn.Parameter], index: int, clip: float | None, update: Update
) -> torch.Tensor:
    """Parameter `index` after a first step, in float64."""
    grads = [p.grad.double() for p in params]
    total = sum(float(g.square().sum()) for g in grads) ** 0.5
    g = grads[index] / (max(1.0, total / clip) if clip else 1.0)
    return update(params[index].detach().double(), g)


Make = Callable[[list[torch.nn.Parameter]], Any]


def compare(
    pair: Any,
    device: torch.device,
    model: str,
    makes: dict[str, Make | str],
    others: Collection[str],
    expected: dict[int, torch.Tensor],
    **row: Any,
) -> None:
    """Times makes["batchops"] against the rest, each on parameters of its own. `others` are the
    peers that compute another update."""
    shapes = MODELS[model]()
    elements = sum(torch.Size(shape).numel() for shape in shapes)
    apart = []

    def stepper(name: str) -> Callable[[], Any] | str:
        make = makes[name]
        if isinstance(make, str):
            return make  # why it is missing
        params = parameters(shapes, device)
        optimizer = make(params)
        if name in others:
            apart.append(params)

        def call() -> list[torch.nn.Parameter]:
            optimizer.step()
            return params

        return call

    def is_right(params: list[torch.nn.Parameter], _: int) -> None:
        for i, want in expected.items():
            error = float((params[i].double() - want).abs().max() / want.abs().max())
            assert error < 1e-6, f"parameter {i}: relative error {error:.1e}"

    def is_right_or_other(params: list[torch.nn.Parameter], index: int) -> None:
        if not any(params is other for other in apart):
            is_right(params, index)

    pair(
        stepper("batchops"),
        {name: stepper(name) for name in makes if name != "batchops"},
        check=is_right,
        peer_check=is_right_or_other,
        bytes_moved=elements * row.pop("bytes_an_element"),
        items=elements,
        calls=1,
        cached=16 * elements < 32 << 20,
        **row,
    )


def watched_after_a_step(
    model: str, device: torch.device, clip: float | None, update: Update
) -> dict[int, torch.Tensor]:
    params = parameters(MODELS[model](), device)
    watched = range(0, len(params), max(1, len(params) // 8))
    return {i: after_a_step(params, i, clip, update) for i in watched}


def plain(optimizer: Any, model: str, **options: Any) -> Any:
    """Our own form for every device, a call an operation: seconds a step of the largest models."""
    if model.startswith("bert"):
        return "a step takes seconds: see the smaller models"
    return made(optimizer, **options, fused=False)


MODEL = pytest.mark.parametrize(
    "model", [pytest.param(name, marks=MARKS.get(name, [])) for name in MODELS]
)


@pytest.mark.parametrize("clip", [None, 1.0], ids=["no clip", "clip 1.0"])
@MODEL
def test_lamb(request, pair, device, threads, model, clip):
    timm = made(timm_optimizer("Lamb"), max_grad_norm=clip)
    others = {
        "fused AdamW": made(torch.optim.AdamW, lr=1e-3, fused=True),
        **other_lambs(device, clip),
    }
    makes = {
        "batchops": made(LAMB, max_grad_norm=clip, fused=True),
        "timm": timm,
        "plain": plain(LAMB, model, max_grad_norm=clip),
        "Apex": apex_lamb(device, clip),
        **others,
    }
    if request.config.getoption("--compile"):
        makes["timm compiled"] = compiled(timm)
    compare(
        pair,
        device,
        model,
        makes,
        others,
        watched_after_a_step(model, device, clip, lamb_update),
        bytes_an_element=32 if clip else 28,
        op="LAMB step",
        case={"model": model, "clip": "none" if clip is None else str(clip)},
    )


@MODEL
def test_lars(request, pair, device, threads, model):
    timm = made(timm_optimizer("Lars"), **LARS_OPTIONS)
    makes = {
        "batchops": made(LARS, **LARS_OPTIONS, fused=True),
        "timm": timm,
        "plain": plain(LARS, model, **LARS_OPTIONS),
        "fused SGD": made(torch.optim.SGD, **LARS_OPTIONS, fused=True),
    }
    if request.config.getoption("--compile"):
        makes["timm compiled"] = compiled(timm)
    compare(
        pair,
        device,
        model,
        makes,
        ["fused SGD"],
        watched_after_a_step(model, device, None, lars_update),
        bytes_an_element=20,
        op="LARS step",
        case={"model": model},
    )


@pytest.mark.quick
@pytest.mark.on_cuda
@pytest.mark.parametrize("clip", [None, 1.0], ids=["no clip", "clip 1.0"])
@pytest.mark.parametrize("model", ["resnet50", "bert, 24 layers"])
def test_lamb_with_masters(pair, device, threads, model, clip):
    """bf16 parameters and gradients with float32 masters: p, g, m, v and the master are read, all
    but g written, 30 bytes an element. AdamW has float32 parameters and no masters."""
    shapes = MODELS[model]()
    elements = sum(torch.Size(shape).numel() for shape in shapes)
    params = parameters(shapes, device, torch.bfloat16)
    watched = range(0, len(params), max(1, len(params) // 8))
    expected = {i: after_a_step(params, i, clip, lamb_update) for i in watched}
    others = parameters(shapes, device)
    ours = LAMB(params, max_grad_norm=clip, master_weights=True, fused=True)
    adam = torch.optim.AdamW(others, lr=1e-3, fused=True)

    def check(output: object, _: int) -> None:
        if output is not None:
            for i, want in expected.items():
                error = (params[i].double() - want).abs().max() / want.abs().max()
                assert error < 2**-8, f"parameter {i}: relative error {float(error):.1e}"

    pair(
        lambda: (ours.step(), params),
        {"fused AdamW, float32": adam.step},
        check=check,
        bytes_moved=elements * (32 if clip else 30),
        items=elements,
        calls=1,
        op="LAMB step, bf16 with masters",
        case={"model": model, "clip": "none" if clip is None else str(clip)},
    )
