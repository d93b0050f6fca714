"""Which norms and activations of a model may become one, whatever way the model is run."""

from __future__ import annotations

import dis
import types
import warnings
from collections import Counter
from collections.abc import Iterator
from dataclasses import dataclass, field

import torch
from torch import fx, nn

from .blocks import is_add, is_same_computation, known_block
from .tables import (
    Activation,
    activation_of,
    fused_norm_act,
    is_norm,
    is_plain,
    is_transparent,
    stock_of_norm_act,
)
from .trace import FRAME, traces

__all__ = ["Plan", "plan"]


@dataclass
class Plan:
    """What is to be done to a model."""

    norms: list[tuple[nn.Module, Activation]] = field(default_factory=list)
    # parent, name of the activation module in it, and how many norms do its work
    places: list[tuple[nn.Module, str, int]] = field(default_factory=list)
    blocks: list[nn.Module] = field(default_factory=list)
    norm_acts: list[tuple[nn.Module, type[nn.Module], Activation | None]] = field(
        default_factory=list
    )


@dataclass
class _Part:
    """A module that could be traced, inside others (outermost first) that could not."""

    root: nn.Module
    graphs: list[fx.Graph]
    holders: tuple[nn.Module, ...]


_Use = tuple[str, int] | None  # kind and partner's id; None for any other use
_DIRECT, _JOIN = "direct", "join"


class _Seen:
    """How norms and activations were used in all traces, and the functions of the joins."""

    def __init__(self) -> None:
        self.uses: dict[int, set[_Use]] = {}
        self.code: dict[int, set[types.CodeType]] = {}

    def add(self, module: nn.Module, use: _Use) -> None:
        self.uses.setdefault(id(module), set()).add(use)

    def partner(self, norm: nn.Module) -> int | None:
        """The activation that follows the norm directly, always and after nothing else."""
        uses = self.uses.get(id(norm), set())
        use = next(iter(uses)) if len(uses) == 1 else None
        if use is None or use[0] != _DIRECT or self.uses[use[1]] != {(_DIRECT, id(norm))}:
            return None
        return use[1]


def plan(model: nn.Module) -> Plan:
    """Finds what may be fused. One warning where that cannot be told."""
    registered = Counter(id(m) for _, m in model.named_modules(remove_duplicate=False))
    modules = [m for m in model.modules() if not isinstance(m, torch.jit.ScriptModule)]
    result = Plan()
    for module in modules:
        fused = fused_norm_act(module)
        if fused and all(registered[id(m)] == registered[id(module)] for m in module.children()):
            result.norm_acts.append((module, *fused))

    norms = [m for m in modules if is_norm(m)]
    activations = {id(m): m for m in modules if activation_of(m) is not None}
    place_of = {
        id(child): (parent, name)
        for parent in modules
        if stock_of_norm_act(parent) is None
        for name, child in parent._modules.items()
        if id(child) in activations
    }
    if not norms or not place_of:
        return result
    opaque = [m for m in modules if stock_of_norm_act(m) is not None]
    candidates = [*norms, *activations.values(), *opaque]
    lone = {id(m) for m in candidates if registered[id(m)] == 1 and is_plain(m)}
    seen = _Seen()
    for part in _parts(model, norms, activations, candidates):
        for graph in part.graphs:
            _look(part.root, graph, seen)
        lone -= _reached(part, candidates)

    for module in modules:
        block = known_block(module)
        if block is None:
            continue
        join, *direct = [
            (module._modules[norm], module._modules[activation])
            for norm, activation in (block.join, *block.direct)
        ]
        uses = [(_JOIN, *join), *((_DIRECT, *pair) for pair in direct)]
        code = getattr(type(module).forward, "__code__", None)
        if (
            all(
                is_norm(norm)
                and {id(norm), id(activation)} <= lone
                and id(activation) in place_of
                and seen.uses.get(id(norm)) == {(kind, id(activation))}
                and seen.uses[id(activation)] == {(k, id(n)) for k, n, a in uses if a is activation}
                for kind, norm, activation in uses
            )
            and seen.code[id(join[0])] == {code}
            and is_same_computation(module, block, candidates)
        ):
            result.blocks.append(module)
            result.norms += [(norm, activation_of(a)) for _, norm, a in uses]
            counts = Counter(id(a) for _, _, a in uses)
            result.places += [(*place_of[a], count) for a, count in counts.items()]

    for norm in norms:
        partner = seen.partner(norm)
        done = any(norm is other for other, _ in result.norms)
        if partner is not None and not done and {id(norm), partner} <= lone and partner in place_of:
            result.norms.append((norm, activation_of(activations[partner])))
            result.places.append((*place_of[partner], 1))
    return result


# ------------------------------------------------------------------------------------- tracing


def _parts(
    model: nn.Module,
    norms: list[nn.Module],
    activations: dict[int, nn.Module],
    candidates: list[nn.Module],
) -> list[_Part]:
    """The model's traces, or those of the largest modules in it that can be traced."""
    ids = {id(m) for m in norms}
    found: list[_Part] = []
    errors: list[Exception] = []

    def descend(module: nn.Module, holders: tuple[nn.Module, ...]) -> None:
        inside = {id(m) for m in module.modules()}
        if not inside & ids or not inside & set(activations):
            return
        if any(part.root is module for part in found):
            return
        try:
            inner = [m for m in candidates if id(m) in inside]
            found.append(_Part(module, traces(module, inner), holders))
        except Exception as error:
            errors.append(error)
            for child in module.children():
                descend(child, (*holders, module))

    descend(model, ())
    known = {id(m) for part in found for m in part.root.modules()}
    if errors and not ids <= known and not set(activations) <= known:
        warnings.warn(
            f"batchops.convert: {type(model).__name__} cannot be traced by torch.fx, so its norms "
            "are swapped but not fused with their activations, except in parts that can be "
            f"({type(errors[0]).__name__}: {errors[0]})",
            stacklevel=4,
        )
    return found


# What a function does to get at the modules inside a container.
_LOOPS = ("FOR_ITER", "BINARY_SUBSCR", "BINARY_SLICE")


def _reached(part: _Part, candidates: list[nn.Module]) -> set[int]:
    """The candidates that code around a part might call past the part's own forward: a trace of the
    part alone says nothing of that."""
    inside = {id(m) for m in candidates}
    words: set[str] = set()
    loops = False
    for holder in part.holders:
        if type(holder).__module__.startswith("torch.nn."):
            continue  # containers, which only call
        for code in _code_of(type(holder)):
            words.update(code.co_names)
            words.update(c for c in code.co_consts if isinstance(c, str))
            loops |= any(
                i.opname in _LOOPS or (i.opname == "BINARY_OP" and i.argrepr == "[]")
                for i in dis.get_instructions(code)
            )
    reached = set()
    for name, module in part.root.named_modules():
        path = name.split(".")
        named = {step for step in path if not step.isdigit()}
        if id(module) in inside and (named & words or (loops and path[0].isdigit())):
            reached.add(id(module))
    return reached


def _code_of(kind: type) -> Iterator[types.CodeType]:
    """The code of forward and of the methods whose names it mentions, and so on."""
    wanted, done = ["forward", "__call__"], set()
    while wanted:
        name = wanted.pop()
        if name in done:
            continue
        done.add(name)
        for base in kind.__mro__:
            if base is nn.Module:
                break
            value = vars(base).get(name)
            value = getattr(value, "fget", None) or getattr(value, "__func__", None) or value
            code = getattr(value, "__code__", None)
            for nested in _nested(code) if code else ():
                wanted.extend(nested.co_names)
                yield nested


def _nested(code: types.CodeType) -> Iterator[types.CodeType]:
    yield code
    for constant in code.co_consts:
        if isinstance(constant, types.CodeType):
            yield from _nested(constant)


# -------------------------------------------------------------------------------- graphs' content


def _look(root: nn.Module, graph: fx.Graph, seen: _Seen) -> None:
    """Notes every call of a norm with what alone uses its output, and every call of an activation
    on anything else. Both must be called from one running function, so that a part of the model
    called alone does what it did."""
    by_name = dict(root.named_modules(remove_duplicate=False))
    module_of = {
        node: by_name[str(node.target)] for node in graph.nodes if node.op == "call_module"
    }
    paired = set()
    for node, norm in module_of.items():
        if not is_norm(norm):
            continue
        end = _through_transparent(node, module_of)
        user = _sole_user(end)
        kind = _DIRECT
        if user is not None and end is node and is_add(user):
            in_place = user.args[0] is not node and _changes_first(user)
            end, user, kind = user, None if in_place else _sole_user(user), _JOIN
        follower = module_of.get(user) if user is not None else None
        frame = node.meta.get(FRAME)
        if (
            activation_of(follower) is not None
            and len(node.args) == 1
            and not node.kwargs
            and user.args == (end,)
            and not user.kwargs
            and frame is not None
            and user.meta.get(FRAME) is frame
        ):
            paired.add(user)
            seen.add(norm, (kind, id(follower)))
            seen.add(follower, (kind, id(norm)))
            if kind == _JOIN:
                seen.code.setdefault(id(norm), set()).add(frame.f_code)
        else:
            seen.add(norm, None)
    for node, module in module_of.items():
        if activation_of(module) is not None and node not in paired:
            seen.add(module, None)
    for node in graph.nodes:
        node.meta.pop(FRAME, None)  # a frame keeps everything in it alive


def _sole_user(node: fx.Node) -> fx.Node | None:
    return next(iter(node.users)) if len(node.users) == 1 else None


def _changes_first(node: fx.Node) -> bool:
    name = node.target if isinstance(node.target, str) else node.target.__name__
    return name in ("iadd", "add_", "__iadd__")


def _through_transparent(node: fx.Node, module_of: dict[fx.Node, nn.Module]) -> fx.Node:
    """The node whose output is this one's after modules that only hand it on."""
    user = _sole_user(node)
    while (
        user is not None
        and user in module_of
        and is_transparent(module_of[user])
        and user.args == (node,)
        and not user.kwargs
    ):
        node, user = user, _sole_user(user)
    return node
