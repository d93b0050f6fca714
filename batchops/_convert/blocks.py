"""Residual blocks whose last norm takes the shortcut and the activation: known by name, checked by
structure."""

from __future__ import annotations

import copy
import functools
import itertools
import operator
from collections.abc import Callable, Hashable
from dataclasses import dataclass

import torch
from torch import Tensor, fx, nn

from .chains import run_chain, run_sum
from .methods import InstanceMethod
from .trace import trace

__all__ = ["ResidualForward", "known_block"]

# Of modules, an input, and a shortcut: run_sum, or the same in steps.
_Join = Callable[[tuple[nn.Module, nn.Module], Tensor, Tensor], Tensor]


def _join_in_steps(modules: tuple[nn.Module, nn.Module], x: Tensor, shortcut: Tensor) -> Tensor:
    act, norm = modules
    return act(norm(x) + shortcut)


def _shortcut(block: nn.Module, x: Tensor) -> Tensor:
    return x if block.downsample is None else block.downsample(x)


def _torchvision_basic_block(block: nn.Module, x: Tensor, join: _Join) -> Tensor:
    h = run_chain((block.relu, block.bn1), block.conv1(x))
    return join((block.relu, block.bn2), block.conv2(h), _shortcut(block, x))


def _torchvision_bottleneck(block: nn.Module, x: Tensor, join: _Join) -> Tensor:
    h = run_chain((block.relu, block.bn1), block.conv1(x))
    h = run_chain((block.relu, block.bn2), block.conv2(h))
    return join((block.relu, block.bn3), block.conv3(h), _shortcut(block, x))


def _timm_basic_block(block: nn.Module, x: Tensor, join: _Join) -> Tensor:
    h = block.aa(run_chain((block.act1, block.drop_block, block.bn1), block.conv1(x)))
    return join((block.act2, block.bn2), block.conv2(h), _shortcut(block, x))


def _timm_bottleneck(block: nn.Module, x: Tensor, join: _Join) -> Tensor:
    h = run_chain((block.act1, block.bn1), block.conv1(x))
    h = block.aa(run_chain((block.act2, block.drop_block, block.bn2), block.conv2(h)))
    return join((block.act3, block.bn3), block.conv3(h), _shortcut(block, x))


@dataclass(frozen=True)
class Block:
    """The forward of a residual block.

    ``chains`` are the names of the activations and norms in it, and of what stands between; those
    of the last join the shortcut. Blocks in which one of ``absent`` is not None have another.
    """

    forward: Callable[[nn.Module, Tensor, _Join], Tensor]
    chains: tuple[tuple[str, ...], ...]
    absent: tuple[str, ...] = ()


_BLOCKS = {
    ("torchvision.models.resnet", "BasicBlock"): Block(
        _torchvision_basic_block, (("relu", "bn1"), ("relu", "bn2"))
    ),
    ("torchvision.models.resnet", "Bottleneck"): Block(
        _torchvision_bottleneck, (("relu", "bn1"), ("relu", "bn2"), ("relu", "bn3"))
    ),
    ("timm.models.resnet", "BasicBlock"): Block(
        _timm_basic_block,
        (("act1", "drop_block", "bn1"), ("act2", "bn2")),
        absent=("se", "drop_path"),
    ),
    ("timm.models.resnet", "Bottleneck"): Block(
        _timm_bottleneck,
        (("act1", "bn1"), ("act2", "drop_block", "bn2"), ("act3", "bn3")),
        absent=("se", "drop_path"),
    ),
}


class ResidualForward(InstanceMethod):
    """The forward of one block, with add and activation inside its last norm."""

    def __init__(self, block: nn.Module) -> None:
        self.place = _place(block)  # what shards a block gives it another class
        super().__init__(block)

    def _find(self) -> Callable[..., Tensor] | None:
        return functools.partial(_run, _BLOCKS[self.place], self.original)


def _run(
    known: Block, original: Callable[[nn.Module, Tensor], Tensor], block: nn.Module, x: Tensor
) -> Tensor:
    if any(getattr(block, name, None) is not None for name in known.absent):
        return original(block, x)
    return known.forward(block, x, run_sum)


def _place(block: nn.Module) -> tuple[str, str]:
    return type(block).__module__, type(block).__qualname__


def known_block(module: nn.Module) -> list[tuple[nn.Module, ...]] | None:
    """The chains of ``module``, if it is one of the known blocks and does what they do."""
    block = _BLOCKS.get(_place(module))
    if block is None or any(getattr(module, name, None) is not None for name in block.absent):
        return None
    names = {name for chain in block.chains for name in chain}
    if not names <= set(module._modules) or not _is_same_computation(module, block, names):
        return None
    return [tuple(module._modules[name] for name in chain) for chain in block.chains]


class _Alone(nn.Module):
    """A block under another forward, to trace."""

    def __init__(self, block: nn.Module, run: Callable[[nn.Module, Tensor], Tensor]) -> None:
        super().__init__()
        self.block = block
        self.run = run

    def forward(self, x: Tensor) -> Tensor:
        return self.run(self.block, x)


def _is_same_computation(module: nn.Module, block: Block, names: set[str]) -> bool:
    """Whether the class's forward and ours, in steps, are one graph in training and eval: a version
    of the class that does something else is left alone."""
    runs = (type(module).forward, lambda m, x: block.forward(m, x, _join_in_steps))
    numbers: dict[Hashable, int] = {}
    try:
        # Traces run on a copy: what a forward does to its module must not be seen.
        tensors = itertools.chain(module.parameters(), module.buffers())
        alone = copy.deepcopy(module, {id(t): t for t in tensors})
        inner = [alone._modules[name] for name in names]
        for training in (True, False):
            theirs, ours = (
                _numbered(trace(_Alone(alone, run), inner, training), numbers) for run in runs
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
        target = "add" if _is_add(node) else node.target
        arguments = fx.node.map_arg((node.args, node.kwargs), lambda n: number_of[n])
        key = (node.op if target != "add" else "add", str(target), repr(arguments))
        number_of[node] = numbers.setdefault(key, len(numbers))
    return sorted(number_of.values())


_ADD_FUNCTIONS = (operator.add, operator.iadd, torch.add)
_ADD_METHODS = ("add", "add_", "__add__", "__iadd__")


def _is_add(node: fx.Node) -> bool:
    """A sum of two nodes, in place or not."""
    if node.kwargs or len(node.args) != 2 or not all(isinstance(a, fx.Node) for a in node.args):
        return False
    if node.op == "call_method":
        return node.target in _ADD_METHODS
    return node.op == "call_function" and node.target in _ADD_FUNCTIONS
