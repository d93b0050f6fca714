"""What convert() knows by type: norms, activations, and norms that bring their activation along."""

from __future__ import annotations

import functools
import types
from collections.abc import Callable
from typing import Any

import torch
import torch.nn.functional as F
from torch import nn

from .. import nn as bnn

__all__ = [
    "ACTIVATIONS",
    "FUNCTIONS",
    "METHODS",
    "NORMS",
    "STOCK",
    "Activation",
    "follows_sums",
    "fused_norm",
    "fused_norm_act",
    "is_plain",
    "is_transparent",
    "of_function",
    "of_module",
]

# A name, or a name and its parameter, as the norms take it.
Activation = str | tuple[str, float]

# Exact types only: a subclass may have a forward of its own.
NORMS: dict[type[nn.Module], type[nn.Module]] = {
    getattr(nn, name): getattr(bnn, name)
    for name in (
        "BatchNorm1d",
        "BatchNorm2d",
        "BatchNorm3d",
        "GroupNorm",
        "LayerNorm",
        "InstanceNorm1d",
        "InstanceNorm2d",
        "InstanceNorm3d",
    )
    if name in bnn.__all__
}
STOCK = {fused: stock for stock, fused in NORMS.items()}

# What our classes read that torch's do not know: a module that has one of these has it from
# somebody else, who means something else by it.
_OURS = ("activation", "ghost_batch_size", "fused_with")

_GELU = {"none": "gelu", "tanh": "gelu_tanh"}


def _leaky(module: nn.Module) -> Activation | None:
    slope = module.negative_slope
    if module.inplace and slope < 0:  # torch's backward raises
        return None
    # a tensor would lose its gradient
    return ("leaky_relu", float(slope)) if isinstance(slope, int | float) else None


# What a norm is told to do in the place of each; None where a module's settings are not known.
ACTIVATIONS: dict[type[nn.Module], Callable[[nn.Module], Activation | None]] = {
    nn.ReLU: lambda module: "relu",
    nn.LeakyReLU: _leaky,
    nn.SiLU: lambda module: "silu",
    nn.GELU: lambda module: _GELU.get(module.approximate),
    nn.Hardswish: lambda module: "hardswish",
}


def _function_of_relu(inplace: bool = False) -> Activation:
    return "relu"


def _function_of_silu(inplace: bool = False) -> Activation:
    return "silu"


def _function_of_hardswish(inplace: bool = False) -> Activation:
    return "hardswish"


def _function_of_leaky(negative_slope: float = 0.01, inplace: bool = False) -> Activation | None:
    if type(negative_slope) not in (int, float):
        return None
    # torch's backward raises for a negative slope where the forward was in place
    return None if inplace and negative_slope < 0 else ("leaky_relu", float(negative_slope))


def _operator_of_relu() -> Activation:
    return "relu"


def _operator_of_leaky(negative_slope: float = 0.01) -> Activation | None:
    return _function_of_leaky(negative_slope, True)


def _operator_of_gelu(*, approximate: str = "none") -> Activation | None:
    return _GELU.get(approximate)


def _torchs_own(
    known: dict[Callable[..., Any], Callable[..., Activation | None]],
) -> dict[Callable[..., Any], Callable[..., Activation | None]]:
    """Without those that somebody has replaced before batchops was imported."""

    def is_own(function: Callable[..., Any]) -> bool:
        if isinstance(function, types.FunctionType):
            return function.__globals__ is vars(F)
        return type(function) is types.BuiltinFunctionType

    return {function: of for function, of in known.items() if is_own(function)}


# The same for torch's functions, of the arguments behind the first: with the signatures of theirs.
FUNCTIONS = _torchs_own(
    {
        F.relu: _function_of_relu,
        torch.relu: _operator_of_relu,
        torch.relu_: _operator_of_relu,  # F.relu_ is the same object
        F.silu: _function_of_silu,
        F.gelu: _operator_of_gelu,
        F.leaky_relu: _function_of_leaky,
        F.leaky_relu_: _operator_of_leaky,
        F.hardswish: _function_of_hardswish,
    }
)
_FUNCTION_TYPES = (types.FunctionType, types.BuiltinFunctionType)

# Methods of tensors by name: what they are in torch, and what they do.
METHODS = {
    name: (getattr(torch.Tensor, name), "relu")
    for name in ("relu", "relu_")
    if type(getattr(torch.Tensor, name)) is types.MethodDescriptorType
}


def of_module(module: nn.Module) -> Activation | None:
    """What a norm is told to do in the place of ``module``."""
    of = ACTIVATIONS.get(type(module))
    return None if of is None else of(module)


def follows_sums(activation: Activation | None) -> bool:
    """Whether a norm may do it after a sum as torch does. For the smooth ones it keeps the shortcut
    for the backward, which torch's sum does not, so that it may be changed in place later."""
    return activation == "relu" or isinstance(activation, tuple)


def of_function(
    function: Any, args: tuple[Any, ...] = (), kwargs: dict[str, Any] | None = None
) -> Activation | None:
    """What a norm is told to do in the place of ``function(y, *args, **kwargs)``."""
    if type(function) not in _FUNCTION_TYPES:  # others may compare and hash as they like
        return None
    of = FUNCTIONS.get(function)
    if of is None:
        return None
    if not args and not kwargs:
        return of()
    try:
        return of(*args, **(kwargs or {}))
    except TypeError:  # torch's function raises it too
        return None


# Norms of timm that end in modules `drop` and `act`: the name in torch's own class of theirs.
_NORM_ACTS = {
    "BatchNormAct2d": nn.BatchNorm2d,
    "GroupNormAct": nn.GroupNorm,
    "GroupNorm1Act": nn.GroupNorm,
    "LayerNormAct": nn.LayerNorm,
}
_TIMM_NORM_ACT = ("timm.layers.norm_act", "timm.models.layers.norm_act")

# Norms of timm that do what torch's do, with other arguments when they are made.
_TIMM_NORM = ("timm.layers.norm", "timm.models.layers.norm")
_RENAMED = {"GroupNorm": nn.GroupNorm, "GroupNorm1": nn.GroupNorm, "LayerNorm": nn.LayerNorm}


def fused_norm(module: nn.Module) -> type[nn.Module] | None:
    """The class by which a stock norm becomes ours: torch's, or one of timm's that is no more."""
    if _has_ours(module):
        return None
    kind = type(module)
    stock = _stock_of_timm(kind, _TIMM_NORM, _RENAMED)
    if stock is None:
        return NORMS.get(kind)
    return NORMS[stock] if _computes_as_stock(module) else None


def _stock_of_timm(
    kind: type[nn.Module], places: tuple[str, ...], names: dict[str, type[nn.Module]]
) -> type[nn.Module] | None:
    """torch's norm that a class of timm's is one of, by the class's exact place."""
    stock = names.get(kind.__qualname__) if kind.__module__ in places else None
    return stock if stock in NORMS and kind.__mro__[1:2] == (stock,) else None


def _computes_as_stock(module: nn.Module) -> bool:
    """Whether a norm of timm's has the forward of its class, and torch's rule on dtypes."""
    return "forward" not in module.__dict__ and not getattr(module, "_fast_norm", False)


def _has_ours(module: nn.Module) -> bool:
    own = (module.__dict__, module._modules, module._parameters, module._buffers)
    return any(name in names for names in own for name in _OURS)


def is_plain(module: nn.Module) -> bool:
    """No hooks, and the forward of its class."""
    return not (
        module._forward_hooks
        or module._forward_pre_hooks
        or module._backward_hooks
        or module._backward_pre_hooks
        or "forward" in module.__dict__
    )


def is_transparent(module: nn.Module) -> bool:
    """Returns its input in training and in eval: an Identity, or a Sequential of nothing else."""
    if not is_plain(module):
        return False
    if type(module) is nn.Sequential:
        return all(map(is_transparent, module))
    return type(module) is nn.Identity


def fused_norm_act(module: nn.Module) -> tuple[type[nn.Module], Activation | None] | None:
    """The class and the activation by which a norm of timm's becomes ours, where it can."""
    stock = _stock_of_timm(type(module), _TIMM_NORM_ACT, _NORM_ACTS)
    if stock is None or _has_ours(module) or not _computes_as_stock(module):
        return None
    if set(module._modules) != {"drop", "act"}:
        return None
    if not is_transparent(module.drop):
        return None
    kind = _of_both(NORMS[stock], type(module))
    if is_transparent(module.act):
        return kind, None
    of = ACTIVATIONS.get(type(module.act))
    activation = of(module.act) if of and is_plain(module.act) else None
    return None if activation is None else (kind, activation)


@functools.cache
def _of_both(fused: type[nn.Module], own: type[nn.Module]) -> type[nn.Module]:
    """The fused norm's class, which is one of timm's as well: what freezes a model, say, asks for
    the class, and knows by it that there is an activation."""

    def reduce(module: nn.Module, protocol: Any) -> tuple[Any, ...]:
        return _new_of_both, (fused, own), module.__dict__.copy()

    made = type(own.__name__, (fused, own), {"__reduce_ex__": reduce, "__doc__": fused.__doc__})
    STOCK[made] = STOCK[fused]
    return made


def _new_of_both(fused: type[nn.Module], own: type[nn.Module]) -> nn.Module:
    made: nn.Module = object.__new__(_of_both(fused, own))
    return made
