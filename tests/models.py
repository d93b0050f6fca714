"""Models of other people's architecture for the tests: timm's own, and blocks written after
torchvision's, which has no build here."""

from __future__ import annotations

import enum
import importlib
import importlib.util
import sys
import types
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn

from batchops import nn as bnn


class _Anything(types.ModuleType):
    """A module that has every public name, as an empty class."""

    __path__: list[str] = []  # noqa: RUF012

    def __getattr__(self, name: str) -> Any:
        if name.startswith("__"):
            raise AttributeError(name)
        return type(name, (), {})


# What importing timm wants of torchvision.
_TORCHVISION = (
    "torchvision",
    "torchvision.ops",
    "torchvision.ops.misc",
    "torchvision.datasets",
    "torchvision.models",
    "torchvision.models.feature_extraction",
    "torchvision.transforms",
    "torchvision.transforms.functional",
)
_Interpolation = enum.Enum(
    "InterpolationMode", ["NEAREST", "BILINEAR", "BICUBIC", "BOX", "HAMMING", "LANCZOS"]
)


def timm() -> Any:
    """timm, with stand-ins for torchvision while it is imported where that is missing."""
    if hasattr(sys.modules.get("timm"), "create_model"):
        return sys.modules["timm"]
    for name in [name for name in sys.modules if name.split(".")[0] == "timm"]:
        del sys.modules[name]  # of a single module of it that another test imported
    if importlib.util.find_spec("timm") is None:
        pytest.skip("timm is not installed")
    stubs = []
    if "torchvision" not in sys.modules and importlib.util.find_spec("torchvision") is None:
        stubs = [_Anything(name) for name in _TORCHVISION]
    try:
        for stub in stubs:
            stub.InterpolationMode = _Interpolation
            sys.modules[stub.__name__] = stub
            parent, _, child = stub.__name__.rpartition(".")
            if parent:
                setattr(sys.modules[parent], child, stub)
        return importlib.import_module("timm")
    finally:
        for stub in stubs:
            del sys.modules[stub.__name__]


def _conv(inputs: int, outputs: int, size: int, stride: int = 1) -> nn.Conv2d:
    return nn.Conv2d(inputs, outputs, size, stride, padding=size // 2, bias=False)


def _projection(inputs: int, outputs: int, stride: int) -> nn.Sequential | None:
    if inputs == outputs and stride == 1:
        return None
    return nn.Sequential(_conv(inputs, outputs, 1, stride), nn.BatchNorm2d(outputs))


class BasicBlock(nn.Module):
    """He et al. 2015, figure 5 left, with torchvision's names: one ReLU module, called twice."""

    def __init__(self, inputs: int, outputs: int, stride: int = 1) -> None:
        super().__init__()
        self.conv1 = _conv(inputs, outputs, 3, stride)
        self.bn1 = nn.BatchNorm2d(outputs)
        self.relu = nn.ReLU(inplace=True)
        self.conv2 = _conv(outputs, outputs, 3)
        self.bn2 = nn.BatchNorm2d(outputs)
        self.downsample = _projection(inputs, outputs, stride)

    def forward(self, x: Tensor) -> Tensor:
        branch = self.bn2(self.conv2(self.relu(self.bn1(self.conv1(x)))))
        branch += x if self.downsample is None else self.downsample(x)
        return self.relu(branch)


class Bottleneck(nn.Module):
    """He et al. 2015, figure 5 right, with torchvision's names: one ReLU module, called thrice."""

    def __init__(self, inputs: int, outputs: int, stride: int = 1) -> None:
        super().__init__()
        width = outputs // 4
        self.conv1, self.bn1 = _conv(inputs, width, 1), nn.BatchNorm2d(width)
        self.conv2, self.bn2 = _conv(width, width, 3, stride), nn.BatchNorm2d(width)
        self.conv3, self.bn3 = _conv(width, outputs, 1), nn.BatchNorm2d(outputs)
        self.relu = nn.ReLU(inplace=True)
        self.downsample = _projection(inputs, outputs, stride)

    def forward(self, x: Tensor) -> Tensor:
        branch = self.relu(self.bn1(self.conv1(x)))
        branch = self.relu(self.bn2(self.conv2(branch)))
        branch = self.bn3(self.conv3(branch))
        shortcut = x if self.downsample is None else self.downsample(x)
        return self.relu(branch + shortcut)


def _shortcut(inputs: int, outputs: int, stride: int) -> nn.Sequential:
    return _projection(inputs, outputs, stride) or nn.Sequential()


class SmallBlock(nn.Module):
    """He et al. 2015 for small images, as such code is often written: ReLU by function, and a
    Sequential for each shortcut."""

    expansion = 1

    def __init__(self, inputs: int, width: int, stride: int = 1) -> None:
        super().__init__()
        self.conv1, self.bn1 = _conv(inputs, width, 3, stride), nn.BatchNorm2d(width)
        self.conv2, self.bn2 = _conv(width, width, 3), nn.BatchNorm2d(width)
        self.shortcut = _shortcut(inputs, width, stride)

    def forward(self, x: Tensor) -> Tensor:
        out = F.relu(self.bn1(self.conv1(x)))
        out = self.bn2(self.conv2(out))
        out += self.shortcut(x)
        out = F.relu(out)
        return out


class SmallBottleneck(nn.Module):
    expansion = 4

    def __init__(self, inputs: int, width: int, stride: int = 1) -> None:
        super().__init__()
        outputs = 4 * width
        self.conv1, self.bn1 = _conv(inputs, width, 1), nn.BatchNorm2d(width)
        self.conv2, self.bn2 = _conv(width, width, 3, stride), nn.BatchNorm2d(width)
        self.conv3, self.bn3 = _conv(width, outputs, 1), nn.BatchNorm2d(outputs)
        self.shortcut = _shortcut(inputs, outputs, stride)

    def forward(self, x: Tensor) -> Tensor:
        out = F.relu(self.bn1(self.conv1(x)))
        out = F.relu(self.bn2(self.conv2(out)))
        out = self.bn3(self.conv3(out))
        return F.relu(out + self.shortcut(x))


class PreActivated(nn.Module):
    """He et al. 2016, figure 1 right: norm and ReLU before each convolution."""

    expansion = 1

    def __init__(self, inputs: int, width: int, stride: int = 1) -> None:
        super().__init__()
        self.bn1, self.conv1 = nn.BatchNorm2d(inputs), _conv(inputs, width, 3, stride)
        self.bn2, self.conv2 = nn.BatchNorm2d(width), _conv(width, width, 3)
        if stride != 1 or inputs != width:
            self.shortcut = nn.Sequential(_conv(inputs, width, 1, stride))

    def forward(self, x: Tensor) -> Tensor:
        out = F.relu(self.bn1(x))
        shortcut = self.shortcut(out) if hasattr(self, "shortcut") else x
        out = self.conv1(out)
        out = self.conv2(F.relu(self.bn2(out)))
        out += shortcut
        return out


class OptionalProjection(nn.Module):
    """As torchvision's BasicBlock goes in statements: the projection is there or None."""

    expansion = 1

    def __init__(self, inputs: int, width: int, stride: int = 1) -> None:
        super().__init__()
        self.conv1, self.bn1 = _conv(inputs, width, 3, stride), nn.BatchNorm2d(width)
        self.relu = nn.ReLU(inplace=True)
        self.conv2, self.bn2 = _conv(width, width, 3), nn.BatchNorm2d(width)
        self.downsample = _projection(inputs, width, stride)
        self.gate: nn.Module | None = None

    def forward(self, x: Tensor) -> Tensor:
        identity = x
        out = self.conv1(x)
        out = self.bn1(out)
        out = self.relu(out)
        out = self.conv2(out)
        out = self.bn2(out)
        if self.gate is not None:
            out = self.gate(out)
        if self.downsample is not None:
            identity = self.downsample(x)
        out += identity
        out = self.relu(out)
        return out


class SmallResNet(nn.Module):
    """A ResNet for images of 32 x 32 of such blocks, ``counts`` of each width."""

    def __init__(self, block: Any, counts: tuple[int, ...] = (2, 2, 2, 2), width: int = 64) -> None:
        super().__init__()
        self.inputs = width
        self.conv1, self.bn1 = _conv(3, width, 3), nn.BatchNorm2d(width)
        self.layers = nn.Sequential()
        for level, count in enumerate(counts):
            for number in range(count):
                stride = 2 if level > 0 and number == 0 else 1
                self.layers.append(block(self.inputs, width << level, stride))
                self.inputs = block.expansion * (width << level)
        self.linear = nn.Linear(self.inputs, 10)

    def forward(self, x: Tensor) -> Tensor:
        out = self.layers(F.relu(self.bn1(self.conv1(x))))
        return self.linear(out.mean((2, 3)))


def as_torchvision(monkeypatch: pytest.MonkeyPatch, **classes: type) -> types.ModuleType:
    """torchvision.models.resnet with subclasses of these in the place of its own."""
    module = types.ModuleType("torchvision.models.resnet")
    for name, kind in classes.items():
        setattr(module, name, type(name, (kind,), {"__module__": module.__name__}))
    for name in ("torchvision", "torchvision.models"):  # pickle imports them on its way
        monkeypatch.setitem(sys.modules, name, sys.modules.get(name) or types.ModuleType(name))
    monkeypatch.setitem(sys.modules, module.__name__, module)
    return module


class UNetBlock(nn.Module):
    """norm - act - conv - (+ embedding) - norm - act - dropout - conv, + x: a diffusion UNet's."""

    def __init__(self, channels: int, norm: type[nn.Module], act: type[nn.Module]) -> None:
        super().__init__()

        def new() -> nn.Module:
            return norm(4, channels) if norm is nn.GroupNorm else norm(channels)

        self.norm1, self.act1 = new(), act()
        self.conv1 = _conv(channels, channels, 3)
        self.embed = nn.Sequential(nn.SiLU(), nn.Linear(6, channels))
        self.norm2, self.act2 = new(), act()
        self.dropout = nn.Dropout(0.1)
        self.conv2 = _conv(channels, channels, 3)

    def forward(self, x: Tensor, embedding: Tensor) -> Tensor:
        h = self.conv1(self.act1(self.norm1(x)))
        h = h + self.embed(embedding)[:, :, None, None]
        return x + self.conv2(self.dropout(self.act2(self.norm2(h))))


def needs(norm: type[nn.Module] | None = None, activation: str | None = None) -> None:
    """Skips where this build has no such fused norm or activation."""
    if norm is not None and norm.__name__ not in bnn.__all__:
        pytest.skip(f"no fused {norm.__name__} in this build")
    if activation is not None:
        try:
            torch.ops.batchops.activation(torch.zeros(1), activation)
        except (RuntimeError, ValueError):
            pytest.skip(f"no fused {activation} in this build")
