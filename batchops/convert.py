"""Swaps a model's stock norms for fused ones, in place, and back."""

from __future__ import annotations

from typing import TypeVar

from torch import nn

from ._convert.analysis import plan
from ._convert.blocks import ResidualForward
from ._convert.tables import NORMS, STOCK, FusedActivation, fused_norm

__all__ = ["convert", "revert"]

_Model = TypeVar("_Model", bound=nn.Module)

_MARK = "_activation_was_module"  # on norms whose activation convert() took from a module
_FROM = "_converted_from"  # on norms that were not torch's own: the class to go back to


def convert(model: _Model, *, fuse: bool = True) -> _Model:
    """Swaps torch's norms for the fused modules, in place, and returns ``model``.

    Only a norm's class changes: parameters, buffers, hooks, dtype, device, training flag and
    state_dict keys are the very same objects and names. Subclasses of torch's norms are left alone,
    but for timm's ``GroupNorm``, ``GroupNorm1`` and ``LayerNorm`` (unless their fast norm is on),
    which do what torch's do.

    With ``fuse``, an activation module (ReLU, and the others that the norms know) that is the only
    user of a norm's output moves into the norm, and an identity takes its place in ``model``.
    torch.fx serves to find these places, in training and in eval mode, with and without gradients;
    the model keeps its own forward. Norm and activation must be called from the same running
    function, with nothing but ``nn.Identity`` between them, so that a part of the model called
    alone does what it did. Nothing is fused across a module that has hooks or a forward of its own,
    or that is registered or used in several places. Activations called by function
    (``F.relu(x)``) stay where they are.

    Residual blocks of torchvision and timm (``BasicBlock`` and ``Bottleneck`` of their ``resnet``)
    get another forward on the instance, by which the sum with the shortcut and the ReLU after it
    happen in the last norm. Their class stays, and so does a block whose forward is not the known
    one. timm's norms with an activation (``BatchNormAct2d``) become fused norms.

    Where torch.fx cannot trace the whole model, parts of it that it can trace are fused, unless the
    code around them might reach inside; if norms remain, there is one warning.

    :func:`revert` undoes all of it. Revert before tools that put other modules in the place of
    norms (``SyncBatchNorm.convert_sync_batchnorm``, conv-bn folding), before TorchScript, ONNX,
    torch.fx and ``nn.DataParallel``: they know nothing of the activation or of forwards on
    instances. ``torch.compile`` and ``torch.export`` take converted models. A norm that another
    model holds too becomes a fused norm there as well; use ``fuse=False`` then.

    Raises:
        TypeError: ``model`` is not an ``nn.Module``.
    """
    _check(model, "convert")
    if fuse:
        found = plan(model)
        for norm, kind, activation in found.norm_acts:
            norm.__dict__[_FROM] = type(norm)
            norm.__class__ = kind
            norm.__dict__["activation"] = activation
        for norm, activation in found.norms:
            norm.__dict__["activation"] = activation
            norm.__dict__[_MARK] = True
        for parent, name, norms in found.places:
            parent._modules[name] = FusedActivation(parent._modules[name], norms)
        for block in found.blocks:
            block.__dict__["forward"] = ResidualForward(block)
    for module in model.modules():
        kind = fused_norm(module)
        if kind is None:
            continue
        if type(module) not in NORMS:
            module.__dict__[_FROM] = type(module)
        module.__class__ = kind
    return model


def revert(model: _Model) -> _Model:
    """Turns fused norms and the activations inside them back into the modules that they were.

    Parameters and buffers are untouched, classes and forwards the original ones. A fused norm that
    was written with an activation by hand, not by :func:`convert`, has no stock module to go back
    to.

    Raises:
        TypeError: ``model`` is not an ``nn.Module``.
        ValueError: such a norm is in the model, or only a part of what was fused together is;
            nothing is changed then.
    """
    _check(model, "revert")
    norms = {name: m for name, m in model.named_modules() if type(m) in STOCK}
    marked = [norm for norm in norms.values() if _MARK in norm.__dict__]
    for name, norm in norms.items():
        if getattr(norm, "ghost_batch_size", None) is not None:
            raise ValueError(
                f"revert: expected no ghost batches, but {name or 'the model'!r} has "
                f"ghost_batch_size={norm.ghost_batch_size}, which a stock module cannot hold"
            )
        if norm.activation is not None and not {_MARK, _FROM} & set(norm.__dict__):
            raise ValueError(
                "revert: expected only activations that convert() fused, but "
                f"{name or 'the model'!r} was built with activation={norm.activation!r}, which a "
                "stock module cannot hold"
            )
    places = [
        (parent, name, child)
        for parent in model.modules()
        for name, child in parent._modules.items()
        if isinstance(child, FusedActivation)
    ]
    stands_for = sum(child.norms for _, _, child in places)
    if isinstance(model, FusedActivation) or stands_for != len(marked):
        raise ValueError(
            "revert: expected both parts of every fused pair in the model, got "
            f"{len(marked)} norms with an activation and modules that stand for {stands_for}; "
            "revert the model that was converted, not a part of it"
        )
    for parent, name, child in places:
        child.original.training = child.training
        parent._modules[name] = child.original
    for norm in norms.values():
        norm.__dict__.pop(_MARK, None)
        norm.__dict__.pop("activation", None)
        norm.__class__ = norm.__dict__.pop(_FROM, None) or STOCK[type(norm)]
    for module in model.modules():
        if isinstance(module.__dict__.get("forward"), ResidualForward):
            del module.__dict__["forward"]
    return model


def _check(model: nn.Module, op: str) -> None:
    if not isinstance(model, nn.Module):
        raise TypeError(f"{op}: expected a torch.nn.Module, got {type(model).__name__}")
