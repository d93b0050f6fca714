"""Methods that convert() puts on a module's instance, in the place of those of its class."""

from __future__ import annotations

import copy
import functools
import inspect
import itertools
import types
from collections.abc import Callable
from typing import Any

from torch import nn

from .chains import run_chain
from .source import Site, rewritten
from .tables import ACTIVATIONS, STOCK, is_transparent

__all__ = ["InstanceMethod", "Replicate", "RewrittenMethod", "SequentialForward", "is_sequential"]


class InstanceMethod:
    """A method of ``module``'s class that runs as ``run(module, ...)``.

    It sits on the instance, so that the module keeps its class and other instances their method.
    Pickle and deepcopy of the module bind it to the copy. Where the class has got another method of
    this name since, that one is called.
    """

    name = "forward"

    def __init__(self, module: nn.Module) -> None:
        self.module = module
        self._bind()

    def _bind(self) -> None:
        self.original = getattr(type(self.module), self.name)
        self.run = self._find() or self.original
        self.__class__ = _with_own_code(self._kind(), self.original)

    @classmethod
    def _kind(cls) -> type[InstanceMethod]:
        """The class without code of its own."""
        return cls.__base__ if "_has_own_code" in vars(cls) else cls

    def _find(self) -> Callable[..., Any] | None:
        """What to run; None where the class is not the one that it was made for."""
        raise NotImplementedError

    def __call__(self, *args: Any, **kwargs: Any) -> Any:
        method = getattr(type(self.module), self.name)
        run = self.run if method is self.original else method
        return run(self.module, *args, **kwargs)

    def of(self, module: nn.Module) -> InstanceMethod:
        """The same for a module that is as this one is."""
        made = copy.copy(self)
        made.module = module
        made._bind()
        return made

    def __getattr__(self, name: str) -> Any:
        if name in ("original", "module", "run"):  # not bound yet
            raise AttributeError(name)
        return getattr(self.original, name)

    def __reduce__(self) -> tuple[Any, ...]:
        return object.__new__, (self._kind(),), self.__getstate__()

    def __getstate__(self) -> dict[str, Any]:
        return {k: v for k, v in self.__dict__.items() if k not in ("original", "run")}

    def __setstate__(self, state: dict[str, Any]) -> None:
        self.__dict__.update(state)
        self._bind()

    # What torch.export and others ask of a method.
    @property
    def __name__(self) -> str:
        return self.name

    @property
    def __self__(self) -> nn.Module:
        return self.module

    @property
    def __func__(self) -> Callable[..., Any]:
        return self.original

    @property
    def __code__(self) -> types.CodeType:
        return self.original.__code__

    @property
    def __signature__(self) -> inspect.Signature:
        return inspect.signature(self.original.__get__(self.module))


@functools.lru_cache(maxsize=4096)
def _with_own_code(kind: type[InstanceMethod], original: Callable[..., Any]) -> type[Any]:
    """``kind`` with another code object for each method's ``__call__``: torch.compile counts how
    often it has compiled a code, and compiles no more of it from some number on."""
    call = InstanceMethod.__call__
    own = types.FunctionType(call.__code__.replace(), call.__globals__, call.__name__)
    return type(kind.__name__, (kind,), {"__call__": own, "_has_own_code": True})


class Replicate(InstanceMethod):
    """What ``nn.DataParallel`` calls on each module, for a copy without its contents: so that the
    copy's methods are of the copy."""

    name = "_replicate_for_data_parallel"

    def _find(self) -> Callable[..., Any]:
        return self._replicate

    def _replicate(self, module: nn.Module) -> nn.Module:
        replica: nn.Module = self.original(module)
        for name, method in replica.__dict__.items():
            if isinstance(method, InstanceMethod):
                replica.__dict__[name] = method.of(replica)
        return replica


class SequentialForward(InstanceMethod):
    """The forward of an ``nn.Sequential``: its children one after the other, or several at once."""

    def __init__(self, module: nn.Sequential) -> None:
        self.names = tuple(module._modules)
        # of each call: a child's name, or those of a chain, the last child first
        self.calls = _calls(module)
        super().__init__(module)

    def _find(self) -> Callable[..., Any]:
        return self._forward

    def _forward(self, module: nn.Sequential, input: Any) -> Any:
        children = module._modules
        if tuple(children) != self.names:  # some were added, or taken away
            return self.original(module, input)
        for call in self.calls:
            if isinstance(call, str):
                input = children[call](input)
            else:
                input = run_chain([children[name] for name in call], input)
        return input

    def chains(self) -> list[tuple[nn.Module, ...]]:
        children = self.module._modules
        return [
            tuple(children[name] for name in call)
            for call in self.calls
            if not isinstance(call, str)
        ]


def _calls(module: nn.Sequential) -> tuple[str | tuple[str, ...], ...]:
    children = list(module._modules.items())
    calls: list[str | tuple[str, ...]] = []
    while children:
        name, first = children.pop(0)
        calls.append(name)
        if type(first) not in STOCK:
            continue
        between = list(itertools.takewhile(lambda item: is_transparent(item[1]), children))
        after = children[len(between) :]
        if after and type(after[0][1]) in ACTIVATIONS:
            calls[-1] = (after[0][0], *(n for n, _ in reversed(between)), name)
            children = after[1:]
    return tuple(calls)


def is_sequential(module: nn.Module) -> bool:
    """Whether the forward calls the children one after the other, and does nothing else."""
    kind = type(module)
    return (
        isinstance(module, nn.Sequential)
        and kind.forward is nn.Sequential.forward
        and kind.__iter__ is nn.Sequential.__iter__
    )


class RewrittenMethod(InstanceMethod):
    """A method whose source was read: it does what it says, with chains at ``sites``."""

    def __init__(self, module: nn.Module, name: str, digest: str, sites: tuple[Site, ...]) -> None:
        self.name, self.digest, self.sites = name, digest, sites
        super().__init__(module)

    def _find(self) -> Callable[..., Any] | None:
        return rewritten(self.original, self.digest, self.sites)
