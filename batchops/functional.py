"""Functional forms of the fused norms."""

from __future__ import annotations

import math
import operator
import re
import reprlib
import sys
import warnings
from collections.abc import Callable
from typing import Any, SupportsIndex

import torch
import torch.nn.functional as F
from torch import Tensor
from torch.overrides import handle_torch_function, has_torch_function_variadic

from . import _binding, _recording
from ._sharded import is_sharded

__all__ = ["batch_norm", "group_norm", "instance_norm", "layer_norm"]

_is_compiling = torch.compiler.is_compiling

# A norm's operator, and the shorter way to it.
_Operator = tuple[Any, Callable[..., Any]]


def _operator(name: str) -> _Operator:
    return getattr(torch.ops.batchops, name).default, _binding.norms[name]


_train = _operator("batch_norm")
_update = _operator("batch_norm_update")
_eval = _operator("batch_norm_eval")
_group = _operator("group_norm")
_layer = _operator("layer_norm")
_instance = _operator("instance_norm")
_instance_update = _operator("instance_norm_update")
_activation = torch.ops.batchops.activation.default

# torch's own in patch() as well, whose functions may come here
_stock_batch, _stock_instance = F.batch_norm, F.instance_norm

# None, a name, or a name and its parameter.
Activation = str | tuple[str, float] | None
_SLOPE = 0.01  # torch's default for leaky_relu
_WHOLE = 2**62  # ghost batches larger than any batch

_CPU_DTYPES = frozenset((torch.float32, torch.bfloat16, torch.float16, torch.float64))
_CUDA_DTYPES = frozenset((torch.float32, torch.bfloat16, torch.float16))
_CUDA = _binding.core.built_with_cuda()
_runs_on: dict[int, bool] = {}  # the CUDA devices that have been met


def _has_kernel(input: Tensor, residual: Tensor | None = None) -> bool:
    """Whether there is a kernel of ours for device and dtypes; else the stock op serves."""
    if residual is not None and residual.dtype != input.dtype:
        return False
    if input.layout is not torch.strided or input.is_nested:
        return False
    if type(input) is not Tensor and is_sharded(input):
        return False
    if input.is_cpu:
        return input.dtype in _CPU_DTYPES
    if input.is_cuda:
        return _CUDA and input.dtype in _CUDA_DTYPES and _has_code_for(input.device.index)
    return input.is_meta and input.dtype in _CPU_DTYPES


def _has_code_for(device: int) -> bool:
    """Whether this build runs on the device: the driver is new enough, and there is code for it."""
    known = _runs_on.get(device)
    if known is not None:
        return known
    if not torch.cuda.is_initialized():
        return True  # there is no more than the description of a tensor
    with torch.cuda.device(device):
        problem = _binding.core.cuda_problem(device)
    _runs_on[device] = problem is None
    if problem is not None:
        warnings.warn(f"torch's own norms serve CUDA device {device}: {problem}", stacklevel=4)
    return problem is None


# As torch.compiler.assume_constant_result does, which would import dynamo: a graph asks when it is
# traced, and does not depend on what has been met before.
_has_code_for._dynamo_marked_constant = True  # type: ignore[attr-defined]


def _activation_of(activation: Activation) -> tuple[str, float]:
    """Name and slope, as the operators take them."""
    if activation is None:
        return "none", _SLOPE
    if isinstance(activation, str):
        return activation, _SLOPE
    if isinstance(activation, tuple) and len(activation) == 2 and activation[0] == "leaky_relu":
        return "leaky_relu", float(activation[1])
    raise ValueError(
        f"expected activation to be None, a name or ('leaky_relu', slope), got {activation!r}"
    )


def _call(operator: _Operator, *args: Any) -> Tensor:
    """A norm's operator; inside recompute(), its output can be rebuilt."""
    op, direct = operator
    try:
        if not _is_compiling():
            if _recording.open_anywhere:
                return _recording.record(op, args)
            y = direct(*args)
            if y is not NotImplemented:
                return y
        return op(*args)[0]
    except RuntimeError as error:
        return _after(error, op, args)


def _after(error: RuntimeError, op: Any, args: tuple[Any, ...]) -> Tensor:
    """What is looked at once an operator has raised, and costs the calls that succeed no time."""
    named = dict(zip((a.name for a in op._schema.arguments), args, strict=False))
    # For a type that is not the schema's, operators that are not torch's have a RuntimeError.
    full_name = op._schema.name
    expected = rf"{full_name}\(\) Expected a value of type '(.+?)' for argument '(\w+)'"
    wrong = re.match(expected, str(error))
    if wrong is not None:
        kind, name = wrong.groups()
        norm = full_name.removeprefix("batchops::")
        raise TypeError(
            f"{norm.removesuffix('_update').removesuffix('_eval')}: expected {name} to be {kind}, "
            f"got {reprlib.repr(named[name])} of type {type(named[name]).__name__}"
        ) from None
    if "momentum" in named and any(map(torch._is_functional_tensor, args[:3])):
        return _functionalized(op, named)
    raise error


def _functionalized(op: Any, named: dict[str, Any]) -> Tensor:
    """In torch.func.functionalize, which follows what torch's own operators write to running
    statistics, and refuses ours. A rule of ours for it would be torch.compile's as well, in the
    place of its own, which needs no copy of them."""
    statistics = named["running_mean"], named["running_var"]
    affine = named["weight"], named["bias"]
    rest = named["momentum"], named["eps"]
    end = named["residual"], named["activation"], named["slope"]
    if op is _instance_update[0]:
        _check_sum("instance_norm", named["input"], *end)
        y = _stock_instance(named["input"], *statistics, *affine, True, *rest)
    else:
        _check_sum("batch_norm", named["input"], *end)
        ghost = named.get("ghost_batch_size", 0)
        y = _stock_with_ghosts(named["input"], *statistics, *affine, True, *rest, ghost)
    return _finish(y, *end)


def _check_tensor(op: str, residual: Any) -> None:
    if not isinstance(residual, Tensor):
        raise TypeError(
            f"{op}: expected residual to be a Tensor or None, got {type(residual).__name__}"
        )


def _check_sum(op: str, input: Tensor, residual: Tensor | None, name: str, slope: float) -> None:
    """What _finish() adds to torch's norms, before those have written to running statistics."""
    _activation(torch.empty(0, dtype=input.dtype, device="cpu"), name, slope)
    if residual is None or input.is_nested or residual.is_nested:
        return
    if residual.device != input.device:
        raise RuntimeError(
            f"{op}: expected residual on {input.device}, where input is, but got it on "
            f"{residual.device}"
        )
    if residual.shape != input.shape:
        raise RuntimeError(
            f"{op}: expected residual of input's size {list(input.shape)}, but got "
            f"{list(residual.shape)}"
        )


def _finish(y: Tensor, residual: Tensor | None, name: str, slope: float) -> Tensor:
    """What a norm of torch's own lacks: the residual and the activation."""
    z = y if residual is None else y + residual
    if z.is_nested and name != "none":
        return _ON_NESTED[name](z, slope)
    return _activation(z, name, slope)


# The activation operator is made of what has no kernel for them.
_ON_NESTED: dict[str, Callable[[Tensor, float], Tensor]] = {
    "relu": lambda z, _: F.relu(z),
    "leaky_relu": F.leaky_relu,
    "silu": lambda z, _: F.silu(z),
    "gelu": lambda z, _: F.gelu(z),
    "gelu_tanh": lambda z, _: F.gelu(z, approximate="tanh"),
    "hardswish": lambda z, _: F.hardswish(z),
}


def _cast(
    cast_output: bool, input: Tensor, residual: Tensor | None
) -> tuple[Tensor, Tensor | None]:
    """float32 where torch's own operator runs in it: it is on autocast's list for CUDA alone."""
    if (
        cast_output
        and input.device.type == "cuda"
        and torch.is_autocast_enabled("cuda")
        and input.dtype in (torch.float16, torch.bfloat16)
    ):
        return input.float(), None if residual is None else residual.float()
    return input, residual


def _cast_parameters(
    input: Tensor, weight: Tensor | None, bias: Tensor | None
) -> tuple[Tensor | None, Tensor | None]:
    """float32 for parameters of another dtype than ``input``'s, where torch's own operator would
    cast them: both norms are on autocast's list for CUDA."""
    if not input.is_cuda or not torch.is_autocast_enabled("cuda"):
        return weight, bias
    fitting = (input.dtype, torch.float32)
    if all(t is None or t.dtype in fitting for t in (weight, bias)):
        return weight, bias
    return tuple(t if t is None else t.float() for t in (weight, bias))  # type: ignore[return-value]


def _of_arrays(op: Callable[..., Tensor], arguments: dict[str, Any]) -> Any:
    """``op`` of cupy arrays: tensors over the same memory, and y as an array. Other kinds raise."""
    cupy, input = sys.modules.get("cupy"), arguments["input"]
    if cupy is None or not isinstance(input, cupy.ndarray):
        raise TypeError(
            f"{op.__name__}: expected input to be a Tensor or a cupy.ndarray, got "
            f"{type(input).__name__}"
        )
    arrays = {name: v for name, v in arguments.items() if isinstance(v, cupy.ndarray)}
    for name, array in arrays.items():
        if any(stride < 0 for stride in array.strides):  # torch would end the process
            raise ValueError(
                f"{op.__name__}: expected {name} with strides of 0 or more, got {array.strides}"
            )
    tensors = arguments | {name: torch.from_dlpack(array) for name, array in arrays.items()}
    with torch.no_grad():
        return cupy.from_dlpack(op(**tensors))


def _missing_statistic(
    op: str, running_mean: Tensor | None, running_var: Tensor | None, needed: str | None = None
) -> Exception:
    """``needed``: the reason why None for both is not enough."""

    def given(t: Tensor | None) -> str:
        return "None" if t is None else "a tensor"

    got = f"got running_mean={given(running_mean)} and running_var={given(running_var)}"
    if needed is not None:
        return RuntimeError(
            f"{op}: expected running_mean and running_var both given, since {needed}, but {got}"
        )
    # torch's words, so that what matches on them goes on working
    return ValueError(
        f"{op}: running_mean and running_var must either both be None or neither be None, but {got}"
    )


def _ghost_size(ghost_batch_size: int | None) -> int:
    """As the operators take it: 0 for the whole batch."""
    if ghost_batch_size is None:
        return 0
    if isinstance(ghost_batch_size, bool) or not isinstance(ghost_batch_size, SupportsIndex):
        raise TypeError(
            "batch_norm: expected ghost_batch_size to be an int or None, got "
            f"{type(ghost_batch_size).__name__}"
        )
    ghost_batch_size = operator.index(ghost_batch_size)
    if ghost_batch_size <= 0:
        raise ValueError(
            f"batch_norm: expected ghost_batch_size to be positive or None, got {ghost_batch_size}"
        )
    return min(ghost_batch_size, _WHOLE)


def _stock_with_ghosts(
    input: Tensor,
    running_mean: Tensor | None,
    running_var: Tensor | None,
    weight: Tensor | None,
    bias: Tensor | None,
    training: bool,
    momentum: float,
    eps: float,
    ghost: int,
) -> Tensor:
    """torch's batch norm, and ghost batches by its operators, where there is no kernel."""
    if input.dim() < 2 or not 0 < ghost < input.size(0) or input.numel() == 0:
        return _stock_batch(input, running_mean, running_var, weight, bias, training, momentum, eps)
    ends = list(range(ghost, input.size(0), ghost))
    values = math.prod(input.shape[2:])
    if ends and (input.size(0) - ends[-1]) * values == 1:
        ends.pop()
    y = torch.cat(
        [
            _stock_batch(part, None, None, weight, bias, True, momentum, eps)
            for part in input.tensor_split(ends)
        ]
    )
    if running_mean is not None and running_var is not None:
        with torch.no_grad():
            dims = [0, *range(2, input.dim())]
            accurate = input.float() if input.itemsize < 4 else input
            var, mean = torch.var_mean(accurate, dims, correction=1)
            for running, batch in ((running_mean, mean), (running_var, var)):
                running.lerp_(batch.to(running.dtype), momentum)
    return y


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
    activation: Activation = None,
    residual: Tensor | None = None,
    ghost_batch_size: int | None = None,
) -> Tensor:
    """``y = activation((x - mean) / sqrt(var + eps) * weight + bias + residual)``, per channel.

    ``mean`` and the biased ``var`` are over the batch and all spatial positions when ``training``
    (then ``running = (1 - momentum) * running + momentum * batch``, with the unbiased variance),
    else ``running_mean`` and ``running_var``. All sums are in float32 or better. The result is
    the same bit for bit in every run and for any number of threads.

    Args:
        input: ``(N, C, *)``, 2 or more dimensions; float32, bfloat16, float16, and float64 on the
            CPU. Contiguous and channels-last memory are both native: the output keeps the layout.
            A ``cupy.ndarray`` gives one back, without gradients; the other tensors are arrays then.
        running_mean, running_var: ``(C,)``, of ``input``'s dtype or float32; or both ``None`` when
            ``training``. Updated in place when ``training``.
        weight, bias: ``(C,)``, of ``input``'s dtype or float32; or ``None`` for 1 and 0.
        momentum: weight of the new batch in the running statistics, no unit, 0 to 1.
        eps: added to the variance, in squared units of ``input``; positive when ``training``.
        activation: ``None``, ``"relu"``, ``"leaky_relu"`` (slope 0.01), ``("leaky_relu", slope)``,
            ``"silu"``, ``"gelu"``, ``"gelu_tanh"`` or ``"hardswish"``.
        residual: of ``input``'s size and dtype, added before the activation. Where its dtype
            differs, torch's own operators compute the sum with torch's type promotion.
        ghost_batch_size: samples that share statistics when ``training``; None for all of them.
            Each ``ghost_batch_size`` samples in turn are normalised with their own ``mean`` and
            ``var``; the last ones may be fewer, and where they hold a single value a channel they
            join those before. The running statistics take one step, towards the mean and the
            variance of the whole batch. No effect in evaluation.

    Returns:
        Tensor of ``input``'s size, dtype and layout. An empty input gives an empty output and
        leaves the statistics alone. Differentiable once and twice in ``input``, ``weight``,
        ``bias`` and ``residual``; forward-mode AD raises ``NotImplementedError``. The backward
        keeps ``input`` and, with a residual, one bit an element for relu and leaky_relu and
        ``residual`` itself for the smooth activations.

    Raises:
        ValueError: one value per channel (of a ghost batch) when training; unknown ``activation``;
            ``eps`` or ``ghost_batch_size`` out of range; one running statistic without the other
            when ``training``.
        TypeError: an argument of another kind, naming it.
        RuntimeError: sizes, dtypes or devices that do not fit, naming the argument; a running
            statistic that requires a gradient.

    A device or dtype without a kernel here (CUDA float64, MPS, ...) takes torch's operators.

    Source: Ioffe and Szegedy 2015, arXiv:1502.03167, algorithms 1 and 2; ghost batches: Hoffer,
    Hubara and Soudry 2017, arXiv:1705.08741.
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
            ghost_batch_size=ghost_batch_size,
        )
    if not isinstance(input, Tensor):
        return _of_arrays(batch_norm, locals())
    if momentum is None:
        raise TypeError("batch_norm: expected momentum to be a float, got None")
    if residual is not None:
        _check_tensor("batch_norm", residual)
    # most calls have none of the two, and a call of a function costs a hundredth of theirs
    name, slope = ("none", _SLOPE) if activation is None else _activation_of(activation)
    ghost = 0 if ghost_batch_size is None else _ghost_size(ghost_batch_size)
    if not training:
        ghost = 0
    if not _has_kernel(input, residual):
        _check_sum("batch_norm", input, residual, name, slope)
        stats = running_mean, running_var
        y = _stock_with_ghosts(input, *stats, weight, bias, training, momentum, eps, ghost)
        return _finish(y, residual, name, slope)
    # left out where it is 0: every argument costs time
    ghosts = (False, ghost) if ghost else ()
    if training:
        if running_mean is None and running_var is None:
            return _call(_train, input, weight, bias, residual, eps, name, slope, *ghosts)
        if running_mean is not None and running_var is not None:
            stats = running_mean, running_var
            rest = momentum, eps, name, slope
            return _call(_update, input, *stats, weight, bias, residual, *rest, *ghosts)
    elif running_mean is not None and running_var is not None:
        if eps < 0:
            raise ValueError(f"batch_norm eps must be non-negative, but got {eps}")
        return _call(
            _eval, input, running_mean, running_var, weight, bias, residual, eps, name, slope
        )
    needed = None if training else "training is False"
    raise _missing_statistic("batch_norm", running_mean, running_var, needed)


def group_norm(
    input: Tensor,
    num_groups: int,
    weight: Tensor | None = None,
    bias: Tensor | None = None,
    eps: float = 1e-5,
    *,
    activation: Activation = None,
    residual: Tensor | None = None,
    cast_output: bool = False,
) -> Tensor:
    """``y = activation((x - mean) / sqrt(var + eps) * weight + bias + residual)``, per group.

    ``mean`` and the biased ``var`` are those of each sample's ``C / num_groups`` channels with all
    their positions; ``weight`` and ``bias`` belong to channels. All sums are in float32 or better.
    The result is the same bit for bit in every run and for any number of threads.

    Args:
        input: ``(N, C, *)``, 2 or more dimensions; float32, bfloat16, float16, and float64 on the
            CPU. Contiguous and channels-last memory are both native: the output keeps the layout.
            A ``cupy.ndarray`` gives one back, without gradients; the other tensors are arrays then.
        num_groups: divides ``C``.
        weight, bias: ``(C,)``, of ``input``'s dtype or float32; or ``None`` for 1 and 0.
        eps: added to the variance, in squared units of ``input``.
        activation: as for :func:`batch_norm`.
        residual: of ``input``'s size and dtype, added before the activation. Where its dtype
            differs, torch's own operators compute the sum with torch's type promotion.
        cast_output: the dtype torch's own operator gives under autocast, which is float32 for a
            low-precision ``input`` on CUDA. Else the output keeps ``input``'s dtype there too.

    Returns:
        Tensor of ``input``'s size, dtype and layout; empty for an empty input. Differentiable once
        and twice in ``input``, ``weight``, ``bias`` and ``residual``; forward-mode AD raises
        ``NotImplementedError``. The backward keeps ``input`` and, with a residual, one bit an
        element for relu and leaky_relu and ``residual`` itself for the smooth activations.

    Raises:
        ValueError: one value per group; unknown ``activation``.
        TypeError: an argument of another kind, naming it.
        RuntimeError: sizes, dtypes or devices that do not fit, naming the argument.

    A device or dtype without a kernel here (CUDA float64, MPS, ...) takes torch's operators.

    Source: Wu and He 2018, arXiv:1803.08494.
    """
    if has_torch_function_variadic(input, weight, bias, residual):
        return handle_torch_function(
            group_norm,
            (input, weight, bias, residual),
            input,
            num_groups,
            weight=weight,
            bias=bias,
            eps=eps,
            activation=activation,
            residual=residual,
            cast_output=cast_output,
        )
    if not isinstance(input, Tensor):
        return _of_arrays(group_norm, locals())
    if residual is not None:
        _check_tensor("group_norm", residual)
    if input.dim() < 2:
        raise RuntimeError(
            f"Expected at least 2 dimensions for input tensor but received {input.dim()}"
        )
    if num_groups <= 0:
        # torch's words, so that what matches on them goes on working
        raise RuntimeError(
            f"group_norm: Expected num groups to be greater than 0, got {num_groups}"
        )
    size = input.size()
    # torch's own check, which counts the values of a group over the whole batch
    F._verify_batch_size([size[0] * size[1] // num_groups, num_groups, *size[2:]])
    name, slope = _activation_of(activation)
    input, residual = _cast(cast_output, input, residual)
    weight, bias = _cast_parameters(input, weight, bias)
    if not _has_kernel(input, residual):
        _check_sum("group_norm", input, residual, name, slope)
        return _finish(F.group_norm(input, num_groups, weight, bias, eps), residual, name, slope)
    return _call(_group, input, num_groups, weight, bias, residual, eps, name, slope)


def layer_norm(
    input: Tensor,
    normalized_shape: list[int] | tuple[int, ...] | torch.Size,
    weight: Tensor | None = None,
    bias: Tensor | None = None,
    eps: float = 1e-5,
    *,
    activation: Activation = None,
    residual: Tensor | None = None,
    cast_output: bool = False,
) -> Tensor:
    """``y = activation((x - mean) / sqrt(var + eps) * weight + bias + residual)``, per row.

    A row is the last ``len(normalized_shape)`` dimensions; each of its positions has a ``weight``
    and a ``bias``. All sums are in float32 or better, and bitwise reproducible.

    Args:
        input: ``(*, *normalized_shape)``; float32, bfloat16, float16, and float64 on the CPU. A
            non-contiguous one is copied once; the output is contiguous, as torch's is. A
            ``cupy.ndarray`` as for :func:`group_norm`.
        normalized_shape: the sizes of a row.
        weight, bias: of size ``normalized_shape``, of ``input``'s dtype or float32; or ``None``.
        eps: added to the variance, in squared units of ``input``.
        activation, residual, cast_output: as for :func:`group_norm`.

    Returns:
        Tensor of ``input``'s size and dtype. Differentiable as :func:`group_norm` is.

    Raises:
        ValueError: unknown ``activation``.
        TypeError: an argument of another kind, naming it.
        RuntimeError: sizes, dtypes or devices that do not fit, naming the argument.

    Source: Ba, Kiros and Hinton 2016, arXiv:1607.06450.
    """
    if has_torch_function_variadic(input, weight, bias, residual):
        return handle_torch_function(
            layer_norm,
            (input, weight, bias, residual),
            input,
            normalized_shape,
            weight=weight,
            bias=bias,
            eps=eps,
            activation=activation,
            residual=residual,
            cast_output=cast_output,
        )
    if not isinstance(input, Tensor):
        return _of_arrays(layer_norm, locals())
    if residual is not None:
        _check_tensor("layer_norm", residual)
    name, slope = _activation_of(activation)
    input, residual = _cast(cast_output, input, residual)
    weight, bias = _cast_parameters(input, weight, bias)
    if not _has_kernel(input, residual):
        _check_sum("layer_norm", input, residual, name, slope)
        y = F.layer_norm(input, normalized_shape, weight, bias, eps)
        return _finish(y, residual, name, slope)
    return _call(_layer, input, normalized_shape, weight, bias, residual, eps, name, slope)


def instance_norm(
    input: Tensor,
    running_mean: Tensor | None = None,
    running_var: Tensor | None = None,
    weight: Tensor | None = None,
    bias: Tensor | None = None,
    use_input_stats: bool = True,
    momentum: float = 0.1,
    eps: float = 1e-5,
    *,
    activation: Activation = None,
    residual: Tensor | None = None,
    cast_output: bool = False,
) -> Tensor:
    """``y = activation((x - mean) / sqrt(var + eps) * weight + bias + residual)``, per sample and
    channel.

    ``mean`` and the biased ``var`` are over the positions of each channel of each sample when
    ``use_input_stats``, else ``running_mean`` and ``running_var``. Running statistics, where given
    with ``use_input_stats``, move by ``momentum`` towards the batch's average of the means and of
    the unbiased variances.

    Args:
        input: ``(N, C, *)`` with more than one position; dtypes, layouts and kinds of array as for
            :func:`group_norm`.
        running_mean, running_var: ``(C,)``; both or none. Of any floating dtype where they are
            updated, of ``input``'s dtype or float32 where they are used.
        weight, bias: ``(C,)``, of ``input``'s dtype or float32; or ``None`` for 1 and 0.
        momentum: weight of the new batch in the running statistics, no unit, 0 to 1.
        eps: added to the variance, in squared units of ``input``.
        activation, residual: as for :func:`group_norm`.
        cast_output: of no effect: autocast leaves torch's instance norm in ``input``'s dtype.

    Returns:
        Tensor of ``input``'s size, dtype and layout. Differentiable as :func:`group_norm` is.

    Raises:
        ValueError: one position only; unknown ``activation``; one running statistic without the
            other with ``use_input_stats``.
        TypeError: an argument of another kind, naming it.
        RuntimeError: sizes, dtypes or devices that do not fit, naming the argument; a running
            statistic that requires a gradient.

    Source: Ulyanov, Vedaldi and Lempitsky 2016, arXiv:1607.08022.
    """
    if has_torch_function_variadic(input, running_mean, running_var, weight, bias, residual):
        return handle_torch_function(
            instance_norm,
            (input, running_mean, running_var, weight, bias, residual),
            input,
            running_mean=running_mean,
            running_var=running_var,
            weight=weight,
            bias=bias,
            use_input_stats=use_input_stats,
            momentum=momentum,
            eps=eps,
            activation=activation,
            residual=residual,
            cast_output=cast_output,
        )
    if not isinstance(input, Tensor):
        return _of_arrays(instance_norm, locals())
    if residual is not None:
        _check_tensor("instance_norm", residual)
    if momentum is None:
        raise TypeError("instance_norm: expected momentum to be a float, got None")
    if not use_input_stats and (running_mean is None or running_var is None):
        needed = "use_input_stats is False"
        raise _missing_statistic("instance_norm", running_mean, running_var, needed)
    name, slope = _activation_of(activation)
    if not _has_kernel(input, residual):
        _check_sum("instance_norm", input, residual, name, slope)
        y = _stock_instance(
            input, running_mean, running_var, weight, bias, use_input_stats, momentum, eps
        )
        return _finish(y, residual, name, slope)
    end = eps, name, slope
    if not use_input_stats:
        stats = running_mean, running_var
        return _call(_eval, input, *stats, weight, bias, residual, *end)
    if running_mean is None and running_var is None:
        return _call(_instance, input, weight, bias, residual, *end)
    if running_mean is None or running_var is None:
        raise _missing_statistic("instance_norm", running_mean, running_var)
    stats = running_mean, running_var
    return _call(_instance_update, input, *stats, weight, bias, residual, momentum, *end)
