"""LAMB as one would write it in plain torch: a loop over the parameters, a few operators each."""

from __future__ import annotations

from collections.abc import Iterable
from typing import Any

import torch


class PlainLAMB(torch.optim.Optimizer):
    """``p -= lr * (‖p‖ / ‖u‖) * u``, u = Adam's update + weight_decay * p (arXiv:1904.00962).

    The gradients are first divided by max(1, ‖all gradients‖ / max_grad_norm). Parameters of groups
    without weight decay are not adapted: their ratio is 1, as it is where either norm is 0.
    """

    def __init__(
        self,
        params: Iterable[Any],
        lr: float = 1e-3,
        betas: tuple[float, float] = (0.9, 0.999),
        eps: float = 1e-6,
        weight_decay: float = 0.01,
        max_grad_norm: float = 1.0,
    ) -> None:
        super().__init__(
            params, {"lr": lr, "betas": betas, "eps": eps, "weight_decay": weight_decay}
        )
        self.max_grad_norm = max_grad_norm

    @torch.no_grad()
    def step(self, closure: Any = None) -> Any:
        loss = None
        if closure is not None:
            with torch.enable_grad():
                loss = closure()
        grads = [p.grad for g in self.param_groups for p in g["params"] if p.grad is not None]
        if not grads:
            return loss
        norm = torch.linalg.vector_norm(torch.stack([torch.linalg.vector_norm(g) for g in grads]))
        clip = (norm / self.max_grad_norm).clamp_(min=1.0)

        for group in self.param_groups:
            beta1, beta2 = group["betas"]
            for p in group["params"]:
                if p.grad is None:
                    continue
                state = self.state[p]
                if not state:
                    state["step"] = 0
                    state["exp_avg"] = torch.zeros_like(p)
                    state["exp_avg_sq"] = torch.zeros_like(p)
                state["step"] += 1
                m, v = state["exp_avg"], state["exp_avg_sq"]
                g = p.grad / clip
                m.lerp_(g, 1 - beta1)
                v.mul_(beta2).addcmul_(g, g, value=1 - beta2)
                correction1 = 1 - beta1 ** state["step"]
                correction2 = 1 - beta2 ** state["step"]
                u = (m / correction1) / ((v / correction2).sqrt_().add_(group["eps"]))
                if group["weight_decay"] != 0:
                    u.add_(p, alpha=group["weight_decay"])
                    weight_norm, update_norm = p.norm(), u.norm()
                    ratio = torch.where(
                        (weight_norm > 0) & (update_norm > 0), weight_norm / update_norm, 1.0
                    )
                    u.mul_(ratio)
                p.add_(u, alpha=-group["lr"])
        return loss
