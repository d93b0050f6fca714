"""A norm, the sum of its output with a shortcut, and the activation of that, as one call.

What a model writes in steps stays in steps: ``begin_sum`` stands where the norm was called and says
whether the three can be one, ``add_...`` where the sum was, ``end_sum`` where the activation was.
If they cannot, each does at its place what is written there. If they can, what goes from one to the
next is a ``_Begun``, for a norm that runs at the sum, and a ``_Done``.
"""

from __future__ import annotations

import operator
from collections.abc import Callable, Sequence
from typing import Any, NamedTuple

import torch
from torch import Tensor, nn

from .chains import activation_of_call, activation_of_chain, is_plain_tensor, takes
from .tables import NORMS, STOCK, Activation, follows_sums, is_plain

__all__ = ["add_by", "add_in_place", "add_left", "add_right", "begin_sum", "end_sum"]


class _Begun(NamedTuple):
    norm: nn.Module
    x: Tensor
    activation: Activation


class _Done(NamedTuple):
    y: Tensor


# Their calls read what they hold and their input, and write nothing. So it cannot be told whether
# they ran before a norm or after it, but where one of the two raises an error: the step is lost
# then, and a norm in the shortcut may have counted its batch where torch's would not have come to
# it, or the one before the sum may not have where torch's was done.
_WITHOUT_STATE = frozenset(
    getattr(nn, f"{name}{n}d")
    for name in ("Conv", "AvgPool", "MaxPool", "AdaptiveAvgPool", "AdaptiveMaxPool", "ZeroPad")
    for n in (1, 2, 3)
) | {nn.Identity, nn.Linear, nn.Flatten}


def begin_sum(
    norm: Callable[[Any], Any],
    x: Any,
    activation: Callable[..., Any],
    owner: nn.Module,
    watched: Sequence[str],
    absent: Sequence[str],
    /,
    *args: Any,
    **kwargs: Any,
) -> Any:
    """``norm(x)``, now or at the sum. ``watched`` are the children of ``owner`` that may be called
    until then, ``absent`` those that must be None for that."""
    done = _activation_of((activation, norm), x, args, kwargs)
    if (
        done is None
        or any(getattr(owner, name, None) is not None for name in absent)
        or not all(_commutes(getattr(owner, name, None), norm) for name in watched)
    ):
        return norm(x)
    return _Begun(norm, x, done)


def _activation_of(
    callees: tuple[Callable[..., Any], ...], x: Any, args: tuple[Any, ...], kwargs: dict[str, Any]
) -> Activation | None:
    """What the second of these two is to do besides, where it makes a plain tensor."""
    activation = None if args or kwargs else activation_of_chain(callees)
    if activation is None:
        activation = activation_of_call(callees, x, args, kwargs)
    elif not takes(callees[1:], x):
        return None
    return activation if follows_sums(activation) else None


def _commutes(module: Any, norm: nn.Module) -> bool:
    """Whether it makes no difference which of the two is called first."""
    if module is None:
        return True
    if not isinstance(module, nn.Module) or not is_plain(module):
        return False
    kind = type(module)
    if kind is nn.Sequential:
        return all(_commutes(m, norm) for m in module._modules.values())
    if kind in STOCK or kind in NORMS:
        statistics = [t for t in norm._buffers.values() if t is not None]
        own = [t for t in module._buffers.values() if t is not None]
        return not any(_shares(a, b) for a in own for b in statistics)
    return kind in _WITHOUT_STATE


def _shares(a: Tensor, b: Tensor) -> bool:
    if a is b or torch.compiler.is_compiling():  # a compiler knows by itself what is a view
        return a is b
    return torch._C._is_alias_of(a, b)


def _add(total: Any, shortcut: Any, add: Callable[[Any, Any], Any]) -> Any:
    if type(total) is not _Begun:
        return add(total, shortcut)
    norm, x, activation = total
    if _fits(shortcut, x):
        return _Done(norm(x, residual=shortcut, activation=activation))
    return add(norm(x), shortcut)


def _fits(shortcut: Any, x: Tensor) -> bool:
    """Whether a sum with the norm's output has that one's dtype, size and layout in any case."""
    return (
        isinstance(shortcut, Tensor)
        and not (shortcut.is_nested or x.is_nested)  # strided ones have no sizes
        and is_plain_tensor(shortcut)
        and shortcut.dtype == x.dtype
        and shortcut.shape == x.shape
        and shortcut.device == x.device
        and shortcut.layout is x.layout
        and shortcut.stride() == x.stride()
        and (x.is_contiguous() or _is_channels_last(x))
    )


def _is_channels_last(x: Tensor) -> bool:
    if x.dim() == 4:
        return x.is_contiguous(memory_format=torch.channels_last)
    return x.dim() == 5 and x.is_contiguous(memory_format=torch.channels_last_3d)


def add_left(total: Any, shortcut: Any) -> Any:
    return _add(total, shortcut, operator.add)


def add_right(shortcut: Any, total: Any) -> Any:
    return _add(total, shortcut, lambda y, shortcut: shortcut + y)


def add_in_place(total: Any, shortcut: Any) -> Any:
    return _add(total, shortcut, operator.iadd)


def add_by(function: Callable[[Any, Any], Any], total: Any, shortcut: Any) -> Any:
    """``function(norm(x), shortcut)``, which was torch.add when it was read."""
    if type(total) is _Begun and function is not _ADD:
        total = total.norm(total.x)
    return _add(total, shortcut, function)


_ADD = torch.add


def end_sum(activation: Callable[..., Any], total: Any, /, *args: Any, **kwargs: Any) -> Any:
    """What the activation gives of the sum."""
    return total.y if type(total) is _Done else activation(total, *args, **kwargs)
