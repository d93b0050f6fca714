"""The modules: torch's subclasses, with its rules on training, statistics and state."""

from __future__ import annotations

import copy
import pickle

import pytest
import torch
from torch import nn

from batchops import nn as bnn

KINDS = {
    "1d": (nn.BatchNorm1d, bnn.BatchNorm1d, (6, 4)),
    "1d with length": (nn.BatchNorm1d, bnn.BatchNorm1d, (6, 4, 5)),
    "2d": (nn.BatchNorm2d, bnn.BatchNorm2d, (3, 4, 5, 6)),
    "3d": (nn.BatchNorm3d, bnn.BatchNorm3d, (2, 4, 3, 4, 5)),
}
OPTIONS = {
    "default": {},
    "no affine": {"affine": False},
    "no statistics": {"track_running_stats": False},
    "cumulative": {"momentum": None},
    "momentum and eps": {"momentum": 0.37, "eps": 1e-3},
    "zero momentum": {"momentum": 0.0},
}


@pytest.mark.parametrize("options", OPTIONS.values(), ids=OPTIONS)
@pytest.mark.parametrize("kind", KINDS)
def test_follows_torch_through_training_and_eval(kind, options):
    stock_type, ours_type, shape = KINDS[kind]
    stock, ours = stock_type(4, **options), ours_type(4, **options)
    assert isinstance(ours, stock_type)
    if stock.affine:
        with torch.no_grad():
            stock.weight.uniform_(0.5, 1.5)
            stock.bias.normal_()
    ours.load_state_dict(stock.state_dict())
    for step in range(4):
        if step == 3:
            stock.eval()
            ours.eval()
        x = torch.randn(shape) * 3 + 1
        a, b = (x.clone().requires_grad_() for _ in range(2))
        y, z = stock(a), ours(b)
        torch.testing.assert_close(z, y, rtol=1e-5, atol=1e-5)
        dy = torch.randn_like(y)
        y.backward(dy)
        z.backward(dy)
        torch.testing.assert_close(b.grad, a.grad, rtol=1e-4, atol=1e-5)
        for key, value in stock.state_dict().items():
            torch.testing.assert_close(ours.state_dict()[key], value, rtol=1e-5, atol=1e-6)
    for p, q in zip(stock.parameters(), ours.parameters(), strict=True):
        torch.testing.assert_close(q.grad, p.grad, rtol=1e-4, atol=1e-4)


def test_state_dicts_interchange_bit_for_bit():
    stock, ours = nn.BatchNorm2d(4), bnn.BatchNorm2d(4, activation="relu")
    stock(torch.randn(3, 4, 5, 5))
    ours.load_state_dict(stock.state_dict())
    back = nn.BatchNorm2d(4)
    back.load_state_dict(ours.state_dict())
    assert list(ours.state_dict()) == list(stock.state_dict())
    assert all(torch.equal(v, back.state_dict()[k]) for k, v in stock.state_dict().items())


def test_activation_and_residual():
    norm = bnn.BatchNorm2d(4, activation="relu")
    plain = nn.BatchNorm2d(4)
    x, z = torch.randn(3, 4, 5, 5), torch.randn(3, 4, 5, 5)
    torch.testing.assert_close(norm(x, residual=z), (plain(x) + z).relu(), rtol=1e-5, atol=1e-5)
    torch.testing.assert_close(norm(x), plain(x).relu(), rtol=1e-5, atol=1e-5)
    assert "activation='relu'" in repr(norm)


def test_copies_pickle_and_hooks():
    norm = bnn.BatchNorm2d(4, activation="relu")
    x = torch.randn(3, 4, 5, 5)
    expected = copy.deepcopy(norm)(x)
    for other in (copy.deepcopy(norm), pickle.loads(pickle.dumps(norm))):
        assert other.activation == "relu"
        assert torch.equal(other(x), expected)
    calls = []
    norm.register_forward_hook(lambda m, args, out: calls.append(out.shape))
    norm(x)
    assert calls == [x.shape]


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16, torch.float64])
def test_whole_module_in_another_dtype(dtype):
    norm = bnn.BatchNorm2d(4, activation="relu").to(dtype)
    x = torch.randn(8, 4, 6, 6).to(dtype)
    y = norm(x)
    reference = nn.BatchNorm2d(4).double()
    expected = reference(x.double()).relu()
    tolerance = 2 * torch.finfo(dtype).eps
    torch.testing.assert_close(y.double(), expected, rtol=tolerance, atol=tolerance)
    torch.testing.assert_close(
        norm.running_var.double(), reference.running_var, rtol=tolerance, atol=tolerance
    )


def test_channels_last_stays():
    norm = bnn.BatchNorm2d(4)
    x = torch.randn(3, 4, 5, 6).to(memory_format=torch.channels_last)
    assert norm(x).is_contiguous(memory_format=torch.channels_last)


def test_data_parallel_buffers_and_meta_device():
    norm = bnn.BatchNorm2d(4, device="meta", dtype=torch.bfloat16)
    assert norm.weight.is_meta
    norm = norm.to_empty(device="cpu")
    norm.reset_parameters()
    norm.reset_running_stats()
    assert norm(torch.randn(3, 4, 5, 5).bfloat16()).isfinite().all()
