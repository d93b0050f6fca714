"""Functional forms of the fused norms."""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Tensor
from torch.overrides import handle_torch_function, has_torch_function_variadic

from . import _binding

__all__ = ["batch_norm"]

_train = torch.ops.batchops.batch_norm.default
_update = torch.ops.batchops.batch_norm_update.default
_eval = torch.ops.batchops.batch_norm_eval.default
_activation = torch.ops.batchops.activation.default

_CPU_DTYPES = frozenset((torch.float32, torch.bfloat16, torch.float16, torch.float64))
_CUDA_DTYPES = frozenset((torch.float32, torch.bfloat16, torch.float16))
_CUDA = _binding.core.built_with_cuda()


def _has_kernel(input: Tensor) -> bool:
    """Whether there is a kernel of ours for the device and dtype; else the stock op serves."""
    if input.layout is not torch.strided:
        return False
    if input.is_cpu:
        return input.dtype in _CPU_DTYPES
    if input.is_cuda:
        return _CUDA and input.dtype in _CUDA_DTYPES
    return input.is_meta and input.dtype in _CPU_DTYPES


def batch_norm(
    input: Tensor,
    running_mean: Tensor | None,
    running_var: Tensor | None,
    weight: Tensor | None = None,
    bias: Tensor | None = None,
    training: bool = False,
    momentum: float = 0.1,
    eps: float = 1e-5,
    *,
    activation: str | None = None,
    residual: Tensor | None = None,
) -> Tensor:
    """``y = activation((x - mean) / sqrt(var + eps) * weight + bias + residual)``, per channel.

    ``mean`` and the biased ``var`` are over the batch and all spatial positions when ``training``
    (then ``running = (1 - momentum) * running + momentum * batch``, with the unbiased variance),
    else ``running_mean`` and ``running_var``. All sums are in float32 or better. The result is
    the same bit for bit in every run and for any number of threads.

    Args:
        input: ``(N, C, *)``, 2 or more dimensions; float32, bfloat16, float16, and float64 on the
            CPU. Contiguous and channels-last memory are both native: the output keeps the layout.
        running_mean, running_var: ``(C,)``, of ``input``'s dtype or float32; or both ``None`` when
            ``training``. Updated in place when ``training``.
        weight, bias: ``(C,)``, of ``input``'s dtype or float32; or ``None`` for 1 and 0.
        momentum: weight of the new batch in the running statistics, no unit, 0 to 1.
        eps: added to the variance, in squared units of ``input``; positive when ``training``.
        activation: ``None`` or ``"relu"``.
        residual: of ``input``'s size and dtype, added before the activation. Where its dtype
            differs, torch's own operators compute the sum with torch's type promotion.

    Returns:
        Tensor of ``input``'s size, dtype and layout. An empty input gives an empty output and
        leaves the statistics alone. Differentiable once and twice in ``input``, ``weight``,
        ``bias`` and ``residual``; forward-mode AD raises ``NotImplementedError``. The backward
        keeps ``input`` and, with a residual and relu, one bit an element.

    Raises:
        ValueError: one value per channel when training; unknown ``activation``; ``eps`` out of
            range.
        RuntimeError: sizes, dtypes or devices that do not fit, naming the argument.

    A device or dtype without a kernel here (CUDA float64, MPS, ...) takes torch's operators.

    Source: Ioffe and Szegedy 2015, arXiv:1502.03167, algorithms 1 and 2.
    """
    if has_torch_function_variadic(input, running_mean, running_var, weight, bias, residual):
        return handle_torch_function(
            batch_norm,
            (input, running_mean, running_var, weight, bias, residual),
            input,
            running_mean,
            running_var,
            weight=weight,
            bias=bias,
            training=training,
            momentum=momentum,
            eps=eps,
            activation=activation,
            residual=residual,
        )
    if not isinstance(input, Tensor):
        raise TypeError(f"batch_norm: expected input to be a Tensor, got {type(input).__name__}")
    if momentum is None:
        raise TypeError("batch_norm: expected momentum to be a float, got None")
    name = "none" if activation is None else activation
    if not _has_kernel(input) or (residual is not None and residual.dtype != input.dtype):
        y = F.batch_norm(input, running_mean, running_var, weight, bias, training, momentum, eps)
        return _activation(y if residual is None else y + residual, name)
    if training:
        if running_mean is None and running_var is None:
            return _train(input, weight, bias, residual, eps, name)[0]
        if running_mean is not None and running_var is not None:
            return _update(
                input, running_mean, running_var, weight, bias, residual, momentum, eps, name
            )[0]
    elif running_mean is not None and running_var is not None:
        if eps < 0:
            raise ValueError(f"batch_norm eps must be non-negative, but got {eps}")
        return _eval(input, running_mean, running_var, weight, bias, residual, eps, name)[0]
    raise RuntimeError(
        "batch_norm: expected running_mean and running_var both given"
        f"{' or both None when training' if training else ', since training is False'}, but got "
        f"running_mean={'None' if running_mean is None else 'a tensor'} and "
        f"running_var={'None' if running_var is None else 'a tensor'}"
    )
