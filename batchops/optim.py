"""Fused optimizers for large batches."""

from __future__ import annotations

import math
from collections import defaultdict
from collections.abc import Callable, Iterable, Iterator
from itertools import chain
from operator import is_, itemgetter
from typing import Any

import torch
from torch import Tensor
from torch.optim import Optimizer

from . import _binding as _binding  # loads the operators

__all__ = ["LAMB"]

_STATE = ("exp_avg", "exp_avg_sq", "step")
_PLAIN_TYPES = (Tensor, torch.nn.Parameter)
_state_tensors = itemgetter(*_STATE)
_FLAGS = ("bias_correction", "grad_averaging", "trust_clip", "always_adapt", "maximize")
# Elements that the plain path turns into float64 at a time.
_PIECE = {"cpu": 1 << 16}
_PIECE_ELSEWHERE = 1 << 22


class _Kept:
    """Carries a state tensor past Optimizer.load_state_dict, which would cast it."""

    __slots__ = ("value",)

    def __init__(self, value: Tensor) -> None:
        self.value = value


class LAMB(Optimizer):
    r"""``p -= lr * r * u``, Adam's update with a trust ratio ``r = ‖p‖ / ‖u‖`` for each tensor.

    ::

        C = max(1, ‖grad‖ / max_grad_norm)                  over all parameters; 1 when None
        g = grad / C                                        (-grad / C with maximize)
        m = beta1 * m + beta3 * g                           beta3 = 1 - beta1, or 1
        v = beta2 * v + (1 - beta2) * g**2
        u = (m / bc1) / (sqrt(v / bc2) + eps) + weight_decay * p        bc = 1 - beta**step, or 1
        r = ‖p‖ / ‖u‖   where weight_decay != 0 or always_adapt, else 1

    ``r`` is 1 where either norm is 0. A NaN or infinite norm is not hidden: it reaches the
    parameters. ``p.grad`` is never written, and nothing of the parameters' size is allocated
    beyond ``exp_avg`` and ``exp_avg_sq`` (but for one copy of a gradient whose memory format
    differs from its parameter's). Results are the same bit for bit for any number of threads.

    Args:
        params: parameters, named parameters or dicts of parameter groups, as in ``torch.optim``.
            float32, float16 and bfloat16 are fused, mixed as they come; float64 and devices
            without a kernel take the plain path.
        lr: learning rate, a float or a one-element tensor (one on a GPU costs a
            synchronisation a step).
        betas: decay of the running averages of the gradient and its square, each in [0, 1).
        eps: added to the root of ``v``, in units of the gradient after the clip.
        weight_decay: λ, added to the update as ``λ * p``; 0 also turns ``r`` off.
        bias_correction: divide the averages by ``1 - beta**step``.
        grad_averaging: weigh the gradient by ``1 - beta1`` in ``m``, else by 1.
        max_grad_norm: bound on the norm of all gradients together, positive, or ``None``; one
            number for the whole optimizer.
        trust_clip: ``r`` at most 1 (LAMBC).
        always_adapt: ``r`` also where ``weight_decay`` is 0.
        maximize: ascend instead of descend.
        fused: ``True``: the native kernels, an error naming a parameter they cannot take;
            ``False``: torch operators on float64 pieces, within the same error bounds but not the
            same bits; ``None``: native wherever possible. Belongs to the run, not to the
            checkpoint: ``load_state_dict`` leaves it alone.

    State of each parameter: ``step`` (float32, 0-dim, on the CPU, as torch's own unfused
    optimizers keep it), ``exp_avg`` and ``exp_avg_sq`` (float32, float64 for float64 parameters).
    ``load_state_dict`` keeps the dtypes it is given.

    Raises:
        ValueError: a hyperparameter out of its range, or groups that differ in ``max_grad_norm``.
        RuntimeError: sparse or complex gradients, ``foreach`` or ``differentiable`` in a group,
            and ``fused=True`` with a parameter the kernels cannot take. Parameters and state are
            as before.

    Source: You et al. 2020, arXiv:1904.00962, algorithm 2; names and defaults are timm's.
    """

    _plan: _Plan | None = None

    def __init__(
        self,
        params: Any,
        lr: float | Tensor = 1e-3,
        betas: tuple[float, float] = (0.9, 0.999),
        eps: float = 1e-6,
        weight_decay: float = 0.01,
        *,
        bias_correction: bool = True,
        grad_averaging: bool = True,
        max_grad_norm: float | None = 1.0,
        trust_clip: bool = False,
        always_adapt: bool = False,
        maximize: bool = False,
        fused: bool | None = None,
    ) -> None:
        defaults = {
            "lr": lr,
            "betas": betas,
            "eps": eps,
            "weight_decay": weight_decay,
            "bias_correction": bias_correction,
            "grad_averaging": grad_averaging,
            "max_grad_norm": max_grad_norm,
            "trust_clip": trust_clip,
            "always_adapt": always_adapt,
            "maximize": maximize,
            "fused": fused,
        }
        _check_options(defaults)
        super().__init__(params, defaults)

    def add_param_group(self, param_group: dict[str, Any]) -> None:
        if isinstance(param_group, dict):
            options = {**self.defaults, **param_group}
            _check_options(options)
            for group in self.param_groups:
                if group["max_grad_norm"] != options["max_grad_norm"]:
                    raise ValueError(
                        "LAMB: max_grad_norm is one number for the whole optimizer, expected "
                        f"{group['max_grad_norm']}, got {options['max_grad_norm']}"
                    )
        super().add_param_group(param_group)
        self._plan = None

    def load_state_dict(self, state_dict: dict[str, Any]) -> None:
        def keep(optimizer: Optimizer, loaded: dict[str, Any]) -> dict[str, Any]:
            state = {
                key: {
                    name: _Kept(value) if isinstance(value, Tensor) else value
                    for name, value in entry.items()
                }
                if isinstance(entry, dict)
                else entry
                for key, entry in loaded["state"].items()
            }
            fused = [group["fused"] for group in self.param_groups]
            groups = [dict(group) for group in loaded["param_groups"]]
            for group, own in zip(groups, fused, strict=False):
                group["fused"] = own
            return {**loaded, "state": state, "param_groups": groups}

        # Registered last, so that it sees what the user's own hooks have made of the dict.
        handle = self.register_load_state_dict_pre_hook(keep)
        try:
            super().load_state_dict(state_dict)
        finally:
            handle.remove()

    load_state_dict.__doc__ = Optimizer.load_state_dict.__doc__

    def __setstate__(self, state: dict[str, Any]) -> None:
        super().__setstate__(state)
        self._plan = None
        for group in self.param_groups:
            for name, value in self.defaults.items():
                group.setdefault(name, value)
        for p, entry in self.state.items():
            if not isinstance(entry, dict):
                continue
            for name, value in entry.items():
                if isinstance(value, _Kept):
                    home = p.device if isinstance(p, Tensor) else value.value.device
                    entry[name] = value.value.to(torch.device("cpu") if name == "step" else home)
            if "step" in entry and not isinstance(entry["step"], Tensor):
                entry["step"] = torch.tensor(
                    float(entry["step"]), dtype=torch.float32, device="cpu"
                )

    @torch.no_grad()
    def step(self, closure: Callable[[], Any] | None = None) -> Any:
        """One update; ``closure`` re-evaluates the model and returns the loss."""
        loss = None
        if closure is not None:
            with torch.enable_grad():
                loss = closure()

        max_grad_norm = self.param_groups[0]["max_grad_norm"]
        for group in self.param_groups:
            _check_options(group)
            if group["max_grad_norm"] != max_grad_norm:
                raise ValueError(
                    "LAMB.step: max_grad_norm is one number for the whole optimizer, got "
                    f"{max_grad_norm} and {group['max_grad_norm']}"
                )
        # A second time only where a parameter has changed its dtype, device or layout.
        while True:
            plan = self._plan
            if plan is None or not plan.holds(self):
                plan = self._plan = _Plan(self)
            if plan.run(self.param_groups, max_grad_norm):
                return loss
            self._plan = None


class _Plan:
    """The tensors of a step: native tables by device, and what takes the plain path.

    Made anew when groups, parameters or state tensors are other objects than before, and when a
    parameter has its first gradient.
    """

    def __init__(self, optimizer: LAMB) -> None:
        groups = optimizer.param_groups
        state = optimizer.state
        self.groups = [(len(group["params"]), group["fused"]) for group in groups]
        self.params = [p for group in groups for p in group["params"]]
        self.stateless: list[Tensor] = []
        chosen: list[tuple[Tensor, int, str, bool]] = []

        # All checks come before the first change to the state. Where two parameters are one memory,
        # the second must see the first one's step: not a thing for threads.
        seen: set[int] = set()
        for index, group in enumerate(groups):
            for position, p in enumerate(group["params"]):
                name = _name_of(p, group, index, position)
                entry = state.get(p) or {}
                if p.grad is None:
                    if not entry:
                        self.stateless.append(p)
                        continue
                else:
                    _check_gradient(p, p.grad, name)
                _check_state(p, entry, name)
                reason = "" if group["fused"] is False else _why_not_native(p, entry)
                if reason and group["fused"]:
                    raise RuntimeError(f"LAMB: fused=True cannot take {name}: {reason}")
                repeated = p.numel() > 0 and type(p) in _PLAIN_TYPES and p.data_ptr() in seen
                if repeated and group["fused"]:
                    raise RuntimeError(
                        f"LAMB: fused=True cannot take {name}: an earlier parameter has its memory"
                    )
                if type(p) in _PLAIN_TYPES:
                    seen.add(p.data_ptr())
                native = not reason and not repeated and group["fused"] is not False
                chosen.append((p, index, name, native))

        tables: dict[torch.device, list[tuple[Tensor, int, str]]] = defaultdict(list)
        self.plain: list[tuple[Tensor, dict[str, Any], int, str]] = []
        for p, index, name, native in chosen:
            entry = state[p]
            if not entry:
                dtype = torch.float64 if p.dtype == torch.float64 else torch.float32
                entry["step"] = torch.zeros((), dtype=torch.float32, device="cpu")
                entry["exp_avg"] = torch.zeros_like(p, dtype=dtype)
                entry["exp_avg_sq"] = torch.zeros_like(p, dtype=dtype)
            if native:
                tables[p.device].append((p, index, name))
            else:
                self.plain.append((p, entry, index, name))
        self.tables = [
            (device, _native_table(members, state)) for device, members in tables.items()
        ]
        self.entries = [entry for p, entry in state.items() if entry and isinstance(p, Tensor)]
        self.tensors = list(chain.from_iterable(map(_state_tensors, self.entries)))

    def holds(self, optimizer: LAMB) -> bool:
        """Whether the optimizer still has the very objects that this plan was made of."""
        groups = optimizer.param_groups
        if self.groups != [(len(group["params"]), group["fused"]) for group in groups]:
            return False
        params = chain.from_iterable(group["params"] for group in groups)
        state = optimizer.state
        entries = [entry for p, entry in state.items() if entry and isinstance(p, Tensor)]
        if (
            len(entries) != len(self.entries)
            or not all(map(is_, params, self.params))
            or not all(map(is_, entries, self.entries))
        ):
            return False
        try:
            tensors = chain.from_iterable(map(_state_tensors, entries))
            if not all(map(is_, tensors, self.tensors)):
                return False
        except KeyError:
            return False
        return all(p.grad is None for p in self.stateless)

    def run(self, groups: list[dict[str, Any]], max_grad_norm: float | None) -> bool:
        """One step; False, with nothing changed, if a table cannot serve its tensors any more."""
        numbers = [
            float(value)
            for group in groups
            for value in (group["lr"], *group["betas"], group["eps"], group["weight_decay"])
        ]
        flags = [
            sum(bool(group[name]) << bit for bit, name in enumerate(_FLAGS)) for group in groups
        ]
        bound = 0.0 if max_grad_norm is None else float(max_grad_norm)
        if len(self.tables) == 1 and not self.plain:
            return self.tables[0][1].step(numbers, flags, bound, None) < 0

        plain = [member for member in self.plain if member[0].grad is not None]
        for p, entry, _, name in plain:
            _check_gradient(p, p.grad, name)
            _check_state(p, entry, name)
        if any(table.prepare() >= 0 for _, table in self.tables):
            return False
        sums: list[Tensor] = []
        if bound:
            sums = [table.grad_sum_sq() for _, table in self.tables]
            sums += [_sum_of_squares(_pieces((p.grad,))) for p, *_ in plain]
        for device, table in self.tables:
            table.step(numbers, flags, bound, _total(sums, device, torch.float64))
        for p, entry, index, _ in plain:
            total = _total(sums, p.device, _wide(p))
            clip = None if total is None else (total.sqrt() / bound).clamp(min=1.0)
            _plain_step(p, entry, groups[index], clip)
        return True


def _native_table(members: list[tuple[Tensor, int, str]], state: Any) -> Any:
    params, indices, names = (list(column) for column in zip(*members, strict=True))
    exp_avgs, exp_avg_sqs, steps = zip(*(_state_tensors(state[p]) for p in params), strict=True)
    make = torch.classes.batchops.LambTable
    return make(params, list(exp_avgs), list(exp_avg_sqs), list(steps), indices, names)


# ------------------------------------------------------------------------------------- checks


def _check_options(options: dict[str, Any]) -> None:
    lr = options["lr"]
    if not isinstance(lr, (int, float, Tensor)):
        raise TypeError(f"LAMB: expected lr to be a number or a tensor, got {type(lr).__name__}")
    if isinstance(lr, Tensor) and lr.numel() != 1:
        raise ValueError(f"LAMB: lr must be a float or a one-element tensor, got {lr.numel()}")
    if not lr >= 0.0:
        raise ValueError(f"LAMB: invalid learning rate: expected lr >= 0, got {lr}")
    if not options["eps"] >= 0.0:
        raise ValueError(f"LAMB: invalid epsilon: expected eps >= 0, got {options['eps']}")
    betas = options["betas"]
    if len(betas) != 2 or not all(0.0 <= beta < 1.0 for beta in betas):
        raise ValueError(f"LAMB: invalid betas: expected two numbers in [0, 1), got {betas}")
    decay = options["weight_decay"]
    if not decay >= 0.0:
        raise ValueError(f"LAMB: invalid weight_decay: expected weight_decay >= 0, got {decay}")
    bound = options["max_grad_norm"]
    if bound is not None and not 0.0 < bound < math.inf:
        raise ValueError(f"LAMB: max_grad_norm must be positive and finite, or None, got {bound}")
    for name in ("foreach", "differentiable", "capturable"):
        if options.get(name):
            raise RuntimeError(f"LAMB: `{name}` is not supported, got {name}={options[name]}")
    if options["fused"] not in (None, True, False):
        raise ValueError(f"LAMB: fused must be True, False or None, got {options['fused']!r}")


def _name_of(p: Tensor, group: dict[str, Any], index: int, position: int) -> str:
    names = group.get("param_names")
    called = f" ({names[position]!r})" if names else ""
    return f"parameter {position} of group {index}{called}, {p.dtype} of size {tuple(p.shape)}"


def _check_gradient(p: Tensor, grad: Tensor, name: str) -> None:
    if grad.layout is not torch.strided:
        raise RuntimeError(f"LAMB.step: {name} has a sparse gradient; expected a dense one")
    if grad.is_complex() or p.is_complex():
        raise RuntimeError(f"LAMB.step: {name} has a complex gradient; expected a real one")
    if grad.shape != p.shape or grad.device != p.device:
        raise RuntimeError(
            f"LAMB.step: {name} expects a gradient of its size on {p.device}, got "
            f"{tuple(grad.shape)} on {grad.device}"
        )


def _check_state(p: Tensor, entry: dict[str, Any], name: str) -> None:
    if not entry:
        if any(size > 1 and stride == 0 for size, stride in zip(p.shape, p.stride(), strict=True)):
            raise RuntimeError(f"LAMB.step: {name} has elements that share memory; clone it first")
        return
    for key in _STATE:
        if not isinstance(entry.get(key), Tensor):
            raise RuntimeError(
                f"LAMB.step: expected a tensor {key!r} in the state of {name}, got "
                f"{type(entry.get(key)).__name__} (keys: {sorted(map(str, entry))})"
            )
    for key in ("exp_avg", "exp_avg_sq"):
        value = entry[key]
        if value.shape != p.shape or value.device != p.device or not value.is_floating_point():
            raise RuntimeError(
                f"LAMB.step: expected {key!r} of {name} to be floating-point, of its size and on "
                f"{p.device}, got {value.dtype} of size {tuple(value.shape)} on {value.device}"
            )


def _why_not_native(p: Tensor, entry: dict[str, Any]) -> str:
    if type(p) not in _PLAIN_TYPES:
        return f"expected a torch.Tensor, got the subclass {type(p).__name__}"
    step = entry.get("step")
    if step is not None and (step.dtype != torch.float32 or not step.is_cpu or step.numel() != 1):
        return f"expected state 'step' as a float32 number on the CPU, got {step.dtype}"
    m, v = entry.get("exp_avg"), entry.get("exp_avg_sq")
    return torch.ops.batchops.lamb_unsupported(p, m, v)


# --------------------------------------------------------------------------------- plain path


def _wide(p: Tensor) -> torch.dtype:
    return torch.float32 if p.device.type == "mps" else torch.float64


def _pieces(tensors: tuple[Tensor, ...]) -> Iterator[tuple[Tensor, ...]]:
    """Views of equal places in tensors of one size, of bounded size whatever the strides."""
    limit = _PIECE.get(tensors[0].device.type, _PIECE_ELSEWHERE)
    shape = tensors[0].shape
    if tensors[0].numel() <= limit:
        yield tensors
        return
    if all(t.is_contiguous() for t in tensors):
        yield from zip(*(t.view(-1).split(limit) for t in tensors), strict=True)
        return
    dim = max(range(len(shape)), key=lambda d: shape[d])
    size = max(1, shape[dim] * limit // tensors[0].numel())
    for views in zip(*(t.split(size, dim) for t in tensors), strict=True):
        yield from _pieces(views)


def _sum_of_squares(pieces: Iterable[tuple[Tensor, ...]]) -> Tensor:
    return torch.stack([x.to(_wide(x)).square().sum() for (x,) in pieces]).sum()


def _total(sums: list[Tensor], device: torch.device, dtype: torch.dtype) -> Tensor | None:
    if not sums:
        return None
    return torch.stack([s.to(device=device, dtype=dtype) for s in sums]).sum()


def _plain_step(p: Tensor, entry: dict[str, Any], group: dict[str, Any], clip: Tensor | None):
    """One tensor's step in torch operators, in float64 by pieces."""
    m, v, step = entry["exp_avg"], entry["exp_avg_sq"], entry["step"]
    step.add_(1)
    t = float(step)
    beta1, beta2 = map(float, group["betas"])
    beta3 = 1 - beta1 if group["grad_averaging"] else 1.0
    bc1, bc2 = (1 - beta1**t, 1 - beta2**t) if group["bias_correction"] else (1.0, 1.0)
    lr, eps, decay = float(group["lr"]), float(group["eps"]), float(group["weight_decay"])
    wide = _wide(p)

    def update(p_i: Tensor, m_i: Tensor, v_i: Tensor) -> Tensor:
        u = (m_i.to(wide) / bc1).div_((v_i.to(wide) / bc2).sqrt_().add_(eps))
        return u.add_(p_i.to(wide), alpha=decay)

    p_sq = torch.zeros((), dtype=wide, device=p.device)
    u_sq = torch.zeros_like(p_sq)
    for p_i, g_i, m_i, v_i in _pieces((p, p.grad, m, v)):
        g = g_i.to(wide)
        if group["maximize"]:
            g = -g
        if clip is not None:
            g = g / clip
        m_i.copy_(m_i.to(wide).mul_(beta1).add_(g, alpha=beta3))
        v_i.copy_(v_i.to(wide).mul_(beta2).addcmul_(g, g, value=1 - beta2))
        p_sq += p_i.to(wide).square().sum()
        u_sq += update(p_i, m_i, v_i).square_().sum()

    ratio = torch.ones_like(p_sq)
    if decay != 0 or group["always_adapt"]:
        p_norm, u_norm = p_sq.sqrt(), u_sq.sqrt()
        ratio = torch.where((p_norm == 0) | (u_norm == 0), ratio, p_norm / u_norm)
        if group["trust_clip"]:
            ratio = ratio.clamp(max=1.0)
    for p_i, m_i, v_i in _pieces((p, m, v)):
        p_i.copy_(p_i.to(wide) - update(p_i, m_i, v_i).mul_(ratio).mul_(lr))
