"""Swaps a model's stock norms for fused ones, in place, and back."""

from __future__ import annotations

import copy
import inspect
import itertools
import random
import sys
import threading
import warnings
from collections import Counter, OrderedDict
from collections.abc import Callable, Iterator
from types import FrameType
from typing import Any, TypeVar

import numpy
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

    def __init__(self, original: nn.Module) -> None:
        super().__init__()
        self.training = original.training
        # in __dict__, so that it does not become a submodule
        self.__dict__["original"] = original


_ACTIVATIONS: dict[type[nn.Module], tuple[str, type[FusedReLU]]] = {nn.ReLU: ("relu", FusedReLU)}
_FUSED = tuple(fused for _, fused in _ACTIVATIONS.values())


def convert(model: _Model, *, fuse: bool = True) -> _Model:
    """Swaps BatchNorm1d, 2d and 3d for the fused modules, in place, and returns ``model``.

    Only a norm's class changes: parameters, buffers, hooks, dtype, device, training flag and
    state_dict keys are the very same objects and names. Subclasses of torch's norms are left alone.

    With ``fuse``, an ``nn.ReLU`` module that is the only user of a norm's output moves into the
    norm, and an identity takes its place in ``model``. torch.fx serves to find these places, in
    training and in eval mode, with and without gradients; the model keeps its own forward. Norm
    and ReLU must be called from the same running function, so that a part of the model called
    alone does what it did. Nothing is fused across a module that has hooks or a forward of its
    own, or that is registered or used in several places. A model that torch.fx cannot trace is
    converted without fusing, with one warning.

    :func:`revert` undoes all of it. Revert before tools that put other modules in the place of
    norms (``SyncBatchNorm.convert_sync_batchnorm``, conv-bn folding): they know nothing of the
    activation. A norm that another model holds too becomes a fused norm there as well; use
    ``fuse=False`` then.

    Raises:
        TypeError: ``model`` is not an ``nn.Module``.
    """
    _check(model, "convert")
    if fuse:
        for norm, activation, parent, child in _fusable(model):
            norm.activation, fused = _ACTIVATIONS[type(activation)]
            norm.__dict__["_activation_was_module"] = True
            parent._modules[child] = fused(activation)
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
        ValueError: such a norm is in the model, or only one part of a fused pair is; nothing is
            changed then.
    """
    _check(model, "revert")
    norms = {name: m for name, m in model.named_modules() if type(m) in _STOCK}
    with_activation = {name: m for name, m in norms.items() if m.activation is not None}
    for name, norm in with_activation.items():
        if "_activation_was_module" not in norm.__dict__:
            raise ValueError(
                "revert: expected only activations that convert() fused, but "
                f"{name or 'the model'!r} was built with activation={norm.activation!r}, which a "
                "stock module cannot hold"
            )
    places = [
        (parent, name, child)
        for parent in model.modules()
        for name, child in parent._modules.items()
        if isinstance(child, _FUSED)
    ]
    if isinstance(model, _FUSED) or len(places) != len(with_activation):
        raise ValueError(
            "revert: expected both parts of every fused pair in the model, got "
            f"{len(with_activation)} norms with an activation and {len(places)} modules that stand "
            "for one; revert the model that was converted, not a part of it"
        )
    for parent, name, child in places:
        child.original.training = child.training
        parent._modules[name] = child.original
    for norm in norms.values():
        norm.__dict__.pop("_activation_was_module", None)
        norm.__dict__.pop("activation", None)
        norm.__class__ = _STOCK[type(norm)]
    return model


def _check(model: nn.Module, op: str) -> None:
    if not isinstance(model, nn.Module):
        raise TypeError(f"{op}: expected a torch.nn.Module, got {type(model).__name__}")


_Place = tuple[nn.Module, nn.Module, nn.Module, str]  # norm, activation, its parent, its name


def _fusable(model: nn.Module) -> list[_Place]:
    """The norms and activations that may be fused whatever way the model is run."""
    registered = Counter(id(m) for _, m in model.named_modules(remove_duplicate=False))
    modules = [m for m in model.modules() if not isinstance(m, torch.jit.ScriptModule)]
    place_of = {
        id(child): (parent, name)
        for parent in modules
        for name, child in parent._modules.items()
        if type(child) in _ACTIVATIONS
    }
    norms = [m for m in modules if _is_norm(m)]
    if not norms or not place_of:
        return []
    try:
        graphs = _traces(model, modules)
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
    found = []
    for norm in norms:
        others = partner.get(id(norm), set())
        activation = by_id.get(next(iter(others))) if len(others) == 1 else None
        if activation is None or partner[id(activation)] != {id(norm)}:
            continue
        pair = (norm, activation)
        if any(registered[id(m)] > 1 or _has_hooks(m) or "forward" in m.__dict__ for m in pair):
            continue
        found.append((*pair, *place_of[id(activation)]))
    return found


def _is_norm(module: nn.Module) -> bool:
    fused_without = type(module) in _STOCK and module.activation is None
    return type(module) in _NORMS or fused_without


def _has_hooks(module: nn.Module) -> bool:
    names = ("_forward_hooks", "_forward_pre_hooks", "_backward_hooks", "_backward_pre_hooks")
    return any(getattr(module, name, None) for name in names)


class _Tracer(fx.Tracer):
    """Notes for each module call the frame it came from, and keeps out of other threads' way."""

    proxy_buffer_attributes = True  # a forward that writes buffers must not write them here

    def __init__(self, holders: set[int]) -> None:
        super().__init__()
        self._holders = holders
        self._thread = threading.get_ident()

    def is_leaf_module(self, m: nn.Module, qualified_name: str) -> bool:
        # What holds none of the modules in question need not be looked into.
        return id(m) not in self._holders or super().is_leaf_module(m, qualified_name)

    # While tracing, fx stands between every module of the process and its callers.
    def getattr(self, attr: str, attr_val: Any, parameter_proxy_cache: dict[str, Any]) -> Any:
        if threading.get_ident() != self._thread:
            return attr_val
        return super().getattr(attr, attr_val, parameter_proxy_cache)

    def call_module(
        self, m: nn.Module, forward: Callable[..., Any], args: Any, kwargs: dict[str, Any]
    ) -> Any:
        if threading.get_ident() != self._thread:
            return forward(*args, **kwargs)
        if id(m) in self._holders:
            forward = m.forward  # without the user's hooks, which are not made for proxies
        output = super().call_module(m, forward, args, kwargs)
        if isinstance(output, fx.Proxy) and output.node.op == "call_module":
            output.node.meta.setdefault(_FRAME, _caller())
        return output


_FRAME = "batchops_frame"
_MACHINERY = (fx._symbolic_trace.__file__, nn.modules.module.__file__, __file__)


def _caller() -> FrameType | None:
    """The frame of the user's function that called the module being traced."""
    frame: FrameType | None = sys._getframe(1)
    while frame is not None and frame.f_code.co_filename in _MACHINERY:
        frame = frame.f_back
    return frame


def _traces(model: nn.Module, modules: list[nn.Module]) -> list[fx.Graph]:
    """Graphs of ``model`` in training and eval mode, with and without gradients, and with
    arguments that default to None given and left out."""
    parameters = inspect.signature(model.forward).parameters.values()
    nones = {p.name: None for p in parameters if p.default is None}
    return [
        _trace(model, modules, training, gradients, concrete)
        for training, gradients in itertools.product((True, False), repeat=2)
        for concrete in ([None, nones] if nones else [None])
    ]


def _trace(
    model: nn.Module,
    modules: list[nn.Module],
    training: bool,
    gradients: bool,
    concrete: dict[str, None] | None,
) -> fx.Graph:
    """The forward runs on proxies. What it sets on modules on the way, training flags included,
    what it puts into their lists, dicts and sets, and the random states are put back."""
    candidates = [m for m in modules if _is_norm(m) or type(m) in _ACTIVATIONS]
    wanted = {id(m) for m in candidates}
    holders = {id(m) for m in modules if any(id(c) in wanted for c in m.modules())} - wanted
    before = [(m, dict(m.__dict__)) for m in modules]
    contents = [
        (value, copy.copy(value))
        for _, attributes in before
        for value in attributes.values()
        if type(value) in _RESTORE
    ]
    python_random, numpy_random = random.getstate(), numpy.random.get_state()
    try:
        for module in modules:
            module.training = training
        for module in candidates:
            # Only a call goes through the tracer; a direct .forward() must not pass unseen.
            module.__dict__["forward"] = _refuse_direct_forward
        with torch.random.fork_rng(devices=[]), torch.set_grad_enabled(gradients):
            return _Tracer(holders).trace(model, concrete_args=concrete)
    finally:
        for module, attributes in before:
            module.__dict__.clear()
            module.__dict__.update(attributes)
        for value, content in contents:
            _RESTORE[type(value)](value, content)
        random.setstate(python_random)
        numpy.random.set_state(numpy_random)


def _restore_table(table: Any, content: Any) -> None:
    table.clear()
    table.update(content)


# _parameters, _buffers and _modules are among the dicts.
_RESTORE: dict[type, Callable[[Any, Any], None]] = {
    dict: _restore_table,
    OrderedDict: _restore_table,
    set: _restore_table,
    list: lambda value, content: value.__setitem__(slice(None), content),
}


def _refuse_direct_forward(*args: Any, **kwargs: Any) -> None:
    raise RuntimeError("a norm or an activation is run by its forward method, not by a call")


def _calls(model: nn.Module, graph: fx.Graph) -> Iterator[tuple[nn.Module, nn.Module | None]]:
    """Each call of a norm with the activation that alone uses its output, or with None; and each
    call of an activation on anything else with None."""
    by_name = dict(model.named_modules(remove_duplicate=False))
    module_of = {
        node: by_name[str(node.target)] for node in graph.nodes if node.op == "call_module"
    }
    paired = set()
    for node, module in module_of.items():
        if not _is_norm(module):
            continue
        user = next(iter(node.users)) if len(node.users) == 1 else None
        follower = module_of.get(user) if user is not None else None
        if (
            user is not None
            and type(follower) in _ACTIVATIONS
            and len(node.args) == 1
            and not node.kwargs
            and user.args == (node,)
            and not user.kwargs
            and user.meta.get(_FRAME) is node.meta.get(_FRAME) is not None
        ):
            paired.add(user)
            yield module, follower
        else:
            yield module, None
    for node, module in module_of.items():
        if type(module) in _ACTIVATIONS and node not in paired:
            yield module, None
    for node in graph.nodes:
        node.meta.pop(_FRAME, None)  # a frame keeps everything in it alive
