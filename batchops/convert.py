"""Swaps a model's stock norms for fused ones, in place, and back."""

from __future__ import annotations

from typing import TypeVar

from torch import nn
from torch.nn.utils import parametrize

from ._convert.chains import has_global_hooks
from ._convert.plan import fuse as _fuse
from ._convert.plan import unfuse
from ._convert.tables import NORMS, STOCK, fused_norm, fused_norm_act

__all__ = ["convert", "revert"]

_Model = TypeVar("_Model", bound=nn.Module)

_FROM = "_converted_from"  # on norms that were not torch's own: the class to go back to


def convert(model: _Model, *, fuse: bool = True) -> _Model:
    """Swaps torch's norms for the fused modules, in place, and returns ``model``.

    Only a norm's class changes: parameters, buffers, hooks, dtype, device, training flag and
    state_dict keys are the very same objects and names. Subclasses of torch's norms are left alone,
    but for timm's ``GroupNorm``, ``GroupNorm1`` and ``LayerNorm`` (unless their fast norm is on),
    which do what torch's do. So is a norm on which somebody has set an attribute ``activation``,
    ``ghost_batch_size`` or ``fused_with``, which mean something else here.

    With ``fuse``, the places where a method calls an activation (a module, ReLU and the others that
    the norms know, or torch's function or method for it) on a norm's output make one call of both:
    ``self.act(self.norm(x))``, ``F.relu(self.norm(x), inplace=True)``, ``self.norm(x).relu()``,
    ``x = self.norm(x)`` with ``x = self.act(x)`` behind it, and neighbours in an ``nn.Sequential``,
    with nothing but ``nn.Identity`` between them. For that such a module gets, on the instance, the
    method over again with that call in it; it keeps its class, and nothing that the method does
    otherwise changes. The norms and activations themselves stay what they are: whatever else calls
    one, a loop over children, another method, ``model[:2]``, gets its own output. At each call they
    are looked at: where one has hooks (or all modules have), a forward of its own, or has become
    another module or function, both are called in turn. A norm's ``fused_with`` names what it was
    found with.

    A sum with a shortcut between norm and activation (ReLU or leaky ReLU) happens in the norm too:
    ``F.relu(self.norm(x) + z)``, or ``x += self.shortcut(z)`` in statements, as in the residual
    blocks of torchvision and timm. The norm then runs where the sum stands, after the shortcut, if
    that cannot be told: the shortcut is a variable, or a child of plain torch modules that has no
    part in the norm. timm's norms with an activation (``BatchNormAct2d``) become fused norms.

    Left as they are: activations whose further arguments are no constants, norm and activation that
    are called by different functions, and functions that are not methods of a module or whose
    source is not at hand; there is one warning if such a method calls norms of its module and
    activations.

    :func:`revert` undoes all of it. Revert before TorchScript, ONNX, torch.fx, and ``copy.copy`` of
    a module: such a copy would run the method of the original. ``torch.compile``, ``torch.export``,
    ``copy.deepcopy``, pickle and ``nn.DataParallel`` take converted models. A norm that another
    model holds too becomes a fused norm there as well.

    Raises:
        TypeError: ``model`` is not an ``nn.Module``.
    """
    _check(model, "convert")
    modules = list(model.modules())
    if fuse and not has_global_hooks():
        for module in modules:
            found = fused_norm_act(module)
            if found is not None:
                kind, activation = found
                module.__dict__[_FROM] = type(module)
                module.__class__ = kind
                module.__dict__["activation"] = activation
    for module in modules:
        kind = fused_norm(module)
        if kind is None:
            continue
        if type(module) not in NORMS:
            module.__dict__[_FROM] = type(module)
        module.__class__ = kind
    if fuse:
        _fuse(model)
    return model


def revert(model: _Model) -> _Model:
    """Turns fused norms back into the modules that they were, and takes off what fused them.

    Parameters and buffers are untouched, classes and methods the original ones. Any part of a
    converted model can go back. A fused norm that was written with an activation by hand, not by
    :func:`convert`, has no stock module to go back to.

    Raises:
        TypeError: ``model`` is not an ``nn.Module``.
        ValueError: such a norm is in the model; nothing is changed then.
    """
    _check(model, "revert")
    norms = {name: m for name, m in model.named_modules() if _fused_class(m) is not None}
    for name, norm in norms.items():
        if getattr(norm, "ghost_batch_size", None) is not None:
            raise ValueError(
                f"revert: expected no ghost batches, but {name or 'the model'!r} has "
                f"ghost_batch_size={norm.ghost_batch_size}, which a stock module cannot hold"
            )
        if norm.activation is not None and _FROM not in norm.__dict__:
            raise ValueError(
                "revert: expected only activations that convert() fused, but "
                f"{name or 'the model'!r} was built with activation={norm.activation!r}, which a "
                "stock module cannot hold"
            )
    unfuse(model)
    for norm in norms.values():
        kind = _fused_class(norm)
        for own in ("activation", "ghost_batch_size"):
            norm.__dict__.pop(own, None)
        stock = norm.__dict__.pop(_FROM, None) or STOCK[kind]
        norm.__class__ = stock if type(norm) is kind else _with_base(type(norm), stock)
    return model


def _fused_class(module: nn.Module) -> type[nn.Module] | None:
    """The fused norm's class of a module, also where torch has put parametrizations before it."""
    kind = type(module)
    if kind not in STOCK and parametrize.is_parametrized(module):
        kind = kind.__base__
    return kind if kind in STOCK else None


def _with_base(kind: type[nn.Module], base: type[nn.Module]) -> type[nn.Module]:
    own = {k: v for k, v in vars(kind).items() if k not in ("__dict__", "__weakref__")}
    return type(kind.__name__, (base,), own)


def _check(model: nn.Module, op: str) -> None:
    if not isinstance(model, nn.Module):
        raise TypeError(f"{op}: expected a torch.nn.Module, got {type(model).__name__}")
