"""Modules: subclasses of torch's, with the same state_dict, plus an activation and a residual."""

from __future__ import annotations

import sys
import warnings
from typing import Any

import torch
from torch import Tensor, nn

from . import _binding
from . import functional as BF

__all__ = [
    "BatchNorm1d",
    "BatchNorm2d",
    "BatchNorm3d",
    "GroupNorm",
    "InstanceNorm1d",
    "InstanceNorm2d",
    "InstanceNorm3d",
    "LayerNorm",
]

_is_compiling = torch.compiler.is_compiling
_count = _binding.norms["count"]


def _checked(activation: BF.Activation) -> BF.Activation:
    """An unknown name fails when the module is made, not at the first batch."""
    if activation is None or activation == "none":
        return None
    torch.ops.batchops.activation(torch.empty(0), *BF._activation_of(activation))
    return activation


class _Activated(nn.Module):
    """What all fused norms add to torch's modules."""

    # Class attributes, so that a stock module turned into this class (convert) has them too.
    activation: BF.Activation = None
    fused_with: BF.Activation = None  # what convert() found behind the norm, for people to see

    def extra_repr(self) -> str:
        text = super().extra_repr()
        for name in ("activation", "fused_with"):
            value = getattr(self, name)
            text = text if value is None else f"{text}, {name}={value!r}"
        return text


class _FusedBatchNorm(_Activated, nn.modules.batchnorm._BatchNorm):
    ghost_batch_size: int | None = None  # as `activation`

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
        activation: BF.Activation = None,
        ghost_batch_size: int | None = None,
        **kwargs: bool,  # bias=, in the torch versions that have it
    ) -> None:
        super().__init__(
            num_features, eps, momentum, affine, track_running_stats, device, dtype, **kwargs
        )
        self.activation = _checked(activation)
        BF._ghost_size(ghost_batch_size)
        self.ghost_batch_size = ghost_batch_size

    @property
    def qconfig(self) -> Any:
        """What torch looks for last where it puts a SyncBatchNorm into the place of any batch norm.
        That one knows no activation and no ghost batches, and would leave them out."""
        plain = self.activation is None and self.ghost_batch_size is None
        if not plain and sys._getframe(1).f_code.co_name.startswith("convert_sync_batchnorm"):
            raise RuntimeError(
                f"{type(self).__name__}: expected neither activation nor ghost_batch_size where a "
                f"SyncBatchNorm takes its place, got activation={self.activation!r}, "
                f"ghost_batch_size={self.ghost_batch_size}: call batchops.revert(model) before "
                "convert_sync_batchnorm"
            )
        if "qconfig" in self.__dict__:
            return self.__dict__["qconfig"]
        raise AttributeError(f"{type(self).__name__!r} object has no attribute 'qconfig'")

    @qconfig.setter
    def qconfig(self, value: Any) -> None:
        self.__dict__["qconfig"] = value

    @qconfig.deleter
    def qconfig(self) -> None:
        if self.__dict__.pop("qconfig", self) is self:
            raise AttributeError("qconfig")

    def extra_repr(self) -> str:
        text = super().extra_repr()
        size = self.ghost_batch_size
        return text if size is None else f"{text}, ghost_batch_size={size}"

    def forward(
        self,
        input: Tensor,
        residual: Tensor | None = None,
        *,
        activation: BF.Activation = None,
    ) -> Tensor:
        self._check_input_dim(input)
        factor = 0.0 if self.momentum is None else self.momentum
        training = self.training
        mean, var = self.running_mean, self.running_var
        if training:
            if self.track_running_stats:
                counter = self.num_batches_tracked
                # First, as torch counts: a checkpoint's recomputation may end within the norm.
                if counter is not None:
                    if _is_compiling() or _count(counter) is NotImplemented:
                        counter.add_(1)
                    if self.momentum is None:  # cumulative average
                        factor = 1.0 / float(counter)
            else:
                mean = var = None
        elif mean is None and var is None:
            training = True  # batch statistics, and none to update
        return BF.batch_norm(
            input,
            mean,
            var,
            self.weight,
            self.bias,
            training,
            factor,
            self.eps,
            activation=self.activation if activation is None else activation,
            residual=residual,
            ghost_batch_size=self.ghost_batch_size,
        )


def _document(name: str, shape: str, stock: type, form: str = "batch_norm") -> str:
    ghosts = "``ghost_batch_size``: samples that share statistics in training, None for all."
    return f"""``y = activation({form}(x) + residual)`` for ``{shape}`` inputs.

    A subclass of ``torch.nn.{stock.__name__}`` with its arguments, buffers and state_dict.
    ``activation`` is ``None``, a name (``"relu"``, ``"silu"``, ...) or ``("leaky_relu", slope)``.
    Call it as ``{name}(...)(x)`` or ``{name}(...)(x, residual=z)``; an ``activation`` in the call
    holds for that call. Formula, dtypes and errors: :func:`batchops.functional.{form}`.
    {ghosts if form == "batch_norm" else ""}
    """


class BatchNorm1d(_FusedBatchNorm, nn.BatchNorm1d):
    __doc__ = _document("BatchNorm1d", "(N, C) or (N, C, L)", nn.BatchNorm1d)


class BatchNorm2d(_FusedBatchNorm, nn.BatchNorm2d):
    __doc__ = _document("BatchNorm2d", "(N, C, H, W)", nn.BatchNorm2d)


class BatchNorm3d(_FusedBatchNorm, nn.BatchNorm3d):
    __doc__ = _document("BatchNorm3d", "(N, C, D, H, W)", nn.BatchNorm3d)


class GroupNorm(_Activated, nn.GroupNorm):
    __doc__ = _document("GroupNorm", "(N, C, *)", nn.GroupNorm, "group_norm")

    def __init__(
        self,
        num_groups: int,
        num_channels: int,
        eps: float = 1e-5,
        affine: bool = True,
        device: torch.device | str | None = None,
        dtype: torch.dtype | None = None,
        *,
        activation: BF.Activation = None,
        **kwargs: bool,  # bias=, in the torch versions that have it
    ) -> None:
        super().__init__(num_groups, num_channels, eps, affine, device, dtype, **kwargs)
        self.activation = _checked(activation)

    def forward(
        self,
        input: Tensor,
        residual: Tensor | None = None,
        *,
        activation: BF.Activation = None,
    ) -> Tensor:
        return BF.group_norm(
            input,
            self.num_groups,
            self.weight,
            self.bias,
            self.eps,
            activation=self.activation if activation is None else activation,
            residual=residual,
        )


class LayerNorm(_Activated, nn.LayerNorm):
    __doc__ = _document("LayerNorm", "(*, *normalized_shape)", nn.LayerNorm, "layer_norm")

    def __init__(
        self,
        normalized_shape: int | list[int] | torch.Size,
        eps: float = 1e-5,
        elementwise_affine: bool = True,
        bias: bool = True,
        device: torch.device | str | None = None,
        dtype: torch.dtype | None = None,
        *,
        activation: BF.Activation = None,
    ) -> None:
        super().__init__(normalized_shape, eps, elementwise_affine, bias, device, dtype)
        self.activation = _checked(activation)

    def forward(
        self,
        input: Tensor,
        residual: Tensor | None = None,
        *,
        activation: BF.Activation = None,
    ) -> Tensor:
        return BF.layer_norm(
            input,
            self.normalized_shape,
            self.weight,
            self.bias,
            self.eps,
            activation=self.activation if activation is None else activation,
            residual=residual,
        )


class _FusedInstanceNorm(_Activated, nn.modules.instancenorm._InstanceNorm):
    def __init__(
        self,
        num_features: int,
        eps: float = 1e-5,
        momentum: float | None = 0.1,
        affine: bool = False,
        track_running_stats: bool = False,
        device: torch.device | str | None = None,
        dtype: torch.dtype | None = None,
        *,
        activation: BF.Activation = None,
        **kwargs: bool,
    ) -> None:
        super().__init__(
            num_features, eps, momentum, affine, track_running_stats, device, dtype, **kwargs
        )
        self.activation = _checked(activation)

    def forward(
        self,
        input: Tensor,
        residual: Tensor | None = None,
        *,
        activation: BF.Activation = None,
    ) -> Tensor:
        self._check_input_dim(input)
        unbatched = input.dim() == self._get_no_batch_dim()
        dim = 0 if unbatched else 1
        if input.size(dim) != self.num_features:
            # torch's words, so that what matches on them goes on working
            if self.affine:
                raise ValueError(
                    f"expected input's size at dim={dim} to match num_features "
                    f"({self.num_features}), but got: {input.size(dim)}."
                )
            warnings.warn(
                f"input's size at dim={dim} does not match num_features. You can silence this "
                "warning by not passing in num_features, which is not used because affine=False",
                stacklevel=2,
            )
        if unbatched:
            input = input.unsqueeze(0)
            residual = None if residual is None else residual.unsqueeze(0)
        output = BF.instance_norm(
            input,
            self.running_mean,
            self.running_var,
            self.weight,
            self.bias,
            self.training or not self.track_running_stats,
            0.0 if self.momentum is None else self.momentum,
            self.eps,
            activation=self.activation if activation is None else activation,
            residual=residual,
        )
        return output.squeeze(0) if unbatched else output


class InstanceNorm1d(_FusedInstanceNorm, nn.InstanceNorm1d):
    __doc__ = _document("InstanceNorm1d", "(N, C, L)", nn.InstanceNorm1d, "instance_norm")


class InstanceNorm2d(_FusedInstanceNorm, nn.InstanceNorm2d):
    __doc__ = _document("InstanceNorm2d", "(N, C, H, W)", nn.InstanceNorm2d, "instance_norm")


class InstanceNorm3d(_FusedInstanceNorm, nn.InstanceNorm3d):
    __doc__ = _document("InstanceNorm3d", "(N, C, D, H, W)", nn.InstanceNorm3d, "instance_norm")
