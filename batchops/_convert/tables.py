"""What convert() knows by type: norms, activations, and norms that bring their activation along."""

from __future__ import annotations

from collections.abc import Callable

from torch import nn

from .. import nn as bnn

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

_GELU = {"none": "gelu", "tanh": "gelu_tanh"}
_ACTIVATIONS: dict[type[nn.Module], Callable[[nn.Module], Activation]] = {
    nn.ReLU: lambda module: "relu",
    nn.LeakyReLU: lambda module: ("leaky_relu", float(module.negative_slope)),
    nn.SiLU: lambda module: "silu",
    nn.GELU: lambda module: _GELU[module.approximate],
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


class FusedActivation(nn.Identity):
    """Stands where an activation module was whose work the norms before it now do."""

    def __init__(self, original: nn.Module, norms: int) -> None:
        super().__init__()
        self.training = original.training
        # in __dict__, so that it does not become a submodule
        self.__dict__["original"] = original
        self.__dict__["norms"] = norms  # how many norms do its work

    def extra_repr(self) -> str:
        return f"{self.original}"


def activation_of(module: nn.Module | None) -> Activation | None:
    """What a norm would be told to do in the place of ``module``; None for any other module."""
    of = _ACTIVATIONS.get(type(module))
    if of is None:
        return None
    activation = of(module)
    return activation if _has_kernel(activation) else None


def _has_kernel(activation: Activation) -> bool:
    try:
        bnn.BatchNorm1d(1, activation=activation)
    except (TypeError, ValueError, RuntimeError):
        return False
    return True


def fused_norm(module: nn.Module) -> type[nn.Module] | None:
    """The class by which a stock norm becomes ours: torch's, or one of timm's that is no more."""
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


def is_norm(module: nn.Module) -> bool:
    """A stock norm to swap, or a fused one that has no activation yet."""
    fused_without = type(module) in STOCK and module.activation is None
    return fused_norm(module) is not None or fused_without


def has_hooks(module: nn.Module) -> bool:
    names = ("_forward_hooks", "_forward_pre_hooks", "_backward_hooks", "_backward_pre_hooks")
    return any(getattr(module, name, None) for name in names)


def is_plain(module: nn.Module) -> bool:
    """No hooks, and the forward of its class."""
    return not has_hooks(module) and "forward" not in module.__dict__


def is_transparent(module: nn.Module) -> bool:
    """Returns its input in training and in eval: an Identity, or a Sequential of nothing else."""
    if not is_plain(module):
        return False
    if type(module) is nn.Sequential:
        return all(map(is_transparent, module))
    return type(module) is nn.Identity


def stock_of_norm_act(module: nn.Module) -> type[nn.Module] | None:
    """torch's norm inside one of timm's norms with an activation."""
    return _stock_of_timm(type(module), _TIMM_NORM_ACT, _NORM_ACTS)


def fused_norm_act(module: nn.Module) -> tuple[type[nn.Module], Activation | None] | None:
    """The class and the activation by which a norm of timm's becomes ours, where it can."""
    stock = stock_of_norm_act(module)
    if stock is None or not _computes_as_stock(module) or set(module._modules) != {"drop", "act"}:
        return None
    if not is_transparent(module.drop):
        return None
    if is_transparent(module.act):
        return NORMS[stock], None
    activation = activation_of(module.act)
    if activation is None or not is_plain(module.act):
        return None
    return NORMS[stock], activation


__all__ = [
    "NORMS",
    "STOCK",
    "Activation",
    "FusedActivation",
    "activation_of",
    "fused_norm",
    "fused_norm_act",
    "has_hooks",
    "is_norm",
    "is_plain",
    "is_transparent",
    "stock_of_norm_act",
]
