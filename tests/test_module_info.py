"""PyTorch's own inputs for its norm modules, run through ours: as torch's in all but speed."""

from __future__ import annotations

import copy
import io
import pickle
import warnings

import pytest
import torch

from batchops import nn as bnn

with warnings.catch_warnings():
    warnings.simplefilter("ignore")
    common_modules = pytest.importorskip("torch.testing._internal.common_modules")

NAMES = (
    *(f"BatchNorm{d}d" for d in (1, 2, 3)),
    "GroupNorm",
    "LayerNorm",
    *(f"InstanceNorm{d}d" for d in (1, 2, 3)),
)
INFOS = {
    info.module_cls.__name__: info
    for info in common_modules.module_db
    if info.module_cls in [getattr(torch.nn, name) for name in NAMES]
}
DTYPES = (torch.float32, torch.float64)
CASES = [
    pytest.param(name, training, dtype, id=f"{name}-{'train' if training else 'eval'}-{dtype}")
    for name in NAMES
    for training in (True, False)
    for dtype in DTYPES
]


def test_torch_has_inputs_for_every_norm():
    assert set(INFOS) == set(NAMES)


def samples(name, training, dtype, device):
    """(module of torch's, ours with the same state, positional and keyword inputs)."""
    info = INFOS[name]
    if dtype not in info.dtypes:
        pytest.skip(f"torch has no {dtype} inputs for {name}")
    inputs = info.module_inputs_func(
        info, device=device, dtype=dtype, requires_grad=True, training=training
    )
    found = 0
    for sample in inputs:
        arguments, keywords = sample.constructor_input.args, sample.constructor_input.kwargs
        keywords = {"device": device, "dtype": dtype, **keywords}
        theirs = info.module_cls(*arguments, **keywords)
        for parameter in theirs.parameters():  # ones and zeros would hide a mistake
            torch.nn.init.uniform_(parameter, 0.5, 1.5)
        ours = getattr(bnn, name)(*arguments, **keywords)
        ours.load_state_dict(theirs.state_dict())
        ours.train(training), theirs.train(training)
        found += 1
        yield theirs, ours, sample.forward_input.args, sample.forward_input.kwargs
    assert found > 0


def compare(got, expected):
    tolerance = 1e-9 if expected.dtype == torch.float64 else 1e-4
    torch.testing.assert_close(got, expected, rtol=tolerance, atol=tolerance)


def run(module, arguments, keywords):
    """Output, and gradients of inputs and parameters."""
    arguments = [
        a.detach().clone(memory_format=torch.preserve_format).requires_grad_() for a in arguments
    ]
    y = module(*arguments, **keywords)
    torch.manual_seed(0)
    y.backward(torch.randn_like(y, memory_format=torch.contiguous_format))
    return y, [t.grad for t in (*arguments, *module.parameters())]


def check(theirs, ours, arguments, keywords):
    expected, expected_grads = run(theirs, arguments, keywords)
    got, grads = run(ours, arguments, keywords)
    assert got.shape == expected.shape
    assert got.dtype == expected.dtype
    assert got.device == expected.device
    compare(got, expected)
    for one, other in zip(grads, expected_grads, strict=True):
        compare(one, other)
    for key, value in theirs.state_dict().items():
        compare(ours.state_dict()[key], value)


@pytest.mark.parametrize(("name", "training", "dtype"), CASES)
def test_forward_gradients_and_state(name, training, dtype, device):
    for sample in samples(name, training, dtype, device):
        check(*sample)


@pytest.mark.parametrize(("name", "training", "dtype"), CASES)
def test_non_contiguous_inputs(name, training, dtype, device):
    for theirs, ours, arguments, keywords in samples(name, training, dtype, device):
        spread = [torch.stack([a, a], -1)[..., 0] if a.dim() else a for a in arguments]
        assert not any(a.is_contiguous() for a in spread if a.numel() > 1)
        check(theirs, ours, spread, keywords)


@pytest.mark.parametrize("name", [n for n in NAMES if n not in ("LayerNorm", "BatchNorm1d")])
@pytest.mark.parametrize("training", [True, False], ids=["train", "eval"])
def test_memory_format(name, training, device):
    formats = {4: torch.channels_last, 5: torch.channels_last_3d}
    for theirs, ours, arguments, keywords in samples(name, training, torch.float32, device):
        (x,) = arguments
        batched = x.dim() if name == "GroupNorm" else int(name[-2]) + 2
        if x.dim() not in formats or x.dim() != batched:
            continue
        x = x.detach().to(memory_format=formats[x.dim()])
        check(theirs, ours, [x], keywords)
        assert ours(x).stride() == x.stride()


@pytest.mark.parametrize(("name", "training", "dtype"), CASES)
def test_pickling_copying_and_state_dict(name, training, dtype, device):
    for theirs, ours, arguments, keywords in samples(name, training, dtype, device):
        assert isinstance(ours, type(theirs))
        assert ours.state_dict().keys() == theirs.state_dict().keys()
        theirs.load_state_dict(ours.state_dict())  # and the other way
        buffer = io.BytesIO()
        torch.save(ours, buffer)
        buffer.seek(0)
        copies = (
            pickle.loads(pickle.dumps(ours)),
            copy.deepcopy(ours),
            torch.load(buffer, weights_only=False),
        )
        for other in copies:
            assert type(other) is type(ours)
            assert other.training == training
            assert other.activation == ours.activation
            assert repr(other) == repr(ours)
            mine, again = (copy.deepcopy(m)(*arguments, **keywords) for m in (ours, other))
            assert torch.equal(mine, again)


@pytest.mark.parametrize("name", NAMES)
def test_to_dtype_and_meta_device(name, device):
    for theirs, ours, arguments, keywords in samples(name, True, torch.float32, device):
        ours.double(), theirs.double()
        doubled = [a.detach().double() for a in arguments]
        compare(ours(*doubled, **keywords), theirs(*doubled, **keywords))
        if getattr(ours, "momentum", 0.1) is None:
            continue  # torch reads the counter for the cumulative average, and meta has none
        on_meta = ours.to("meta")(*(a.to("meta") for a in doubled), **keywords)
        assert on_meta.is_meta
        assert on_meta.shape == theirs(*doubled, **keywords).shape
