"""What other projects offer for the same work: a callable, or the reason why it is left out."""

from __future__ import annotations

import importlib
import importlib.util
import sys
import types
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
from common import optional, reason

# What a project's kernels need, where they import without it.
_CUDA_ALONE = "runs on CUDA alone"

Norm = Callable[..., torch.Tensor]
Make = Callable[[Any], Any]


def _on_cuda(module: str, device: torch.device) -> Any | str:
    found = optional(module)
    return found if isinstance(found, str) or device.type == "cuda" else _CUDA_ALONE


# --- optimizers ----------------------------------------------------------------------------------


def timm_optimizer(name: str) -> Any | str:
    """timm's Lamb or Lars, also where timm itself cannot be imported for want of torchvision."""
    module = f"timm.optim.{name.lower()}"
    try:
        return getattr(importlib.import_module(module), name)
    except ImportError as error:
        missing = f"timm cannot be imported: {error}"
    for loaded in [loaded for loaded in sys.modules if loaded.split(".")[0] == "timm"]:
        del sys.modules[loaded]
    spec = importlib.util.find_spec("timm")
    if spec is None or not spec.submodule_search_locations:
        return missing
    root = Path(spec.submodule_search_locations[0])
    for package, folder in (("timm", root), ("timm.optim", root / "optim")):
        sys.modules[package] = types.ModuleType(package)
        sys.modules[package].__path__ = [str(folder)]
    return getattr(importlib.import_module(module), name)


def made(optimizer: Any | str, **options: Any) -> Make | str:
    """What makes one over parameters; a reason stays a reason."""
    return optimizer if isinstance(optimizer, str) else lambda params: optimizer(params, **options)


def compiled(make: Make | str) -> Make | str:
    """With its whole step compiled."""
    if isinstance(make, str):
        return make

    def make_compiled(params: Any) -> Any:
        torch.compiler.reset()
        return types.SimpleNamespace(step=torch.compile(make(params).step))

    return make_compiled


def other_lambs(device: torch.device, clip: float | None) -> dict[str, Make | str]:
    """Variants that compute another update: torch-optimizer's has no bias correction and clamps the
    norm of p, bitsandbytes' is its own."""
    plain = optional("torch_optimizer")
    bits = _on_cuda("bitsandbytes.optim", device)
    return {
        "torch-optimizer": made(plain if isinstance(plain, str) else plain.Lamb, lr=1e-3)
        if clip is None
        else "has no clip",
        "bitsandbytes": made(bits if isinstance(bits, str) else bits.LAMB, lr=1e-3)
        if clip is None
        else "has no clip",
    }


def apex_lamb(device: torch.device, clip: float | None) -> Make | str:
    apex = _on_cuda("apex.optimizers", device)
    if isinstance(apex, str):
        return apex
    # 0 turns its clip off
    return made(apex.FusedLAMB, lr=1e-3, max_grad_norm=clip or 0.0)


def prepared(side: Callable[[Norm], Any], norm: Norm | str) -> Any | str:
    """side(norm), or why it cannot be made: a backward's side runs the forward."""
    if isinstance(norm, str):
        return norm
    try:
        return side(norm)
    except Exception as error:  # whatever a peer that cannot do it raises
        return reason(error)


# --- norms ---------------------------------------------------------------------------------------


def layer_norms(device: torch.device, eps: float) -> dict[str, Norm | str]:
    """Called as (x, groups, weight, bias), over the last dimension."""
    apex = _on_cuda("apex.normalization.fused_layer_norm", device)
    liger = _on_cuda("liger_kernel.transformers.functional", device)
    norms: dict[str, Norm | str] = {"Apex": apex, "Liger": liger}
    if not isinstance(apex, str):
        norms["Apex"] = lambda x, _, weight, bias: apex.fused_layer_norm_affine(
            x, weight, bias, x.shape[1:], eps
        )
    if not isinstance(liger, str):
        norms["Liger"] = lambda x, _, weight, bias: liger.liger_layer_norm(x, weight, bias, eps)
    return norms


def group_norms(device: torch.device, eps: float, silu: bool) -> dict[str, Norm | str]:
    """Called as (x, groups, weight, bias); Apex' takes channels_last alone."""
    apex = _on_cuda("apex.contrib.group_norm", device)
    if isinstance(apex, str):
        return {"Apex": apex}
    modules: dict[int, Any] = {}

    def norm(x: torch.Tensor, groups: int, weight: Any, bias: Any) -> torch.Tensor:
        if id(weight) not in modules:
            module = apex.GroupNorm(groups, x.shape[1], eps, act="silu" if silu else "")
            module.weight, module.bias = weight, bias
            modules[id(weight)] = module
        return modules[id(weight)](x)

    return {"Apex": norm}
