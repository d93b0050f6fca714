"""Where a method calls an activation on a norm's output, and the same method with one call there.

    self.act(self.norm(x))                        run_chain((self.act, self.norm), x)

    x = self.norm(x)                              x = run_chain((self.act, self.norm), x)
    x = self.act(x)                               x = x

    F.relu(self.norm(x), inplace=True)            run_call((F.relu, self.norm), x, inplace=True)
    self.norm(x).relu()                           run_method((self.norm,), x, "relu")

    x = self.norm(x)                              x = begin_sum(self.norm, x, self.act, ...)
    x += self.shortcut(z)                         x = add_in_place(x, self.shortcut(z))
    x = self.act(x)                               x = end_sum(self.act, x)

Nothing that the method does otherwise is touched, and nothing outside of it: what else calls the
norm gets the norm's output. The source counts only where it compiles to the method's own code.
"""

from __future__ import annotations
import __future__

import ast
import collections
import copy
import functools
import hashlib
import inspect
import itertools
import linecache
import operator
import types
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import nn

from .chains import run_call, run_chain, run_method
from .sums import add_by, add_in_place, add_left, add_right, begin_sum, end_sum
from .tables import METHODS, Activation, follows_sums, of_function, of_module

__all__ = ["Found", "Site", "SourceError", "find", "mentions", "rewritten"]

# What the rewritten method calls, as variables around it.
_HELPERS = {
    f"_batchops_{helper.__name__}": helper
    for helper in (
        *(run_chain, run_call, run_method),
        *(begin_sum, add_left, add_right, add_in_place, add_by, end_sum),
    )
}


@dataclass(frozen=True)
class Site:
    """Numbers of nodes in the order of ast.walk: the calls of the activation, of identities, of the
    norm. With ``add``, the helper for it, a sum stands between activation and norm; then come the
    names of the children that are called before the norm now, and of those that are None."""

    nodes: tuple[int, ...]
    add: str = ""
    watched: tuple[str, ...] = ()
    absent: tuple[str, ...] = ()


class SourceError(Exception):
    """The source of a function is not to be had, or is another one by now."""


@dataclass
class Found:
    """A place in a method; the modules called there, where they are the same at each run, without
    the activation if that is a function, which then stands beside them."""

    site: Site
    modules: tuple[nn.Module, ...] | None
    activation: Activation | None = None


# ------------------------------------------------------------------------------------ the source


@dataclass
class _Source:
    """A function's definition, what to know it by, and what its file imports."""

    definition: ast.FunctionDef
    digest: str
    imported: tuple[str, ...]


@functools.lru_cache(maxsize=4096)
def _read(code: types.CodeType, owner: str | None, free: tuple[str, ...]) -> _Source:
    """What ``code`` was compiled from."""
    try:
        definition = _parsed(code)
        imported = _imported("".join(linecache.getlines(code.co_filename)))
        same = _same(_compiled(definition, code, owner, free, imported), code)
    except Exception as error:  # of inspect, of the parser, of the compiler: it does not count then
        raise SourceError(f"{type(error).__name__}: {error}") from error
    if not same:
        raise SourceError("it compiles to other code: the file may have changed")
    digest = hashlib.sha256(ast.dump(definition).encode()).hexdigest()
    return _Source(definition, digest, imported)


def _parsed(code: types.CodeType) -> ast.FunctionDef:
    """The definition at the place that ``code`` names, without what is not in the code."""
    lines, first = inspect.getsourcelines(code)
    # in a block of its own, so that it may stay indented: what a string in it says counts
    inside = lines[0][:1].isspace()
    tree: Any = ast.parse("".join(["if True:\n", *lines] if inside else lines))
    definition = tree.body[0].body[0] if inside else tree.body[0]
    if not isinstance(definition, ast.FunctionDef) or definition.name != code.co_name:
        raise LookupError(f"there is no def {code.co_name} at its place")
    ast.increment_lineno(definition, first - (2 if inside else 1))
    definition.decorator_list, definition.returns = [], None
    arguments = definition.args
    arguments.defaults = [ast.copy_location(ast.Constant(None), a) for a in arguments.defaults]
    arguments.kw_defaults = [
        a and ast.copy_location(ast.Constant(None), a) for a in arguments.kw_defaults
    ]
    for argument in ast.walk(arguments):
        if isinstance(argument, ast.arg):
            argument.annotation = None
    return definition


def _compiled(
    definition: ast.FunctionDef,
    code: types.CodeType,
    owner: str | None,
    free: tuple[str, ...],
    imported: tuple[str, ...],
) -> types.CodeType:
    """The function's code, in a class of the same name (private names take it in), with the same
    variables around it, and the file's imports (calls of what was imported are other code)."""
    body: list[ast.stmt] = [definition]
    path = ["outer", code.co_name]
    if owner is not None:
        path.insert(1, owner)
        body = [_made(ast.ClassDef, name=owner, bases=[], keywords=[], body=body)]
        if owner not in free:
            body.insert(0, ast.Global([owner]))  # as the class's name is to its methods
    names = [ast.arg(name) for name in free if name != "__class__"]
    arguments = ast.arguments(
        posonlyargs=[], args=names, kwonlyargs=[], kw_defaults=[], defaults=[]
    )
    outer = _made(ast.FunctionDef, name="outer", args=arguments, body=body)
    imports = [ast.Import([ast.alias(name) for name in imported])] if imported else []
    module = ast.fix_missing_locations(ast.Module(body=[*imports, outer], type_ignores=[]))
    flags = code.co_flags & _FUTURES
    inner = compile(module, code.co_filename, "exec", flags=flags, dont_inherit=True)
    for name in path:
        codes = (c for c in inner.co_consts if isinstance(c, types.CodeType))
        inner = next(c for c in codes if c.co_name == name)
    return inner


@functools.lru_cache(maxsize=256)
def _imported(text: str) -> tuple[str, ...]:
    """The names that are imported at the top of a file."""
    names: list[str] = []
    nodes: list[ast.AST] = [ast.parse(text)]
    while nodes:
        node = nodes.pop()
        if isinstance(node, ast.Import | ast.ImportFrom):
            names += [(a.asname or a.name).split(".")[0] for a in node.names if a.name != "*"]
        elif not isinstance(node, (*_FUNCTIONS, ast.expr)):
            nodes.extend(ast.iter_child_nodes(node))
    return tuple(sorted(set(names)))


def _made(kind: type[Any], **fields: Any) -> Any:
    more = {"type_params": []} if "type_params" in kind._fields else {}
    return kind(decorator_list=[], **fields, **more)


_FUTURES = functools.reduce(
    operator.or_, (getattr(__future__, name).compiler_flag for name in __future__.all_feature_names)
)
_NESTED = inspect.CO_NESTED  # whether it was compiled inside a function, as _compiled does
_ALIKE = (
    *("co_code", "co_names", "co_varnames", "co_freevars", "co_cellvars", "co_name"),
    *("co_argcount", "co_posonlyargcount", "co_kwonlyargcount"),
)


def _same(a: Any, b: Any) -> bool:
    """Whether two codes do the same, or two constants of them are one."""
    if type(a) is not type(b):
        return False
    if isinstance(a, types.CodeType):
        return (
            all(getattr(a, name) == getattr(b, name) for name in _ALIKE)
            and a.co_flags | _NESTED == b.co_flags | _NESTED
            and _same(a.co_consts, b.co_consts)
        )
    if isinstance(a, tuple):
        return len(a) == len(b) and all(map(_same, a, b))
    if isinstance(a, str) and "<locals>" in a and "<locals>" in b:  # names of inner functions
        return a.rpartition(".")[2] == b.rpartition(".")[2]
    # -0.0 is equal to 0.0, and a frozenset has its elements in any order
    return a == b if isinstance(a, frozenset) else repr(a) == repr(b)


def _owner(function: types.FunctionType) -> str | None:
    """The class whose body a function was written in."""
    path = function.__qualname__.split(".")
    return path[-2] if len(path) > 1 and path[-2] != "<locals>" else None


def _wrapped(function: Any) -> tuple[types.FunctionType, int] | None:
    """What a decorator's function calls, and the number of its variable that holds it."""
    inner = getattr(function, "__wrapped__", None)
    if not isinstance(inner, types.FunctionType) or not isinstance(function, types.FunctionType):
        return None
    for number, cell in enumerate(function.__closure__ or ()):
        try:
            if cell.cell_contents is inner:
                return inner, number
        except ValueError:  # an empty cell
            continue
    return None


def mentions(function: Any) -> set[str]:
    """The names in a function, and in those within it."""
    while (wrapped := _wrapped(function)) is not None:
        function = wrapped[0]
    names: set[str] = set()
    codes = [getattr(function, "__code__", None)]
    while codes:
        code = codes.pop()
        if isinstance(code, types.CodeType):
            names.update(code.co_names)
            codes.extend(code.co_consts)
    return names


# ------------------------------------------------------------------------------------- rewriting


def rewritten(function: Any, digest: str, sites: tuple[Site, ...]) -> Callable[..., Any] | None:
    """``function`` with a chain at each of ``sites``; None where its source is
    not the one of ``digest``."""
    wrapped = _wrapped(function)
    if wrapped is not None:
        inner = rewritten(wrapped[0], digest, sites)
        if inner is None:
            return None
        cells = list(function.__closure__)
        cells[wrapped[1]] = types.CellType(inner)
        return _remade(function, function.__code__, tuple(cells))
    try:
        code = _rewritten_code(function.__code__, _owner(function), digest, sites)
    except (SourceError, AttributeError):  # not there, or no function of Python's
        return None
    cells_of = dict(zip(function.__code__.co_freevars, function.__closure__ or (), strict=True))
    cells_of.update((name, types.CellType(helper)) for name, helper in _HELPERS.items())
    return _remade(function, code, tuple(cells_of[name] for name in code.co_freevars))


def _remade(
    function: types.FunctionType, code: types.CodeType, closure: tuple[types.CellType, ...]
) -> types.FunctionType:
    made = types.FunctionType(
        code, function.__globals__, function.__name__, function.__defaults__, closure
    )
    made.__kwdefaults__ = function.__kwdefaults__
    made.__qualname__ = function.__qualname__
    made.__doc__ = function.__doc__
    made.__annotations__ = function.__annotations__
    made.__dict__.update(function.__dict__)
    return made


@functools.lru_cache(maxsize=4096)
def _rewritten_code(
    code: types.CodeType, owner: str | None, digest: str, sites: tuple[Site, ...]
) -> types.CodeType:
    read = _read(code, owner, code.co_freevars)
    if digest != read.digest:
        raise SourceError("it is another one than the sites were found in")
    definition = copy.deepcopy(read.definition)
    nodes = list(ast.walk(definition))
    rewrite = _Rewrite()
    for site in sites:
        rewrite.add(site, [nodes[number] for number in site.nodes], definition)
    free = (*code.co_freevars, *_HELPERS)
    return _compiled(rewrite.visit(definition), code, owner, free, read.imported)


class _Rewrite(ast.NodeTransformer):
    """Puts other nodes in the place of those of the sites."""

    def __init__(self) -> None:
        self.made: dict[int, Callable[[Any], ast.AST]] = {}

    def add(self, site: Site, nodes: list[Any], definition: ast.FunctionDef) -> None:
        if any(id(node) in self.made for node in nodes):
            raise SourceError("two chains share a call")
        first, norm = nodes[0], nodes[-1]
        if site.add:
            own = (*definition.args.posonlyargs, *definition.args.args)[0].arg
            self.made[id(norm)] = lambda _: self._begin(first, norm, own, site)
            self.made[id(nodes[1])] = lambda node: self._add(node, site.add)
            self.made[id(first)] = self._end
        else:  # the chain where the norm was called, and its result where the others were
            self.made.update((id(node), lambda node: self.visit(_operand(node))) for node in nodes)
            self.made[id(norm)] = lambda _: self._run(nodes)

    def visit(self, node: ast.AST) -> Any:
        make = self.made.get(id(node))
        if make is None:
            return super().visit(node)
        new = make(node)
        return new if hasattr(new, "lineno") else ast.copy_location(new, node)

    def _run(self, chain: list[ast.Call]) -> ast.expr:
        first, norm = chain[0], chain[-1]
        of_tensor = not first.args
        modules = [self.visit(call.func) for call in (chain[1:] if of_tensor else chain)]
        arguments = [_tuple(modules), self.visit(norm.args[0])]
        if of_tensor:
            return _call("run_method", *arguments, ast.Constant(first.func.attr))
        if first.args[1:] or first.keywords:
            return _call("run_call", *arguments, *first.args[1:], keywords=first.keywords)
        return _call("run_chain", *arguments)

    def _begin(self, activation: ast.Call, norm: ast.Call, own: str, site: Site) -> ast.expr:
        activation = copy.deepcopy(activation)  # a part of it comes at the sum's end as well
        names = [_tuple(list(map(ast.Constant, names))) for names in (site.watched, site.absent)]
        return _call(
            "begin_sum",
            *(self.visit(norm.func), self.visit(norm.args[0]), activation.func),
            *(ast.Name(own, ast.Load()), *names),
            *activation.args[1:],
            keywords=activation.keywords,
        )

    def _add(self, node: Any, helper: str) -> ast.AST:
        if isinstance(node, ast.AugAssign):
            left = ast.Name(node.target.id, ast.Load())
            return ast.Assign([node.target], _call(helper, left, self.visit(node.value)))
        if isinstance(node, ast.BinOp):
            return _call(helper, self.visit(node.left), self.visit(node.right))
        return _call(helper, node.func, *map(self.visit, node.args))

    def _end(self, node: ast.Call) -> ast.expr:
        more = {"keywords": node.keywords}
        return _call("end_sum", node.func, self.visit(node.args[0]), *node.args[1:], **more)


def _call(helper: str, *args: ast.expr, keywords: Sequence[ast.keyword] = ()) -> ast.Call:
    name = ast.Name(f"_batchops_{helper}", ast.Load())
    return ast.Call(name, list(args), list(keywords))


def _tuple(elements: list[ast.expr]) -> ast.expr:
    return ast.Tuple(elements, ast.Load())


def _operand(call: ast.Call) -> ast.expr:
    """What an activation is called on: its argument, or the object of the method."""
    return call.args[0] if call.args else call.func.value


def _takes_one(node: ast.AST) -> bool:
    """A call with one argument, by position."""
    return (
        isinstance(node, ast.Call)
        and len(node.args) == 1
        and not node.keywords
        and not isinstance(node.args[0], ast.Starred)
    )


def _arguments(call: ast.Call) -> tuple[tuple[Any, ...], dict[str, Any]] | None:
    """The arguments behind the first of a call, if they are constants."""
    if not call.args or isinstance(call.args[0], ast.Starred):
        return None
    try:
        args = tuple(map(ast.literal_eval, call.args[1:]))
        # **something has no name, and no function takes one of name "None"
        return args, {str(k.arg): ast.literal_eval(k.value) for k in call.keywords}
    except (ValueError, TypeError):
        return None


def _is_method(node: ast.AST) -> bool:
    """``value.relu()``"""
    return (
        isinstance(node, ast.Call)
        and isinstance(node.func, ast.Attribute)
        and node.func.attr in METHODS
        and not node.args
        and not node.keywords
    )


# --------------------------------------------------------------------------------------- finding


def find(
    function: Any,
    module: nn.Module,
    is_norm: Callable[[nn.Module], bool],
    is_activation: Callable[[nn.Module], bool],
    is_transparent: Callable[[nn.Module], bool],
) -> tuple[str, list[Found]]:
    """What to know the source of a method of ``module``'s class by, and the chains in it.

    Raises SourceError.
    """
    while (wrapped := _wrapped(function)) is not None:
        function = wrapped[0]
    code = function.__code__
    source = _read(code, _owner(function), code.co_freevars)
    finder = _Finder(function, source.definition, module)
    found: list[Found] = []
    for call in finder.calls:
        if not any(map(is_norm, finder.callees(call))):
            continue
        chain = finder.chain(call, is_activation, is_transparent)
        if chain is not None:
            found.append(finder.found(chain))
        else:
            found += finder.sums(call)
    uses = collections.Counter(number for f in found for number in f.site.nodes)
    # a call whose name says little may be the end of one chain and the start of the next
    return source.digest, [f for f in found if all(uses[number] == 1 for number in f.site.nodes)]


# Between a statement and a call in it that is made whenever the statement runs.
_ALWAYS = (
    *(ast.Call, ast.keyword, ast.Starred, ast.Attribute, ast.Subscript, ast.Tuple, ast.List),
    *(ast.BinOp, ast.UnaryOp, ast.Assign, ast.AugAssign, ast.Return, ast.Expr),
)
_FUNCTIONS = (ast.FunctionDef, ast.AsyncFunctionDef, ast.Lambda, ast.ClassDef)
# What a norm's call writes.
_STATISTICS = {"running_mean", "running_var", "num_batches_tracked"}
# What looks at a function's variables from inside.
_LOOKS = {"locals", "vars", "eval", "exec"}


class _Finder:
    """One method, read for one instance."""

    def __init__(
        self, function: types.FunctionType, definition: ast.FunctionDef, module: nn.Module
    ) -> None:
        self.code = code = function.__code__
        self.function = function
        self.module = module
        self.nodes = list(ast.walk(definition))
        self.number = {id(node): n for n, node in enumerate(self.nodes)}
        self.parent = {
            id(child): node for node in self.nodes for child in ast.iter_child_nodes(node)
        }
        self.calls = [node for node in self.nodes if _takes_one(node)]
        self.next: dict[int, ast.stmt] = {}
        for block in _blocks(self.nodes):
            self.next.update({id(a): b for a, b in itertools.pairwise(block)})
        self.definition = definition
        self.every = list(module.modules())
        first = code.co_varnames[0] if code.co_argcount else None
        bound = [
            *(n.id for n in self.nodes if isinstance(n, ast.Name) and not _is_load(n)),
            *(n.arg for n in self.nodes if isinstance(n, ast.arg)),
        ]
        # the name of the instance, as long as it means nothing else anywhere
        self.own = first if bound.count(first) == 1 else None
        self.bound: dict[str, list[nn.Module]] = {}
        for node in self.nodes:
            if isinstance(node, ast.For | ast.comprehension):
                for name, modules in self._bind(node.target, node.iter):
                    if modules and bound.count(name) == 1:
                        self.bound[name] = modules
        names = {n.id for n in self.nodes if isinstance(n, ast.Name)}
        self.can_split = not names & _LOOKS and not any(
            isinstance(n, ast.NamedExpr) for n in self.nodes
        )
        self.has_try = any(type(n).__name__ in ("Try", "TryStar") for n in self.nodes)
        self.reads_statistics = any(
            isinstance(n, ast.Attribute) and n.attr in _STATISTICS for n in self.nodes
        )

    def _bind(self, target: ast.expr, over: ast.expr) -> Iterator[tuple[str, list[nn.Module]]]:
        """The names in a loop's ``target``, and the modules that they go over."""
        targets = target.elts if isinstance(target, ast.Tuple) else []
        if isinstance(target, ast.Name):
            if isinstance(over, ast.Call) and isinstance(over.func, ast.Attribute):
                over = over.func.value if over.func.attr == "values" else over
            yield target.id, _children(self._modules_of_path(over), None)
        elif isinstance(over, ast.Call) and isinstance(over.func, ast.Name):
            if over.func.id == "zip":
                for inner, each in zip(targets, over.args, strict=False):
                    yield from self._bind(inner, each)
            elif over.func.id == "enumerate" and len(targets) == 2 and over.args:
                yield from self._bind(targets[1], over.args[0])

    def found(
        self,
        nodes: list[Any],
        add: str = "",
        watched: Sequence[str] = (),
        absent: Sequence[str] = (),
    ) -> Found:
        """Of the nodes of a site."""
        numbers = tuple(self.number[id(node)] for node in nodes)
        activation = self.activation(nodes[0])
        calls = nodes[1:] if activation else nodes
        each = [self.callees(c) for c in calls if not add or c is not nodes[1]]
        fixed = all(len(modules) == 1 for modules in each)
        modules = tuple(modules[0] for modules in each) if fixed else None
        return Found(Site(numbers, add, tuple(watched), tuple(absent)), modules, activation)

    def activation(self, call: ast.Call) -> Activation | None:
        """What a call does that is one of a function, or of a tensor's method."""
        if _is_method(call):
            return METHODS[call.func.attr][1]
        arguments = _arguments(call)
        return None if arguments is None else of_function(self._value(call.func), *arguments)

    def _value(self, node: ast.expr) -> Any:
        """What a path of names means by now, as far as that shows without running anything."""
        if isinstance(node, ast.Name):
            return self.module if node.id == self.own else _variable(self.function, node.id)
        if not isinstance(node, ast.Attribute):
            return None
        value = self._value(node.value)
        if isinstance(value, nn.Module):
            names = {**value._modules, **value.__dict__}
        else:
            names = vars(value) if isinstance(value, types.ModuleType) else {}
        return names.get(node.attr)

    def callees(self, call: ast.Call) -> list[nn.Module]:
        """The modules that a call may be one of, as far as the names say."""
        return self._modules(call.func)

    def _modules(self, node: ast.expr) -> list[nn.Module]:
        if isinstance(node, ast.Name):
            if node.id == self.own:
                return [self.module]
            every = self.every if node.id in self.code.co_varnames else []
            return self.bound.get(node.id, every)
        if isinstance(node, ast.Attribute):
            return _children(self._modules_of_path(node.value), node.attr)
        if isinstance(node, ast.Subscript):
            return _children(self._modules_of_path(node.value), _constant(node.slice))
        if isinstance(node, ast.IfExp):
            return [*self._modules(node.body), *self._modules(node.orelse)]
        if _is_getattr(node):
            return _children(self._modules_of_path(node.args[0]), _constant(node.args[1]))
        return []

    def _modules_of_path(self, node: ast.expr) -> list[nn.Module]:
        """As above, for what is only a step on the way: local names are too many."""
        return [] if isinstance(node, ast.Name) and node.id != self.own else self._modules(node)

    def chain(
        self,
        norm: ast.Call,
        is_activation: Callable[[nn.Module], bool],
        is_transparent: Callable[[nn.Module], bool],
    ) -> list[ast.Call] | None:
        """The calls from the activation's to the norm's, if such follow and nothing else does."""
        chain = [norm]
        name = None  # the variable that the output went into
        skipped: set[str] = set()  # variables set between the statements
        while True:
            user = self._user(chain[-1])
            if user is None:
                step = self._by_name(self.parent[id(chain[-1])], chain[-1], skipped)
                if step is None:
                    return None
                name, user = step
            if self.activation(user) is not None:
                chain.append(user)
                break
            if user not in self.calls:
                return None
            callees = self.callees(user)
            if any(map(is_activation, callees)):
                chain.append(user)
                break
            if not callees or not all(map(is_transparent, callees)):
                return None
            chain.append(user)
        if name is not None and not self._may_split(chain, name, skipped):
            return None
        return chain[::-1]

    def _user(self, value: ast.expr) -> ast.Call | None:
        """The call that is made on a value, as its first argument or as a method of it."""
        outer = self.parent[id(value)]
        if isinstance(outer, ast.Attribute):
            call = self.parent[id(outer)]
            return call if _is_method(call) and call.func is outer else None
        is_first = isinstance(outer, ast.Call) and outer.args[:1] == [value]
        return outer if is_first else None

    def _by_name(
        self, statement: ast.AST, value: ast.Call, skipped: set[str]
    ) -> tuple[str, ast.Call] | None:
        """``name = value`` and the call in the next statement that alone uses ``name``."""
        name = _target(statement)
        if name is None or statement.value is not value:
            return None
        following = self._after(statement, name, skipped)
        if following is None:
            return None
        loads = self._loads(following, name)
        user = self._user(loads[0]) if len(loads) == 1 else None
        if user is None:
            return None
        return (name, user) if self._comes_first(user, following) else None

    def _after(self, statement: ast.stmt, name: str, skipped: set[str]) -> ast.stmt | None:
        """The next statement, but for those between that set other variables to constants, as
        torch.fx does to free them: those go into ``skipped``."""
        following = self.next.get(id(statement))
        while (names := _set_to_constant(following)) and name not in names:
            skipped |= names
            following = self.next.get(id(following))
        return following

    def _comes_first(self, part: ast.expr | ast.stmt, statement: ast.stmt) -> bool:
        """Whether a part of a statement is always run, and before other calls in it: those may
        change what the part calls, or what that does."""
        around = set()
        node: ast.AST = part
        while node is not statement:
            around.add(id(node))
            node = self.parent[id(node)]
            if not isinstance(node, _ALWAYS):
                return False
        inside = {id(n) for n in ast.walk(part)}
        place = part.lineno, part.col_offset
        calls = [n for n in ast.walk(statement) if isinstance(n, ast.Call)]
        others = [n for n in calls if id(n) not in around | inside]
        return all((n.lineno, n.col_offset) >= place for n in others)

    # ------------------------------------------------------------------------------------- sums

    def sums(self, norm: ast.Call) -> list[Found]:
        """The sum of the norm's output and another value that goes into an activation, if that is
        all that becomes of the output.

        From the norm on until the sum the output's place is held by the norm's input; the norm runs
        at the sum. So between the two there may only be what does not tell whether it has run.
        """
        watched: list[str] = []
        absent: list[str] = []
        if self.own is None or self.reads_statistics or self._is_inside_function(norm):
            return []
        statement = self._statement(norm)
        name = _target(statement)
        load: ast.expr = norm
        links = []
        if name is not None and statement.value is norm:
            following = self.next.get(id(statement))
            while following is not None and self._passes(following, name, watched, absent):
                following = self.next.get(id(following))
            loads = [] if following is None else self._loads(following, name)
            if len(loads) != 1:
                return []
            load = loads[0]
            links.append((name, following))
            statement = following
        added = self._sum_of(load, watched, is_norms=load is norm)
        if added is None:
            return []
        total, add = added
        if load is not norm and not self._comes_first(total, statement):
            return []
        user = self._user(total) if isinstance(total, ast.expr) else None
        if user is None:
            name = _target(statement) or (total.target.id if add == "add_in_place" else None)
            following = self._after(statement, name or "", set())
            is_value = total is statement or getattr(statement, "value", None) is total
            if name is None or following is None or not is_value:
                return []
            loads = self._loads(following, name)
            user = self._user(loads[0]) if len(loads) == 1 else None
            if user is None or not self._comes_first(user, following):
                return []
            links.append((name, following))
        # looked up where the norm is called and where the activation is
        if _is_method(user) or not _is_lookup(user.func):
            return []
        if (_names(user.func) - {self.own}).intersection(
            (*self.code.co_varnames, *self.code.co_cellvars, *self.code.co_freevars)
        ):
            return []
        activation = self.activation(user)
        if activation is None:
            known = map(of_module, self.callees(user) if user in self.calls else ())
            activation = next(filter(follows_sums, known), None)
        if not follows_sums(activation):
            return []
        if not all(self._ends(name, following, links) for name, following in links):
            return []
        return [self.found([user, total, norm], add, watched, absent)]

    def _sum_of(self, load: ast.expr, watched: list[str], is_norms: bool) -> tuple[Any, str] | None:
        """The sum that a value is part of, and its helper."""
        total: Any = self.parent[id(load)]
        if isinstance(total, ast.AugAssign):
            if total.target is not load or not isinstance(total.op, ast.Add):
                return None
            return (total, "add_in_place") if self._is_quiet(total.value, watched) else None
        if isinstance(total, ast.BinOp) and isinstance(total.op, ast.Add):
            if total.left is load:
                return (total, "add_left") if self._is_quiet(total.right, watched) else None
            # what stands before the norm runs before it, whatever it is
            if is_norms or self._is_quiet(total.left, watched):
                return total, "add_right"
        if isinstance(total, ast.Call) and total.args[:1] == [load]:
            if len(total.args) != 2 or total.keywords or self._value(total.func) is not torch.add:
                return None
            return (total, "add_by") if self._is_quiet(total.args[1], watched) else None
        return None

    def _passes(
        self, statement: ast.stmt, name: str, watched: list[str], absent: list[str]
    ) -> bool:
        """Whether a statement tells nothing of whether the norm has run."""
        if isinstance(statement, ast.Assign):
            target = _target(statement)
            names = _set_to_constant(statement) or {target}
            if None in names or name in names or not all(map(self._is_local, names)):
                return False
            is_constant = isinstance(statement.value, ast.Constant)
            return is_constant or self._is_quiet(statement.value, watched, name)
        if not isinstance(statement, ast.If) or not self._is_plain_test(statement.test, name):
            return False
        called: list[str] = []
        missing: list[str] = []
        if not all(self._passes(s, name, called, missing) for s in statement.body):
            # it never runs where the child that it asks for is None
            child = self._child(_asked_for(statement.test))
            if child is None:
                return False
            called, missing = [], [child]
        if not all(self._passes(s, name, called, missing) for s in statement.orelse):
            return False
        watched += called
        absent += missing
        return True

    def _is_quiet(self, node: ast.expr, watched: list[str], name: str | None = None) -> bool:
        """A variable, or a child's output for one, which need not be the same before and after the
        norm unless ``begin_sum`` says so of the child."""
        if isinstance(node, ast.Name):
            return node.id != name
        if isinstance(node, ast.IfExp):
            parts = (node.body, node.orelse)
            if not self._is_plain_test(node.test, name):
                return False
            return all(self._is_quiet(part, watched, name) for part in parts)
        if not _takes_one(node) or not self._is_quiet(node.args[0], watched, name):
            return False
        child = self._child(node.func)
        if child is not None:
            watched.append(child)
        return child is not None

    def _child(self, node: ast.expr | None) -> str | None:
        """The name of a child of the instance, or of what is None now."""
        name = self._attribute(node)
        if name is None:
            return None
        own = self.module.__dict__
        known = name in self.module._modules if name not in own else own[name] is None
        return name if known else None

    def _attribute(self, node: ast.expr | None) -> str | None:
        """The name of an attribute of the instance."""
        if not isinstance(node, ast.Attribute) or not isinstance(node.value, ast.Name):
            return None
        return node.attr if node.value.id == self.own else None

    def _is_plain_test(self, node: ast.expr, name: str | None) -> bool:
        """A condition in which nothing is called, and that the norm's call does not change."""
        if isinstance(node, ast.BoolOp):
            return all(self._is_plain_test(value, name) for value in node.values)
        if isinstance(node, ast.UnaryOp):
            return self._is_plain_test(node.operand, name)
        if isinstance(node, ast.Compare):
            asked = [node.left, *node.comparators]
            if all(isinstance(op, ast.Is | ast.IsNot) for op in node.ops):
                return all(self._is_quiet_value(n, name) for n in asked)
            return all(map(self._is_setting, asked))
        return self._is_setting(node)

    def _is_quiet_value(self, node: ast.expr, name: str | None) -> bool:
        """Of which it is asked what object it is, which calls nothing."""
        if isinstance(node, ast.Name):
            return node.id != name
        return (
            isinstance(node, ast.Constant)
            or self._child(node) is not None
            or self._is_setting(node)
        )

    def _is_setting(self, node: ast.expr) -> bool:
        """An attribute of the instance that is no tensor and no object with a say in its truth."""
        if isinstance(node, ast.Constant):
            return True
        name = self._attribute(node)
        if name is None or hasattr(getattr(type(self.module), name, None), "__get__"):
            return False
        value = self.module.__dict__.get(name, self)
        return value is None or type(value) in (bool, int, float, str)

    def _is_local(self, name: str) -> bool:
        """A variable that only the method's own statements see."""
        code = self.code
        return name in code.co_varnames and name not in (*code.co_cellvars, *code.co_freevars)

    def _ends(self, name: str, statement: ast.stmt, links: list[tuple[str, ast.stmt]]) -> bool:
        """Whether what ``name`` holds is not seen after ``statement``, nor elsewhere until then."""
        if not self.can_split or self.has_try or not self._is_local(name):
            return False
        used = [load for n, s in links if n == name for load in self._loads(s, name)]
        return self._is_over(name, statement, len(used))

    def _is_over(self, name: str, statement: ast.stmt, used: int) -> bool:
        """Whether nothing but so many loads sees what ``name`` holds until the end of
        ``statement``."""
        if len(self._loads(self.definition, name)) == used:
            return True
        # in which the error may end that somebody raises until then
        if any(isinstance(n, ast.With | ast.AsyncWith) for n in self._around(statement)):
            return False
        if isinstance(statement, ast.AugAssign):
            return getattr(statement.target, "id", "") == name
        return _target(statement) == name or isinstance(statement, ast.Return)

    def _may_split(self, chain: list[ast.Call], name: str, skipped: set[str]) -> bool:
        """Whether ``name`` may hold the activation's output from the norm on, and what is called
        may be looked up ahead."""
        code = self.code
        if not self.can_split or self.has_try or not self._is_local(name):
            return False
        statements = [self._statement(call) for call in chain]
        if any(self._is_inside_function(s) for s in statements):
            return False
        changed = {name, *skipped, *code.co_cellvars, *code.co_freevars}
        for call in chain[1:]:
            if _is_method(call):
                continue
            if not _is_lookup(call.func):
                return False
            if (_names(call.func) - {self.own}) & changed:
                return False
        # one variable all along, and in between nothing but `name = identity(name)`
        used = 0
        for before, after in itertools.pairwise(statements):
            if after is before:
                continue
            if _target(before) != name:
                return False
            used += len(self._loads(after, name))
        return self._is_over(name, statements[-1], used)

    def _statement(self, node: ast.AST) -> ast.stmt:
        while not isinstance(node, ast.stmt):
            node = self.parent[id(node)]
        return node

    def _is_inside_function(self, node: ast.AST) -> bool:
        return any(isinstance(n, _FUNCTIONS) for n in self._around(node))

    def _around(self, node: ast.AST) -> Iterator[ast.AST]:
        """What a node is in, from the inside out, and not the method itself."""
        while (node := self.parent[id(node)]) is not self.definition:
            yield node

    def _loads(self, node: ast.AST, name: str) -> list[ast.Name]:
        """Where the name is read, by ``name += 1`` as well."""
        return [
            n
            for n in ast.walk(node)
            if isinstance(n, ast.Name)
            and n.id == name
            and (_is_load(n) or isinstance(self.parent[id(n)], ast.AugAssign))
        ]


def _variable(function: types.FunctionType, name: str) -> Any:
    """What a name means that is not the function's own, but its file's, or that of a function
    around it."""
    code = function.__code__
    if name in code.co_freevars:
        try:
            return function.__closure__[code.co_freevars.index(name)].cell_contents
        except ValueError:  # nothing yet
            return None
    is_own = name in code.co_varnames or name in code.co_cellvars
    return None if is_own else function.__globals__.get(name)


def _children(modules: list[nn.Module], name: str | None) -> list[nn.Module]:
    """The children of that name, or all."""
    if name is None:
        return [child for m in modules for child in m._modules.values() if child is not None]
    return [m._modules[name] for m in modules if m._modules.get(name) is not None]


def _blocks(nodes: list[ast.AST]) -> Iterator[list[ast.stmt]]:
    for node in nodes:
        for field in ("body", "orelse", "finalbody"):
            block = getattr(node, field, None)
            if isinstance(block, list):
                yield block


def _is_load(node: ast.Name) -> bool:
    return isinstance(node.ctx, ast.Load)


def _target(statement: ast.AST) -> str | None:
    """The only variable that a plain assignment writes."""
    if not isinstance(statement, ast.Assign) or len(statement.targets) != 1:
        return None
    target = statement.targets[0]
    return target.id if isinstance(target, ast.Name) else None


def _asked_for(test: ast.expr) -> ast.expr | None:
    """What is not None, or true, where a condition holds."""
    if not isinstance(test, ast.Compare):
        return test
    is_not = isinstance(test.ops[0], ast.IsNot) and len(test.ops) == 1
    none = test.comparators[0]
    return test.left if is_not and isinstance(none, ast.Constant) and none.value is None else None


def _set_to_constant(statement: ast.AST | None) -> set[str]:
    """The variables that an assignment of a constant writes, if it writes nothing else."""
    if not isinstance(statement, ast.Assign) or not isinstance(statement.value, ast.Constant):
        return set()
    names = [target.id for target in statement.targets if isinstance(target, ast.Name)]
    return set(names) if len(names) == len(statement.targets) else set()


def _names(node: ast.AST) -> set[str]:
    return {n.id for n in ast.walk(node) if isinstance(n, ast.Name)}


def _constant(node: ast.expr) -> str | None:
    """The name of the child that an index or getattr's argument stands for, where it is written."""
    known = isinstance(node, ast.Constant) and isinstance(node.value, int | str)
    return str(node.value) if known else None


def _is_getattr(node: ast.expr) -> bool:
    return (
        isinstance(node, ast.Call)
        and isinstance(node.func, ast.Name)
        and node.func.id == "getattr"
        and len(node.args) == 2
        and not node.keywords
    )


def _is_lookup(node: ast.expr) -> bool:
    """Names, attributes and items: nothing is called on the way."""
    if _is_getattr(node):
        return _is_lookup(node.args[0]) and isinstance(node.args[1], ast.Constant)
    if isinstance(node, ast.Name):
        return True
    if isinstance(node, ast.Attribute):
        return _is_lookup(node.value)
    if isinstance(node, ast.Subscript):
        return _is_lookup(node.value) and isinstance(node.slice, ast.Name | ast.Constant)
    return False
