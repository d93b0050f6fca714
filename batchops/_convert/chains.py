"""A norm and the activation that follows it, as one call.

What convert() puts on a model asks here, call by call, whether the modules and functions still are
ones that can become one; if not, they are called one after the other, as the model was written.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn.modules import module as _modules
from torch.overrides import _get_current_function_mode_stack, has_torch_function

from .. import functional as BF
from .tables import (
    ACTIVATIONS,
    METHODS,
    STOCK,
    Activation,
    is_plain,
    is_transparent,
    of_function,
)

__all__ = [
    "activation_of_call",
    "activation_of_chain",
    "ends_in_free_norm",
    "has_global_hooks",
    "is_plain_tensor",
    "run_call",
    "run_chain",
    "run_method",
    "takes",
]

_Callee = Callable[..., Any]


def activation_of_chain(modules: Sequence[nn.Module]) -> Activation | None:
    """What the norm that ``modules`` end in is to do besides, in one call for all of them.

    They are in the order in which a nested call names them: the activation, identities, the norm.
    None where they are others, or where somebody watches one of them.
    """
    activation, norm = modules[0], modules[-1]
    of = ACTIVATIONS.get(type(activation))
    if of is None or not is_plain(activation) or not _is_free(norm):
        return None
    if len(modules) > 2 and not all(is_transparent(m) for m in modules[1:-1]):
        return None
    return of(activation)


def ends_in_free_norm(modules: Sequence[nn.Module]) -> bool:
    """Whether these are identities and a norm that may do more; the norm is the last."""
    if not _is_free(modules[-1]):
        return False
    return len(modules) == 1 or all(is_transparent(m) for m in modules[:-1])


def _is_free(norm: nn.Module) -> bool:
    """Whether a module is a norm that does no activation so far, and nobody watches."""
    if type(norm) not in STOCK or norm.activation is not None:
        return False
    return is_plain(norm) and not has_global_hooks()


def has_global_hooks() -> bool:
    return bool(
        _modules._global_forward_hooks
        or _modules._global_forward_pre_hooks
        or _modules._global_backward_hooks
        or _modules._global_backward_pre_hooks
    )


def activation_of_call(
    callees: Sequence[_Callee],
    x: Any,
    args: tuple[Any, ...] = (),
    kwargs: dict[str, Any] | None = None,
) -> Activation | None:
    """The same where the first is a function, which is called with ``args`` and ``kwargs`` too."""
    activation = of_function(callees[0], args, kwargs)
    return activation if activation and takes(callees[1:], x) else None


def takes(modules: Sequence[nn.Module], x: Any) -> bool:
    """Whether the norm that ``modules`` end in may do a function's part: it makes a plain tensor of
    ``x``, for which there are no other functions than torch's."""
    if not isinstance(x, Tensor) or x.dtype not in BF._CPU_DTYPES:
        return False  # an array, or what a norm or the function refuses
    return ends_in_free_norm(modules) and not _is_overridden(x, modules[-1])


def _is_overridden(x: Tensor, norm: nn.Module) -> bool:
    """Whether something else than torch may answer a function of torch's: a class of tensors, or
    a mode, which are to see the calls that are written."""
    tensors = (x, *norm._parameters.values(), *norm._buffers.values())
    if not torch._C._is_torch_function_mode_enabled():
        return has_torch_function(tensors)
    modes = _get_current_function_mode_stack()
    if any(type(mode).__module__ not in _QUIET_MODES for mode in modes):
        return True
    return not all(map(is_plain_tensor, tensors))


# Modes of torch's that leave activations and sums alone: of torch.set_default_device, and those
# that torch.export traces in.
_QUIET_MODES = (
    "torch.utils._device",
    "torch._export.non_strict_utils",
    "torch.fx.experimental.proxy_tensor",
)


def is_plain_tensor(t: Tensor | None) -> bool:
    """Whether its class leaves functions to torch; has_torch_function() looks at modes as well."""
    if t is None or type(t) in (Tensor, nn.Parameter):
        return True
    return type(t).__torch_function__ is torch._C._disabled_torch_function_impl


def run_chain(callees: Sequence[_Callee], x: Any) -> Any:
    """``callees[0](...(callees[-1](x)))``."""
    activation = activation_of_chain(callees) or activation_of_call(callees, x)
    if activation is not None:
        return callees[-1](x, activation=activation)
    for callee in reversed(callees):
        x = callee(x)
    return x


def run_call(callees: Sequence[_Callee], x: Any, /, *args: Any, **kwargs: Any) -> Any:
    """``callees[0](...(callees[-1](x)), *args, **kwargs)``."""
    activation = activation_of_call(callees, x, args, kwargs)
    if activation is not None:
        return callees[-1](x, activation=activation)
    for callee in reversed(callees[1:]):
        x = callee(x)
    return callees[0](x, *args, **kwargs)


def run_method(modules: Sequence[nn.Module], x: Any, name: str) -> Any:
    """``modules[0](...(modules[-1](x))).name()``."""
    method, activation = METHODS.get(name, (None, None))
    if getattr(Tensor, name) is method and takes(modules, x):
        return modules[-1](x, activation=activation)
    for module in reversed(modules):
        x = module(x)
    return getattr(x, name)()
