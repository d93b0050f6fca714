"""torch.nn.functional's norms, replaced for a while."""

from __future__ import annotations

import contextlib
import functools
import inspect
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

_NAMES = ("batch_norm", "group_norm", "layer_norm", "instance_norm")
_lock = threading.Lock()
_depth = 0
_stock: dict[str, Callable[..., Tensor]] = {}


@contextlib.contextmanager
def patch() -> Iterator[None]:
    """``F.batch_norm → batchops.functional.batch_norm``, and so for every norm, in the block.

    For models that cannot be converted: whatever calls ``torch.nn.functional``'s norms by that
    module gets the fused ones, torch's own norm modules included. Calls that they do not take
    (another dtype, device or layout, tensor subclasses, forward-mode AD, arguments that torch
    judges by rules of its own) go to torch's function, which also raises torch's errors.

    The names are replaced for the whole process while any thread is in such a block, so that
    checkpoints which are recomputed in autograd's threads see the same functions; blocks may nest
    and overlap in any order, and an exception ends a block like any other exit. Functions imported
    before by their own name (``from torch.nn.functional import batch_norm``) stay torch's.
    """
    global _depth
    with _lock:
        if _depth == 0:
            for name in _NAMES:
                if name in BF.__all__:
                    _stock[name] = getattr(F, name)
                    setattr(F, name, _replacement(_stock[name], getattr(BF, name)))
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


def _replacement(
    stock: Callable[..., Tensor], fused: Callable[..., Tensor]
) -> Callable[..., Tensor]:
    signature = inspect.signature(stock)
    defaults = {name: parameter.default for name, parameter in signature.parameters.items()}
    if "cast_output" in inspect.signature(fused).parameters:  # torch's dtype under autocast
        fused = functools.partial(fused, cast_output=True)

    @functools.wraps(stock)
    def norm(*args: Any, **kwargs: Any) -> Tensor:
        arguments = {**defaults, **dict(zip(defaults, args, strict=False)), **kwargs}
        return (fused if _serves(arguments) else stock)(*args, **kwargs)

    return norm


def _serves(arguments: dict[str, Any]) -> bool:
    """Whether the fused norm computes what torch's would, on these arguments."""
    input = arguments["input"]
    tensors = [value for value in arguments.values() if isinstance(value, Tensor)]
    if type(input) is not Tensor and type(input) is not torch.nn.Parameter:
        return False
    if has_torch_function(tensors) or not BF._has_kernel(input) or input.dim() < 2:
        return False
    if forward_ad._current_level >= 0 or arguments["eps"] <= 0:
        return False
    channels = input.size(1)
    shape = tuple(arguments.get("normalized_shape", (channels,)))
    if not _fits(arguments, ("weight", "bias"), input, shape):
        return False
    if "num_groups" in arguments:
        return arguments["num_groups"] > 0 and channels % arguments["num_groups"] == 0
    if "running_mean" in arguments:
        pair = "running_mean", "running_var"
        given = sum(arguments[name] is not None for name in pair)
        from_batch = arguments["use_input_stats" if "use_input_stats" in arguments else "training"]
        if given == 1 or (given == 0 and not from_batch) or arguments["momentum"] is None:
            return False
        return _fits(arguments, pair, input, shape)
    return shape == tuple(input.shape[-len(shape) :])


def _fits(
    arguments: dict[str, Any], pair: tuple[str, str], input: Tensor, shape: tuple[int, ...]
) -> bool:
    given = [arguments[name] for name in pair if arguments[name] is not None]
    return len({t.dtype for t in given}) <= 1 and all(
        t.device == input.device
        and t.dtype in (input.dtype, torch.float32)
        and tuple(t.shape) == shape
        for t in given
    )
