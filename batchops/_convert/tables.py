"""What convert() knows by type: norms, activations, and norms that bring their activation along."""

from __future__ import annotations

from collections.abc import Callable

from torch import nn

from .. import nn as bnn

__all__ = [
    "ACTIVATIONS",
    "NORMS",
    "STOCK",
    "Activation",
    "fused_norm",
    "fused_norm_act",
    "is_plain",
    "is_transparent",
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
    if is_transparent(module.act):
        return NORMS[stock], None
    of = ACTIVATIONS.get(type(module.act))
    activation = of(module.act) if of and is_plain(module.act) else None
    return None if activation is None else (NORMS[stock], activation)
