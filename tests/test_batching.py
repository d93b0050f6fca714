"""Padding, packing, normalising, and the samplers that go with them.

The oracles are plain loops in Python, float64 arithmetic, and transcriptions of what Hugging Face's
collators do with the same samples.
"""

from __future__ import annotations

import itertools
import math
import pickle
import random
import time
from collections import Counter
from collections.abc import Callable
from fractions import Fraction
from typing import Any

import numpy as np
import pytest
import torch
from torch._subclasses.fake_tensor import FakeTensorMode
from torch.utils.data import default_collate
from torch.utils.flop_counter import FlopCounterMode

from batchops import data
from batchops.data import Collator, DataLoader, Normalize, Pack, Pad, pack, pad
from batchops.data._collate import ARRAY_DTYPES

from .test_collate import TENSOR_DTYPES, seen


@pytest.fixture(autouse=True)
def _two_threads(threads: Any) -> None:
    threads(2)


def lengths_of(seed: int, n: int, most: int) -> list[int]:
    rng = random.Random(seed)
    return [rng.choice([0, 1, most, rng.randrange(most + 1)]) for _ in range(n)]


# --- pad and pack --------------------------------------------------------------------------------


def padded_by_hand(parts: list[torch.Tensor], width: int, value: Any, left: bool) -> torch.Tensor:
    out = torch.full((len(parts), width, *parts[0].shape[1:]), value, dtype=parts[0].dtype)
    for row, part in zip(out, parts, strict=True):
        start = width - len(part) if left else 0
        row[start : start + len(part)] = part
    return out


@pytest.mark.parametrize("dtype", TENSOR_DTYPES[:15], ids=str)
@pytest.mark.parametrize("shape", [(), (3,), (2, 5)], ids=str)
def test_pad_and_pack_every_dtype(dtype: torch.dtype, shape: tuple[int, ...]) -> None:
    parts = [
        torch.randint(0, 2, (length, *shape)).to(dtype) for length in lengths_of(len(shape), 9, 7)
    ]
    for left, multiple in ((False, 1), (True, 8)):
        width = -(-max(map(len, parts)) // multiple) * multiple
        got = pad(parts, value=1, side="left" if left else "right", multiple=multiple)
        assert torch.equal(got.values, padded_by_hand(parts, width, 1, left))
        assert got.values.is_contiguous()
        want = padded_by_hand(
            [torch.ones(len(p), dtype=torch.int64) for p in parts], width, 0, left
        )
        assert torch.equal(got.mask, want)
    packed = pack(parts)
    assert torch.equal(packed.values, torch.cat(parts))
    assert packed.cu_seqlens.tolist() == [0, *itertools.accumulate(map(len, parts))]


@pytest.mark.parametrize("form", ["lists", "tuples", "arrays", "tensors", "strided"])
@pytest.mark.parametrize("seed", range(6))
def test_everything_that_goes_beside(form: str, seed: int) -> None:
    rng = random.Random(seed)
    n, most = rng.choice([(1, 1), (3, 10), (40, 30), (300, 600)])
    plain = [
        [rng.randrange(-(1 << 40), 1 << 40) for _ in range(k)] for k in lengths_of(seed, n, most)
    ]
    make: Callable[[list[int]], Any] = {
        "lists": list,
        "tuples": tuple,
        "arrays": lambda s: np.array(s, np.int64),
        "tensors": lambda s: torch.tensor(s, dtype=torch.int64),
        "strided": lambda s: torch.tensor([s, s], dtype=torch.int64).T[:, 0],
    }[form]
    sequences = [make(s) for s in plain]
    tensors = [torch.tensor(s, dtype=torch.int64) for s in plain]
    left = rng.random() < 0.5
    multiple = rng.choice([1, 3, 64])
    minimum = rng.choice([None, most + 5])
    width = -(-max(max(map(len, plain)), minimum or 0) // multiple) * multiple
    got = pad(
        sequences,
        value=-7,
        side="left" if left else "right",
        multiple=multiple,
        length=minimum,
        mask=torch.bool,
        lengths=True,
        position_ids=True,
        labels=True,
        ignore=-5,
    )
    counts = [torch.arange(len(s)) for s in plain]
    assert torch.equal(got.values, padded_by_hand(tensors, width, -7, left))
    assert torch.equal(got.labels, padded_by_hand(tensors, width, -5, left))
    assert torch.equal(got.position_ids, padded_by_hand(counts, width, 0, left))
    assert torch.equal(got.mask, padded_by_hand([c >= 0 for c in counts], width, False, left))
    assert got.lengths.tolist() == [len(s) for s in plain]

    flat = pack(sequences, labels=True, seq_idx=True)
    assert torch.equal(flat.values, torch.cat(tensors))
    first = torch.cat([c == 0 for c in counts])
    assert torch.equal(flat.labels, torch.where(first, -100, flat.values))
    assert torch.equal(flat.position_ids, torch.cat(counts))
    assert flat.seq_idx.tolist() == [i for i, s in enumerate(plain) for _ in s]
    assert flat.max_seqlen == max(map(len, plain))
    assert flat.cu_seqlens.dtype is torch.int32


def test_pad_equals_pad_sequence() -> None:
    parts = [torch.randn(length, 4) for length in (3, 1, 7)]
    for side in ("left", "right"):
        want = torch.nn.utils.rnn.pad_sequence(parts, True, 0.5, padding_side=side)
        assert torch.equal(pad(parts, value=0.5, side=side).values, want)


def test_numbers_in_lists() -> None:
    assert pad([[1, 2.5], [3]]).values.dtype is torch.float32
    assert pad([[1], []]).values.tolist() == [[1], [0]]
    assert pad([[], []]).values.shape == (2, 0)
    assert pack([[], []]).cu_seqlens.tolist() == [0, 0, 0]
    assert pad([[2**63 - 1, -(2**63)]]).values.tolist() == [[2**63 - 1, -(2**63)]]


def test_integers_of_any_type() -> None:
    got = pad([[1, 2, 3]], multiple=np.int64(4), length=np.uint8(5))
    assert got.values.tolist() == [[1, 2, 3, 0, 0, 0, 0, 0]]


@pytest.mark.parametrize("side", ["left", "right"])
@pytest.mark.parametrize("dtype", [torch.float64, torch.complex128], ids=str)
def test_pad_and_pack_keep_the_graph(side: str, dtype: torch.dtype) -> None:
    leaves = [torch.randn(n, 2, dtype=dtype, requires_grad=True) for n in (3, 1, 0, 4)]
    parts = [leaf * (k + 2) for k, leaf in enumerate(leaves)]
    parts[1] = parts[1].detach()  # one that has none
    held = [part.detach() for part in parts]
    options = {"lengths": True, "position_ids": True, "labels": True, "multiple": 3}
    got = pad(parts, value=5, side=side, **options)
    for ours, want in zip(got, pad(held, value=5, side=side, **options), strict=True):
        assert torch.equal(ours, want)
        assert ours.dtype is want.dtype
    theirs = torch.nn.utils.rnn.pad_sequence(parts, True, 5, padding_side=side)
    with_graph = [leaves[0], leaves[2], leaves[3]]
    grads = torch.autograd.grad(
        got.values.abs().square().sum(), with_graph, retain_graph=True, allow_unused=True
    )
    expected = torch.autograd.grad(theirs.abs().square().sum(), with_graph, retain_graph=True)
    assert all(torch.equal(g, e) for g, e in zip(grads, expected, strict=True))

    flat = pack(parts, seq_idx=True, labels=True)
    for ours, want in zip(flat, pack(held, seq_idx=True, labels=True), strict=True):
        assert ours == want if isinstance(want, int) else torch.equal(ours, want)
    (grad,) = torch.autograd.grad(flat.values.abs().sum() + flat.labels.abs().sum(), leaves[:1])
    steps = torch.tensor([1, 2, 2])[:, None]  # a label there is not for the first step
    unit = leaves[0].detach() / leaves[0].detach().abs()
    assert torch.allclose(grad, 2 * steps * unit)

    with torch.no_grad():
        assert not pad(parts).values.requires_grad
        assert not pack(parts).values.requires_grad
    assert not pad(held).values.requires_grad


def test_pad_and_pack_carry_tangents() -> None:
    forward = torch.autograd.forward_ad
    with forward.dual_level():
        parts = [forward.make_dual(torch.ones(2), torch.full((2,), 3.0)), torch.ones(1)]
        padded = forward.unpack_dual(pad(parts).values).tangent
        packed = forward.unpack_dual(pack(parts).values).tangent
    assert padded.tolist() == [[3.0, 3.0], [0.0, 0.0]]
    assert packed.tolist() == [3.0, 3.0, 0.0]


@pytest.mark.parametrize(
    "sequences",
    [
        [[1, 2], [3]],
        [[1.5], [2.0, 3.0]],
        [np.arange(3), np.arange(1)],
        [torch.arange(3), torch.arange(1)],
        [torch.zeros(2, 3), torch.ones(1, 3)],
    ],
    ids=["ints", "floats", "arrays", "tensors", "matrices"],
)
def test_pad_and_pack_under_modes(sequences: list[Any]) -> None:
    """Those who watch see torch's operators, and values where there are any."""
    beside = {"lengths": True, "position_ids": True, "labels": True, "side": "left"}
    want = (*pad(sequences, **beside), *pack(sequences, seq_idx=True, labels=True))
    with FlopCounterMode(display=False):
        got = (*pad(sequences, **beside), *pack(sequences, seq_idx=True, labels=True))
    for ours, expected in zip(got, want, strict=True):
        same = torch.equal if isinstance(expected, torch.Tensor) else int.__eq__
        assert same(ours, expected)
    with FakeTensorMode() as mode:
        fakes = [mode.from_tensor(s) if isinstance(s, torch.Tensor) else s for s in sequences]
        got = (*pad(fakes, **beside), *pack(fakes, seq_idx=True, labels=True))
    for ours, expected in zip(got, want, strict=True):
        if isinstance(expected, torch.Tensor):
            assert isinstance(ours, torch._subclasses.FakeTensor)
            assert (ours.shape, ours.dtype) == (expected.shape, expected.dtype)


def test_sequences_that_are_not_plain() -> None:
    class Mine(np.ndarray):
        pass

    rows = [np.arange(3).view(Mine), np.arange(1).view(Mine)]
    assert pad(rows).values.tolist() == [[0, 1, 2], [0, 0, 0]]
    assert pack([np.arange(3)[::-1]]).values.tolist() == [2, 1, 0]
    conj = torch.tensor([1j]).conj()
    assert pad([conj, torch.ones(2, dtype=torch.complex64)]).values[0].tolist() == [-1j, 0]


@pytest.mark.parametrize(
    ("call", "error", "text"),
    [
        (lambda: pad([]), ValueError, "pad: expected at least one sequence, got none"),
        (lambda: pad("text"), TypeError, "expected a sequence of sequences, got str"),
        (
            lambda: pad([torch.tensor(1)]),
            TypeError,
            r"at least one dimension, got Tensor of shape \(",
        ),
        (
            lambda: pad([torch.ones(2, 3), torch.ones(2, 4)]),
            ValueError,
            r"got Tensor of shape \(L, 4\), torch.float32 on cpu at position 1",
        ),
        (
            lambda: pad([torch.ones(2), torch.ones(2).int()]),
            ValueError,
            "torch.int32 on cpu at pos",
        ),
        (lambda: pad([torch.ones(2), [1]]), TypeError, "expected tensors only, got list"),
        (lambda: pad([np.ones(2), np.ones(2, ">f8")]), ValueError, ">f8 at position 1"),
        (lambda: pad([[1], ["a"]]), ValueError, "got list of str at position 1"),
        (lambda: pad([[1 << 70]]), TypeError, "arrays or lists of numbers"),
        (lambda: pad([[1]], side="middle"), ValueError, 'side: expected "left" or "right"'),
        (lambda: pad([[1]], multiple=0), ValueError, "multiple: expected an integer >= 1, got 0"),
        (lambda: pad([[1]], multiple=True), ValueError, "multiple: expected .*, got True"),
        (lambda: pad([[1]], multiple=2.0), ValueError, "multiple: expected .*, got 2.0"),
        (lambda: pad([[1]], length="5"), ValueError, "length: expected an integer >= 0, got '5'"),
        (lambda: pad([[1]], length=5.0), ValueError, "length: expected an integer >= 0, got 5.0"),
        (lambda: pad([[1]], length=-1), ValueError, "length: expected an integer >= 0, got -1"),
        (
            lambda: pad([np.zeros((4, 4), np.clongdouble)[:, ::2]]),
            TypeError,
            r"arrays or lists of numbers, .*, got ndarray of shape \(L, 2\), complex256",
        ),
        (lambda: pack([np.zeros(4, np.clongdouble)[::2]]), TypeError, "pack: .*, complex256"),
        (lambda: pad([torch.ones(2).to_sparse()]), TypeError, "expected dense tensors"),
        (
            lambda: pad([torch.ones(2, requires_grad=True), [1]]),
            TypeError,
            "tensors only, got list",
        ),
        (lambda: pad([np.array(1)]), TypeError, r"at least one dimension, got ndarray of shape \("),
        (lambda: pad([[1]], mask=torch.float32), ValueError, "mask: expected a bool"),
        (
            lambda: pad([torch.ones(2, dtype=torch.uint8)], value=-1),
            ValueError,
            "pad: value: expected a value of torch.uint8, got -1",
        ),
        (lambda: pad([torch.ones(2, device="meta")]), TypeError, "on meta"),
        (lambda: pack([]), ValueError, "pack: expected at least one sequence, got none"),
    ],
)
def test_pad_refuses(call: Callable[[], Any], error: type, text: str) -> None:
    with pytest.raises(error, match=text):
        call()


# --- Normalize -----------------------------------------------------------------------------------

# Unit roundoff: half a unit in the last of 24, 8 and 11 bits.
EPSILON = {torch.float32: 2**-24, torch.bfloat16: 2**-8, torch.float16: 2**-11}


@pytest.mark.parametrize("dtype", EPSILON, ids=str)
@pytest.mark.parametrize("last", [False, True], ids=["contiguous", "channels_last"])
@pytest.mark.parametrize("layout", ["HWC", "CHW"])
@pytest.mark.parametrize(
    ("channels", "height", "width", "n"),
    [
        (3, 5, 7, 3),  # no whole vector
        (3, 32, 32, 4),
        (3, 33, 31, 2),  # a tail in each plane, planes not aligned
        (1, 28, 28, 5),
        (4, 9, 11, 2),
        (7, 8, 8, 2),
        (3, 300, 300, 9),  # past the caches, several chunks a sample
    ],
)
def test_normalize(
    dtype: torch.dtype, last: bool, layout: str, channels: int, height: int, width: int, n: int
) -> None:
    g = torch.Generator().manual_seed(channels * height)
    images = torch.randint(0, 256, (n, height, width, channels), dtype=torch.uint8, generator=g)
    mean = [0.2 + 0.1 * c for c in range(channels)]
    std = [0.3 + 0.05 * c for c in range(channels)]
    fmt = torch.channels_last if last else torch.contiguous_format
    if layout == "CHW":
        images = images.permute(0, 3, 1, 2).contiguous()
    normalize = Normalize(mean, std, layout=layout, dtype=dtype, memory_format=fmt)
    want = images.double() if layout == "CHW" else images.permute(0, 3, 1, 2).double()
    shape = (1, channels, 1, 1)
    m, s = (torch.tensor(v, dtype=torch.float64).view(shape) for v in (mean, std))
    want = (want / 255 - m) / s
    # scale, shift and the sum are rounded in fp32, each relative to its own size; then the dtype.
    bound = EPSILON[torch.float32] * ((want + m / s).abs() + 2 * (m / s).abs() + want.abs())
    bound = bound + (EPSILON[dtype] * want.abs() if dtype is not torch.float32 else 0) + 1e-7
    for samples in (list(images), list(images.numpy())):
        got = normalize(samples)
        assert got.dtype is dtype
        assert got.shape == want.shape
        assert got.is_contiguous(memory_format=fmt)
        assert ((got.double() - want).abs() <= bound).all()


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16], ids=str)
def test_normalize_rounds_once_to_nearest_even(dtype: torch.dtype) -> None:
    """Every byte under scales that reach subnormals and infinity: as torch rounds the fp32."""
    image = torch.arange(256, dtype=torch.uint8).view(16, 16, 1)
    for scale in (1e-9, 3e-8, 1e-6, 1e-3, 1.0, 257.0, 300.0, 1e5):
        for mean in (0.0, 0.37):
            exact = Normalize([mean], [1.0], scale=scale)([image])
            got = Normalize([mean], [1.0], scale=scale, dtype=dtype)([image])
            assert torch.equal(got, exact.to(dtype)), (scale, mean)
            # fewer than a vector: the way without one
            tail = Normalize([mean], [1.0], scale=scale, dtype=dtype)(
                [image.view(-1)[k * 7 : k * 7 + 7].view(7, 1, 1) for k in range(36)]
            )
            assert torch.equal(tail.view(-1), exact.view(-1)[:252].to(dtype))


def test_normalize_takes_strided_images_and_refuses_others() -> None:
    normalize = Normalize([0.5] * 3, [0.5] * 3)
    image = torch.randint(0, 256, (6, 5, 3), dtype=torch.uint8)
    strided = image.permute(1, 0, 2).contiguous().permute(1, 0, 2)
    assert torch.equal(normalize([strided]), normalize([image]))
    assert torch.equal(normalize([image.numpy()[:, ::-1]]), normalize([image.flip(1)]))
    for samples, error, text in (
        ([], ValueError, "at least one image"),
        ([[1, 2]], TypeError, "expected tensors or arrays, got list"),
        ([image.float()], ValueError, "uint8 images of shape"),
        (
            [image, image[:3]],
            ValueError,
            r"got Tensor of shape \(3, 5, 3\), torch.uint8 at position 1",
        ),
        ([image.permute(2, 0, 1)], ValueError, r"\(H, W, 3\)"),
    ):
        with pytest.raises(error, match=text):
            normalize(samples)
    for arguments, text in (
        ({"mean": [0.5], "std": [0.5, 0.5]}, "as many means as standard deviations"),
        ({"mean": [0.5], "std": [0.0]}, "std other than 0"),
        ({"mean": [float("nan")], "std": [1.0]}, "finite numbers"),
        ({"mean": [0.5], "std": [1.0], "layout": "HW"}, "layout: expected"),
        ({"mean": [0.5], "std": [1.0], "dtype": torch.int8}, "dtype: expected float32"),
        ({"mean": [0.5], "std": [1.0], "memory_format": torch.preserve_format}, "memory_format"),
    ):
        with pytest.raises(ValueError, match=text):
            Normalize(**arguments)


# --- Collator ------------------------------------------------------------------------------------


def test_without_options_it_is_collate() -> None:
    batch = [{"x": torch.ones(2) * i, "n": i, "s": str(i), "a": np.ones(3)} for i in range(4)]
    assert seen(Collator()(batch)) == seen(default_collate(batch))


def tokens(seed: int, n: int = 12) -> list[dict[str, Any]]:
    rng = random.Random(seed)
    out = []
    for _ in range(n):
        k = rng.randrange(1, 40)
        out.append(
            {
                "input_ids": [rng.randrange(1000) for _ in range(k)],
                "token_type_ids": [rng.randrange(2) for _ in range(k)],
                "attention_mask": [1] * k,
                "labels": rng.randrange(5),
            }
        )
    return out


def with_padding(
    features: list[dict[str, Any]], pad_id: int, side: str, multiple: int | None
) -> dict[str, torch.Tensor]:
    """What DataCollatorWithPadding does by way of a tokenizer's pad: every token input to the
    longest (rounded up), ids with the padding token, the others with 0; tensors of int64."""
    width = max(len(f["input_ids"]) for f in features)
    if multiple:
        width = math.ceil(width / multiple) * multiple
    batch: dict[str, Any] = {key: [] for key in features[0]}
    for feature in features:
        for key, value in feature.items():
            if isinstance(value, list):
                fill = [pad_id if key == "input_ids" else 0] * (width - len(value))
                value = fill + value if side == "left" else value + fill
            batch[key].append(value)
    return {key: torch.tensor(value) for key, value in batch.items()}


@pytest.mark.parametrize("side", ["left", "right"])
@pytest.mark.parametrize("multiple", [1, 8])
def test_equal_to_data_collator_with_padding(side: str, multiple: int) -> None:
    collator = Collator(pad=Pad({"input_ids": 17, "token_type_ids": 0}, side, multiple))
    for seed in range(4):
        features = tokens(seed)
        want = with_padding(features, 17, side, multiple)
        got = collator(features)
        assert list(got) == list(want)
        for key, value in want.items():
            assert torch.equal(got[key], value), key
        # and without a mask of their own
        for feature in features:
            del feature["attention_mask"]
        assert torch.equal(collator(features)["attention_mask"], want["attention_mask"])


def with_flattening(features: list[dict[str, Any]], separator: int = -100) -> dict[str, Any]:
    """What DataCollatorWithFlattening does with return_flash_attn_kwargs and return_seq_idx."""
    ids: list[int] = []
    labels: list[int] = []
    positions: list[int] = []
    index: list[int] = []
    offsets, longest = [0], 0
    for i, feature in enumerate(features):
        own = feature["input_ids"]
        ids += own
        labels += [separator, *feature.get("labels", own)[1:]]
        positions += range(len(own))
        index += [i] * len(own)
        offsets.append(offsets[-1] + len(own))
        longest = max(longest, len(own))
    cu = torch.tensor(offsets, dtype=torch.int32)
    return {
        "input_ids": torch.tensor([ids]),
        "labels": torch.tensor([labels]),
        "position_ids": torch.tensor([positions]),
        "seq_idx": torch.tensor([index], dtype=torch.int32),
        "cu_seq_lens_q": cu,
        "cu_seq_lens_k": cu,
        "max_length_q": longest,
        "max_length_k": longest,
    }


@pytest.mark.parametrize("own_labels", [False, True])
def test_equal_to_data_collator_with_flattening(own_labels: bool) -> None:
    collator = Collator(
        pack=Pack(
            labels="labels",
            seq_idx="seq_idx",
            cu_seqlens=("cu_seq_lens_q", "cu_seq_lens_k"),
            max_seqlen=("max_length_q", "max_length_k"),
            batch_dim=True,
        )
    )
    for seed in range(4):
        features = [{"input_ids": f["input_ids"]} for f in tokens(seed)]
        if own_labels:
            features = [{**f, "labels": [t + 1 for t in f["input_ids"]]} for f in features]
        want, got = with_flattening(features), collator(features)
        assert set(got) == set(want)
        for key, value in want.items():
            if isinstance(value, torch.Tensor):
                assert got[key].dtype is value.dtype
                assert torch.equal(got[key], value), key
            else:
                assert got[key] == value


def test_tuples_and_bare_sequences() -> None:
    samples = [(torch.arange(k), k) for k in (3, 1)]
    values, label, beside = Collator(pad=Pad({0: -1}, mask="m", lengths="l", labels="y"))(samples)
    assert values.tolist() == [[0, 1, 2], [0, -1, -1]]
    assert label.tolist() == [3, 1]
    assert beside["m"].tolist() == [[1, 1, 1], [1, 0, 0]]
    assert beside["l"].tolist() == [3, 1]
    assert beside["y"].tolist() == [[0, 1, 2], [0, -100, -100]]
    bare = Collator(pad=9)([[1, 2], [3]])
    assert bare.values.tolist() == [[1, 2], [3, 9]]
    flat = Collator(pack=True)([[1, 2], [3]])
    assert flat.values.tolist() == [1, 2, 3]
    assert flat.seq_idx is None


IMAGES = [(torch.randint(0, 256, (8, 6, 3), dtype=torch.uint8), i) for i in range(5)]


def test_images() -> None:
    hwc = torch.stack([image for image, _ in IMAGES])
    chw = hwc.permute(0, 3, 1, 2)
    normalize = Normalize([0.5] * 3, [0.25] * 3)
    arrays = [(image.numpy(), i) for image, i in IMAGES]
    for samples in (IMAGES, arrays):
        got, label = Collator(transform=normalize)(samples)
        assert torch.equal(got, normalize([image for image, _ in IMAGES]))
        assert label.tolist() == list(range(5))
        got, _ = Collator(transform={0: normalize})(samples)
        assert torch.equal(got, normalize([image for image, _ in IMAGES]))
        for fmt in (torch.contiguous_format, torch.channels_last):
            got, _ = Collator(layout="HWC", memory_format=fmt)(samples)
            assert torch.equal(got, chw)
            assert got.is_contiguous(memory_format=fmt)
    planes = [(image.permute(2, 0, 1).contiguous(), i) for image, i in IMAGES]
    for samples in (planes, [(image.numpy(), i) for image, i in planes]):
        got, _ = Collator(memory_format=torch.channels_last)(samples)
        assert torch.equal(got, chw)
        assert got.is_contiguous(memory_format=torch.channels_last)
        got, _ = Collator()(samples)
        assert torch.equal(got, chw)
    floats = [(image.float() / 3, i) for image, i in IMAGES]
    got, _ = Collator(layout="HWC", memory_format=torch.channels_last, dtype=torch.bfloat16)(floats)
    assert torch.equal(got, (chw.float() / 3).bfloat16())
    assert got.is_contiguous(memory_format=torch.channels_last)


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16, torch.float64], ids=str)
def test_dtypes(dtype: torch.dtype) -> None:
    samples = [{"x": torch.randn(3, 4), "a": np.random.rand(2), "i": i} for i in range(4)]
    got = Collator(dtype=dtype)(samples)
    want = default_collate(samples)
    assert torch.equal(got["x"], want["x"].to(dtype))
    assert torch.equal(got["a"], want["a"].to(dtype))
    assert got["i"].dtype is torch.int64


@pytest.mark.parametrize(
    ("make", "samples", "text"),
    [
        (
            lambda: Collator(pad=Pad({"b": 0})),
            [{"a": [1]}],
            r"pad: expected \['b'\] in each sample",
        ),
        (lambda: Collator(pad=Pad({"a": 0})), [[1, 2]], "expected mappings or tuples"),
        (
            lambda: Collator(pad=Pad({"a": 0})),
            [{"a": [1]}, {"a": ["x"]}],
            r"got list of str at position 1(.|\n)*sample\['a'\]",
        ),
        (lambda: Collator(pack=Pack(("b",))), [{"a": [1]}], r"pack: expected \['b'\]"),
        (
            lambda: Collator(pack=Pack(("a", "b"))),
            [{"a": [1], "b": [1]}, {"a": [1], "b": [1, 2]}],
            "parts of equal lengths, got 2 of 'b' and 1 of 'a' at position 1",
        ),
        (lambda: Collator(transform=Normalize([0.5], [1.0])), IMAGES, r"\(H, W, 1\)"),
    ],
)
def test_collator_refuses_samples(make: Any, samples: Any, text: str) -> None:
    with pytest.raises(ValueError, match=text):
        make()(samples)


@pytest.mark.parametrize(
    ("arguments", "text"),
    [
        ({"pad": True, "pack": True}, "expected pad or pack, got both"),
        ({"pack": 3}, "pack: expected True or a Pack, got 3"),
        ({"layout": "WHC"}, "layout: expected"),
        ({"dtype": torch.int32}, "dtype: expected a floating-point dtype"),
        ({"memory_format": torch.channels_last_3d}, "memory_format: expected"),
    ],
)
def test_collator_refuses_arguments(arguments: dict[str, Any], text: str) -> None:
    with pytest.raises(ValueError, match=text):
        Collator(**arguments)


class Tokens(torch.utils.data.Dataset):
    def __init__(self, n: int = 24) -> None:
        self.items = tokens(5, n)

    def __len__(self) -> int:
        return len(self.items)

    def __getitem__(self, i: int) -> Any:
        return self.items[i]


@pytest.mark.parametrize("arguments", [{}, {"threads": 2}, {"num_workers": 1}], ids=str)
def test_in_a_loader(arguments: dict[str, Any]) -> None:
    collator = pickle.loads(pickle.dumps(Collator(pad=Pad({"input_ids": 0, "token_type_ids": 0}))))
    dataset = Tokens()
    for given in ({"collator": collator}, {"collate_fn": collator}):
        got = list(DataLoader(dataset, 5, **given, **arguments))
        for k, batch in enumerate(got):
            want = with_padding(dataset.items[5 * k : 5 * k + 5], 0, "right", None)
            assert all(torch.equal(batch[key], want[key]) for key in want)
            assert batch["input_ids"].is_shared() is ("num_workers" in arguments)


# --- samplers ------------------------------------------------------------------------------------


def random_lengths(seed: int, n: int = 3000, most: int = 500) -> np.ndarray:
    rng = np.random.default_rng(seed)
    return np.minimum(rng.lognormal(4, 1, n).astype(int) + 1, most)


@pytest.mark.parametrize("padded", [True, False])
@pytest.mark.parametrize("seed", range(5))
def test_budget_is_never_exceeded_and_nobody_is_left_out(seed: int, padded: bool) -> None:
    rng = random.Random(seed)
    lengths = random_lengths(seed, rng.choice([1, 255, 3000, 70_000]))
    multiple = rng.choice([1, 8])
    most = rng.choice([None, 16])
    budget = 504 * rng.choice([1, 4])
    sampler = data.TokenBudgetBatchSampler(
        lengths,
        budget,
        seed=seed,
        padded=padded,
        multiple=multiple,
        max_samples=most,
        shuffle=rng.random() < 0.8,
        window=rng.choice([None, 64, 1]),
    )
    seen_once: Counter[int] = Counter()
    batches = list(sampler)
    assert len(batches) == len(sampler)
    rounded = -(-lengths // multiple) * multiple
    for batch in batches:
        own = rounded[batch]
        assert len(batch) > 0
        assert (own.max() * len(batch) if padded else own.sum()) <= budget
        assert most is None or len(batch) <= most
        seen_once.update(batch)
    assert seen_once == Counter(range(len(lengths)))
    if padded and len(lengths) > 2000 and most is None and sampler.window is None:
        cost = sum(rounded[b].max() * len(b) for b in batches)
        assert rounded.sum() / cost > 0.98, "hardly any padding"


def test_ranks_have_equally_many_batches_without_talking() -> None:
    lengths = random_lengths(1)
    whole = [tuple(b) for b in data.TokenBudgetBatchSampler(lengths, 2000, seed=4)]
    for world in (2, 3, 7):
        for drop_last in (False, True):
            ranks = [
                data.TokenBudgetBatchSampler(
                    lengths, 2000, seed=4, num_replicas=world, rank=r, drop_last=drop_last
                )
                for r in range(world)
            ]
            own = [[tuple(b) for b in sampler] for sampler in ranks]
            assert len({len(batches) for batches in own}) == 1
            assert [len(b) for b in own] == [len(sampler) for sampler in ranks]
            together = Counter(itertools.chain(*own))
            if drop_last:
                assert together <= Counter(whole)
                assert sum(together.values()) > len(whole) - world
            else:
                assert set(together) == set(whole)
                assert sum(together.values()) < len(whole) + world


def test_more_ranks_than_batches() -> None:
    samplers = [data.TokenBudgetBatchSampler([5, 5], 10, num_replicas=5, rank=r) for r in range(5)]
    assert [len(list(s)) for s in samplers] == [1] * 5


@pytest.mark.parametrize(
    "make",
    [
        lambda **k: data.TokenBudgetBatchSampler(random_lengths(2), 3000, **k),
        lambda **k: data.BucketBatchSampler(random_lengths(2), 16, **k),
        lambda **k: data.MixtureBatchSampler([100, 50, 9], [1, 2, 3], 8, **k),
    ],
    ids=["budget", "bucket", "mixture"],
)
def test_epochs_seeds_and_resumption(make: Any) -> None:
    sampler = make(seed=3)
    first = list(sampler)
    assert list(sampler) == first == list(make(seed=3))
    assert list(make(seed=4)) != first
    sampler.set_epoch(1)
    second = list(sampler)
    assert second != first
    iterator = iter(sampler)
    for _ in range(5):
        next(iterator)
    state = sampler.state_dict()
    made_with = state.pop("made_with")
    assert state == {"seed": 3, "epoch": 1, "position": 5}
    state["made_with"] = made_with
    again = make(seed=0)
    again.load_state_dict(pickle.loads(pickle.dumps(state)))
    assert list(again) == second[5:]
    assert list(again) == second, "the next pass is whole"
    with pytest.raises(ValueError, match="expected seed, epoch and position"):
        again.load_state_dict({"seed": 3})


LENGTHS = random_lengths(2, 100)
OTHERS: dict[str, tuple[Callable[..., Any], str]] = {
    "ranks": (lambda: data.BucketBatchSampler(LENGTHS, 9, num_replicas=2, rank=0), "num_replicas"),
    "length": (lambda: data.BucketBatchSampler([*LENGTHS[:-1], 1], 9), "lengths"),
    "number": (lambda: data.BucketBatchSampler(LENGTHS[:-1], 9), "lengths"),
    "batch": (lambda: data.BucketBatchSampler(LENGTHS, 10), "batch_size"),
    "full": (lambda: data.BucketBatchSampler(LENGTHS, 9, drop_last=True), "drop_last"),
    "budget": (lambda: data.TokenBudgetBatchSampler(LENGTHS, 4001), "max_tokens"),
    "packed": (lambda: data.TokenBudgetBatchSampler(LENGTHS, 4000, padded=False), "padded"),
    "window": (lambda: data.TokenBudgetBatchSampler(LENGTHS, 4000, window=50), "window"),
    "weights": (lambda: data.MixtureBatchSampler([60, 40], [1, 3], 9), "weights"),
    "exact": (lambda: data.MixtureBatchSampler([60, 40], [1, 2], 9, exact=True), "exact"),
}


@pytest.mark.parametrize("name", OTHERS)
def test_a_position_among_other_batches_is_refused(name: str) -> None:
    make, argument = OTHERS[name]
    other = make()
    sampler = {
        data.BucketBatchSampler: lambda: data.BucketBatchSampler(LENGTHS, 9),
        data.TokenBudgetBatchSampler: lambda: data.TokenBudgetBatchSampler(LENGTHS, 4000),
        data.MixtureBatchSampler: lambda: data.MixtureBatchSampler([60, 40], [1, 2], 9),
    }[type(other)]()
    want = list(other)
    other.load_state_dict(sampler.state_dict())  # nothing was handed out
    assert list(other) == want
    iterator = iter(sampler)
    next(iterator)
    with pytest.raises(ValueError, match=f"a sampler with {argument} = .*, got one with "):
        other.load_state_dict(sampler.state_dict())
    assert list(other) == want, "it is as it was"
    # And by way of a loader, which counts batches itself.
    loader = DataLoader(range(100), batch_sampler=sampler)
    next(iter(loader))
    with pytest.raises(ValueError, match=f"a loader with {argument} = .*, got one with "):
        DataLoader(range(100), batch_sampler=other).load_state_dict(loader.state_dict())


class Index:
    """An integer of some other library's."""

    def __index__(self) -> int:
        return 2


INTEGERS: dict[str, Callable[[Any], Any]] = {
    "max_tokens": lambda n: data.TokenBudgetBatchSampler([1], n),
    "multiple": lambda n: data.TokenBudgetBatchSampler([1], 9, multiple=n),
    "max_samples": lambda n: data.TokenBudgetBatchSampler([1], 9, max_samples=n),
    "window": lambda n: data.TokenBudgetBatchSampler([1], 9, window=n),
    "seed": lambda n: data.TokenBudgetBatchSampler([1], 9, seed=n),
    "num_replicas": lambda n: data.TokenBudgetBatchSampler([1], 9, num_replicas=n),
    "rank": lambda n: data.TokenBudgetBatchSampler([1], 9, num_replicas=3, rank=n),
    "batch_size": lambda n: data.BucketBatchSampler([1], n),
    "bucket_batches": lambda n: data.BucketBatchSampler([1], 2, bucket_batches=n),
    "sizes": lambda n: data.MixtureBatchSampler([n, 1], [1, 1], 2),
    "batches": lambda n: data.MixtureBatchSampler([2], [1], 2, batches=n),
}


@pytest.mark.parametrize("argument", INTEGERS)
def test_samplers_take_integers_of_any_type_and_no_truth_values(argument: str) -> None:
    make = INTEGERS[argument]
    want = list(make(2))
    assert want
    for value in (np.int64(2), np.uint8(2), torch.tensor(2), Index()):
        sampler = make(value)
        assert list(sampler) == want
        held = getattr(sampler, argument)
        assert type(held[0] if argument == "sizes" else held) is int
    for value in (True, np.True_, torch.tensor(True), 2.0, "2"):
        with pytest.raises(ValueError, match=rf"Sampler: {argument}: expected an integer >= \d, "):
            make(value)


HUGE = 10**30


@pytest.mark.parametrize(
    "make",
    [
        lambda: data.TokenBudgetBatchSampler([3, 1], HUGE),
        lambda: data.TokenBudgetBatchSampler([3, 1], HUGE, padded=False),
        lambda: data.TokenBudgetBatchSampler([3, 1], 10, max_samples=HUGE),
        lambda: data.TokenBudgetBatchSampler([3, 1], 10, window=HUGE),
        lambda: data.TokenBudgetBatchSampler([3, 1], HUGE, multiple=(1 << 31) - 1),
        lambda: data.BucketBatchSampler([3, 1], HUGE),
        lambda: data.BucketBatchSampler([3, 1], 2, bucket_batches=HUGE),
        lambda: data.BucketBatchSampler([3, 1], 2, seed=HUGE),
    ],
)
def test_limits_that_nothing_reaches(make: Callable[[], Any]) -> None:
    assert sorted(itertools.chain(*make())) == [0, 1]
    assert list(data.BucketBatchSampler([3, 1], HUGE, drop_last=True)) == []


def test_oversized_samples() -> None:
    lengths = [3, 99, 4, 100, 2]
    with pytest.raises(
        ValueError, match=r"sample 1 has 99 tokens, more than max_tokens = 10 \(2 such"
    ):
        data.TokenBudgetBatchSampler(lengths, 10)
    alone = [set(b) for b in data.TokenBudgetBatchSampler(lengths, 10, oversize="alone")]
    assert {1} in alone
    assert {3} in alone
    assert set().union(*alone) == set(range(5))
    skipped = [i for b in data.TokenBudgetBatchSampler(lengths, 10, oversize="skip") for i in b]
    assert sorted(skipped) == [0, 2, 4]
    with pytest.raises(ValueError, match="sample 0 has 16 tokens"):
        data.TokenBudgetBatchSampler([9], 10, multiple=8)


def test_buckets() -> None:
    lengths = random_lengths(3, 2050)
    sampler = data.BucketBatchSampler(lengths, 16, bucket_batches=20, seed=1)
    batches = list(sampler)
    assert Counter(itertools.chain(*batches)) == Counter(range(2050))
    assert sorted(map(len, batches)) == [2, *[16] * 128]
    spread = np.mean([np.ptp(lengths[b]) for b in batches])
    mixed = np.mean([np.ptp(lengths[k : k + 16]) for k in range(0, 2048, 16)])
    assert spread < mixed / 5
    full = list(data.BucketBatchSampler(lengths, 16, drop_last=True))
    assert {len(b) for b in full} == {16}
    assert len(full) == 128
    assert len(list(data.BucketBatchSampler([1], 16, drop_last=True))) == 0


def test_mixtures() -> None:
    sizes, weights = [1000, 50, 300], [1.0, 2.0, 0.0]
    sampler = data.MixtureBatchSampler(sizes, weights, 30, batches=200, seed=1)
    batches = list(sampler)
    assert len(batches) == len(sampler) == 200
    of = np.searchsorted(np.cumsum(sizes), np.array(batches).ravel(), side="right")
    share = np.bincount(of, minlength=3) / of.size
    # Four standard deviations of a binomial share.
    assert abs(share[1] - 2 / 3) < 4 * math.sqrt(2 / 9 / of.size)
    assert share[2] == 0
    # without repetition until a dataset is through
    drawn = [i for b in batches for i in b if 1000 <= i < 1050]
    for k in range(0, len(drawn) - 50, 50):
        assert len(set(drawn[k : k + 50])) == 50


def mixture_counts(weights: Any, batch_size: int, batches: int) -> np.ndarray:
    """(batches, datasets), of an exact mixture."""
    sampler = data.MixtureBatchSampler(
        [50] * len(weights), weights, batch_size, batches=batches, exact=True
    )
    return np.array([np.bincount(np.array(b) // 50, minlength=len(weights)) for b in sampler])


def assert_exact(weights: list[Any], batch_size: int, batches: int) -> None:
    counts = mixture_counts(weights, batch_size, batches)
    assert counts.shape == (batches, len(weights))
    assert (counts.sum(1) == batch_size).all()
    exact = [Fraction(str(w)) for w in weights]
    wanted = [batch_size * w / sum(exact) for w in exact]
    behind = [Fraction(0)] * len(weights)
    for row in counts.tolist():
        assert all(abs(c - w) < 1 for c, w in zip(row, wanted, strict=True)), (weights, row)
        behind = [b + w - c for b, w, c in zip(behind, wanted, row, strict=True)]
        assert all(abs(b) < 1 for b in behind), (weights, batch_size, behind)


def test_exact_mixtures_of_all_small_weights() -> None:
    """Up to the batch at which all are even. Rules that break ties by less than the sampler's are
    found out at sums of 10 (what is due first) and 11 (and what overlaps its next turn)."""
    for datasets in range(1, 6):
        for weights in itertools.combinations_with_replacement(range(1, 9), datasets):
            if sum(weights) <= 12:
                for batch_size in range(1, sum(weights)):
                    assert_exact(list(weights), batch_size, sum(weights) + 1)


@pytest.mark.parametrize(
    ("weights", "batch_size", "batches"),
    [
        ([14, 7, 5], 9, 60),  # 9 a batch: 4.85, 2.42, 1.73
        ([0.7, 0.2, 0.1], 8, 50),  # decimals that are no binary fractions
        ([1, 0, 3], 5, 9),  # one that is never drawn
        ([1.0], 3, 4),
        ([1e308, 1e308, 1e308], 4, 7),  # a sum beyond float64
        ([5e-324, 1.0], 4, 7),
        ([0.1 + 0.01 * k for k in range(40)], 64, 80),  # many, no period in sight
        ([3, 3, 3, 3, 4, 4, 4], 17, 30),  # heavy shares of a turn: 2.125 and 2.83
    ],
)
def test_exact_mixtures(weights: list[Any], batch_size: int, batches: int) -> None:
    assert_exact(weights, batch_size, batches)


def test_weights_whose_sum_is_infinite() -> None:
    sampler = data.MixtureBatchSampler([10, 10], [1e308, 1e308], 10, batches=100)
    share = np.mean([i < 10 for batch in sampler for i in batch])
    assert abs(share - 0.5) < 4 * math.sqrt(0.25 / 1000)


def pairs_of(seed: int, epoch: int = 0) -> set[tuple[int, int]]:
    sampler = data.BucketBatchSampler(np.full(10_000, 7), 10, seed=seed)
    sampler.set_epoch(epoch)
    return {pair for batch in sampler for pair in itertools.combinations(sorted(batch), 2)}


def test_neighbouring_seeds_and_epochs_are_strangers() -> None:
    """Of 45,000 pairs in batches, chance puts 40.5 in the other epoch's; 85 is seven deviations."""
    first = pairs_of(0)
    for seed, epoch in ((1, 0), (2, 0), (0, 1), (0, 2), (1, 1)):
        assert len(first & pairs_of(seed, epoch)) < 85, (seed, epoch)


@pytest.mark.parametrize(
    ("call", "text"),
    [
        (lambda: data.TokenBudgetBatchSampler([[1]], 5), "a vector of integers, got 2 dimensions"),
        (lambda: data.TokenBudgetBatchSampler([1.5], 5), "got 1 dimensions of float64"),
        (lambda: list(data.TokenBudgetBatchSampler([-1], 5)), "got -1 for sample 0"),
        (
            lambda: data.TokenBudgetBatchSampler([1], 0),
            "max_tokens: expected an integer >= 1, got 0",
        ),
        (lambda: data.TokenBudgetBatchSampler([1], 5, oversize="no"), "oversize: expected"),
        (
            lambda: data.TokenBudgetBatchSampler([1], 1 << 40, multiple=1 << 31),
            r"multiple: expected below 2\^31, as lengths are, got 2147483648",
        ),
        (
            lambda: data.TokenBudgetBatchSampler([1], 5, num_replicas=2, rank=2),
            "rank: expected below",
        ),
        (lambda: data.TokenBudgetBatchSampler([1], 5, seed=-1), "seed: expected an integer >= 0"),
        (lambda: data.BucketBatchSampler([1], 0), "batch_size: expected an integer >= 1"),
        (lambda: data.MixtureBatchSampler([3], [1, 2], 2), "one for each of 1 datasets"),
        (lambda: data.MixtureBatchSampler([3], [-1], 2), "finite and >= 0"),
        (lambda: data.MixtureBatchSampler([3], [0], 2), "a positive one"),
        (lambda: data.MixtureBatchSampler([0, 1], [1, 1], 2), "dataset 0 has weight 1.0 and no"),
    ],
)
def test_samplers_refuse(call: Callable[[], Any], text: str) -> None:
    with pytest.raises(ValueError, match=text):
        call()


def test_empty_lengths() -> None:
    sampler = data.TokenBudgetBatchSampler(np.empty(0, int), 5)
    assert len(sampler) == 0
    assert list(sampler) == []


def test_plans_are_uniform() -> None:
    """Where a sample lands among samples of its own length is uniform over epochs."""
    places = np.zeros(32)
    sampler = data.TokenBudgetBatchSampler([1] * 32, 32)
    for e in range(2000):
        sampler.set_epoch(e)
        (batch,) = sampler
        places[batch.index(0)] += 1
    # chi-squared with 31 degrees of freedom: 61.1 at one in a thousand
    assert ((places - 62.5) ** 2 / 62.5).sum() < 61.1


def test_a_large_plan_is_a_permutation_in_bounded_time() -> None:
    lengths = np.random.default_rng(0).integers(1, 2000, 1_000_000)
    begun = time.process_time()
    sampler = data.TokenBudgetBatchSampler(lengths, 16_384)
    samples, starts = sampler._planned()
    spent = time.process_time() - begun
    assert np.array_equal(np.sort(samples), np.arange(1_000_000))
    longest = np.maximum.reduceat(lengths[samples], starts[:-1])
    assert (longest * np.diff(starts) <= 16_384).all()
    assert spent < 1.0, "ten times what the bench shows, for a busy machine"


def test_array_dtypes_are_known() -> None:
    assert len(ARRAY_DTYPES) == 14
