"""Symbolic traces of a module that leave random states and other threads as they were."""

from __future__ import annotations

import random
import threading
from collections.abc import Callable, Sequence
from typing import Any

import numpy
import torch
from torch import fx, nn

__all__ = ["trace"]


class _Tracer(fx.Tracer):
    """Keeps out of other threads' way."""

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
        return super().call_module(m, forward, args, kwargs)


def trace(module: nn.Module, candidates: Sequence[nn.Module], training: bool) -> fx.Graph:
    """The graph of ``module``, in which calls of ``candidates`` are nodes. Its forward runs on
    proxies, and may leave them in ``module``."""
    modules = [m for m in module.modules() if not isinstance(m, torch.jit.ScriptModule)]
    wanted = {id(m) for m in candidates}
    holders = {id(m) for m in modules if any(id(c) in wanted for c in m.modules())} - wanted
    python_random, numpy_random = random.getstate(), numpy.random.get_state()
    try:
        for m in modules:
            m.training = training
        for m in candidates:
            # Only a call goes through the tracer; a direct .forward() must not pass unseen.
            m.__dict__["forward"] = _refuse_direct_forward
        devices = range(torch.cuda.device_count()) if torch.cuda.is_initialized() else ()
        with torch.random.fork_rng(devices=devices):
            return _Tracer(holders).trace(module)
    finally:
        random.setstate(python_random)
        numpy.random.set_state(numpy_random)


def _refuse_direct_forward(*args: Any, **kwargs: Any) -> None:
    raise RuntimeError("a norm or an activation is run by its forward method, not by a call")
