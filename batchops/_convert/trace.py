"""Symbolic traces of a model that leave the model, its state and other threads as they were."""

from __future__ import annotations

import copy
import inspect
import itertools
import random
import sys
import threading
from collections import OrderedDict
from collections.abc import Callable, Iterable
from types import FrameType
from typing import Any

import numpy
import torch
from torch import fx, nn

__all__ = ["FRAME", "trace", "traces"]

FRAME = "batchops_frame"


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
            output.node.meta.setdefault(FRAME, _caller())
        return output


_MACHINERY = (fx._symbolic_trace.__file__, nn.modules.module.__file__, __file__)


def _caller() -> FrameType | None:
    """The frame of the user's function that called the module being traced."""
    frame: FrameType | None = sys._getframe(1)
    while frame is not None and frame.f_code.co_filename in _MACHINERY:
        frame = frame.f_back
    return frame


def traces(model: nn.Module, candidates: Iterable[nn.Module]) -> list[fx.Graph]:
    """Graphs of ``model`` in training and eval mode, with and without gradients, and with
    arguments that default to None given and left out.

    ``candidates`` are the modules in question: their calls are nodes, and modules that hold none
    of them are not looked into. Node.meta[FRAME] is the frame that a module was called from; take
    it out when done, since it keeps everything in it alive.
    """
    candidates = list(candidates)
    parameters = inspect.signature(model.forward).parameters.values()
    nones = {p.name: None for p in parameters if p.default is None}
    return [
        trace(model, candidates, training, gradients, concrete)
        for training, gradients in itertools.product((True, False), repeat=2)
        for concrete in ([None, nones] if nones else [None])
    ]


def trace(
    model: nn.Module,
    candidates: list[nn.Module],
    training: bool,
    gradients: bool = True,
    concrete: dict[str, None] | None = None,
) -> fx.Graph:
    """The forward runs on proxies. What it sets on modules on the way, training flags included,
    what it puts into their lists, dicts and sets, and the random states are put back."""
    if "forward" in model.__dict__:
        raise RuntimeError(f"{type(model).__name__} has a forward of its own on the instance")
    modules = [m for m in model.modules() if not isinstance(m, torch.jit.ScriptModule)]
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
        devices = range(torch.cuda.device_count()) if torch.cuda.is_initialized() else ()
        with torch.random.fork_rng(devices=devices), torch.set_grad_enabled(gradients):
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
