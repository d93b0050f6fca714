"""Residual blocks whose last norm takes the shortcut and the activation: known by name, checked by
structure."""

from __future__ import annotations

import operator
from collections.abc import Callable, Hashable
from dataclasses import dataclass

import torch
from torch import Tensor, fx, nn

from .trace import FRAME, trace

__all__ = ["Block", "ResidualForward", "is_add", "is_same_computation", "known_block"]

_Join = Callable[[nn.Module, nn.Module, Tensor, Tensor], Tensor]


def _fused_join(norm: nn.Module, act: nn.Module, x: Tensor, shortcut: Tensor) -> Tensor:
    # act is an identity by now; called, so that hooks that were put on it later see the output
    return act(norm(x, residual=shortcut))


def _plain_join(norm: nn.Module, act: nn.Module, x: Tensor, shortcut: Tensor) -> Tensor:
    return act(norm(x) + shortcut)


def _shortcut(block: nn.Module, x: Tensor) -> Tensor:
    return x if block.downsample is None else block.downsample(x)


def _torchvision_basic_block(block: nn.Module, x: Tensor, join: _Join) -> Tensor:
    h = block.relu(block.bn1(block.conv1(x)))
    return join(block.bn2, block.relu, block.conv2(h), _shortcut(block, x))


def _torchvision_bottleneck(block: nn.Module, x: Tensor, join: _Join) -> Tensor:
    h = block.relu(block.bn1(block.conv1(x)))
    h = block.relu(block.bn2(block.conv2(h)))
    return join(block.bn3, block.relu, block.conv3(h), _shortcut(block, x))


def _timm_basic_block(block: nn.Module, x: Tensor, join: _Join) -> Tensor:
    h = block.aa(block.act1(block.drop_block(block.bn1(block.conv1(x)))))
    return join(block.bn2, block.act2, block.conv2(h), _shortcut(block, x))


def _timm_bottleneck(block: nn.Module, x: Tensor, join: _Join) -> Tensor:
    h = block.act1(block.bn1(block.conv1(x)))
    h = block.aa(block.act2(block.drop_block(block.bn2(block.conv2(h)))))
    return join(block.bn3, block.act3, block.conv3(h), _shortcut(block, x))


@dataclass(frozen=True)
class Block:
    """The forward of a residual block, and which of its norms and activations become one.

    ``join`` are the names of the norm that is added to the shortcut and of the activation after the
    sum. ``direct`` are pairs that must be fused with it, because they share that activation.
    Blocks in which one of ``absent`` is not None are left alone.
    """

    forward: Callable[[nn.Module, Tensor, _Join], Tensor]
    join: tuple[str, str]
    direct: tuple[tuple[str, str], ...] = ()
    absent: tuple[str, ...] = ()


_BLOCKS = {
    ("torchvision.models.resnet", "BasicBlock"): Block(
        _torchvision_basic_block, ("bn2", "relu"), (("bn1", "relu"),)
    ),
    ("torchvision.models.resnet", "Bottleneck"): Block(
        _torchvision_bottleneck, ("bn3", "relu"), (("bn1", "relu"), ("bn2", "relu"))
    ),
    ("timm.models.resnet", "BasicBlock"): Block(
        _timm_basic_block, ("bn2", "act2"), absent=("se", "drop_path")
    ),
    ("timm.models.resnet", "Bottleneck"): Block(
        _timm_bottleneck, ("bn3", "act3"), absent=("se", "drop_path")
    ),
}


class ResidualForward:
    """The forward of one block, with add and activation inside its last norm.

    It sits on the instance, so that the block keeps its class; pickle and deepcopy of the block
    bind it to the copy.
    """

    def __init__(self, block: nn.Module) -> None:
        self.block = block
        self.place = _place(block)  # what shards a block gives it another class

    def __call__(self, x: Tensor) -> Tensor:
        return _BLOCKS[self.place].forward(self.block, x, _fused_join)


def _place(block: nn.Module) -> tuple[str, str]:
    return type(block).__module__, type(block).__qualname__


def known_block(module: nn.Module) -> Block | None:
    """What to look for in ``module``, if its class is one of the known blocks."""
    block = _BLOCKS.get(_place(module))
    if block is None or "forward" in module.__dict__:
        return None
    if any(getattr(module, name, None) is not None for name in block.absent):
        return None
    names = {name for pair in (block.join, *block.direct) for name in pair}
    return block if names <= set(module._modules) else None


class _Alone(nn.Module):
    """A block under another forward, to trace."""

    def __init__(self, block: nn.Module, run: Callable[[nn.Module, Tensor], Tensor]) -> None:
        super().__init__()
        self.block = block
        self.run = run

    def forward(self, x: Tensor) -> Tensor:
        return self.run(self.block, x)


def is_same_computation(module: nn.Module, block: Block, candidates: list[nn.Module]) -> bool:
    """Whether the class's forward and ours, without fusing, are one graph in training and eval: a
    version of the class that does something else is left alone."""
    runs = (type(module).forward, lambda m, x: block.forward(m, x, _plain_join))
    inside = {id(m) for m in module.modules()}
    inner = [m for m in candidates if id(m) in inside]
    numbers: dict[Hashable, int] = {}
    try:
        for training in (True, False):
            theirs, ours = (
                _numbered(trace(_Alone(module, run), inner, training), numbers) for run in runs
            )
            if theirs != ours:
                return False
    except Exception:
        return False
    return True


def _numbered(graph: fx.Graph, numbers: dict[Hashable, int]) -> list[int]:
    """A number for each node; equal computations have equal numbers in all graphs."""
    number_of: dict[fx.Node, int] = {}
    for node in graph.nodes:
        target = "add" if is_add(node) else node.target
        arguments = fx.node.map_arg((node.args, node.kwargs), lambda n: number_of[n])
        key = (node.op if target != "add" else "add", str(target), repr(arguments))
        number_of[node] = numbers.setdefault(key, len(numbers))
        node.meta.pop(FRAME, None)
    return sorted(number_of.values())


_ADD_FUNCTIONS = (operator.add, operator.iadd, torch.add)
_ADD_METHODS = ("add", "add_", "__add__", "__iadd__")


def is_add(node: fx.Node) -> bool:
    """A sum of two nodes, in place or not."""
    if node.kwargs or len(node.args) != 2 or not all(isinstance(a, fx.Node) for a in node.args):
        return False
    if node.op == "call_method":
        return node.target in _ADD_METHODS
    return node.op == "call_function" and node.target in _ADD_FUNCTIONS
