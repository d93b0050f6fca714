"""Norm outputs that are computed again in the backward instead of kept."""

from __future__ import annotations

import contextlib

import torch

from . import _recording

__all__ = ["recompute"]


def recompute() -> contextlib.AbstractContextManager[None]:
    """``saved(y) → x, mean, rstd, weight, bias``: a context in which what consumers save of a
    norm's output is rebuilt in the backward.

    ::

        with batchops.recompute():
            y = model(x)
        y.sum().backward()

    A convolution after a norm saves its input, the norm's output ``y``. In the block it saves how
    to compute ``y`` from the norm's input and statistics, which the norm's own backward keeps
    anyway: one activation less to keep, for one pass over the input in the backward. Gradients are
    the same bit for bit. Views of ``y`` are found too. Kept as they are: outputs with a residual,
    outputs that something has written to, copies of outputs (of another dtype under autocast, say),
    and layer norms of an input that had to be copied to rows. Writes that torch cannot see (through
    ``.data`` or a NumPy view) are not seen here either.

    Only the forward needs to be in the block; it concerns the calling thread. Blocks nest, with
    each other, with ``torch.utils.checkpoint`` and with
    ``torch.autograd.graph.saved_tensors_hooks`` around them, which get every tensor that is not
    rebuilt. A tensor that is changed in place between its use and the backward raises torch's
    ``RuntimeError``, as without the block; that holds for all that the output is rebuilt from, the
    norm's bias among it. In ``torch.compile``d functions the compiler decides
    what is saved: nothing is rebuilt there, and a block inside of them does nothing.
    ``torch.func``'s gradients refuse saved-tensor hooks and so raise in the block.
    """
    if torch.compiler.is_compiling():
        return contextlib.nullcontext()
    return _recording.block()
