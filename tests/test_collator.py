"""Collator's steps wherever a batch is made: by native code or by torch's operators, of plain
samples or others, with numbers, keys and settings of every kind.

The oracle is what plain samples give where nothing is in the way, and default_collate followed by
torch's operators.
"""

from __future__ import annotations

import collections
import contextlib
import warnings
from collections.abc import Callable
from typing import Any

import numpy as np
import pytest
import torch
from torch._subclasses.fake_tensor import FakeTensorMode
from torch.utils.data import default_collate
from torch.utils.data._utils.collate import default_collate_fn_map
from torch.utils.flop_counter import FlopCounterMode

from batchops.data import Collator, Normalize, Pack, Pad, collate, pack, pad

MEAN, STD = [0.4, 0.5, 0.6], [0.2, 0.25, 0.3]
LAST = torch.channels_last


def image(seed: int = 0, *shape: int) -> torch.Tensor:
    g = torch.Generator().manual_seed(seed)
    return torch.randint(0, 256, shape or (6, 5, 3), dtype=torch.uint8, generator=g)


IMAGES = [image(seed) for seed in range(3)]
FLOATS = [i.float() / 7 for i in IMAGES]


def alike(got: torch.Tensor, want: torch.Tensor) -> None:
    assert (got.dtype, got.shape, got.stride()) == (want.dtype, want.shape, want.stride())
    assert torch.equal(got, want)


# --- modes ---------------------------------------------------------------------------------------


class Passes(torch.overrides.TorchFunctionMode):
    def __torch_function__(self, fn: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        return fn(*args, **(kwargs or {}))


MODES: dict[str, Callable[[], Any]] = {
    "dispatch mode": lambda: FlopCounterMode(display=False),
    "function mode": Passes,
    "forward mode": torch.autograd.forward_ad.dual_level,
}

# Each step, each with samples that it changes.
STEPS: dict[str, tuple[dict[str, Any], list[torch.Tensor]]] = {
    "transform": ({"transform": Normalize(MEAN, STD)}, IMAGES),
    "transform, 16 bits": (
        {"transform": Normalize(MEAN, STD), "dtype": torch.bfloat16, "memory_format": LAST},
        IMAGES,
    ),
    "transform, 64 bits": ({"transform": Normalize(MEAN, STD), "dtype": torch.float64}, IMAGES),
    "transform of planes": (
        {"transform": Normalize(MEAN, STD, layout="CHW")},
        [i.permute(2, 0, 1).contiguous() for i in IMAGES],
    ),
    "layout": ({"layout": "HWC"}, IMAGES),
    "layout and format": ({"layout": "HWC", "memory_format": LAST}, IMAGES),
    "format": ({"memory_format": LAST}, IMAGES),
    "dtype": ({"dtype": torch.bfloat16}, FLOATS),
    "all of floats": ({"layout": "HWC", "memory_format": LAST, "dtype": torch.float16}, FLOATS),
}
steps = pytest.mark.parametrize(("options", "samples"), STEPS.values(), ids=STEPS)


def named(options: dict[str, Any]) -> dict[str, Any]:
    """The same, with a transform by key."""
    if "transform" not in options:
        return options
    return {**options, "transform": {"x": options["transform"]}}


@pytest.mark.parametrize("mode", MODES.values(), ids=MODES)
@steps
def test_steps_are_taken_in_every_mode(
    mode: Any, options: dict[str, Any], samples: list[torch.Tensor]
) -> None:
    want = Collator(**options)(samples)
    arrays = [t.numpy() for t in samples]
    with mode():
        alike(Collator(**options)(samples), want)
        alike(Collator(**options)(arrays), want)
        alike(Collator(**named(options))([{"x": t} for t in samples])["x"], want)


@steps
def test_steps_are_taken_of_fake_tensors(
    options: dict[str, Any], samples: list[torch.Tensor]
) -> None:
    want = Collator(**options)(samples)
    with FakeTensorMode() as mode:
        fakes = [mode.from_tensor(t) for t in samples]
        for got in (
            Collator(**options)(fakes),
            Collator(**named(options))([{"x": t} for t in fakes])["x"],
        ):
            assert isinstance(got, torch._subclasses.FakeTensor)
            assert (got.dtype, got.shape) == (want.dtype, want.shape)
            assert got.stride() == want.stride()


@steps
def test_steps_are_taken_on_the_default_device(
    options: dict[str, Any], samples: list[torch.Tensor]
) -> None:
    """Arrays become tensors there, tensors stay where they are."""
    want = Collator(**options)(samples)
    with torch.device("meta"):
        alike(Collator(**options)(samples), want)
        got = Collator(**options)([t.numpy() for t in samples])
    assert got.device.type == "meta"
    assert (got.dtype, got.shape, got.stride()) == (want.dtype, want.shape, want.stride())


SEQUENCES = [{"input_ids": [1, 2, 3], "labels": [4, 5, 6]}, {"input_ids": [7], "labels": [8]}]


@pytest.mark.parametrize(
    "options",
    [
        {"pad": Pad({"input_ids": 0, "labels": -1}, lengths="n", position_ids="p")},
        {"pack": Pack("input_ids", labels="labels", seq_idx="i", batch_dim=True)},
    ],
    ids=["pad", "pack"],
)
@pytest.mark.parametrize("make", [list, torch.tensor], ids=["lists", "tensors"])
def test_sequences_in_modes(make: Any, options: dict[str, Any]) -> None:
    collator = Collator(**options)
    samples = [{key: make(part) for key, part in sample.items()} for sample in SEQUENCES]
    want = collator(samples)
    with Passes():
        got = collator(samples)
    assert list(got) == list(want)
    for key, value in want.items():
        assert got[key] == value if isinstance(value, int) else torch.equal(got[key], value)
    with FakeTensorMode(allow_non_fake_inputs=True):
        got = collator(samples)
    for key, value in want.items():
        if isinstance(value, torch.Tensor):
            assert isinstance(got[key], torch._subclasses.FakeTensor)
            assert (got[key].dtype, got[key].shape) == (value.dtype, value.shape)


# --- samples that are not plain ------------------------------------------------------------------


class Image(torch.Tensor):
    pass


class Array(np.ndarray):
    pass


ODD: dict[str, Callable[[torch.Tensor], Any]] = {
    "subclass": lambda t: t.as_subclass(Image),
    "array": lambda t: t.numpy(),  # as tensors are
    "array subclass": lambda t: t.numpy().view(Array),
    "strided": lambda t: torch.cat([t, t], -1)[..., ::2],
    "empty": lambda t: t[:, :0],
}


@pytest.mark.parametrize("odd", ODD.values(), ids=ODD)
@steps
def test_samples_that_are_not_plain(
    odd: Any, options: dict[str, Any], samples: list[torch.Tensor]
) -> None:
    layout = options["transform"].layout if "transform" in options else options.get("layout", "CHW")
    plain = [torch.as_tensor(np.asarray(odd(t.clone()))) for t in samples]
    got = Collator(**options)([odd(t) for t in samples])
    assert type(got) is (Image if odd is ODD["subclass"] else torch.Tensor)
    if plain[0].numel():
        alike(got.as_subclass(torch.Tensor), Collator(**options)(plain))
    else:  # strides say nothing
        want = torch.stack(plain).permute((0, 3, 1, 2) if layout == "HWC" else (0, 1, 2, 3))
        assert (got.shape, got.dtype) == (want.shape, Collator(**options)(samples).dtype)


def test_gradients_and_promotion_pass_through_the_steps() -> None:
    leaves = [f.clone().requires_grad_() for f in FLOATS]
    collator = Collator(layout="HWC", memory_format=LAST, dtype=torch.float64)
    out = collator(leaves)
    assert out.is_contiguous(memory_format=LAST)
    out.square().sum().backward()
    for leaf in leaves:
        assert torch.equal(leaf.grad, 2 * leaf.detach())

    mixed = [FLOATS[0], FLOATS[1].double()]
    want = torch.stack([m.double() for m in mixed]).permute(0, 3, 1, 2)
    assert torch.equal(Collator(layout="HWC")(mixed), want)
    conj = [torch.complex(f, f).conj() for f in FLOATS]
    assert torch.equal(Collator(layout="HWC")(conj), torch.stack(conj).permute(0, 3, 1, 2))
    meta = Collator(layout="HWC", dtype=torch.float16)([f.to("meta") for f in FLOATS])
    assert (meta.device.type, meta.dtype, meta.shape) == ("meta", torch.float16, (3, 3, 6, 5))


@pytest.mark.parametrize(
    ("samples", "text"),
    [
        # torch's own words where torch could not make a batch of them either
        ([FLOATS[0], FLOATS[1][:3]], "stack expects each tensor to be equal size"),
        ([np.ones((2, 2, 3), ">f4")] * 2, "byte order|supported types are"),
        ([FLOATS[0], "text"], "expected Tensor as element 1"),
    ],
)
def test_what_torch_refuses_is_refused_in_its_words(samples: Any, text: str) -> None:
    with pytest.raises((RuntimeError, TypeError, ValueError), match=text):
        Collator(layout="HWC")(samples)


@pytest.mark.parametrize(
    ("samples", "text"),
    [
        (
            [IMAGES[0], IMAGES[1].numpy()],
            "got ndarray of shape .* at position 1; position 0 is Ten",
        ),
        ([IMAGES[0], IMAGES[1].float()], r"torch.float32 at position 1; position 0 is Tensor of"),
        ([IMAGES[0].as_subclass(Image), IMAGES[1][:2]], r"got Tensor of shape \(2, 5, 3\)"),
        ([IMAGES[0].float()] * 2, r"got Tensor of shape \(6, 5, 3\), torch.float32$"),
        ([IMAGES[0].to_sparse()] * 2, "got Tensor of .*torch.sparse_coo on cpu$"),
        ([IMAGES[0], None], "got NoneType at position 1"),
    ],
)
def test_normalize_says_what_is_odd(samples: Any, text: str) -> None:
    with pytest.raises(ValueError, match=text):
        Normalize(MEAN, STD)(samples)


# --- whose dtype and memory_format ---------------------------------------------------------------


@pytest.mark.parametrize("by_key", [False, True])
def test_a_transform_takes_what_it_has_not_of_its_own(by_key: bool) -> None:
    def collated(normalize: Normalize, **options: Any) -> torch.Tensor:
        collator = Collator(transform={0: normalize} if by_key else normalize, **options)
        return collator([(i, 1.5) for i in IMAGES])[0]

    plain = Normalize(MEAN, STD)
    alike(
        collated(plain, dtype=torch.bfloat16, memory_format=LAST),
        Normalize(MEAN, STD, dtype=torch.bfloat16, memory_format=LAST)(IMAGES),
    )
    own = Normalize(MEAN, STD, dtype=torch.float32, memory_format=torch.contiguous_format)
    alike(collated(own, dtype=torch.bfloat16, memory_format=LAST), plain(IMAGES))
    half = Normalize(MEAN, STD, dtype=torch.float16)
    alike(
        collated(half, memory_format=LAST),
        Normalize(MEAN, STD, dtype=torch.float16, memory_format=LAST)(IMAGES),
    )
    # Computed in float32 still.
    alike(collated(plain, dtype=torch.float64), plain(IMAGES).double())


# --- keys ----------------------------------------------------------------------------------------


def test_keys_are_those_of_the_sample_alone() -> None:
    normalize = Normalize(MEAN, STD)
    samples = [{"x": i, "aux": {"x": i, "y": [{"x": i}]}} for i in IMAGES]
    got = Collator(transform={"x": normalize})(samples)
    alike(got["x"], normalize(IMAGES))
    alike(got["aux"]["x"], torch.stack(IMAGES))
    alike(got["aux"]["y"][0]["x"], torch.stack(IMAGES))

    x, pair = Collator(transform={0: normalize})([(i, (1.0, 2.0)) for i in IMAGES])
    alike(x, normalize(IMAGES))
    assert [p.tolist() for p in pair] == [[1.0] * 3, [2.0] * 3]

    # The parts that are not padded are parts of the sample as well.
    got = Collator(transform={"x": normalize}, pad=Pad({"n": 0}))(
        [{"x": i, "n": [1] * (k + 1), "aux": {"x": i}} for k, i in enumerate(IMAGES)]
    )
    alike(got["x"], normalize(IMAGES))
    alike(got["aux"]["x"], torch.stack(IMAGES))


@pytest.mark.parametrize(
    ("options", "samples", "text"),
    [
        ({}, [{"image": IMAGES[0]}], r"expected \['x'\] in each sample, got \['image'\]"),
        ({}, [(IMAGES[0],)], r"expected \['x'\] in each sample, got \[0\]"),
        ({}, [IMAGES[0]], r"expected \['x'\] in each sample, got \[\]"),
        ({}, ["x"], r"got \[\]"),
        ({"pad": True}, [{"input_ids": [1]}], r"got \['input_ids'\]"),
        ({"pad": Pad({"x": 0})}, [{"x": [1]}], r"expected images, and \['x'\] are sequences"),
        ({"pack": Pack("x")}, [{"x": [1]}], r"expected images, and \['x'\] are sequences"),
    ],
)
def test_keys_that_samples_lack_are_refused(
    options: dict[str, Any], samples: list[Any], text: str
) -> None:
    with pytest.raises(ValueError, match=f"Collator: transform: .*{text}"):
        Collator(transform={"x": Normalize(MEAN, STD)}, **options)(samples)


# --- dtype ---------------------------------------------------------------------------------------

FLOATING: dict[str, list[Any]] = {
    "few Python floats": [1.5, 2.5],
    "many Python floats": [0.1 * k for k in range(40)],
    "an int before a float": [1, 2.5],
    "numpy's numbers": [np.float32(1.5), np.float32(2)],
    "numpy's doubles": [np.float64(1.5), np.float64(2)],  # Python floats as well
    "arrays without dimensions": [np.array(1.5), np.array(2.5)],
    "integers before floats": [torch.ones(2, dtype=torch.int64), torch.full((2,), 1.5)],
    "floats before integers": [torch.full((2,), 1.5), torch.ones(2, dtype=torch.int64)],
    "empty tensors": [torch.ones(0), torch.ones(0)],
    "tensors that others see": [torch.ones(2).as_subclass(Image)] * 2,
}
UNTOUCHED: dict[str, list[Any]] = {
    "ints": [1, 2],
    "many ints": list(range(40)),
    "bools": [True, False],
    "numpy's ints": [np.int32(1), np.int32(2)],
    "complex": [torch.ones(2, dtype=torch.complex64)] * 2,
}


@pytest.mark.parametrize("watched", [False, True])
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float32, torch.float64], ids=str)
def test_dtype_is_that_of_all_floating_point_tensors(dtype: torch.dtype, watched: bool) -> None:
    with Passes() if watched else contextlib.nullcontext():
        for name, samples in FLOATING.items():
            got = Collator(dtype=dtype)([{"v": s} for s in samples])["v"]
            want = default_collate(samples).to(dtype)
            assert got.dtype is dtype, name
            assert torch.equal(got, want), name
        for name, samples in UNTOUCHED.items():
            got, want = Collator(dtype=dtype)(samples), default_collate(samples)
            assert got.dtype is want.dtype, name
            assert torch.equal(got, want), name


@pytest.mark.parametrize("make", [list, np.array, torch.tensor], ids=["lists", "arrays", "tensors"])
def test_dtype_is_that_of_sequences(make: Any) -> None:
    half = torch.float16
    samples = [{"v": make([1.5, 2.5, 3.5])}, {"v": make([4.5])}]
    got = Collator(dtype=half, pad=Pad({"v": 9.0}, labels="y"))(samples)
    assert (got["v"].dtype, got["y"].dtype) == (half, half)
    assert got["v"].tolist() == [[1.5, 2.5, 3.5], [4.5, 9.0, 9.0]]
    assert got["y"].tolist() == [[1.5, 2.5, 3.5], [4.5, -100.0, -100.0]]
    assert got["attention_mask"].dtype is torch.int64
    got = Collator(dtype=half, pack=Pack("v", labels="y"))(samples)
    assert (got["v"].dtype, got["y"].dtype) == (half, half)
    assert got["y"].tolist() == [-100.0, 2.5, 3.5, -100.0]
    assert got["cu_seqlens"].dtype is torch.int32
    bare = [s["v"] for s in samples]
    assert Collator(dtype=half, pad=True)(bare).values.dtype is half
    assert Collator(dtype=half, pack=True)(bare).values.dtype is half


def test_functions_of_the_users_have_the_last_word() -> None:
    class Mine:
        pass

    def fixed(batch: Any, *, collate_fn_map: Any = None) -> torch.Tensor:
        return torch.ones(len(batch))

    default_collate_fn_map[Mine] = fixed
    before = default_collate_fn_map[torch.Tensor]
    collator = Collator(dtype=torch.float16, transform=Normalize(MEAN, STD), layout="HWC")
    try:
        assert collator([Mine(), Mine()]).dtype is torch.float32
        default_collate_fn_map[torch.Tensor] = fixed
        for batch in (IMAGES, [i.numpy() for i in IMAGES]):
            assert collator(batch).tolist() == [1.0] * 3
    finally:
        default_collate_fn_map[torch.Tensor] = before
        del default_collate_fn_map[Mine]


# --- padding -------------------------------------------------------------------------------------


def test_all_parts_are_as_wide_as_the_longest_of_any() -> None:
    samples = [
        {"input_ids": [1], "labels": [1, 2], "more": [5]},
        {"input_ids": [3, 4], "labels": [6], "more": [7, 8, 9]},
    ]
    collator = Collator(pad=Pad({"input_ids": 0, "labels": -100, "more": -1}, lengths="n"))
    got = collator(samples)
    assert got["input_ids"].tolist() == [[1, 0, 0], [3, 4, 0]]
    assert got["labels"].tolist() == [[1, 2, -100], [6, -100, -100]]
    assert got["more"].tolist() == [[5, -1, -1], [7, 8, 9]]
    # These are of the first part.
    assert got["attention_mask"].tolist() == [[1, 0, 0], [1, 1, 0]]
    assert got["n"].tolist() == [1, 2]
    options = Pad({"input_ids": 0}, side="left", multiple=np.uint8(4), length=np.uint8(5))
    assert Collator(pad=options)(samples[:1])["input_ids"].tolist() == [[0] * 7 + [1]]


Point = collections.namedtuple("Point", ["ids", "y"])


def test_namedtuples_stay_where_nothing_is_made_beside() -> None:
    samples = [Point([1, 2], 3), Point([1], 4)]
    got = Collator(pad=Pad({0: 9}, mask=None))(samples)
    assert type(got) is Point
    assert got.ids.tolist() == [[1, 2], [1, 9]]
    assert got.y.tolist() == [3, 4]
    ids, y, beside = Collator(pad=Pad({0: 9}))(samples)
    assert (ids.tolist(), y.tolist()) == ([[1, 2], [1, 9]], [3, 4])
    assert beside["attention_mask"].tolist() == [[1, 1], [1, 0]]


def test_arguments() -> None:
    batch = [{"input_ids": [1, 2]}, {"input_ids": [3]}]
    for off in (False, None):
        assert Collator(pad=off, pack=True)(batch)["input_ids"].tolist() == [1, 2, 3]
        assert Collator(pack=off, pad=True)(batch)["input_ids"].tolist() == [[1, 2], [3, 0]]
    assert Collator(pack=Pack("input_ids"))(batch)["input_ids"].tolist() == [1, 2, 3]
    assert Collator(pack=Pack(0))([([1, 2], 5), ([3], 6)])[0].tolist() == [1, 2, 3]
    for wrong, error, text in (
        (lambda: Pack(()), ValueError, r"Pack: keys: expected at least one key, got \(\)"),
        (lambda: Pad({}), ValueError, "Pad: values: expected at least one key, got none"),
        (lambda: Pad(side="up"), ValueError, 'Pad: side: expected "left" or "right", got \'up\''),
        (lambda: Pad(multiple=0), ValueError, "Pad: multiple: expected an integer >= 1, got 0"),
        (lambda: Pad(length="5"), ValueError, "Pad: length: expected an integer >= 0, got '5'"),
        (lambda: Collator(transform=torch.stack), TypeError, "transform: expected a Normalize or"),
        (lambda: Collator(transform={"x": len}), TypeError, "got <built-in function len>"),
        (
            lambda: Collator(pack=Pack("labels", labels="labels"))(batch),
            ValueError,
            r"pack: expected \['labels'\] in each sample, got \['input_ids'\]",
        ),
    ):
        with pytest.raises(error, match=text):
            wrong()


# --- memmaps whose file became shorter -----------------------------------------------------------


class Mapped(np.memmap):
    pass


def _rows(file: Any, dtype: Any = np.float32, shape: tuple[int, ...] = (6, 15, 5, 3)) -> np.memmap:
    np.ones(shape, dtype).tofile(file)
    return np.memmap(file, dtype, "r+", shape=shape)


FAULTS: dict[str, Callable[[np.ndarray, np.ndarray], Any]] = {
    "first": lambda bad, good: collate([bad[0], good[1]]),
    "second": lambda bad, good: collate([good[0], bad[1]]),
    "in a dict": lambda bad, good: collate([{"x": good[0]}, {"x": bad[1]}]),
    "as an array": lambda bad, good: collate(list(np.asarray(bad))),
    "view of a view": lambda bad, good: collate([np.asarray(bad)[0][1:], np.asarray(good)[0][1:]]),
    "buffer": lambda bad, good: collate([np.frombuffer(bad._mmap, np.float32, 9)] * 2),
    "torch's way": lambda bad, good: collate([good[0], bad[1].view(Mapped)]),
    "pad": lambda bad, good: pad([good[0], bad[1]]),
    "pad, counting down": lambda bad, good: pad([good[0], bad[1][::-1]]),
    "pack": lambda bad, good: pack([good[0], bad[1]]),
    "dtype": lambda bad, good: Collator(dtype=torch.bfloat16)([good[0], bad[1]]),
    "layout": lambda bad, good: Collator(layout="HWC")([good[0], bad[1]]),
    "padded": lambda bad, good: Collator(pad=True)([good[0], bad[1]]),
}


@pytest.mark.parametrize("make", FAULTS.values(), ids=FAULTS)
def test_truncated_memmaps_are_refused(make: Any, tmp_path: Any) -> None:
    """The file is cut within its last page, so that who reads it gets zeros rather than SIGBUS."""
    good, bad = _rows(tmp_path / "good"), _rows(tmp_path / "bad")
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        make(good, good)
        with (tmp_path / "bad").open("r+b") as file:
            file.truncate(bad.nbytes - 4)
        with pytest.raises(RuntimeError, match=r"expected a file of at least 5400 .* has 5396"):
            make(bad, good)


def test_the_truncated_memmap_is_named(tmp_path: Any) -> None:
    good, bad = _rows(tmp_path / "good"), _rows(tmp_path / "bad")
    with (tmp_path / "bad").open("r+b") as file:
        file.truncate(bad.nbytes - 4)
    rows = [good[0], good[1], np.asarray(bad)[2], good[3]]
    where = r"memmap .*bad: expected (.|\n)*position 2, sample\['x'\]: ndarray of shape"
    for collator in (collate, Collator(layout="HWC"), Collator(pad=Pad({"x": 0}))):
        with pytest.raises(RuntimeError, match=where):
            collator([{"x": row} for row in rows])


@pytest.mark.parametrize("strided", [False, True])
def test_normalize_refuses_truncated_memmaps(strided: bool, tmp_path: Any) -> None:
    rows = _rows(tmp_path / "rows", np.uint8)
    samples = [row.transpose(1, 0, 2) if strided else row for row in rows]
    want = Normalize(MEAN, STD)(samples)
    assert torch.equal(Collator(transform=Normalize(MEAN, STD))(samples), want)
    with (tmp_path / "rows").open("r+b") as file:
        file.truncate(rows.nbytes - 4)
    for call in (Normalize(MEAN, STD), Collator(transform=Normalize(MEAN, STD))):
        with pytest.raises(RuntimeError, match="it was truncated"):
            call(samples)
