"""cupy arrays in, cupy arrays out: over the same memory, through DLPack."""

from __future__ import annotations

import sys
import types

import numpy as np
import pytest
import torch

from batchops import functional as BF


class Array:
    """Stands in for cupy.ndarray on the CPU: what DLPack asks for, and nothing else."""

    def __init__(self, values):
        self.values = np.asarray(values)

    @property
    def strides(self):
        return self.values.strides

    def __dlpack__(self, **options):
        return self.values.__dlpack__(**options)

    def __dlpack_device__(self):
        return self.values.__dlpack_device__()


@pytest.fixture
def array(monkeypatch):
    stand_in = types.SimpleNamespace(ndarray=Array, from_dlpack=lambda t: Array(np.from_dlpack(t)))
    monkeypatch.setitem(sys.modules, "cupy", stand_in)
    return Array


CALLS = {
    "batch_norm": lambda x, w, b, **k: BF.batch_norm(x, None, None, w, b, True, **k),
    "group_norm": lambda x, w, b, **k: BF.group_norm(x, 2, w, b, **k),
    "layer_norm": lambda x, w, b, **k: BF.layer_norm(x, (6,), w, b, **k),
    "instance_norm": lambda x, w, b, **k: BF.instance_norm(x, weight=w, bias=b, **k),
}


def values(*size):
    return np.random.default_rng(0).standard_normal(size, dtype=np.float32)


@pytest.mark.parametrize("name", CALLS)
def test_array_in_array_out(name, array):
    x, r, w, b = values(4, 6, 6), values(4, 6, 6), values(6), values(6)
    y = CALLS[name](array(x), array(w), array(b), residual=array(r), activation="relu")
    assert isinstance(y, Array)
    expected = CALLS[name](
        *map(torch.from_numpy, (x, w, b)), residual=torch.from_numpy(r), activation="relu"
    )
    np.testing.assert_array_equal(y.values, expected.numpy())


def test_running_statistics_are_updated_in_place(array):
    mean, var = array(np.zeros(6, np.float32)), array(np.ones(6, np.float32))
    BF.batch_norm(array(values(4, 6, 5)), mean, var, training=True)
    expected = torch.zeros(6), torch.ones(6)
    BF.batch_norm(torch.from_numpy(values(4, 6, 5)), *expected, training=True)
    np.testing.assert_array_equal(mean.values, expected[0].numpy())
    np.testing.assert_array_equal(var.values, expected[1].numpy())


@pytest.mark.parametrize("name", CALLS)
def test_other_kinds_raise(name, array):
    message = f"{name}: expected input to be a Tensor or a cupy.ndarray, got ndarray"
    with pytest.raises(TypeError, match=message):
        CALLS[name](values(4, 6, 6), None, None)


def test_negative_strides_raise(array):
    with pytest.raises(ValueError, match="group_norm: expected input with strides of 0 or more"):
        BF.group_norm(array(values(4, 6, 6)[::-1]), 2)


@pytest.mark.cuda
@pytest.mark.parametrize("name", CALLS)
def test_cupy(name):
    cupy = pytest.importorskip("cupy")
    x, w, b = values(4, 6, 6), values(6), values(6)
    y = CALLS[name](*map(cupy.asarray, (x, w, b)), activation="silu")
    assert isinstance(y, cupy.ndarray)
    expected = CALLS[name](*(torch.from_numpy(t).cuda() for t in (x, w, b)), activation="silu")
    np.testing.assert_array_equal(cupy.asnumpy(y), expected.cpu().numpy())
