"""What recompute() keeps of a norm's output in the place of the output itself.

    x ── norm ── y ── conv            saved without: x (norm), y (conv)
    │             └ recipe: x, weight, bias, …     with: x (norm), recipe (conv)

The recipe holds what the norm's own backward keeps anyway. It finds y by y's storage, so that views
of y are found too, and only while y has not been written to.
"""

from __future__ import annotations

import contextlib
import functools
import threading
import weakref
from collections.abc import Callable, Iterator
from typing import Any

import torch
from torch import Tensor
from torch.multiprocessing.reductions import StorageWeakRef

__all__ = ["block", "record"]

_ops = torch.ops.batchops
_apply_batch = _ops.batch_norm_apply.default
_apply_group = _ops.group_norm_apply.default

# Whether any thread is in a block: what the norms look at before they call record().
open_anywhere = False
_open_count = 0
_lock = threading.Lock()


class _Thread(threading.local):
    depth = 0
    packed: list[tuple[Any, Any]] | None = None  # what a norm that is running has saved so far

    def __init__(self) -> None:
        self.known: dict[int, _Output] = {}  # by the address of the output's storage


_thread = _Thread()


@contextlib.contextmanager
def block() -> Iterator[None]:
    """Hooks on what autograd saves in this thread; tensors that are not rebuilt go through the
    hooks that were there before."""
    global open_anywhere, _open_count
    outer = torch._C._autograd._top_saved_tensors_default_hooks(True)
    hooks = torch.autograd.graph.saved_tensors_hooks(functools.partial(_pack, outer), _unpack)
    with hooks:
        with _lock:
            _open_count += 1
            open_anywhere = True
        _thread.depth += 1
        try:
            yield
        finally:
            _thread.depth -= 1
            if not _thread.depth:
                _thread.known.clear()
            with _lock:
                _open_count -= 1
                open_anywhere = _open_count > 0


def record(op: Callable[..., Any], args: tuple[Any, ...]) -> Tensor:
    """``op(*args)[0]`` of a norm's operator; inside a block, its output can be rebuilt."""
    thread = _thread
    if not thread.depth:
        return op(*args)[0]
    before, thread.packed = thread.packed, []
    try:
        y, stats, _ = op(*args)
        packed = thread.packed
    finally:
        thread.packed = before
    again = _again(op, args, stats) if packed else None
    place = _place(args[0]) if again is not None else None
    kept = next((kept for at, kept in packed if at == place), None)
    at = _place(y) if place is not None and kept is not None else None
    if at is not None:
        _remember(at[0], _Output(y, kept, *again))
    return y


def _remember(at: int, output: _Output) -> None:
    known = _thread.known
    if len(known) >= 64 and len(known) & (len(known) - 1) == 0:
        for key in [key for key, other in known.items() if other.storage.expired()]:
            del known[key]
    known[at] = output


@functools.cache
def _names(op: Any) -> tuple[str, ...]:
    return tuple(argument.name for argument in op._schema.arguments)


def _again(op: Any, args: tuple[Any, ...], stats: Tensor) -> tuple[Any, tuple[Any, ...]] | None:
    """The operator that makes y from the input and ``stats``, and its arguments after the input;
    None with a residual, which would have to be kept, and where other kernels than those of such an
    operator have made y."""
    named = dict(zip(_names(op), args, strict=False))
    if named["residual"] is not None or op is _ops.instance_norm_update.default:
        return None
    weight, bias = named["weight"], named["bias"]
    activation = named["activation"], named["slope"]
    if op is _ops.group_norm.default:
        return _apply_group, (stats, named["num_groups"], weight, bias, None, *activation)
    if op is _ops.instance_norm.default:
        return _apply_group, (stats, args[0].size(1), weight, bias, None, *activation)
    if op is _ops.layer_norm.default:
        flat = (t if t is None else t.flatten() for t in (weight, bias))
        return _apply_group, (stats, 1, *flat, None, *activation)
    ghost = named.get("ghost_batch_size", 0)
    return _apply_batch, (stats, weight, bias, None, *activation, ghost)


def _place(t: Tensor) -> tuple[int, int, int, torch.dtype] | None:
    """Where a tensor's elements lie, in whatever shape (layer norm keeps its input as rows); None
    where that cannot be told."""
    if not isinstance(t, Tensor) or t.layout is not torch.strided:
        return None
    try:
        storage = t.untyped_storage()._cdata
    except (RuntimeError, NotImplementedError):  # wrappers of functorch
        return None
    return storage, t.storage_offset(), t.numel(), t.dtype


def _check_version(t: Tensor, version: int, size: tuple[int, ...]) -> None:
    if t._version != version:
        raise RuntimeError(
            "one of the variables needed for gradient computation has been modified by an inplace "
            f"operation: [{t.type()} {list(size)}] is at version {t._version}; expected version "
            f"{version} instead (saved inside batchops.recompute())"
        )


class _Kept:
    """A saved tensor as it is. torch leaves the check of versions to hooks."""

    __slots__ = ("__weakref__", "_tensor", "_version")

    def __init__(self, t: Tensor) -> None:
        self._tensor = t.detach()
        self._version = t._version

    def get(self) -> Tensor:
        _check_version(self._tensor, self._version, tuple(self._tensor.shape))
        return self._tensor

    get_ahead = get


class _Copied:
    """A parameter's values. Its own memory may be gone when they are asked for: FSDP frees what it
    has gathered after each forward, and counts no version."""

    __slots__ = ("_values", "_version", "_watch")

    def __init__(self, t: Tensor) -> None:
        self._values = t.detach().clone()
        # Shares the version counter, and no memory.
        self._watch = t.detach()
        self._watch.data = torch.empty(0, dtype=t.dtype, device=t.device)
        self._version = t._version

    def get(self) -> Tensor:
        _check_version(self._watch, self._version, tuple(self._values.shape))
        return self._values


class _Elsewhere:
    """A saved tensor that the hooks around the block have taken. They are asked once in a backward,
    as torch.utils.checkpoint wants it: what a recipe has got stays for the norm itself."""

    __slots__ = ("__weakref__", "_ahead", "_packed", "_unpack")

    def __init__(self, t: Tensor, hooks: tuple[Callable[..., Any], Callable[..., Any]]) -> None:
        pack, self._unpack = hooks
        self._packed = pack(t)
        self._ahead: Tensor | None = None

    def get(self) -> Tensor:
        t, self._ahead = self._ahead, None
        return self._unpack(self._packed) if t is None else t

    def get_ahead(self) -> Tensor:
        if self._ahead is None:
            self._ahead = self._unpack(self._packed)
        return self._ahead


class _Output:
    """A norm's output that may be asked for; keeps neither it nor the norm's input alive."""

    def __init__(self, y: Tensor, kept: Any, op: Any, rest: tuple[Any, ...]) -> None:
        self.storage = StorageWeakRef(y.untyped_storage())
        self.version = y._version
        self.size, self.stride, self.dtype = tuple(y.shape), y.stride(), y.dtype
        self._kept = weakref.ref(kept)
        self._op = op
        stats, *others = rest
        parameters = (_Copied(a) if isinstance(a, Tensor) else a for a in others)
        self._rest = (_Kept(stats), *parameters)

    def recipe(self) -> Callable[[], Tensor] | None:
        kept = self._kept()
        if kept is None:  # the norm's graph is gone
            return None
        op, rest, size, stride = self._op, self._rest, self.size, self.stride

        def rebuild() -> Tensor:
            x = kept.get_ahead()
            with torch.no_grad():
                y = op(x, *(a.get() if isinstance(a, _Kept | _Copied) else a for a in rest))
                if y.size() != size:  # rows of layer norm
                    y = y.view(size)
                if y.stride() != stride:  # the input came back in another layout
                    y = torch.empty_strided(size, stride, dtype=y.dtype, device=y.device).copy_(y)
                return y

        return rebuild


class _Rebuilt:
    """An output, or a view of one, that is computed again when it is wanted."""

    __slots__ = ("__weakref__", "_recipe", "_version", "_view", "_watch")

    def __init__(self, t: Tensor, output: _Output, recipe: Callable[[], Tensor]) -> None:
        self._recipe = recipe
        self._view = t.size(), t.stride(), t.storage_offset()
        # Shares the version counter, and no memory.
        self._watch = t.detach()
        self._watch.data = torch.empty(0, dtype=t.dtype, device=t.device)
        self._version = output.version

    def get(self) -> Tensor:
        _check_version(self._watch, self._version, tuple(self._view[0]))
        y = self._recipe()
        size, stride, offset = self._view
        if y.size() == size and y.stride() == stride and offset == 0:
            return y
        return y.as_strided(size, stride, offset)

    get_ahead = get


def _pack(outer: Any, t: Tensor) -> Any:
    at = _place(t) if _thread.known or _thread.packed is not None else None
    packed = _rebuilt(t, at)
    if packed is None:
        packed = _Kept(t) if outer is None else _Elsewhere(t, outer)
    if _thread.packed is not None:
        # parameters may share the input's storage
        _thread.packed.append((at if t.dim() > 1 else None, packed))
    return packed


def _rebuilt(t: Tensor, at: tuple[Any, ...] | None) -> _Rebuilt | None:
    output = _thread.known.get(at[0]) if at is not None else None
    if output is None or output.storage.expired():
        return None
    if t._version != output.version or t.dtype != output.dtype or t.is_neg() or t.is_conj():
        return None
    recipe = output.recipe()
    return None if recipe is None else _Rebuilt(t, output, recipe)


def _unpack(packed: Any) -> Tensor:
    return packed.get()
