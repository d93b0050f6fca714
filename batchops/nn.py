"""Modules: subclasses of torch's, with the same state_dict, plus an activation and a residual."""

from __future__ import annotations

import torch
from torch import Tensor, nn

from . import functional as BF

__all__ = ["BatchNorm1d", "BatchNorm2d", "BatchNorm3d"]


class _FusedBatchNorm(nn.modules.batchnorm._BatchNorm):
    # Class attribute, so that a stock module turned into this class (convert) has one too.
    activation: str | None = None

    def __init__(
        self,
        num_features: int,
        eps: float = 1e-5,
        momentum: float | None = 0.1,
        affine: bool = True,
        track_running_stats: bool = True,
        device: torch.device | str | None = None,
        dtype: torch.dtype | None = None,
        *,
        activation: str | None = None,
        **kwargs: bool,  # bias=, in the torch versions that have it
    ) -> None:
        super().__init__(
            num_features, eps, momentum, affine, track_running_stats, device, dtype, **kwargs
        )
        if activation is not None:  # an unknown name fails here, not at the first batch
            torch.ops.batchops.activation(torch.empty(0), activation)
        self.activation = None if activation == "none" else activation

    def forward(self, input: Tensor, residual: Tensor | None = None) -> Tensor:
        self._check_input_dim(input)
        factor = 0.0 if self.momentum is None else self.momentum
        training = self.training
        mean, var = self.running_mean, self.running_var
        counter = None
        if training:
            if self.track_running_stats:
                counter = self.num_batches_tracked
                if counter is not None and self.momentum is None:  # cumulative average
                    factor = 1.0 / (float(counter) + 1.0)
            else:
                mean = var = None
        elif mean is None and var is None:
            training = True  # batch statistics, and none to update
        output = BF.batch_norm(
            input,
            mean,
            var,
            self.weight,
            self.bias,
            training,
            factor,
            self.eps,
            activation=self.activation,
            residual=residual,
        )
        if counter is not None:  # last, so that a batch that was refused is not counted
            counter.add_(1)
        return output

    def extra_repr(self) -> str:
        text = super().extra_repr()
        return text if self.activation is None else f"{text}, activation={self.activation!r}"


def _document(name: str, shape: str, stock: type) -> str:
    return f"""``y = activation(batch_norm(x) + residual)`` for ``{shape}`` inputs.

    A subclass of ``torch.nn.{stock.__name__}`` with its arguments, buffers and state_dict.
    ``activation`` is ``None`` or ``"relu"``. Call it as ``{name}(...)(x)`` or
    ``{name}(...)(x, residual=z)``. Formula, dtypes and errors:
    :func:`batchops.functional.batch_norm`.
    """


class BatchNorm1d(_FusedBatchNorm, nn.BatchNorm1d):
    __doc__ = _document("BatchNorm1d", "(N, C) or (N, C, L)", nn.BatchNorm1d)


class BatchNorm2d(_FusedBatchNorm, nn.BatchNorm2d):
    __doc__ = _document("BatchNorm2d", "(N, C, H, W)", nn.BatchNorm2d)


class BatchNorm3d(_FusedBatchNorm, nn.BatchNorm3d):
    __doc__ = _document("BatchNorm3d", "(N, C, D, H, W)", nn.BatchNorm3d)
