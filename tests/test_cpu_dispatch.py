"""The CPU kernels at every instruction set this machine can run, and nothing compiled beyond it."""

from __future__ import annotations

import os
import re
import shutil
import subprocess
from pathlib import Path

import pytest

import batchops

from .native import instruction_sets, run_python

CAPABILITIES = ("avx512", "avx2", "default")
# Those that are not another's under a better name here.
DISTINCT = [isa if isa in CAPABILITIES else "default" for isa in instruction_sets()]

# Runs in a process of its own: the choice is made once a process.
BODY = """
import sys
import numpy as np
import torch
import batchops._binding as binding
from batchops.functional import batch_norm
from tests.reference import BatchNormReference, to_float64
from tests.tolerances import elementwise, norm_error

print(binding.core.cpu_capability())
torch.manual_seed(0)
SHAPES = (
    (3, 5, 7, 7),      # planes shorter than most vectors, joined into rows; odd mask rows
    (4, 3, 17, 19),    # one plane at a time, with a part of a vector at the end
    (33, 67),          # rows with a part of a vector at the end
    (40, 3, 5, 5),     # few channels: several pixels a row, and a short last row
)
for dtype in (torch.float32, torch.bfloat16, torch.float16, torch.float64):
    for shape in SHAPES:
        for layout in (torch.contiguous_format, torch.channels_last):
            if layout == torch.channels_last and len(shape) != 4:
                continue
            for act in ("none", "relu"):
                for with_residual in (False, True):
                    C = shape[1]
                    make = lambda: torch.randn(shape).to(dtype).contiguous(memory_format=layout)
                    x, residual, dy = make() + 3, make() if with_residual else None, make()
                    weight, bias = torch.rand(C).to(dtype) + 0.5, torch.randn(C).to(dtype)
                    leaves = [t for t in (x, weight, bias, residual) if t is not None]
                    for leaf in leaves:
                        leaf.requires_grad_()
                    y = batch_norm(x, None, None, weight, bias, training=True, activation=act,
                                   residual=residual)
                    grads = torch.autograd.grad(y, leaves, dy)
                    values = [to_float64(t) for t in leaves]
                    oracle = BatchNormReference(*values[:3], *values[3:], act=act)
                    # Where z rounds to 0 or below, the derivative is 0 by the kernel's own z.
                    mask = (to_float64(y) > 0) if act == "relu" else None
                    dx, dresidual, dweight, dbias = oracle.backward(to_float64(dy), mask)
                    expected = [oracle.y, dx, dweight, dbias] + [dresidual] * with_residual
                    bound = 2 * elementwise(dtype, x.numel() // C)
                    for got, want in zip((y, *grads), expected):
                        error = norm_error(got, want)
                        assert error <= bound, (dtype, shape, layout, act, error, bound)
"""


NAME = "import batchops._binding as binding; print(binding.core.cpu_capability())"


@pytest.mark.parametrize("capability", DISTINCT)
def test_batch_norm_is_exact_at(capability):
    result = run_python(capability, "-c", BODY)
    assert result.returncode == 0, result.stderr
    assert result.stdout.split() == [capability]


def test_asking_for_more_than_the_machine_has_gives_the_best_it_has():
    for capability in {"", *CAPABILITIES} - set(DISTINCT):
        result = run_python(capability, "-c", NAME)
        assert (result.stdout.strip(), result.stderr) == (DISTINCT[0], "")


# Numbers of 16 bits, all there are, times a factor that makes most of them round.
ROUNDING = """
import torch
from batchops.functional import batch_norm

patterns = torch.arange(-(2**15), 2**15).to(torch.int16)
for dtype in (torch.bfloat16, torch.float16):
    for shape in ((1, 16, 64, 64), (64, 16, 8, 8), (16, 1024, 2, 2)):
        for layout in (torch.contiguous_format, torch.channels_last):
            x = patterns.view(dtype).view(shape).contiguous(memory_format=layout)
            C = shape[1]
            scale = torch.full((C,), 1.00390625)
            y = batch_norm(x, torch.zeros(C), torch.ones(C), scale, None, training=False, eps=0.0)
            expected = (x.float() * scale[0]).to(dtype)
            # The instruction for bfloat16 of some machines takes subnormals for 0.
            tiny = expected.float().abs() < torch.finfo(dtype).smallest_normal
            same = (y == expected) | (y.isnan() & expected.isnan()) | tiny & (y == 0)
            assert same.all(), (dtype, shape, layout, x[~same][:5], y[~same][:5])
"""


# Rows and planes of every kind, with values of their own for each channel.
EVAL = """
import torch
from batchops.functional import batch_norm
from tests.reference import to_float64

torch.manual_seed(0)
SHAPES = (
    (3, 16, 15, 17),   # planes whose vectors begin anywhere; rows of whole pairs of vectors
    (40, 48, 5, 3),    # a last group of fewer columns than the others
    (5, 8, 7, 9),      # several pixels a row, and a short last row
    (33, 4112, 1, 1),  # three groups of columns
    (70, 64, 31, 33),  # past the cache
)
for dtype in (torch.float32, torch.bfloat16):
    for shape in SHAPES:
        for layout in (torch.contiguous_format, torch.channels_last):
            for with_residual in (False, True):
                C = shape[1]
                make = lambda: torch.randn(shape).to(dtype).contiguous(memory_format=layout)
                x, residual = make(), make() if with_residual else None
                mean, bias = torch.randn(C), torch.randn(C)
                var, weight = torch.rand(C) + 0.5, torch.rand(C) + 0.5
                column = lambda t: to_float64(t)[:, None, None]
                want = (to_float64(x) - column(mean)) / (column(var) + 1e-5) ** 0.5
                want = want * column(weight) + column(bias)
                if with_residual:
                    want += to_float64(residual)
                for offset in (0, 1):  # of the output's own memory the caller has no say
                    moved = torch.empty(x.numel() + offset, dtype=dtype)[offset:]
                    moved = moved.as_strided(x.shape, x.stride()).copy_(x)
                    y = batch_norm(moved, mean, var, weight, bias, training=False,
                                   residual=residual)
                    error = abs(to_float64(y) - want) / (1 + abs(want))
                    bound = 2**-8 if dtype == torch.bfloat16 else 1e-6
                    assert error.max() <= bound, (dtype, shape, layout, error.max())
"""


@pytest.mark.parametrize("capability", DISTINCT)
def test_eval_is_exact_at(capability):
    result = run_python(capability, "-c", EVAL)
    assert result.returncode == 0, result.stderr


@pytest.mark.parametrize("capability", DISTINCT)
def test_every_number_of_16_bits_is_rounded_as_torch_does_at(capability):
    result = run_python(capability, "-c", ROUNDING)
    assert result.returncode == 0, result.stderr


def test_unknown_capability_is_reported_and_ignored():
    odd = run_python("sse9", "-c", NAME)
    assert odd.stdout.strip() == DISTINCT[0]
    for word in ("BATCHOPS_CPU_CAPABILITY", '"sse9"', '"avx512", "avx2" or "default"'):
        assert word in odd.stderr


def disassembler(*arguments) -> str:
    return subprocess.run(
        ["objdump", *arguments], capture_output=True, text=True, check=True
    ).stdout


@pytest.mark.skipif(os.uname().machine != "x86_64", reason="x86-64 registers")
@pytest.mark.skipif(shutil.which("objdump") is None, reason="needs objdump")
def test_exported_functions_use_baseline_registers_only():
    """An exported (weak) library function compiled for AVX could replace the process's own copy."""
    library = next(Path(batchops._binding.core.__file__).parent.rglob("libbatchops_core.so"))
    wide = [
        int(line.split(":")[0], 16)
        for line in disassembler("-d", "--no-show-raw-insn", library).splitlines()
        if "%ymm" in line or "%zmm" in line
    ]
    assert wide, "the kernels themselves should use them"
    exported = {}
    for line in disassembler("-T", "-C", library).splitlines():
        match = re.match(r"([0-9a-f]+) .{6}F \.text\s+([0-9a-f]+)\s+\S+\s+(.*)$", line)
        if match:
            exported[match[3]] = range(int(match[1], 16), int(match[1], 16) + int(match[2], 16))
    assert any("batch_norm_forward_cpu" in name for name in exported)
    assert not [name for name, code in exported.items() if any(at in code for at in wide)]
