"""A whole LAMB step from Python against timm's Lamb, the plain path and torch's fused AdamW.

AdamW computes another update; it is here as what an optimizer over the same state costs at best.
Bytes that must move, for each float32 element: p, g, m, v read and p, m, v written are 28, and with
a clip the gradients are read once more.
"""

from __future__ import annotations

import importlib
import importlib.util
import sys
import types
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch

from batchops.optim import LAMB

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
}


def timm_lamb() -> Any:
    """timm's Lamb, also where timm itself cannot be imported for want of torchvision."""
    try:
        return importlib.import_module("timm.optim.lamb").Lamb
    except ImportError as error:
        reason = f"timm cannot be imported: {error}"
    for name in [name for name in sys.modules if name.split(".")[0] == "timm"]:
        del sys.modules[name]
    spec = importlib.util.find_spec("timm")
    if spec is None or not spec.submodule_search_locations:
        return reason
    root = Path(spec.submodule_search_locations[0])
    for name, folder in (("timm", root), ("timm.optim", root / "optim")):
        sys.modules[name] = types.ModuleType(name)
        sys.modules[name].__path__ = [str(folder)]
    return importlib.import_module("timm.optim.lamb").Lamb


def parameters(shapes: list[Shape], device: torch.device) -> list[torch.nn.Parameter]:
    generator = torch.Generator(device).manual_seed(0)
    params = []
    for shape in shapes:
        p = torch.randn(shape, generator=generator, device=device) * 0.05
        params.append(torch.nn.Parameter(p))
        params[-1].grad = torch.randn(shape, generator=generator, device=device) * 0.01
    return params


def first_update(params: list[torch.nn.Parameter], index: int, clip: float | None) -> torch.Tensor:
    """Parameter `index` after a first step with the default options, in float64."""
    grads = [p.grad.double() for p in params]
    total = sum(float(g.square().sum()) for g in grads) ** 0.5
    g = grads[index] / (max(1.0, total / clip) if clip else 1.0)
    p = params[index].detach().double()
    u = g / (g.abs() + 1e-6) + 0.01 * p  # m / bc1 = g and v / bc2 = g² in the first step
    return p - 1e-3 * p.norm() / u.norm() * u


@pytest.mark.parametrize("clip", [None, 1.0], ids=["no clip", "clip 1.0"])
@pytest.mark.parametrize(
    "model",
    [
        pytest.param(name, marks=pytest.mark.quick) if name == "resnet50" else name
        for name in MODELS
    ],
)
def test_lamb(pair, device, threads, model, clip):
    shapes = MODELS[model]()
    watched = range(0, len(shapes), max(1, len(shapes) // 8))
    start = parameters(shapes, device)
    elements = sum(p.numel() for p in start)
    expected = {i: first_update(start, i, clip) for i in watched}
    del start
    Lamb = timm_lamb()

    def stepper(make: Callable[[list[torch.nn.Parameter]], Any]) -> Callable[[], Any]:
        params = parameters(shapes, device)
        optimizer = make(params)

        def call() -> list[torch.nn.Parameter]:
            optimizer.step()
            return params

        return call

    def is_lamb(params: list[torch.nn.Parameter], _: int) -> None:
        for i, want in expected.items():
            error = float((params[i].double() - want).abs().max() / want.abs().max())
            assert error < 1e-6, f"parameter {i}: relative error {error:.1e}"

    def is_lamb_or_adamw(params: list[torch.nn.Parameter], index: int) -> None:
        if params is not adamw_params:
            is_lamb(params, index)

    adamw_params = parameters(shapes, device)
    adamw = torch.optim.AdamW(adamw_params, lr=1e-3, fused=True)

    def adamw_step() -> list[torch.nn.Parameter]:
        adamw.step()
        return adamw_params

    timm = Lamb if isinstance(Lamb, str) else stepper(lambda p: Lamb(p, max_grad_norm=clip))
    pair(
        stepper(lambda p: LAMB(p, max_grad_norm=clip, fused=True)),
        {
            "timm": timm,
            "plain": stepper(lambda p: LAMB(p, max_grad_norm=clip, fused=False)),
            "fused AdamW": adamw_step,
        },
        check=is_lamb,
        peer_check=is_lamb_or_adamw,
        bytes_moved=elements * (32 if clip else 28),
        items=elements,
        calls=1,
        cached=16 * elements < 32 << 20,
        op="LAMB step",
        case={"model": model, "clip": "none" if clip is None else str(clip)},
    )
