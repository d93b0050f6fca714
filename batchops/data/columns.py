"""``Columns``: a table of arrays as a dataset of dicts."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import numpy as np
import torch
from torch.utils.data import Dataset


class Columns(Dataset[dict[str, Any]]):
    """sample i = {name: column[i] for each column}: what a Hugging Face dataset in torch or NumPy
    format gives, from arrays in memory or memory-mapped ones.

    columns: a mapping, or keywords, of tensors, ``numpy.ndarray`` or ``numpy.memmap`` with the same
    size in the first dimension. ``dataset["name"]`` is a column, ``dataset[i]`` a sample,
    ``column_names`` the names in order. :class:`batchops.data.DataLoader` gathers it natively.

    Raises ValueError where there are no columns or their sizes differ, TypeError for other types.
    """

    def __init__(self, columns: Mapping[str, Any] | None = None, /, **named: Any) -> None:
        self.columns: dict[str, Any] = {**(columns or {}), **named}
        if not self.columns:
            raise ValueError("Columns: expected at least one column, got none")
        for name, column in self.columns.items():
            if not isinstance(column, torch.Tensor | np.ndarray) or column.ndim < 1:
                raise TypeError(
                    f"Columns: {name}: expected a tensor or an array of at least one dimension, "
                    f"got {type(column).__name__}"
                )
        sizes = {name: len(column) for name, column in self.columns.items()}
        if len(set(sizes.values())) > 1:
            raise ValueError(f"Columns: expected the same size for every column, got {sizes}")

    @property
    def column_names(self) -> list[str]:
        return list(self.columns)

    def __len__(self) -> int:
        return len(next(iter(self.columns.values())))

    def __getitem__(self, key: Any) -> Any:
        if isinstance(key, str):
            return self.columns[key]
        return {name: column[key] for name, column in self.columns.items()}
