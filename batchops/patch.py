"""torch.nn.functional's norms, replaced for a while."""

from __future__ import annotations

import contextlib
import functools
import threading
from collections.abc import Callable, Iterator
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor
from torch.autograd import forward_ad
from torch.overrides import has_torch_function

from . import functional as BF

__all__ = ["patch"]

_lock = threading.Lock()
_depth = 0
_stock: dict[str, Callable[..., Tensor]] = {}


@contextlib.contextmanager
def patch() -> Iterator[None]:
    """``F.batch_norm → batchops.functional.batch_norm``, and so for every norm, in the block.

    For models that cannot be converted: whatever calls ``torch.nn.functional``'s norms by that
    module gets the fused ones, torch's own norm modules included. The signatures are torch's. Calls
    that the fused ones do not take (another dtype, device or layout, tensor subclasses,
    forward-mode AD) or that torch judges by rules of its own (sizes and dtypes that do not go
    together, arguments of another type) go to torch's function, which also raises torch's errors.

    The names are replaced for the whole process while any thread is in such a block, so that
    checkpoints which are recomputed in autograd's threads see the same functions; blocks may nest
    and overlap in any order, and an exception ends a block like any other exit. Functions imported
    before by their own name (``from torch.nn.functional import batch_norm``) stay torch's.
    """
    global _depth
    with _lock:
        if _depth == 0:
            for name, replacement in _REPLACEMENTS.items():
                _stock[name] = getattr(F, name)
                setattr(F, name, replacement(_stock[name]))
        _depth += 1
    try:
        yield
    finally:
        with _lock:
            _depth -= 1
            if _depth == 0:
                while _stock:
                    name, function = _stock.popitem()
                    setattr(F, name, function)


def _batch_norm(stock: Callable[..., Tensor]) -> Callable[..., Tensor]:
    @functools.wraps(stock)
    def norm(
        input: Any,
        running_mean: Any,
        running_var: Any,
        weight: Any = None,
        bias: Any = None,
        training: Any = False,
        momentum: Any = 0.1,
        eps: Any = 1e-5,
    ) -> Tensor:
        arguments = input, running_mean, running_var, weight, bias, training, momentum, eps
        serves = _serves_batches(*arguments)
        return BF.batch_norm(*arguments) if serves else stock(*arguments)

    return norm


def _instance_norm(stock: Callable[..., Tensor]) -> Callable[..., Tensor]:
    @functools.wraps(stock)
    def norm(
        input: Any,
        running_mean: Any = None,
        running_var: Any = None,
        weight: Any = None,
        bias: Any = None,
        use_input_stats: Any = True,
        momentum: Any = 0.1,
        eps: Any = 1e-5,
    ) -> Tensor:
        arguments = input, running_mean, running_var, weight, bias, use_input_stats, momentum, eps
        serves = _serves_batches(*arguments)
        return BF.instance_norm(*arguments) if serves else stock(*arguments)

    return norm


def _group_norm(stock: Callable[..., Tensor]) -> Callable[..., Tensor]:
    @functools.wraps(stock)
    def norm(
        input: Any, num_groups: Any, weight: Any = None, bias: Any = None, eps: Any = 1e-5
    ) -> Tensor:
        arguments = input, num_groups, weight, bias, eps
        if (
            not _serves(input, eps, weight, bias)
            or type(num_groups) is not int
            or num_groups <= 0
            or input.size(1) % num_groups
            or not _fit(input, (input.size(1),), weight, bias)
        ):
            return stock(*arguments)
        return BF.group_norm(*arguments, cast_output=True)

    return norm


def _layer_norm(stock: Callable[..., Tensor]) -> Callable[..., Tensor]:
    @functools.wraps(stock)
    def norm(
        input: Any, normalized_shape: Any, weight: Any = None, bias: Any = None, eps: Any = 1e-5
    ) -> Tensor:
        arguments = input, normalized_shape, weight, bias, eps
        if (
            not _serves(input, eps, weight, bias)
            or type(normalized_shape) not in (list, tuple, torch.Size)
            or not normalized_shape
            or tuple(normalized_shape) != tuple(input.shape[-len(normalized_shape) :])
            or any(type(size) not in (int, torch.SymInt) for size in normalized_shape)
            or not _fit(input, tuple(normalized_shape), weight, bias)
        ):
            return stock(*arguments)
        return BF.layer_norm(*arguments, cast_output=True)

    return norm


# With the signatures of torch's: what does not fit those is Python's error, as it is there.
_REPLACEMENTS = {
    "batch_norm": _batch_norm,
    "group_norm": _group_norm,
    "layer_norm": _layer_norm,
    "instance_norm": _instance_norm,
}


def _serves_batches(
    input: Any,
    running_mean: Any,
    running_var: Any,
    weight: Any,
    bias: Any,
    from_batch: Any,
    momentum: Any,
    eps: Any,
) -> bool:
    if type(from_batch) is not bool or type(momentum) not in (float, int):
        return False
    if (running_mean is None) is not (running_var is None):
        return False
    if running_mean is None:
        if not from_batch or not _serves(input, eps, weight, bias):
            return False
        return _fit(input, (input.size(1),), weight, bias)
    if not _serves(input, eps, running_mean, running_var, weight, bias):
        return False
    if running_mean.requires_grad or running_var.requires_grad:
        return False
    return _fit(input, (input.size(1),), running_mean, running_var, weight, bias)


def _serves(input: Any, eps: Any, *parameters: Any) -> bool:
    """Whether the fused norm computes what torch's would, as far as all norms are alike."""
    if type(input) is not Tensor and type(input) is not torch.nn.Parameter:
        return False
    if type(eps) not in (float, int) or not eps > 0:
        return False
    if not all(t is None or isinstance(t, Tensor) for t in parameters):
        return False
    if has_torch_function((input, *parameters)) or not BF._has_kernel(input) or input.dim() < 2:
        return False
    return forward_ad._current_level < 0


def _fit(input: Tensor, shape: tuple[int, ...], *parameters: Tensor | None) -> bool:
    """Whether the parameters are there, of ``shape``, and of one dtype that torch takes as well."""
    dtype = None
    for t in parameters:
        if t is None:
            continue
        if t.device != input.device or tuple(t.shape) != shape or t.dtype != (dtype or t.dtype):
            return False
        dtype = t.dtype
    if dtype is None or dtype == input.dtype:
        return True
    return dtype == torch.float32 and input.itemsize == 2
