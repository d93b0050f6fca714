"""Where a model calls an activation on a norm's output, and what goes there."""

from __future__ import annotations

import types
import warnings
from collections.abc import Iterator, Sequence
from typing import Any

import torch
from torch import nn

from .chains import activation_of_chain, ends_in_free_norm
from .methods import (
    InstanceMethod,
    Replicate,
    RewrittenMethod,
    SequentialForward,
    is_sequential,
)
from .source import Found, SourceError, find, mentions
from .tables import ACTIVATIONS, FUNCTIONS, METHODS, STOCK, Activation, is_transparent

__all__ = ["fuse", "unfuse"]


def fuse(model: nn.Module) -> None:
    """Puts methods that run chains on the modules of ``model``, whose norms are fused ones. One
    warning where a forward cannot be read."""
    unfuse(model)
    unread: list[str] = []
    for module in model.modules():
        if isinstance(module, torch.jit.ScriptModule):
            continue
        if not any(map(_is_norm, module.modules())):
            continue
        for method, fused in _methods(module, unread):
            module.__dict__[method.name] = method
            module.__dict__.setdefault(Replicate.name, Replicate(module))
            for norm, activation in fused:
                if activation is not None:
                    norm.__dict__["fused_with"] = activation
    if unread:
        warnings.warn(
            f"batchops.convert: {unread[0]}, so the norms that it calls are swapped but not fused "
            "with their activations",
            stacklevel=3,
        )


def unfuse(model: nn.Module) -> None:
    """Takes off what fuse() put on."""
    for module in model.modules():
        own = module.__dict__
        for name, value in [item for item in own.items() if isinstance(item[1], InstanceMethod)]:
            if name == value.name:
                del own[name]
            else:  # somebody keeps it by a name of their own
                own[name] = types.MethodType(value.original, value.module)
        if any(kind in STOCK for kind in type(module).__mro__):
            own.pop("fused_with", None)


_Fused = list[tuple[nn.Module, Activation | None]]


def _methods(module: nn.Module, unread: list[str]) -> Iterator[tuple[InstanceMethod, _Fused]]:
    """The methods to put on ``module``, and the norms of which it is known what they do in them."""
    own = module.__dict__
    if "forward" not in own and is_sequential(module):
        sequential = SequentialForward(module)
        if sequential.chains():
            yield sequential, list(map(_of_modules, sequential.chains()))
    for name, method in _written(type(module)).items():
        if name in own:
            continue
        if not isinstance(method, types.FunctionType):
            if name == "forward" and _calls_both(module, None):
                unread.append(f"{_name(module)}.forward is not a function of Python's")
            continue
        try:
            digest, found = find(method, module, _is_norm, _is_activation, is_transparent)
        except SourceError as error:
            if _calls_both(module, mentions(method)):
                unread.append(f"the source of {_name(module)}.{name} cannot be read ({error})")
            continue
        if found:
            sites = tuple(f.site for f in found)
            fused = [
                _of_modules(f.modules) if f.activation is None else _of_call(f)
                for f in found
                if f.modules is not None
            ]
            yield RewrittenMethod(module, name, digest, sites), fused


def _of_modules(chain: Sequence[nn.Module]) -> tuple[nn.Module, Activation | None]:
    return chain[-1], activation_of_chain(chain)


def _of_call(found: Found) -> tuple[nn.Module, Activation | None]:
    return found.modules[-1], found.activation if ends_in_free_norm(found.modules) else None


def _written(kind: type[nn.Module]) -> dict[str, Any]:
    """The methods of a module's class that are not torch's own."""
    methods: dict[str, Any] = {}
    for base in kind.__mro__:
        own = base.__module__ == "torch.nn" or base.__module__.startswith("torch.nn.")
        for name, value in vars(base).items():
            methods.setdefault(name, None if own else value)
    return {
        name: value
        for name, value in methods.items()
        if hasattr(value, "__get__") and not isinstance(value, type) and not name.startswith("__")
    }


def _calls_both(module: nn.Module, words: set[str] | None) -> bool:
    """Whether ``words`` name a norm among the children, and an activation there or in torch."""
    children = [c for n, c in module._modules.items() if words is None or n in words]
    functions = _FUNCTION_NAMES.intersection(words or ()).difference(module._modules)
    return any(map(_is_norm, children)) and (bool(functions) or any(map(_is_activation, children)))


_FUNCTION_NAMES = {function.__name__ for function in FUNCTIONS}.union(METHODS)


def _name(module: nn.Module) -> str:
    return type(module).__qualname__


def _is_norm(module: nn.Module) -> bool:
    return type(module) in STOCK and module.activation is None


def _is_activation(module: nn.Module) -> bool:
    return type(module) in ACTIVATIONS
