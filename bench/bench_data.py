"""Whole epochs over in-memory datasets: samples a second against torch's DataLoader.

A call is one epoch, from making the iterator (and, for torch, its worker processes) to its end; the
batches are not used. Both sides are constructed alike. The dataset is several times the last-level
cache, so rotating it is not needed, and the floor counts one read and one write of each sample.
"""

from __future__ import annotations

import threading
from collections.abc import Callable, Iterable
from typing import Any

import pytest
import torch
from common import optional
from torch.utils.data import DataLoader as TorchLoader
from torch.utils.data import Subset, TensorDataset

from batchops.data import DataLoader

SAMPLES = 50_000
BATCH = 512


def _cifar(dtype: torch.dtype) -> TensorDataset:
    g = torch.Generator().manual_seed(0)
    pixels = torch.randint(0, 256, (SAMPLES, 3, 32, 32), dtype=torch.uint8, generator=g)
    labels = torch.randint(0, 10, (SAMPLES,), generator=g)
    return TensorDataset(pixels.to(dtype), labels)


def _epoch(loader: Iterable[Any]) -> Callable[[], int]:
    def run() -> int:
        batches = 0
        for _ in loader:
            batches += 1
        return batches

    return run


class _WholeBatches(TensorDataset):
    """The best that a user of torch's loader can do: one advanced-indexing call for a batch."""

    def __getitems__(self, indices: list[int]) -> tuple[torch.Tensor, ...]:
        rows = torch.tensor(indices)
        return tuple(t[rows] for t in self.tensors)


def _keep(batch: Any) -> Any:
    return batch


def _check_epochs(dataset: Any, batch_size: int, shuffle: bool) -> None:
    """Batch for batch as torch's, same seed: compared before anything is timed."""
    torch.manual_seed(0)
    ours = list(DataLoader(dataset, batch_size, shuffle=shuffle))
    torch.manual_seed(0)
    for mine, theirs in zip(ours, TorchLoader(dataset, batch_size, shuffle=shuffle), strict=True):
        for got, want in zip(mine, theirs, strict=True):
            assert torch.equal(got, want)


def _bench(
    pair: Any,
    dataset: Any,
    *,
    op: str,
    case: dict[str, Any],
    workers: int,
    shuffle: bool = True,
    tuned: bool = False,
    batch_size: int = BATCH,
) -> None:
    arguments = {"batch_size": batch_size, "shuffle": shuffle, "num_workers": workers}
    peers = {"torch": _epoch(TorchLoader(dataset, **arguments))}
    if tuned:
        whole = _WholeBatches(*dataset.tensors)
        peers["torch __getitems__"] = _epoch(TorchLoader(whole, collate_fn=_keep, **arguments))
    _check_epochs(dataset, batch_size, shuffle)
    batches = -(-len(dataset) // batch_size)

    def check(output: int, index: int) -> None:
        assert output == batches, f"{output} batches, expected {batches}"

    tensors = dataset.dataset.tensors if isinstance(dataset, Subset) else dataset.tensors
    row_bytes = sum(t[0].numel() * t.element_size() for t in tensors)
    pair(
        _epoch(DataLoader(dataset, **arguments)),
        peers,
        check=check,
        bytes_moved=2 * row_bytes * len(dataset),
        items=len(dataset),
        calls=1,
        clock="host",
        op=op,
        case=case | {"batch": batch_size, "workers": workers},
    )


@pytest.fixture(autouse=True)
def _on_cpu(device: torch.device) -> None:
    if device.type != "cpu":
        pytest.skip("batches are gathered in host memory")


@pytest.mark.quick
@pytest.mark.parametrize("workers", [0, 2])
def test_uint8(pair: Any, threads: int, workers: int) -> None:
    case = {"dataset": "uint8 3×32×32 + int64", "order": "shuffled"}
    _bench(pair, _cifar(torch.uint8), op="data loader", case=case, workers=workers, tuned=True)


@pytest.mark.parametrize("workers", [0, 2])
def test_float32(pair: Any, threads: int, workers: int) -> None:
    case = {"dataset": "float32 3×32×32 + int64", "order": "shuffled"}
    _bench(pair, _cifar(torch.float32), op="data loader", case=case, workers=workers, tuned=True)


@pytest.mark.parametrize("workers", [0, 2])
def test_in_order(pair: Any, threads: int, workers: int) -> None:
    """No shuffle: consecutive rows are one copy."""
    case = {"dataset": "uint8 3×32×32 + int64", "order": "sequential"}
    dataset = _cifar(torch.uint8)
    _bench(pair, dataset, op="data loader", case=case, workers=workers, shuffle=False)


def test_subset(pair: Any, threads: int) -> None:
    """A random half, as random_split gives it: one more lookup for each sample."""
    g = torch.Generator().manual_seed(1)
    half = torch.randperm(SAMPLES, generator=g)[: SAMPLES // 2].tolist()
    case = {"dataset": "Subset of uint8 3×32×32 + int64", "order": "shuffled"}
    _bench(pair, Subset(_cifar(torch.uint8), half), op="data loader", case=case, workers=0)


def test_small_rows(pair: Any, threads: int) -> None:
    """A table of 16 floats and a label: nothing but the cost of a sample."""
    g = torch.Generator().manual_seed(2)
    dataset = TensorDataset(torch.randn(SAMPLES, 16, generator=g), torch.arange(SAMPLES))
    case = {"dataset": "float32 16 + int64", "order": "shuffled"}
    _bench(pair, dataset, op="data loader", case=case, workers=0)


def test_strided(pair: Any, threads: int) -> None:
    """HWC images seen as CHW: packed on the way."""
    g = torch.Generator().manual_seed(3)
    pixels = torch.randint(0, 256, (SAMPLES, 32, 32, 3), dtype=torch.uint8, generator=g)
    dataset = TensorDataset(pixels.permute(0, 3, 1, 2), torch.arange(SAMPLES))
    case = {"dataset": "uint8 HWC as 3×32×32 + int64", "order": "shuffled"}
    _bench(pair, dataset, op="data loader", case=case, workers=0)


def test_beside_a_spinning_thread(pair: Any, threads: int) -> None:
    """Another Python thread that never waits: who lets go of the GIL waits for its next turn."""
    spinning = True

    def spin() -> None:
        while spinning:
            pass

    g = torch.Generator().manual_seed(0)
    pixels = torch.randint(0, 256, (16_384, 3, 32, 32), dtype=torch.uint8, generator=g)
    dataset = TensorDataset(pixels, torch.arange(16_384))
    thread = threading.Thread(target=spin, daemon=True)
    thread.start()
    try:
        case = {"dataset": "16,384 × uint8 3×32×32 + int64", "order": "shuffled, busy GIL"}
        _bench(pair, dataset, op="data loader", case=case, workers=0)
    finally:
        spinning = False
        thread.join()


def test_hugging_face(pair: Any, threads: int) -> None:
    """Embeddings and labels in torch format, shuffled by the dataset itself and by the loader."""
    datasets = optional("datasets")
    if isinstance(datasets, str):
        pytest.skip(datasets)
    pa = optional("pyarrow")
    rows = torch.randn(20_000, 768, generator=torch.Generator().manual_seed(4)).numpy()
    columns = {
        "embedding": pa.FixedSizeListArray.from_arrays(pa.array(rows.reshape(-1)), 768),
        "label": pa.array(range(20_000), pa.int32()),
    }
    dataset = datasets.Dataset(pa.table(columns)).with_format("torch").shuffle(seed=0)
    arguments = {"batch_size": 256, "shuffle": True}
    torch.manual_seed(0)
    ours = next(iter(DataLoader(dataset, **arguments)))
    torch.manual_seed(0)
    theirs = next(iter(TorchLoader(dataset, **arguments)))
    assert all(torch.equal(ours[key], theirs[key]) for key in theirs)

    def check(output: int, index: int) -> None:
        assert output == 79, f"{output} batches, expected 79"

    pair(
        _epoch(DataLoader(dataset, **arguments)),
        {"torch": _epoch(TorchLoader(dataset, **arguments))},
        check=check,
        bytes_moved=(2 * 768 * 4 + 4 + 8) * len(dataset),
        items=len(dataset),
        calls=1,
        clock="host",
        op="data loader",
        case={"dataset": "Hugging Face, float32 768 + int32", "order": "shuffled", "batch": 256},
    )
