"""A norm and the activation that follows it, as one call.

What convert() puts on a model asks here, call by call, whether the modules still are ones that can
become one; if not, they are called one after the other, as the model was written.
"""

from __future__ import annotations

from collections.abc import Sequence

from torch import Tensor, nn
from torch.nn.modules import module as _modules

from .tables import ACTIVATIONS, STOCK, Activation, is_plain, is_transparent

__all__ = ["activation_of_chain", "has_global_hooks", "run_chain", "run_sum"]


def activation_of_chain(modules: Sequence[nn.Module]) -> Activation | None:
    """What the norm that ``modules`` end in is to do besides, in one call for all of them.

    They are in the order in which a nested call names them: the activation, identities, the norm.
    None where they are others, or where somebody watches one of them.
    """
    activation, norm = modules[0], modules[-1]
    of = ACTIVATIONS.get(type(activation))
    if of is None or type(norm) not in STOCK or norm.activation is not None:
        return None
    if not is_plain(activation) or not is_plain(norm) or has_global_hooks():
        return None
    if len(modules) > 2 and not all(is_transparent(m) for m in modules[1:-1]):
        return None
    return of(activation)


def has_global_hooks() -> bool:
    return bool(
        _modules._global_forward_hooks
        or _modules._global_forward_pre_hooks
        or _modules._global_backward_hooks
        or _modules._global_backward_pre_hooks
    )


def run_chain(modules: Sequence[nn.Module], x: Tensor) -> Tensor:
    """``modules[0](...(modules[-1](x)))``."""
    activation = activation_of_chain(modules)
    if activation is not None:
        return modules[-1](x, activation=activation)
    for module in reversed(modules):
        x = module(x)
    return x


def run_sum(modules: Sequence[nn.Module], x: Tensor, shortcut: Tensor) -> Tensor:
    """``activation(norm(x) + shortcut)`` of these two."""
    activation, norm = modules
    fused = activation_of_chain(modules)
    if fused is not None:
        return norm(x, residual=shortcut, activation=fused)
    return activation(norm(x) + shortcut)
