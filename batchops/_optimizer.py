"""What LAMB and LARS share: options, states, checkpoints, and the tables of native steps."""

from __future__ import annotations

import math
import numbers
import pickle
from bisect import bisect_left, bisect_right
from collections import defaultdict
from collections.abc import Callable, Iterator, Sequence
from typing import Any, NamedTuple

import torch
from torch import Tensor
from torch.optim import Optimizer

from . import _binding  # loads the operators
from . import _optimizer_plain as plain
from ._sharded import how_sharded

_PLAIN_TYPES = (Tensor, torch.nn.Parameter)
_NUMBER = (int, numbers.Real, Tensor)
# What other optimizers leave in a checkpoint's groups and ours refuse or keep elsewhere.
_FOREIGN = ("foreach", "differentiable", "step")
# Of a group, made from its other options.
_FOLLOWING = ("max_lr_snapshot",)


class Stats(NamedTuple):
    """Norms of the last step: ``values[i]`` holds ``columns`` of the parameter ``names[i]``."""

    names: list[str]
    columns: tuple[str, str, str, str]
    values: Tensor


class _Kept:
    """Carries a state tensor past Optimizer.load_state_dict, which would cast it."""

    __slots__ = ("value",)

    def __init__(self, value: Tensor) -> None:
        self.value = value


class _Lost:
    """In the place of an ``exclude`` that a copy could not take along."""


class FusedOptimizer(Optimizer):
    """Base of the optimizers whose step is one native call a device."""

    # Of a subclass: its name, its moments (the native table takes two at most), a moment and the
    # names of options that are flags, in the order of the kernels' structs.
    _kind: str
    _numeric: tuple[str, ...]  # options that are numbers, with neither a tensor's nor None's rules
    _flags: tuple[str, ...]
    _rates: tuple[int, int]  # those of _numbers() that may be tensors
    _plan: _Plan | None = None
    _exclude: Any = None
    _step_supports_amp_scaling = True
    _sm_margin: int = 0

    def __init__(
        self,
        params: Any,
        options: dict[str, Any],
        exclude: Any,
        sm_margin: int,
        foreach: bool | None,
        differentiable: bool,
    ) -> None:
        self._exclude = self._rule(exclude)
        self.sm_margin = sm_margin
        self._refuse_foreign({"foreach": foreach, "differentiable": differentiable})
        self._check(options)
        super().__init__(params, {**options, "exclude": None})

    @property
    def sm_margin(self) -> int:
        """Multiprocessors of a GPU that a step leaves to other kernels, see the class."""
        return self._sm_margin

    @sm_margin.setter
    def sm_margin(self, count: int) -> None:
        if not isinstance(count, numbers.Integral) or count < 0:
            raise ValueError(f"{self._kind}: expected sm_margin to be an int >= 0, got {count!r}")
        self._sm_margin = int(count)

    # ----------------------------------------------------------- for subclasses

    def _moments(self, group: dict[str, Any]) -> tuple[str, ...]:
        raise NotImplementedError

    def _numbers(self, group: dict[str, Any]) -> tuple[Any, ...]:
        raise NotImplementedError

    def _check_own(self, options: dict[str, Any]) -> None:
        raise NotImplementedError

    def _stepped(self, group: dict[str, Any], skip: Tensor | None) -> None:
        """After a step of the group."""

    # --------------------------------------------------------------- torch.optim

    def add_param_group(self, param_group: dict[str, Any]) -> None:
        exclude = self._exclude
        if isinstance(param_group, dict):
            options = {**self.defaults, **param_group}
            self._check(options)
            for group in self.param_groups:
                if group["max_grad_norm"] != options["max_grad_norm"]:
                    raise ValueError(
                        f"{self._kind}: max_grad_norm is one number for the whole optimizer, "
                        f"expected {group['max_grad_norm']}, got {options['max_grad_norm']}"
                    )
            if param_group.get("exclude") is not None:
                exclude = self._rule(param_group["exclude"])
            elif isinstance(exclude, _Lost):
                raise ValueError(
                    f"{self._kind}.add_param_group: exclude was a function that a copy or a pickle "
                    "cannot hold; expected the new group to have an exclude of its own"
                )
            self._complete(param_group, options)
        super().add_param_group(param_group)
        self._plan = None
        group = self.param_groups[-1]
        try:
            group["exclude"] = self._excluded(group, exclude)
        except Exception:
            self.param_groups.pop()
            raise

    def _complete(self, param_group: dict[str, Any], options: dict[str, Any]) -> None:
        """Options of a new group that follow from others."""

    def _rule(self, exclude: Any) -> Any:
        """An ``exclude`` that can be asked more than once, by every group."""
        if exclude is None or isinstance(exclude, bool) or callable(exclude):
            return exclude
        try:
            parts = [exclude] if isinstance(exclude, str) else list(exclude)
        except TypeError:
            parts = [None]
        if not (
            all(type(part) is int for part in parts) or all(isinstance(part, str) for part in parts)
        ):
            raise TypeError(
                f"{self._kind}: exclude must be a bool, a function of name and parameter, or parts "
                f"of names, got {exclude!r}"
            )
        return parts

    def _excluded(self, group: dict[str, Any], exclude: Any) -> list[int]:
        """Positions in the group: plain numbers, which a checkpoint and a pickle can hold."""
        params, names = group["params"], group.get("param_names")
        if exclude is None or exclude is False:
            return []
        if exclude is True:
            return list(range(len(params)))
        if callable(exclude):
            named = zip(names or [None] * len(params), params, strict=True)
            return [i for i, (name, p) in enumerate(named) if exclude(name, p)]
        if all(type(part) is int for part in exclude):
            for position in exclude:
                if not 0 <= position < len(params):
                    raise ValueError(
                        f"{self._kind}: exclude by positions expects numbers from 0 to "
                        f"{len(params) - 1}, got {position}"
                    )
            return exclude
        if names is None:
            raise ValueError(
                f"{self._kind}: exclude by parts of names expects named parameters "
                "(model.named_parameters()), got parameters without names"
            )
        return [i for i, name in enumerate(names) if any(part in name for part in exclude)]

    def load_state_dict(self, state_dict: dict[str, Any]) -> None:
        def keep(optimizer: Optimizer, loaded: dict[str, Any]) -> dict[str, Any]:
            state = {
                key: {
                    name: _Kept(value) if isinstance(value, Tensor) else value
                    for name, value in entry.items()
                    if value is not None
                }
                if isinstance(entry, dict)
                else entry
                for key, entry in loaded["state"].items()
            }
            groups = [dict(group) for group in loaded["param_groups"]]
            for group in groups:
                # Apex and timm count steps by group; timm's Lars does not count them at all.
                count = group.get("step", 1)
                for key in group["params"]:
                    entry = state.get(key)
                    if entry is None:
                        continue
                    if not entry:
                        del state[key]
                    elif "step" not in entry:
                        step = torch.tensor(float(count), dtype=torch.float32, device="cpu")
                        entry["step"] = _Kept(step)
                for name in _FOREIGN:
                    group.pop(name, None)
            for group, own in zip(groups, self.param_groups, strict=False):
                group["fused"], group["capturable"] = own["fused"], own["capturable"]
                # A checkpoint of another optimizer says nothing of ours.
                for name in (*self.defaults, "exclude", *_FOLLOWING):
                    if name in own:
                        group.setdefault(name, own[name])
            return {**loaded, "state": state, "param_groups": groups}

        # Registered last, so that it sees what the user's own hooks have made of the dict.
        handle = self.register_load_state_dict_pre_hook(keep)
        try:
            super().load_state_dict(state_dict)
        finally:
            handle.remove()

    load_state_dict.__doc__ = Optimizer.load_state_dict.__doc__

    def __getstate__(self) -> dict[str, Any]:
        state = {**super().__getstate__(), "_sm_margin": self._sm_margin}
        if self._exclude is not None:
            try:
                pickle.dumps(self._exclude)
                state["_exclude"] = self._exclude
            except Exception:  # a lambda, say
                state["_exclude"] = _Lost()
        return state

    def __setstate__(self, state: dict[str, Any]) -> None:
        super().__setstate__(state)
        self._plan = None
        for name in _FOREIGN:  # torch puts `differentiable` there
            self.defaults.pop(name, None)
        capturable = {}
        for group in self.param_groups:
            for name, value in self.defaults.items():
                group.setdefault(name, value)
            if group["exclude"] is None:
                group["exclude"] = []
            capturable.update(dict.fromkeys(group["params"], group["capturable"]))
        for p, entry in self.state.items():
            if not isinstance(entry, dict):
                continue
            home = p.device if isinstance(p, Tensor) else torch.device("cpu")
            steps_home = home if capturable.get(p) else torch.device("cpu")
            for name, value in entry.items():
                if isinstance(value, _Kept):
                    entry[name] = value.value.to(steps_home if name == "step" else home)
            if "step" in entry and not isinstance(entry["step"], Tensor):
                entry["step"] = torch.tensor(
                    float(entry["step"]), dtype=torch.float32, device=steps_home
                )

    @torch.no_grad()
    def step(self, closure: Callable[[], Any] | None = None) -> Any:
        """One update; ``closure`` re-evaluates the model and returns the loss."""
        loss = None
        if closure is not None:
            with torch.enable_grad():
                loss = closure()

        if not self.param_groups:
            self._plan = None
            return loss
        self._check_capture()
        max_grad_norm = self.param_groups[0]["max_grad_norm"]
        for group in self.param_groups:
            self._check(group)
            if not isinstance(group["exclude"], (list, tuple)):
                raise TypeError(
                    f"{self._kind}.step: expected exclude of a group to be a list of positions, "
                    f"got {group['exclude']!r}"
                )
            if group["max_grad_norm"] != max_grad_norm:
                raise ValueError(
                    f"{self._kind}.step: max_grad_norm is one number for the whole optimizer, got "
                    f"{max_grad_norm} and {group['max_grad_norm']}"
                )
        # torch.amp.GradScaler sets these for the time of the call.
        scale, skip = getattr(self, "grad_scale", None), getattr(self, "found_inf", None)
        if skip is not None and not isinstance(skip, Tensor):
            skip = None  # GradScaler's, of no gradient at all
        if skip is not None and not any(group["capturable"] for group in self.param_groups):
            if float(skip):
                return loss
            skip = None
        # A second time only where objects are others, or a parameter has changed its dtype, device
        # or layout.
        while True:
            plan = self._plan
            if plan is None or not plan.fits(self):
                plan = self._plan = _Plan(self)
            if plan.run(self, max_grad_norm, scale, skip):
                break
            self._plan = None
        for group in self.param_groups:
            self._stepped(group, skip)
        return loss

    def stats(self) -> Stats:
        """‖p‖, ‖g‖, ‖u‖ and the trust ratio of each parameter, as the last step has seen them.

        ``Stats(names, columns, values)``: ``values`` is a float32 tensor of a row a parameter and
        a column each for ``p_norm``, ``g_norm``, ``u_norm`` and ``trust_ratio``, on the first
        parameter's device; nothing waits for that device. ``p_norm`` is of the parameter before
        the step, ``g_norm`` of the unscaled gradient before the clip. Rows of parameters that had
        no gradient, and all rows before the first step, are NaN. Names are those of named
        parameters, else ``group.position``.
        """
        names: list[str] = []
        for index, group in enumerate(self.param_groups):
            given = group.get("param_names")
            names += given or [f"{index}.{i}" for i in range(len(group["params"]))]
        params = (p for group in self.param_groups for p in group["params"])
        device = next((p.device for p in params), torch.device("cpu"))
        values = torch.full((len(names), 4), math.nan, dtype=torch.float32, device=device)
        if self._plan is not None:
            for rows, part in self._plan.stats():
                part, done = part.to(device), 0
                # A list of rows as an index would be copied to the device, and waited for.
                for begin, end in _runs(rows):
                    values[begin:end] = part[done : done + end - begin]
                    done += end - begin
        return Stats(names, ("p_norm", "g_norm", "u_norm", "trust_ratio"), values)

    # --------------------------------------------------------------------- checks

    def _check_capture(self) -> None:
        """Replays of a graph would repeat one step count, were it not on the device."""
        if not torch.cuda.is_initialized() or not torch.cuda.is_current_stream_capturing():
            return
        if not all(group["capturable"] for group in self.param_groups):
            raise RuntimeError(
                f"{self._kind}.step: expected capturable=True in every parameter group while a "
                "CUDA graph is captured, got a group with capturable=False"
            )

    def _check(self, options: dict[str, Any]) -> None:
        kind, lr = self._kind, options["lr"]
        # Mostly it is a float, and asking for more takes longer than all other checks.
        on_host = True
        if type(lr) is not float:
            if not isinstance(lr, (numbers.Real, Tensor)):
                raise TypeError(
                    f"{kind}: expected lr to be a number or a tensor, got {type(lr).__name__}"
                )
            if isinstance(lr, Tensor):
                if lr.numel() != 1:
                    raise ValueError(
                        f"{kind}: Tensor lr must be 1-element, got {lr.numel()} elements"
                    )
                # The value of one elsewhere is not worth a synchronisation.
                on_host = lr.is_cpu
        if on_host and not lr >= 0.0:
            raise ValueError(f"{kind}: invalid learning rate: expected lr >= 0, got {lr}")
        for name in self._numeric:
            if type(options[name]) is not float:
                self._check_number(name, options[name])
        if not options["eps"] >= 0.0:
            raise ValueError(f"{kind}: invalid epsilon: expected eps >= 0, got {options['eps']}")
        decay = options["weight_decay"]
        if not decay >= 0.0:
            raise ValueError(
                f"{kind}: invalid weight_decay: expected weight_decay >= 0, got {decay}"
            )
        bound = options["max_grad_norm"]
        if bound is not None:
            if type(bound) is not float:
                self._check_number("max_grad_norm", bound)
            if not 0.0 < bound < math.inf:
                raise ValueError(
                    f"{kind}: max_grad_norm must be positive and finite, or None, got {bound}"
                )
        if options.get("foreach") or options.get("differentiable"):
            self._refuse_foreign(options)
        if options["fused"] not in (None, True, False):
            raise ValueError(f"{kind}: fused must be True, False or None, got {options['fused']!r}")
        self._check_own(options)

    def _refuse_foreign(self, options: dict[str, Any]) -> None:
        """Keywords of torch's optimizers that ours have no form of; None and False ask for none."""
        for name in ("foreach", "differentiable"):
            if options.get(name):
                raise RuntimeError(
                    f"{self._kind}: `{name}` is not supported, got {name}={options[name]}"
                )

    def _check_number(self, name: str, value: Any) -> None:
        if not isinstance(value, _NUMBER):
            raise TypeError(f"{self._kind}: expected {name} to be a number, got {value!r}")

    def _check_pair(self, name: str, value: Any) -> None:
        try:
            for number in value:
                if type(number) is not float and not isinstance(number, _NUMBER):
                    raise TypeError
        except TypeError:  # there or in iter()
            raise TypeError(
                f"{self._kind}: expected {name} to be two numbers, got {value!r}"
            ) from None


class _Plan:
    """The tensors of a step: native tables by device, and what takes the plain path.

    Made anew when groups, parameters or state tensors are other objects than before, and when a
    parameter has its first gradient. It holds positions and addresses, no tensor of the optimizer:
    another reference would keep alive what has been replaced, and tables' would do more harm.
    """

    def __init__(self, optimizer: FusedOptimizer) -> None:
        groups, state, kind = optimizer.param_groups, optimizer.state, optimizer._kind
        self.key = self._key(optimizer)
        self.stateless: list[tuple[int, int]] = []  # group, position
        chosen: list[tuple[Tensor, int, int, int, str, bool]] = []

        # All checks come before the first change to the state. Where two parameters share memory,
        # the second must see the first one's step: not a thing for threads.
        taken = _Memory()
        row = -1
        for index, group in enumerate(groups):
            moments = optimizer._moments(group)
            for position, p in enumerate(group["params"]):
                row += 1
                entry = state.get(p) or {}
                if p.grad is None and not entry:
                    # It may have no size yet (nn.LazyLinear).
                    self.stateless.append((index, position))
                    continue
                name = _name_of(p, group, index, position)
                part = how_sharded(p)
                if part:
                    raise TypeError(
                        f"{kind}: expected whole parameters, got {name} as {part}: norms of "
                        "sharded parameters are not implemented"
                    )
                _check_parameter(kind, p, name)
                if p.grad is not None:
                    _check_gradient(kind, p, p.grad, name)
                _check_state(kind, p, entry, moments, name)
                reason = "" if group["fused"] is False else _why_not_native(optimizer, group, p)
                if reason and group["fused"]:
                    raise RuntimeError(f"{kind}: fused=True cannot take {name}: {reason}")
                repeated = type(p) in _PLAIN_TYPES and taken.shares(p)
                if repeated and group["fused"]:
                    raise RuntimeError(
                        f"{kind}: fused=True cannot take {name}: an earlier parameter has some of "
                        "its memory"
                    )
                native = not reason and not repeated and group["fused"] is not False
                chosen.append((p, index, position, row, name, native))

        # By device, and whether step counts are there too.
        tables: dict[tuple[torch.device, bool], list[_Native]] = defaultdict(list)
        self.plain: list[plain.Member] = []
        without_ratio = [set(group["exclude"]) for group in groups]
        for p, index, position, row, name, native in chosen:
            group = groups[index]
            _complete_state(p, state[p], group, optimizer._moments(group))
            excluded = position in without_ratio[index]
            if native:
                counted_there = bool(group["capturable"]) and not p.is_cpu
                member = _Native(p, state[p], index, row, excluded, name)
                tables[p.device, counted_there].append(member)
            else:
                self.plain.append(plain.Member(index, position, row, excluded, name))
        self.tables = [
            _Table(
                device,
                counted_there,
                _native_table(optimizer, members),
                [member.row for member in members],
            )
            for (device, counted_there), members in tables.items()
        ]
        # A table compares them itself, in less time.
        self.addresses = None if self.tables else self._addresses(optimizer)

    @staticmethod
    def _addresses(optimizer: FusedOptimizer) -> list[int]:
        """Of all that a plan rests on: parameters and, of states, keys, dicts and values."""
        return [id(x) for x in _binding.core.handles_of(_lists(optimizer), optimizer.state)]

    @staticmethod
    def _key(optimizer: FusedOptimizer) -> list[Any]:
        return [
            (
                len(group["params"]),
                group["fused"],
                group["capturable"],
                group["master_weights"],
                tuple(group["exclude"]),
                optimizer._moments(group),
            )
            for group in optimizer.param_groups
        ]

    def fits(self, optimizer: FusedOptimizer) -> bool:
        """Whether what a table cannot tell is as it was when this plan was made."""
        if self.key != self._key(optimizer):
            return False
        groups = optimizer.param_groups
        for index, position in self.stateless:
            if groups[index]["params"][position].grad is not None:
                return False
        return True

    def run(
        self,
        optimizer: FusedOptimizer,
        max_grad_norm: float | None,
        scale: Tensor | None,
        skip: Tensor | None,
    ) -> bool:
        """One step; False, with nothing changed, if the plan is of other objects or its tables
        cannot serve them any more."""
        if self.addresses is not None and self.addresses != self._addresses(optimizer):
            return False
        kind = optimizer._kind
        bound = 0.0 if max_grad_norm is None else float(max_grad_norm)
        clip_eps = optimizer.param_groups[0].get("clip_eps", 0.0)
        alone = len(self.tables) == 1 and not self.plain
        # More than one native call needs them: from here they are held until the step is over.
        lists, state = _lists(optimizer), optimizer.state
        where = (id(lists), id(state))
        objects = None if alone else _binding.core.handles_of(lists, state)
        if objects is not None:
            if not all(table.native.prepare(*where) for table in self.tables):
                return False
            where = (0, 0)
        members: list[tuple[plain.Member, dict[str, Any], Tensor]] = []
        for member in self.plain:
            group = optimizer.param_groups[member.group]
            p = group["params"][member.position]
            if p.grad is None:
                continue
            _check_parameter(kind, p, member.name)
            _check_gradient(kind, p, p.grad, member.name)
            _check_state(kind, p, optimizer.state[p], optimizer._moments(group), member.name)
            if _wants_master(p, group) and "master" not in optimizer.state[p]:
                return False
            members.append((member, group, p))
        sums: list[Tensor] = []
        if bound and not alone:
            sums = [table.native.grad_sum_sq() for table in self.tables]
            sums += [plain.sum_of_squares(p.grad) for _, _, p in members]
        for table in self.tables:
            total = plain.total(sums, table.device, torch.float64)
            if not table.step(optimizer, where, bound, clip_eps, scale, skip, total):
                return False
        for member in self.plain:
            member.stats = None
        divisors: dict[torch.device, Tensor] = {}
        for member, group, p in members:
            if p.device not in divisors:
                total = plain.total(sums, p.device, plain.wide(p))
                divisors[p.device] = plain.divisor(p, total, bound, clip_eps, scale)
            step = plain.lamb_step if kind == "LAMB" else plain.lars_step
            inputs = plain.Inputs(p, optimizer.state[p], group, member.excluded)
            numbers = optimizer._numbers(group)
            member.stats = step(inputs, divisors[p.device], scale, numbers, skip)
        return True

    def stats(self) -> list[tuple[list[int], Tensor]]:
        parts = []
        for table in self.tables:
            active, values = table.native.stats()
            parts.append(([table.rows[i] for i in active], values))
        parts += [([m.row], m.stats[None]) for m in self.plain if m.stats is not None]
        return parts


def _runs(rows: Sequence[int]) -> Iterator[tuple[int, int]]:
    """[begin, end) of the stretches in which each number is one more than the last."""
    begin = 0
    for i in range(1, len(rows) + 1):
        if i == len(rows) or rows[i] != rows[i - 1] + 1:
            yield rows[begin], rows[i - 1] + 1
            begin = i


class _Memory:
    """The addresses that some tensors take, as stretches without a gap between them."""

    def __init__(self) -> None:
        self._begins: dict[torch.device, list[int]] = defaultdict(list)
        self._ends: dict[torch.device, list[int]] = defaultdict(list)

    def shares(self, t: Tensor) -> bool:
        """Whether one that was asked about before has some of this one's memory."""
        if t.numel() == 0 or t.layout is not torch.strided or t.is_meta:
            return False
        last = sum((size - 1) * stride for size, stride in zip(t.shape, t.stride(), strict=True))
        begin = t.data_ptr()
        end = begin + (last + 1) * t.element_size()
        begins, ends = self._begins[t.device], self._ends[t.device]
        # Those from `first` to `past` touch or share it, and become one with it.
        first, past = bisect_left(ends, begin), bisect_right(begins, end)
        shared = any(ends[k] > begin and begins[k] < end for k in range(first, past))
        if first < past:
            begin, end = min(begin, begins[first]), max(end, ends[past - 1])
        begins[first:past], ends[first:past] = [begin], [end]
        return shared


class _Native(NamedTuple):
    """A parameter that a table is made of."""

    p: Tensor
    state: dict[str, Any]
    group: int
    row: int
    excluded: bool
    name: str


class _Table(NamedTuple):
    """A native table of parameters on one device."""

    device: torch.device
    counted_there: bool  # the step counts are on it, and nothing of a step is read back
    native: Any
    rows: list[int]  # of the parameters among all

    def step(
        self,
        optimizer: FusedOptimizer,
        where: tuple[int, int],
        bound: float,
        clip_eps: float,
        scale: Tensor | None,
        skip: Tensor | None,
        total: Tensor | None,
    ) -> bool:
        """False, with nothing changed, if the table cannot serve the objects there are."""
        groups = optimizer.param_groups
        numbers: list[float] = []
        rates: list[Tensor | None] = []
        for group in groups:
            own = list(optimizer._numbers(group))
            if self.counted_there:
                rates.append(self._rates_there(own, optimizer._rates))
            numbers += map(float, own)
        flags = [
            sum(bool(group[name]) << bit for bit, name in enumerate(optimizer._flags))
            for group in groups
        ]
        host_scale, there = 1.0, {"device": self.device, "dtype": torch.float32}
        if scale is not None and self.device.type == "cpu":
            host_scale, scale = float(scale), None
        if scale is not None:
            scale = scale.to(**there)
        if skip is not None and not self.counted_there:
            if float(skip):
                return True
            skip = None
        if skip is not None:
            skip = skip.to(**there)
        margin = optimizer.sm_margin
        call = (numbers, flags, bound, clip_eps, host_scale, total, scale, skip, rates, margin)
        return self.native.step(*where, *call)

    def _rates_there(self, numbers: list[Any], places: tuple[int, int]) -> Tensor | None:
        """The two of the numbers that may be tensors as one, where one of them is on a device; then
        zeros take their places."""
        both = [numbers[k] for k in places]
        if all(not isinstance(n, Tensor) or n.is_cpu for n in both):
            return None
        there: dict[str, Any] = {"device": self.device, "dtype": torch.float64}
        for k in places:
            numbers[k] = 0.0
        return torch.stack(
            [
                n.to(**there).reshape(())
                if isinstance(n, Tensor) and not n.is_cpu
                else torch.full((), float(n), **there)
                for n in both
            ]
        )


def _lists(optimizer: FusedOptimizer) -> list[Any]:
    return [group["params"] for group in optimizer.param_groups]


def _native_table(optimizer: FusedOptimizer, members: list[_Native]) -> Any:
    lists = _lists(optimizer)
    groups = [optimizer.param_groups[member.group] for member in members]
    moments = [optimizer._moments(group) for group in groups]

    def address(value: Tensor | None) -> int:
        return 0 if value is None else id(value)

    def moment(k: int) -> list[int]:
        pairs = zip(members, moments, strict=True)
        return [id(member.state[own[k]]) if k < len(own) else 0 for member, own in pairs]

    masters = [
        address(member.state.get("master") if group["master_weights"] else None)
        for member, group in zip(members, groups, strict=True)
    ]
    return torch.classes.batchops.OptimizerTable(
        optimizer._kind,
        id(lists),
        id(optimizer.state),
        [id(member.p) for member in members],
        moment(0),
        moment(1),
        masters,
        [id(member.state["step"]) for member in members],
        [int(bool(group["master_weights"])) for group in groups],
        [member.group for member in members],
        [int(member.excluded) for member in members],
        [member.name for member in members],
    )


def _wants_master(p: Tensor, group: dict[str, Any]) -> bool:
    return bool(group["master_weights"]) and p.dtype in (torch.float16, torch.bfloat16)


def _complete_state(
    p: Tensor, entry: dict[str, Any], group: dict[str, Any], moments: tuple[str, ...]
) -> None:
    dtype = torch.float64 if p.dtype == torch.float64 else torch.float32
    # A buffer that is made later, for a momentum that was 0, has its first step then.
    if entry.get("step") is not None and "momentum_buffer" in set(moments) - set(entry):
        entry["step"].zero_()
    if "step" not in entry:
        home = p.device if group["capturable"] else torch.device("cpu")
        # Not torch.zeros: of this one FakeTensorMode knows the value.
        entry["step"] = torch.tensor(0.0, dtype=torch.float32, device=home)
    for name in moments:
        if name not in entry:
            entry[name] = torch.zeros_like(p, dtype=dtype)
    if _wants_master(p, group) and "master" not in entry:
        entry["master"] = p.detach().to(torch.float32, memory_format=torch.preserve_format)


# ------------------------------------------------------------------------------------- checks


def _name_of(p: Tensor, group: dict[str, Any], index: int, position: int) -> str:
    names = group.get("param_names")
    called = f" ({names[position]!r})" if names else ""
    return f"parameter {position} of group {index}{called}, {p.dtype} of size {tuple(p.shape)}"


def _check_parameter(kind: str, p: Tensor, name: str) -> None:
    if p.is_complex():
        raise RuntimeError(f"{kind}.step: {name} has a complex gradient; expected a real one")
    if not p.is_floating_point():
        raise RuntimeError(f"{kind}.step: expected floating-point parameters, got {name}")


def _check_gradient(kind: str, p: Tensor, grad: Tensor, name: str) -> None:
    if grad.layout is not torch.strided:
        raise RuntimeError(f"{kind}.step: {name} has a sparse gradient; expected a dense one")
    if grad.is_complex():
        raise RuntimeError(f"{kind}.step: {name} has a complex gradient; expected a real one")
    if not grad.is_floating_point() or grad.shape != p.shape or grad.device != p.device:
        raise RuntimeError(
            f"{kind}.step: {name} expects a floating-point gradient of its size on {p.device}, got "
            f"{grad.dtype} of size {tuple(grad.shape)} on {grad.device}"
        )


def _check_state(
    kind: str, p: Tensor, entry: dict[str, Any], moments: tuple[str, ...], name: str
) -> None:
    if not entry:
        if any(size > 1 and stride == 0 for size, stride in zip(p.shape, p.stride(), strict=True)):
            raise RuntimeError(
                f"{kind}.step: {name} has elements that share memory; clone it first"
            )
        return
    # LARS keeps no buffer while it has no momentum, and may get one later.
    needed = ("step", *moments) if kind == "LAMB" else ("step",)
    for key in needed:
        if not isinstance(entry.get(key), Tensor):
            raise RuntimeError(
                f"{kind}.step: expected a tensor {key!r} in the state of {name}, got "
                f"{type(entry.get(key)).__name__} (keys: {sorted(map(str, entry))})"
            )
    for key in (*moments, "master"):
        value = entry.get(key)
        if value is None:
            continue
        if (
            not isinstance(value, Tensor)
            or value.shape != p.shape
            or value.device != p.device
            or not value.is_floating_point()
        ):
            got = (
                f"{value.dtype} of size {tuple(value.shape)} on {value.device}"
                if isinstance(value, Tensor)
                else type(value).__name__
            )
            raise RuntimeError(
                f"{kind}.step: expected {key!r} of {name} to be floating-point, of its size and on "
                f"{p.device}, got {got}"
            )


def _why_not_native(optimizer: FusedOptimizer, group: dict[str, Any], p: Tensor) -> str:
    if type(p) not in _PLAIN_TYPES:
        return f"expected a torch.Tensor, got the subclass {type(p).__name__}"
    entry = optimizer.state.get(p) or {}
    if not isinstance(entry, dict):  # a table looks for the tensors in dicts
        return f"expected its state as a dict, got a {type(entry).__name__}"
    step = entry.get("step")
    home = p.device if group["capturable"] else torch.device("cpu")
    if step is not None and (
        step.dtype != torch.float32 or step.device != home or step.numel() != 1
    ):
        return (
            f"expected state 'step' as a float32 number on {home}, got {step.dtype} on "
            f"{step.device}"
        )
    moments = [entry.get(name) for name in optimizer._moments(group)]
    first, second = [*moments, None, None][:2]
    for name, value in entry.items():
        # A table tells whether an object is a tensor by these two types.
        if isinstance(value, Tensor) and type(value) not in _PLAIN_TYPES:
            return f"expected state {name!r} as a torch.Tensor, got a {type(value).__name__}"
    master = entry.get("master") if _wants_master(p, group) else None
    return torch.ops.batchops.optimizer_unsupported(optimizer._kind, p, first, second, master)
