"""Swaps a model's stock norms for fused ones, in place, and back."""

from __future__ import annotations

import inspect
import warnings
from collections import Counter
from collections.abc import Iterator
from typing import TypeVar

import torch
from torch import fx, nn

from . import nn as bnn

__all__ = ["convert", "revert"]

_Model = TypeVar("_Model", bound=nn.Module)

# Exact types only: a subclass may have a forward of its own.
_NORMS: dict[type[nn.Module], type[nn.Module]] = {
    nn.BatchNorm1d: bnn.BatchNorm1d,
    nn.BatchNorm2d: bnn.BatchNorm2d,
    nn.BatchNorm3d: bnn.BatchNorm3d,
}
_STOCK = {fused: stock for stock, fused in _NORMS.items()}


class FusedReLU(nn.Identity):
    """Stands where an ``nn.ReLU`` was whose work the batch norm before it now does."""


_ACTIVATIONS: dict[type[nn.Module], tuple[str, type[nn.Module]]] = {nn.ReLU: ("relu", FusedReLU)}
_STOCK_ACTIVATIONS = {fused: stock for stock, (_, fused) in _ACTIVATIONS.items()}


def convert(model: _Model, *, fuse: bool = True) -> _Model:
    """Swaps BatchNorm1d, 2d and 3d for the fused modules, in place, and returns ``model``.

    Only the modules' class changes: parameters, buffers, hooks, dtype, device, training flag and
    state_dict keys are the very same objects and names. Subclasses of torch's norms are left alone.

    With ``fuse``, an ``nn.ReLU`` module that is the only user of a norm's output moves into the
    norm, and the ReLU's class becomes an identity. torch.fx serves to find these places, in
    training and in eval mode; the model keeps its own forward. Nothing is fused across a module
    that has hooks or is used in several places. A model that torch.fx cannot trace is converted
    without fusing, with one warning. :func:`revert` undoes all of it.

    Raises:
        TypeError: ``model`` is not an ``nn.Module``.
    """
    _check(model, "convert")
    if fuse:
        for norm, activation in _fusable(model):
            name, fused = _ACTIVATIONS[type(activation)]
            norm.activation = name
            # in __dict__, so that the activation does not become a submodule of the norm
            norm.__dict__["_fused_module"] = activation
            activation.__class__ = fused
    for module in model.modules():
        if type(module) in _NORMS:
            module.__class__ = _NORMS[type(module)]
    return model


def revert(model: _Model) -> _Model:
    """Turns fused norms and the activations inside them back into torch's modules, in place.

    Parameters and buffers are untouched. A fused norm that was written with an activation by hand,
    not by :func:`convert`, has no stock module to go back to.

    Raises:
        TypeError: ``model`` is not an ``nn.Module``.
        ValueError: such a norm is in the model; nothing is changed then.
    """
    _check(model, "revert")
    norms = {name: m for name, m in model.named_modules() if type(m) in _STOCK}
    for name, norm in norms.items():
        if norm.activation is not None and "_fused_module" not in norm.__dict__:
            raise ValueError(
                "revert: expected only activations that convert() fused, but "
                f"{name or 'the model'!r} was built with activation={norm.activation!r}, which a "
                "stock module cannot hold"
            )
    for norm in norms.values():
        activation = norm.__dict__.pop("_fused_module", None)
        if activation is not None:
            activation.__class__ = _STOCK_ACTIVATIONS[type(activation)]
        norm.__dict__.pop("activation", None)
        norm.__class__ = _STOCK[type(norm)]
    return model


def _check(model: nn.Module, op: str) -> None:
    if not isinstance(model, nn.Module):
        raise TypeError(f"{op}: expected a torch.nn.Module, got {type(model).__name__}")


def _fusable(model: nn.Module) -> list[tuple[nn.Module, nn.Module]]:
    """The (norm, activation) pairs that may be fused whatever way the model is run."""
    registered = Counter(id(m) for _, m in model.named_modules(remove_duplicate=False))
    modules = list(model.modules())
    norms = [m for m in modules if _is_norm(m)]
    activations = [m for m in modules if type(m) in _ACTIVATIONS]
    if not norms or not activations:
        return []
    try:
        graphs = [
            _trace(model, training, none_defaults)
            for training in (True, False)
            for none_defaults in (False, True)
        ]
    except Exception as error:
        warnings.warn(
            f"batchops.convert: {type(model).__name__} cannot be traced by torch.fx, so its norms "
            f"are swapped but not fused with their activations ({type(error).__name__}: {error})",
            stacklevel=3,
        )
        return []

    # A pair must hold in every trace that calls either of the two.
    partner: dict[int, set[int]] = {}
    by_id = {id(m): m for m in modules}
    for graph in graphs:
        for module, follower in _calls(model, graph):
            partner.setdefault(id(module), set()).add(id(follower))
            if follower is not None:
                partner.setdefault(id(follower), set()).add(id(module))
    pairs = []
    for norm in norms:
        others = partner.get(id(norm), set())
        if len(others) != 1:
            continue
        activation = by_id.get(next(iter(others)))
        if activation is None or partner[id(activation)] != {id(norm)}:
            continue
        if registered[id(norm)] > 1 or registered[id(activation)] > 1:
            continue
        if _has_hooks(norm) or _has_hooks(activation):
            continue
        pairs.append((norm, activation))
    return pairs


def _is_norm(module: nn.Module) -> bool:
    fused_without = type(module) in _STOCK and module.activation is None
    return type(module) in _NORMS or fused_without


def _has_hooks(module: nn.Module) -> bool:
    names = ("_forward_hooks", "_forward_pre_hooks", "_backward_hooks", "_backward_pre_hooks")
    return any(getattr(module, name, None) for name in names)


class _Tracer(fx.Tracer):
    proxy_buffer_attributes = True  # a forward that writes buffers must not write them here

    def __init__(self, holders: set[int]) -> None:
        super().__init__()
        self._holders = holders

    def is_leaf_module(self, m: nn.Module, qualified_name: str) -> bool:
        # What holds none of the modules in question need not be looked into.
        return id(m) not in self._holders or super().is_leaf_module(m, qualified_name)


def _trace(model: nn.Module, training: bool, none_defaults: bool) -> fx.Graph:
    """The graph of ``model`` in one mode; arguments that default to None are None or given.

    The forward runs on proxies. What it sets on modules on the way, training flags included, and
    the random state are put back.
    """
    modules = list(model.modules())
    holders = {
        id(m) for m in modules if any(_is_norm(c) or type(c) in _ACTIVATIONS for c in m.modules())
    }
    holders -= {id(m) for m in modules if _is_norm(m) or type(m) in _ACTIVATIONS}
    tables = ("_parameters", "_buffers", "_modules")
    before = [(m, dict(m.__dict__), {t: dict(getattr(m, t)) for t in tables}) for m in modules]
    concrete = None
    if none_defaults:
        parameters = inspect.signature(model.forward).parameters.values()
        concrete = {p.name: None for p in parameters if p.default is None}
    try:
        for module in modules:
            module.training = training
        with torch.random.fork_rng(devices=[]):
            return _Tracer(holders).trace(model, concrete_args=concrete)
    finally:
        for module, attributes, contents in before:
            module.__dict__.clear()
            module.__dict__.update(attributes)
            for table, entries in contents.items():
                current = getattr(module, table)
                current.clear()
                current.update(entries)


def _calls(model: nn.Module, graph: fx.Graph) -> Iterator[tuple[nn.Module, nn.Module | None]]:
    """Each call of a norm with the activation that alone uses its output, or with None; and each
    call of an activation on anything else with None."""
    by_name = dict(model.named_modules(remove_duplicate=False))
    module_of = {
        node: by_name.get(str(node.target)) for node in graph.nodes if node.op == "call_module"
    }
    paired = set()
    for node, module in module_of.items():
        if module is None or not _is_norm(module):
            continue
        user = next(iter(node.users)) if len(node.users) == 1 else None
        follower = module_of.get(user) if user is not None else None
        plain = len(node.args) == 1 and not node.kwargs
        if plain and type(follower) in _ACTIVATIONS and user.args == (node,) and not user.kwargs:
            paired.add(user)
            yield module, follower
        else:
            yield module, None
    for node, module in module_of.items():
        if type(module) in _ACTIVATIONS and node not in paired:
            yield module, None
