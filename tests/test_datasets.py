"""Hugging Face datasets in the loader, against torch's loader over the very same dataset."""

from __future__ import annotations

import itertools
import warnings
from collections.abc import Iterator
from typing import Any

import numpy as np
import pytest
import torch
from torch.utils.data import DataLoader as TorchLoader
from torch.utils.data import Subset

from batchops import _C
from batchops.data import DataLoader, _arrow
from batchops.data._iterators import GatherIter, LocalIter, WorkerGatherIter

from .test_collate import seen

datasets = pytest.importorskip("datasets", reason="Hugging Face's datasets is not installed")
pa = pytest.importorskip("pyarrow")

NATIVE = (GatherIter, WorkerGatherIter)
N = 53


@pytest.fixture(autouse=True)
def _setting(threads: Any, monkeypatch: pytest.MonkeyPatch) -> Iterator[None]:
    threads(2)
    with warnings.catch_warnings():
        warnings.filterwarnings("ignore", message=".*worker processes in total.*")
        yield


def values(dtype: str, *shape: int) -> np.ndarray:
    """Bits of all kinds: the extremes of integers, floats that round, overflow and are NaN."""
    rng = np.random.default_rng(sum(map(ord, dtype)) + len(shape))
    count = N * int(np.prod(shape, dtype=int))
    if dtype == "bool":
        flat = rng.integers(0, 2, count).astype(bool)
    elif dtype.startswith("float"):
        flat = (rng.standard_normal(count) * 10.0 ** rng.integers(-40, 39, count)).astype(dtype)
        flat[: min(4, count)] = [np.nan, np.inf, -0.0, np.finfo(dtype).max][: min(4, count)]
    else:
        info = np.iinfo(dtype)
        flat = rng.integers(info.min, info.max, count, dtype=dtype, endpoint=True)
        flat[0], flat[-1] = info.min, info.max
    return flat.reshape(N, *shape)


def arrow(array: np.ndarray) -> Any:
    """Fixed-size lists, nested as deep as the array has dimensions beyond the first."""
    flat = pa.array(array.reshape(-1))
    for size in reversed(array.shape[1:]):
        flat = pa.FixedSizeListArray.from_arrays(flat, size)
    return flat


def dataset(rows_of_a_chunk: int = N, **columns: Any) -> Any:
    table = pa.table({k: arrow(v) if isinstance(v, np.ndarray) else v for k, v in columns.items()})
    chunks = [table.slice(i, rows_of_a_chunk) for i in range(0, len(table), rows_of_a_chunk)]
    return datasets.Dataset(pa.concat_tables(chunks))


def epoch(cls: Any, data: Any, **arguments: Any) -> Any:
    torch.manual_seed(11)
    try:
        return [seen(batch) for batch in cls(data, 8, shuffle=True, **arguments)]
    except Exception as error:
        return (type(error), str(error).split("\n  in the batch")[0])


def assert_as_torch(data: Any, native: bool, workers: int = 0) -> None:
    got = epoch(DataLoader, data, num_workers=workers)
    assert got == epoch(TorchLoader, data)
    assert isinstance(iter(DataLoader(data, 8, num_workers=workers)), NATIVE) is native


INTEGERS = ["int8", "int16", "int32", "int64", "uint8", "uint16", "uint32"]
GATHERED = [*INTEGERS, "float32", "float64", "bool"]


@pytest.mark.parametrize("kind", ["torch", "numpy", None])
@pytest.mark.parametrize("dtype", GATHERED)
def test_scalars(dtype: str, kind: str | None) -> None:
    for chunk in (N, 7):
        assert_as_torch(dataset(chunk, x=values(dtype)).with_format(kind), native=True)


@pytest.mark.parametrize("kind", ["torch", "numpy"])
@pytest.mark.parametrize("dtype", GATHERED)
@pytest.mark.parametrize("shape", [(5,), (2, 3), (3, 1, 4)], ids=str)
def test_fixed_size_arrays(dtype: str, kind: str, shape: tuple[int, ...]) -> None:
    for chunk in (N, 10):
        assert_as_torch(dataset(chunk, x=values(dtype, *shape)).with_format(kind), native=True)


@pytest.mark.parametrize("dtype", ["uint8", "int32", "float32", "float64"])
def test_array_features_and_lists_of_one_length(dtype: str) -> None:
    """Array2D and its like, and lists with offsets, are laid out alike where lengths are."""
    image, rows = values(dtype, 4, 3), values(dtype, 6)
    features = datasets.Features(
        image=datasets.Array2D((4, 3), dtype),
        rows=datasets.Sequence(datasets.Value(dtype)),
        label=datasets.ClassLabel(num_classes=N),
    )
    data = datasets.Dataset.from_dict(
        {"image": list(image), "rows": list(rows), "label": list(range(N))}, features=features
    )
    for kind in ("torch", "numpy"):
        assert_as_torch(data.with_format(kind), native=True)
        assert_as_torch(data.select(range(9, 40)).with_format(kind), native=True)
    same = data.with_format("torch", dtype=getattr(torch, dtype))
    assert_as_torch(same.remove_columns("label"), native=True)
    assert next(iter(DataLoader(same, 4)))["image"].dtype is getattr(torch, dtype)


def test_mappings_of_indices_chunks_and_columns() -> None:
    """shuffle and select map indices; chunks of two tables are cut at different rows."""
    a = dataset(9, x=values("int32", 3), y=values("float32"))
    b = dataset(20, x=values("int32", 3), y=values("float32"))
    joined = datasets.concatenate_datasets([a, b.select([5, 1, 50, 2])])
    x, y = (
        pa.chunked_array([arrow(v)[:k], arrow(v)[k:]])
        for v, k in ((values("int8"), 20), (values("int64", 2), 31))
    )
    ragged = datasets.Dataset(pa.table({"x": x, "y": y}))
    for data in (
        a.shuffle(seed=3),
        a.shuffle(seed=3).select([4, 4, 52, 0]),
        a.select(range(7, 33)),
        joined,
        joined.shuffle(seed=1),
        ragged,
        ragged.sort("x"),
    ):
        assert_as_torch(data.with_format("torch"), native=True)
        assert_as_torch(data.with_format("torch", columns=["y"]), native=True)
        assert_as_torch(Subset(data.with_format("numpy"), [3, 0, 2, 1, 3]), native=True)


@pytest.mark.parametrize("workers", [0, 2])
def test_memory_mapped_and_in_the_background(tmp_path: Any, workers: int) -> None:
    rows = np.random.default_rng(0).standard_normal((600, 4096)).astype(np.float32)
    data = datasets.Dataset(pa.table({"x": arrow(rows), "i": pa.array(np.arange(600))}))
    data.save_to_disk(tmp_path / "rows", num_shards=3)
    data = datasets.load_from_disk(tmp_path / "rows").with_format("torch").shuffle(seed=5)
    loader = DataLoader(data, 32, shuffle=True, num_workers=workers)
    torch.manual_seed(11)
    got = list(loader)
    torch.manual_seed(11)
    for mine, theirs in itertools.zip_longest(got, TorchLoader(data, 32, shuffle=True)):
        assert list(mine) == list(theirs)
        assert all(torch.equal(mine[k], theirs[k]) for k in theirs)
    assert isinstance(iter(loader), NATIVE)
    if workers == 0:
        iterator = iter(loader)
        next(iterator)
        assert iterator._ahead, "Arrow's memory is never written to: batches are gathered ahead"


def _nulls() -> Any:
    return datasets.Dataset(pa.table({"x": pa.array([1, None, 3] * 5)}))


def _nulls_in_lists() -> Any:
    inner = pa.array([1, 2, None, 4] * 5)
    return datasets.Dataset(pa.table({"x": pa.FixedSizeListArray.from_arrays(inner, 2)}))


LEFT: dict[str, Any] = {
    "nulls": lambda: _nulls().with_format("torch"),
    "nulls in lists": lambda: _nulls_in_lists().with_format("torch"),
    "null lists": lambda: datasets.Dataset(
        pa.table({"x": pa.array([[1, 2], None, [3, 4]], pa.list_(pa.int64(), 2))})
    ).with_format("torch"),
    "lists of several lengths": lambda: datasets.Dataset.from_dict(
        {"x": [[1, 2], [3], [4, 5, 6]]}
    ).with_format("torch"),
    "lists, no format": lambda: dataset(x=values("int64", 3)),
    "strings": lambda: dataset(x=values("int64"), s=pa.array(list(map(str, range(N))))),
    "strings beside the columns": lambda: dataset(
        x=values("int64"), s=pa.array(list(map(str, range(N))))
    ).with_format("torch", columns=["x"], output_all_columns=True),
    "uint64": lambda: dataset(x=values("uint8").astype("uint64")).with_format("torch"),
    "float16": lambda: dataset(x=np.arange(N, dtype="float16")).with_format("torch"),
    "to a dtype that is not converted to": lambda: dataset(x=values("int32")).with_format(
        "torch", dtype=torch.float16
    ),
    "a transform": lambda: dataset(x=values("int64")).with_transform(
        lambda batch: {"x": [2 * x for x in batch["x"]]}
    ),
    "dates": lambda: dataset(x=pa.array(np.arange(N, dtype="int32")).cast(pa.date32())),
    "no rows": lambda: dataset(x=values("int64")).select([]).with_format("torch"),
}


@pytest.mark.parametrize("name", LEFT)
def test_everything_else_is_the_datasets_own(name: str) -> None:
    data = LEFT[name]()
    if len(data):
        assert_as_torch(data, native=False)
    assert isinstance(iter(DataLoader(data, 8)), LocalIter)


class Mine(datasets.Dataset):
    pass


def test_subclasses_and_patched_indexing_are_user_code(monkeypatch: pytest.MonkeyPatch) -> None:
    data = dataset(x=values("int64"))
    assert_as_torch(Mine(data.data), native=False)
    iterator = iter(DataLoader(data, 8))
    assert isinstance(iterator, NATIVE)
    next(iterator)
    monkeypatch.setattr(datasets.Dataset, "__getitems__", lambda self, keys: [-1 for _ in keys])
    assert next(iterator).tolist() == [-1] * 8
    assert isinstance(iter(DataLoader(data, 8)), LocalIter)


def test_a_registered_formatter_is_user_code() -> None:
    from datasets.formatting import _FORMAT_TYPES

    data = dataset(x=values("int64")).with_format("torch")
    own = type("Own", (_FORMAT_TYPES["torch"],), {})
    before = _FORMAT_TYPES["torch"]
    try:
        _FORMAT_TYPES["torch"] = own
        assert isinstance(iter(DataLoader(data, 8)), LocalIter)
    finally:
        _FORMAT_TYPES["torch"] = before
    assert isinstance(iter(DataLoader(data, 8)), NATIVE)


def test_formats_changed_between_batches() -> None:
    """set_format works in place: the next batch is of the new format, one read ahead or not."""

    def run(cls: Any) -> list[Any]:
        data = dataset(x=values("int32", 20_000), y=values("float64")).with_format("torch")
        out = []
        for k, batch in enumerate(cls(data, 8)):
            out.append(seen(batch))
            if k == 1:
                data.set_format("numpy", columns=["y"])
            if k == 3:
                data.set_format("torch", dtype=torch.float32, columns=["y"])
        return out

    assert run(DataLoader) == run(TorchLoader)


def test_indices_out_of_range() -> None:
    data = dataset(x=values("int64")).with_format("torch")
    for source in (data, data.shuffle(seed=1)):
        for batch in ([0, -1, N - 1], [N], [-N - 1], [True], []):
            logs = []
            for cls in (TorchLoader, DataLoader):
                try:
                    logs.append([seen(b) for b in cls(source, batch_sampler=[batch])])
                except Exception as error:
                    logs.append((type(error), str(error)))
            assert logs[0] == logs[1]


def test_casts_are_refused_where_they_are_unknown() -> None:
    column = (4096, 5, 8, 8, [], [])
    with pytest.raises(ValueError, match="cast: expected a known one of dense rows, got int64 to"):
        _C.Table([column], ["int64 to int8"])
    with pytest.raises(ValueError, match="casts: expected one for each of 1 columns, got 2"):
        _C.Table([column], ["", ""])
    for source, target in _arrow.CASTS:
        cast = f"{source} to {target}".replace("torch.", "")
        assert _C.Table([(4096, 5, 8, source.itemsize, [], [])], [cast]).rows == 5
    with pytest.raises(ValueError, match="dense rows"):
        _C.Table([(4096, 5, 64, 4, [2], [32])], ["int32 to int64"])
