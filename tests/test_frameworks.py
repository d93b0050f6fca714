"""Loaders in the hands of frameworks that make them anew, or carry their states."""

from __future__ import annotations

import copy
import importlib
import logging
import warnings
from pathlib import Path
from typing import Any

import pytest
import torch
from torch.utils.data import DataLoader as TorchLoader
from torch.utils.data import Dataset, DistributedSampler, SequentialSampler, TensorDataset

from batchops import data
from batchops.data import DataLoader

WAYS = pytest.mark.parametrize(
    "arguments",
    [{}, {"threads": 2}, {"num_workers": 1, "prefetch_factor": 3}, {"collator": data.Collator()}],
    ids=["plain", "threads", "workers", "collator"],
)
ROWS = torch.arange(60.0).view(20, 3)


class Samples(Dataset):
    """Which nothing gathers."""

    def __len__(self) -> int:
        return len(ROWS)

    def __getitem__(self, i: int) -> torch.Tensor:
        return ROWS[i]


def peer(name: str) -> Any:
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        return pytest.importorskip(name)


def values(batch: Any) -> list[Any]:
    (rows,) = batch if isinstance(batch, list) else (batch,)
    return rows[:, 0].tolist()


def stock(arguments: dict[str, Any]) -> dict[str, Any]:
    return {k: v for k, v in arguments.items() if k not in ("threads", "collator")}


# --- Accelerate ----------------------------------------------------------------------------------


@pytest.fixture
def accelerate() -> Any:
    peer("accelerate")
    return importlib.import_module("accelerate.data_loader")


@WAYS
@pytest.mark.parametrize("split", [False, True], ids=["shards", "split batches"])
def test_accelerate_shards(accelerate: Any, arguments: dict[str, Any], split: bool) -> None:
    """Of two processes both, in this one."""

    def shard(cls: Any, arguments: dict[str, Any], rank: int) -> list[Any]:
        loader = cls(TensorDataset(ROWS), 4, **arguments)
        prepared = accelerate.prepare_data_loader(
            loader, num_processes=2, process_index=rank, split_batches=split, put_on_device=False
        )
        assert isinstance(prepared, TorchLoader)
        return [values(batch) for batch in prepared]

    for rank in range(2):
        got = shard(DataLoader, arguments, rank)
        assert got == shard(TorchLoader, stock(arguments), rank)
        assert len(got) > 1


@WAYS
def test_accelerate_prepares_and_skips(accelerate: Any, arguments: dict[str, Any]) -> None:
    def run(cls: Any, arguments: dict[str, Any]) -> list[Any]:
        torch.manual_seed(5)
        loader = cls(TensorDataset(ROWS), 4, shuffle=True, **arguments)
        prepared = accelerate.prepare_data_loader(loader, put_on_device=False)
        epochs = [values(batch) for _ in range(2) for batch in prepared]
        rest = accelerate.skip_first_batches(prepared, 3)
        return [*epochs, *(values(batch) for batch in rest)]

    got = run(DataLoader, arguments)
    assert got == run(TorchLoader, stock(arguments))
    assert len(got) == 12


def test_accelerate_can_be_told_to_make_ours(
    accelerate: Any, monkeypatch: pytest.MonkeyPatch
) -> None:
    """It names torch's class where it makes a loader anew; docs/data.md says how to have ours."""
    monkeypatch.setattr(accelerate, "DataLoader", DataLoader)
    loader = DataLoader(TensorDataset(ROWS), 4)
    prepared = accelerate.prepare_data_loader(loader, put_on_device=False)
    assert [values(batch) for batch in prepared] == [values(batch) for batch in loader]
    assert type(prepared.base_dataloader) is DataLoader
    assert prepared.base_dataloader.metrics["samples"] == 20


# --- Lightning -----------------------------------------------------------------------------------


@pytest.fixture
def lightning() -> Any:
    module = peer("pytorch_lightning")
    logging.getLogger("pytorch_lightning").setLevel(logging.ERROR)
    return module


def fit(lightning: Any, loader: Any, epochs: int = 2, **arguments: Any) -> tuple[list[Any], Any]:
    """The batches that a model was trained on."""

    class Model(lightning.LightningModule):
        def __init__(self) -> None:
            super().__init__()
            self.layer = torch.nn.Linear(3, 1)
            self.seen: list[Any] = []

        def training_step(self, batch: Any, _: int) -> torch.Tensor:
            self.seen.append(values(batch))
            return self.layer(batch[0] if isinstance(batch, list) else batch).sum()

        def configure_optimizers(self) -> Any:
            return torch.optim.SGD(self.parameters(), 0.01)

    fit_arguments = {k: arguments.pop(k) for k in ("ckpt_path",) if k in arguments}
    if fit_arguments:
        fit_arguments["weights_only"] = False
    model = Model()
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        trainer = lightning.Trainer(
            max_epochs=epochs,
            accelerator="cpu",
            devices=1,
            logger=False,
            enable_progress_bar=False,
            enable_model_summary=False,
            **{"enable_checkpointing": False, **arguments},
        )
        trainer.fit(model, loader, **fit_arguments)
    return model.seen, trainer


@WAYS
def test_lightning_trains_on_the_same_batches(lightning: Any, arguments: dict[str, Any]) -> None:
    def run(cls: Any, arguments: dict[str, Any]) -> list[Any]:
        torch.manual_seed(5)
        return fit(lightning, cls(TensorDataset(ROWS), 4, shuffle=True, **arguments))[0]

    got = run(DataLoader, arguments)
    assert got == run(TorchLoader, stock(arguments))
    assert len(got) == 10


@WAYS
def test_lightning_makes_loaders_anew(lightning: Any, arguments: dict[str, Any]) -> None:
    """With a sampler of each rank's, as a distributed strategy has it do."""
    module = importlib.import_module("pytorch_lightning.utilities.data")
    loader = DataLoader(TensorDataset(ROWS), 4, shuffle=True, drop_last=True, **arguments)
    sampler = DistributedSampler(TensorDataset(ROWS), 2, 1, shuffle=False)
    again = module._update_dataloader(loader, sampler)
    assert type(again) is DataLoader
    want = TorchLoader(TensorDataset(ROWS), 4, sampler=sampler, drop_last=True)
    assert [values(batch) for batch in again] == [values(batch) for batch in want]
    for name in ("threads", "device", "collator", "ring_bytes", "checked", "num_workers"):
        assert getattr(again, name) == getattr(loader, name)


class Late(DataLoader):
    """A user's subclass with a signature of its own, made inside the hook."""

    def __init__(self, rows: torch.Tensor, size: int, **rest: Any) -> None:
        super().__init__(TensorDataset(rows), batch_size=size, **rest)


def test_lightning_makes_subclasses_anew(lightning: Any) -> None:
    module = importlib.import_module("pytorch_lightning.utilities.data")
    hooks = importlib.import_module("lightning_fabric.utilities.data")
    with hooks._replace_dunder_methods(TorchLoader, "dataset"):
        loader = Late(ROWS, 4, threads=2)
    again = module._update_dataloader(loader, SequentialSampler(loader.dataset))
    assert type(again) is Late
    assert again.threads == 2
    assert [values(batch) for batch in again] == [values(batch) for batch in loader]


@pytest.mark.parametrize("dataset", [TensorDataset(ROWS), Samples()], ids=["gathered", "samples"])
@pytest.mark.parametrize("threads", [None, 2])
def test_lightning_resumes_in_the_middle_of_an_epoch(
    lightning: Any, tmp_path: Path, dataset: Any, threads: int | None
) -> None:
    """Its checkpoints carry the state of a loader that has one."""

    def loader() -> DataLoader:
        return DataLoader(dataset, 4, shuffle=True, threads=threads)

    saves = lightning.callbacks.ModelCheckpoint(tmp_path, every_n_train_steps=3, save_top_k=-1)
    seen, _ = fit(lightning, loader(), 1, callbacks=[saves], enable_checkpointing=True)
    (checkpoint,) = tmp_path.glob("*step=3.ckpt")
    torch.manual_seed(99)
    rest, _ = fit(lightning, loader(), 1, ckpt_path=checkpoint)
    assert len(seen) == 5
    assert rest == seen[3:]


# --- torchdata -----------------------------------------------------------------------------------


class Counts(torch.utils.data.IterableDataset):
    """With the two methods that StatefulDataLoader asks for."""

    def __init__(self) -> None:
        self.at = 0

    def __iter__(self) -> Any:
        while self.at < 20:
            self.at += 1
            yield self.at - 1
        self.at = 0

    def state_dict(self) -> dict[str, Any]:
        return {"at": self.at}

    def load_state_dict(self, state: dict[str, Any]) -> None:
        self.at = state["at"]


@pytest.mark.parametrize("make", [Samples, Counts])
@pytest.mark.parametrize("workers", [0, 2])
def test_as_torchdatas_stateful_loader(make: Any, workers: int) -> None:
    """The same order, and after the same call of load_state_dict the same rest of the epoch."""
    theirs = peer("torchdata.stateful_dataloader").StatefulDataLoader
    shuffle = {} if make is Counts else {"shuffle": True}

    def run(cls: Any) -> tuple[list[Any], list[Any]]:
        torch.manual_seed(7)
        loader = cls(make(), 3, num_workers=workers, **shuffle)
        iterator = iter(loader)
        start = [next(iterator).tolist() for _ in range(2)]
        state = copy.deepcopy(loader.state_dict())
        del iterator
        again = cls(make(), 3, num_workers=workers, **shuffle)
        again.load_state_dict(state)
        return start, [batch.tolist() for batch in again]

    start, rest = run(DataLoader)
    assert len(start) + len(rest) >= 7
    torch.manual_seed(7)
    whole = [b.tolist() for b in TorchLoader(make(), 3, num_workers=workers, **shuffle)]
    assert [*start, *rest] == whole
    assert len(rest) == len(run(theirs)[1])


@pytest.mark.parametrize("workers", [0, 2])
def test_as_torchdatas_after_a_break_and_between_epochs(workers: int) -> None:
    """Which epoch goes on, and that the ones after it are those of a run without a stop."""
    theirs = peer("torchdata.stateful_dataloader").StatefulDataLoader

    def run(cls: Any, breaks: bool) -> list[int]:
        torch.manual_seed(7)
        loader = cls(Samples(), 3, num_workers=workers, shuffle=True)
        for step, _ in enumerate(loader):
            if breaks and step == 1:
                break
        state, rng = copy.deepcopy(loader.state_dict()), torch.get_rng_state()
        again = cls(Samples(), 3, num_workers=workers, shuffle=True)
        again.load_state_dict(state)
        torch.set_rng_state(rng)
        got = [[values(batch) for batch in again] for _ in range(2)]
        if not breaks:
            torch.set_rng_state(rng)
            assert got == [[values(batch) for batch in loader] for _ in range(2)]
        return [len(epoch) for epoch in got]

    assert run(DataLoader, True) == run(theirs, True) == [5, 7]
    assert run(DataLoader, False) == run(theirs, False) == [7, 7]
