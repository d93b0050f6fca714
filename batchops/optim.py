"""Fused optimizers for large batches."""

from __future__ import annotations

import math
from collections.abc import Callable, Iterable
from typing import Any, ClassVar

import torch
from torch import Tensor

from ._optimizer import FusedOptimizer, Stats

__all__ = ["LAMB", "LARS", "Stats"]

Exclude = bool | str | Iterable[str] | Callable[[str | None, Tensor], bool] | None


def _vectors(name: str | None, p: Tensor) -> bool:
    return p.ndim <= 1


class LAMB(FusedOptimizer):
    r"""``p -= lr * r * u``, Adam's update with a trust ratio ``r = ‖p‖ / ‖u‖`` for each tensor.

    ::

        C = max(1, (‖grad‖ + clip_eps) / max_grad_norm)     over all parameters; 1 when None
        g = grad / C                                        (-grad / C with maximize)
        m = beta1 * m + beta3 * g                           beta3 = 1 - beta1, or 1
        v = beta2 * v + (1 - beta2) * g**2
        a = (m / bc1) / (sqrt(v / bc2) + eps)               bc = 1 - beta**step, or 1
        u = a + weight_decay * p
        r = clamp(‖p‖ / ‖u‖, *ratio_clamp)   where weight_decay != 0 or always_adapt, else 1

    ``r`` is 1 where either norm is 0. A NaN or infinite norm is not hidden: it reaches the
    parameters. ``p.grad`` is never written (after ``GradScaler.step`` it holds the scale still).
    Nothing of the parameters' size is allocated beyond ``exp_avg`` and ``exp_avg_sq`` (but for
    masters, and one copy of a gradient whose memory format differs from its parameter's). Results
    are the same bit for bit for any number of threads.

    Args:
        params: parameters, named parameters or dicts of parameter groups, as in ``torch.optim``.
            float32, float16 and bfloat16 are fused, mixed as they come; float64 and devices
            without a kernel take the plain path.
        lr: learning rate, a float or a one-element tensor (one on a GPU costs a
            synchronisation a step, but with ``capturable``).
        betas: decay of the running averages of the gradient and its square, each in [0, 1).
        eps: added to the root of ``v``, in units of the gradient after the clip.
        weight_decay: λ, added to the update as ``λ * p``; 0 also turns ``r`` off.
        bias_correction: divide the averages by ``1 - beta**step``.
        grad_averaging: weigh the gradient by ``1 - beta1`` in ``m``, else by 1.
        max_grad_norm: bound on the norm of all gradients together, positive, or ``None``; one
            number for the whole optimizer.
        clip_eps: see ``C``, which stays 1 up to 1 all the same; the first group's counts.
        trust_clip: ``r`` at most 1 (LAMBC).
        always_adapt: ``r`` also where ``weight_decay`` is 0.
        decoupled_decay: ``p *= 1 - lr * λ`` before ``‖p‖`` is taken, instead of ``λ * p`` in ``u``.
        corrected_weight_decay: ``lr**2 / max_lr`` for ``lr`` there; ``max_lr`` is the group's
            first ``lr``, which must be positive.
        caution: ``a`` is 0 where its sign is not the gradient's, and divided by the fraction that
            is kept, at least 1e-3 (arXiv:2411.16085).
        ratio_clamp: bounds ``(min, max)`` of ``r`` where it is not 1 for a zero norm.
        step_size_correction: the corrections go to the step size, ``lr * sqrt(bc2) / bc1``, and
            ``a = m / (sqrt(v) + eps)``.
        eps_inside_sqrt: ``sqrt(v / bc2 + eps)``.
        exclude: parameters with ``r = 1``: a function of name (``None`` without names) and
            parameter, parts of names (with named parameters), or a bool. Resolved when a group is
            added; the group then holds a list of positions, which may be changed between steps.
        maximize: ascend instead of descend.
        capturable: all of a step on the device, without a synchronisation: ``step``, ``lr`` as a
            tensor, GradScaler's ``found_inf``; a captured CUDA graph may replay it.
        master_weights: float16 and bfloat16 parameters get a float32 master (state ``master``),
            which the update goes to; the parameter is its rounded copy, so what is written to it
            from elsewhere after the first step is undone by the next.
        fused: ``True``: the native kernels, an error naming a parameter they cannot take;
            ``False``: torch operators on float64 pieces, within the same error bounds but not the
            same bits; ``None``: native wherever possible. Belongs to the run, not to the
            checkpoint, as ``capturable`` does: ``load_state_dict`` leaves both alone.
        sm_margin: multiprocessors of a GPU that the step, one kernel of as many blocks as fit the
            device, leaves to kernels beside it (an all-reduce, say); at least one stays its own.
            Results are the same bits. An attribute too, which may change between steps.
        foreach, differentiable: taken for callers that pass them to every optimizer, as ``None``
            or ``False``; there is no such form.

    State of each parameter: ``step`` (float32, 0-dim, on the CPU, as torch's own unfused
    optimizers keep it; on the device with ``capturable``), ``exp_avg`` and ``exp_avg_sq`` (float32,
    float64 for float64 parameters), ``master``. ``load_state_dict`` keeps the dtypes it is given,
    and takes states of Apex's FusedLAMB and timm's Lamb.

    Raises:
        ValueError: a hyperparameter out of its range, or groups that differ in ``max_grad_norm``.
        TypeError: a hyperparameter or ``exclude`` of another kind, and parameters of which this
            process has a part (DTensors, FSDP's flat parameters).
        RuntimeError: sparse, complex or integer gradients, complex or integer parameters,
            ``foreach`` or ``differentiable``, and ``fused=True`` with a parameter the kernels
            cannot take or that shares memory with an earlier one. Parameters and state are as
            before.

    Source: You et al. 2020, arXiv:1904.00962, algorithm 2; names and defaults are timm's.
    """

    _kind = "LAMB"
    _numeric = ("eps", "weight_decay", "clip_eps")
    _rates = (0, 5)  # lr, decay_lr
    _flags = (
        "bias_correction",
        "grad_averaging",
        "always_adapt",
        "maximize",
        "decoupled_decay",
        "caution",
        "step_size_correction",
        "eps_inside_sqrt",
    )
    PRESETS: ClassVar[dict[str, dict[str, Any]]] = {
        "paper": {"max_grad_norm": None, "always_adapt": True},
        "apex": {},
        "nvlamb": {"always_adapt": True},
        "timm": {},
        "lambc": {"trust_clip": True},
        "deepspeed": {
            "max_grad_norm": None,
            "clip_eps": 1e-6,
            "always_adapt": True,
            "ratio_clamp": (0.01, 10.0),
            "step_size_correction": True,
            "eps": 1e-8,
            "weight_decay": 0.0,
        },
    }

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
        clip_eps: float = 0.0,
        trust_clip: bool = False,
        always_adapt: bool = False,
        decoupled_decay: bool = False,
        corrected_weight_decay: bool = False,
        caution: bool = False,
        ratio_clamp: tuple[float, float] | None = None,
        step_size_correction: bool = False,
        eps_inside_sqrt: bool = False,
        exclude: Exclude = None,
        maximize: bool = False,
        capturable: bool = False,
        master_weights: bool = False,
        fused: bool | None = None,
        sm_margin: int = 0,
        foreach: bool | None = None,
        differentiable: bool = False,
    ) -> None:
        options = {
            "lr": lr,
            "betas": betas,
            "eps": eps,
            "weight_decay": weight_decay,
            "bias_correction": bias_correction,
            "grad_averaging": grad_averaging,
            "max_grad_norm": max_grad_norm,
            "clip_eps": clip_eps,
            "trust_clip": trust_clip,
            "always_adapt": always_adapt,
            "decoupled_decay": decoupled_decay,
            "corrected_weight_decay": corrected_weight_decay,
            "caution": caution,
            "ratio_clamp": ratio_clamp,
            "step_size_correction": step_size_correction,
            "eps_inside_sqrt": eps_inside_sqrt,
            "maximize": maximize,
            "capturable": capturable,
            "master_weights": master_weights,
            "fused": fused,
        }
        super().__init__(params, options, exclude, sm_margin, foreach, differentiable)

    @classmethod
    def preset(cls, name: str, params: Any, **overrides: Any) -> LAMB:
        """The combination of keywords that a published implementation stands for.

        ``paper``, ``apex`` (FusedLAMB), ``nvlamb`` (FusedLAMB with use_nvlamb), ``timm``, ``lambc``
        (timm with trust_clip) and ``deepspeed`` (FusedLamb; its newest source corrects the moments
        instead of the step size, as ``step_size_correction=False`` does); ``overrides`` are LAMB's
        keywords. ValueError for another name.
        """
        return cls(params, **{**_preset(cls, name), **overrides})

    def _complete(self, param_group: dict[str, Any], options: dict[str, Any]) -> None:
        if options["corrected_weight_decay"]:
            param_group.setdefault("max_lr_snapshot", float(options["lr"]))

    def _moments(self, group: dict[str, Any]) -> tuple[str, ...]:
        return ("exp_avg", "exp_avg_sq")

    def _numbers(self, group: dict[str, Any]) -> tuple[Any, ...]:
        lr = decay_lr = group["lr"]
        if group["corrected_weight_decay"]:
            decay_lr = lr * lr / group.get("max_lr_snapshot", lr)
        low, high = group["ratio_clamp"] or (0.0, math.inf)
        if group["trust_clip"]:
            high = min(high, 1.0)
            low = min(low, high)
        return (lr, *group["betas"], group["eps"], group["weight_decay"], decay_lr, low, high)

    def _check_own(self, options: dict[str, Any]) -> None:
        betas = options["betas"]
        self._check_pair("betas", betas)
        if len(betas) != 2 or not all(0.0 <= beta < 1.0 for beta in betas):
            raise ValueError(f"LAMB: invalid betas: expected two numbers in [0, 1), got {betas}")
        clamp = options["ratio_clamp"]
        if clamp is not None:
            self._check_pair("ratio_clamp", clamp)
            if not (len(clamp) == 2 and 0.0 <= clamp[0] <= clamp[1]):
                raise ValueError(
                    "LAMB: ratio_clamp must be None or (min, max) with 0 <= min <= max, got "
                    f"{clamp}"
                )
        if not 0.0 <= options["clip_eps"] < math.inf:
            raise ValueError(f"LAMB: expected clip_eps >= 0, got {options['clip_eps']}")
        if options["corrected_weight_decay"]:
            if not options["decoupled_decay"]:
                raise ValueError(
                    "LAMB: corrected_weight_decay is a form of decoupled_decay: expected "
                    "decoupled_decay=True, got False"
                )
            if not options.get("max_lr_snapshot", options["lr"]) > 0:
                raise ValueError(
                    "LAMB: corrected_weight_decay expects the first lr, its peak, to be positive, "
                    f"got {options['lr']}"
                )


class LARS(FusedOptimizer):
    r"""SGD with momentum whose gradient is scaled by ``λ_l = trust_coeff * ‖p‖ / ‖g‖`` a tensor.

    ::

        λ_l = trust_coeff * ‖p‖ / (‖g‖ + weight_decay * ‖p‖ + eps)   where weight_decay != 0 or
                                                                     always_adapt, else 1
        G   = λ_l * (g + weight_decay * p)                           times lr with lr_in_momentum
        m   = momentum * m + (1 - dampening) * G                     G in the first step
        p  -= lr * m                                                 without lr with lr_in_momentum;
                                                                     G + momentum * m with nesterov

    ``λ_l`` is 1 where either norm is 0. A NaN or infinite norm is not hidden. ``p.grad`` is never
    written, and nothing of the parameters' size is allocated beyond ``momentum_buffer``, which
    needs a momentum. Results are the same bit for bit for any number of threads.

    Args:
        params, lr, maximize, capturable, master_weights, fused, sm_margin, foreach, differentiable:
            as in :class:`LAMB`.
        momentum: μ, at least 0.
        dampening: of the gradient in the buffer, but for the first step.
        weight_decay: λ; 0 also turns ``λ_l`` off.
        nesterov: needs a momentum and no dampening.
        trust_coeff: η of the paper.
        eps: see ``λ_l``, in units of the gradient.
        trust_clip: ``min(λ_l / lr, 1)`` for ``λ_l`` (LARC), so that ``lr`` is a bound on the rate.
        always_adapt: ``λ_l`` also where ``weight_decay`` is 0.
        exclude: parameters without ``λ_l``, as in :class:`LAMB`.
        exclude_decay: they have no weight decay either.
        lr_in_momentum: see ``G``: a change of ``lr`` takes effect through ``m``, as in the paper.
        momentum_correction: ``momentum * lr / (lr of the step before)`` in ``m``'s line (Goyal et
            al. 2017, arXiv:1706.02677); 1 for that quotient in the first step and after ``lr = 0``.
            The group's ``last_lr``, which checkpoints hold; a skipped step leaves it alone.
        zero_norm_plain: where a norm is 0, ``G = g``: neither weight decay nor trust_clip.
        max_grad_norm: bound on the norm of all gradients together, positive, or ``None``; one
            number for the whole optimizer.

    State of each parameter: ``step`` as in :class:`LAMB` (counted from when the momentum was first
    not 0), ``momentum_buffer`` (float32, float64 for float64 parameters; with a momentum),
    ``master``. ``load_state_dict`` takes states of timm's
    Lars.

    Raises:
        ValueError, TypeError, RuntimeError: as :class:`LAMB`.

    Source: You et al. 2017, arXiv:1708.03888, algorithm 1; names and defaults are timm's.
    """

    _kind = "LARS"
    _numeric = ("eps", "weight_decay", "momentum", "dampening", "trust_coeff")
    _rates = (0, 6)  # lr, the factor of the momentum correction
    _flags = (
        "nesterov",
        "trust_clip",
        "always_adapt",
        "exclude_decay",
        "lr_in_momentum",
        "zero_norm_plain",
        "maximize",
    )
    PRESETS: ClassVar[dict[str, dict[str, Any]]] = {
        "paper": {
            "momentum": 0.9,
            "weight_decay": 5e-4,
            "eps": 0.0,
            "always_adapt": True,
            "lr_in_momentum": True,
        },
        "mlperf": {
            "momentum": 0.9,
            "weight_decay": 1e-4,
            "eps": 1e-7,  # Keras' epsilon, which the reference takes where it is given 0
            "always_adapt": True,
            "exclude": _vectors,
            "exclude_decay": True,
            "lr_in_momentum": True,
        },
        "timm": {},
        "larc": {"trust_clip": True},
        "apex_larc": {
            "trust_coeff": 0.02,
            "trust_clip": True,
            "always_adapt": True,
            "zero_norm_plain": True,
        },
    }

    def __init__(
        self,
        params: Any,
        lr: float | Tensor = 1.0,
        momentum: float = 0.0,
        dampening: float = 0.0,
        weight_decay: float = 0.0,
        nesterov: bool = False,
        *,
        trust_coeff: float = 1e-3,
        eps: float = 1e-8,
        trust_clip: bool = False,
        always_adapt: bool = False,
        exclude: Exclude = None,
        exclude_decay: bool = False,
        lr_in_momentum: bool = False,
        momentum_correction: bool = False,
        zero_norm_plain: bool = False,
        max_grad_norm: float | None = None,
        maximize: bool = False,
        capturable: bool = False,
        master_weights: bool = False,
        fused: bool | None = None,
        sm_margin: int = 0,
        foreach: bool | None = None,
        differentiable: bool = False,
    ) -> None:
        options = {
            "lr": lr,
            "momentum": momentum,
            "dampening": dampening,
            "weight_decay": weight_decay,
            "nesterov": nesterov,
            "trust_coeff": trust_coeff,
            "eps": eps,
            "trust_clip": trust_clip,
            "always_adapt": always_adapt,
            "exclude_decay": exclude_decay,
            "lr_in_momentum": lr_in_momentum,
            "momentum_correction": momentum_correction,
            "zero_norm_plain": zero_norm_plain,
            "max_grad_norm": max_grad_norm,
            "maximize": maximize,
            "capturable": capturable,
            "master_weights": master_weights,
            "fused": fused,
        }
        super().__init__(params, options, exclude, sm_margin, foreach, differentiable)

    @classmethod
    def preset(cls, name: str, params: Any, **overrides: Any) -> LARS:
        """The combination of keywords that a published implementation stands for.

        ``paper``, ``mlperf`` (the TensorFlow reference, which leaves out biases and norms: here
        tensors of at most one dimension), ``timm``, ``larc`` (timm with trust_clip) and
        ``apex_larc`` (Apex's LARC around SGD); ``overrides`` are LARS' keywords. ValueError for
        another name.
        """
        return cls(params, **{**_preset(cls, name), **overrides})

    def _moments(self, group: dict[str, Any]) -> tuple[str, ...]:
        return ("momentum_buffer",) if group["momentum"] != 0 else ()

    def _numbers(self, group: dict[str, Any]) -> tuple[Any, ...]:
        lr, last = group["lr"], group.get("last_lr")
        factor: Any = 1.0
        if group["momentum_correction"] and last is not None:
            if isinstance(last, Tensor):
                if isinstance(lr, Tensor) and lr.is_cpu and not last.is_cpu:
                    lr = float(lr)
                # NaN: no step before, or none that was not skipped.
                factor = (lr / last).where((last != 0) & ~last.isnan(), 1.0)
            elif last != 0:
                factor = lr / last
        names = ("momentum", "dampening", "weight_decay", "trust_coeff", "eps")
        return (group["lr"], *(group[name] for name in names), factor)

    def _stepped(self, group: dict[str, Any], skip: Tensor | None) -> None:
        if not group["momentum_correction"]:
            return
        lr, last = group["lr"], group.get("last_lr")
        if skip is None and not (isinstance(lr, Tensor) and group["capturable"]):
            group["last_lr"] = float(lr)
            return
        if skip is not None and (not isinstance(lr, Tensor) or lr.is_cpu):
            # Filled there: a copy to the device would be waited for.
            dtype = lr.dtype if isinstance(lr, Tensor) else None
            lr = torch.full((), float(lr), dtype=dtype, device=skip.device)
        home = lr.device
        if not isinstance(last, Tensor):
            last = torch.full_like(lr, math.nan if last is None else last)
        if skip is not None:
            lr = torch.where(skip.to(home).reshape(lr.shape) != 0, last, lr)
        # In place where it can be: a captured graph writes to where it will read.
        group["last_lr"] = last.copy_(lr)

    def _check_own(self, options: dict[str, Any]) -> None:
        for name in ("momentum", "trust_coeff"):
            if not 0.0 <= options[name] < math.inf:
                raise ValueError(f"LARS: invalid {name}: expected {name} >= 0, got {options[name]}")
        if not -math.inf < options["dampening"] < math.inf:
            raise ValueError(
                f"LARS: invalid dampening: expected a finite number, got {options['dampening']}"
            )
        if options["nesterov"] and (options["momentum"] <= 0 or options["dampening"] != 0):
            raise ValueError(
                "LARS: nesterov: expected a momentum and zero dampening, got "
                f"momentum={options['momentum']}, dampening={options['dampening']}"
            )


def _preset(cls: Any, name: str) -> dict[str, Any]:
    if name not in cls.PRESETS:
        raise ValueError(
            f"{cls.__name__}.preset: expected one of {', '.join(cls.PRESETS)}, got {name!r}"
        )
    return cls.PRESETS[name]
