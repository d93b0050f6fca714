"""Hugging Face datasets: columns of fixed-size rows as arrays over Arrow's own memory.

What a formatter makes of a column, and what torch then collates it to, is told by types alone:

==========  ==========================  =================================
format      integers                    floats
==========  ==========================  =================================
``None``    int64 (scalars only)        float64 (scalars only)
``numpy``   int64                       float32
``torch``   int64, or ``dtype=``        float32, or ``dtype=``
==========  ==========================  =================================

Booleans stay what they are. Everything else (nulls, strings, images, lists of several lengths,
other formats and options) is for the dataset's own code.
"""

from __future__ import annotations

import sys
from typing import Any, NamedTuple

import numpy as np
import torch

# All that decides what a sample is: attributes that its methods replace and never change in place.
ATTRIBUTES = (
    *("_data", "_indices", "_info"),
    *("_format_type", "_format_kwargs", "_format_columns", "_output_all_columns"),
)

# Features whose values are Arrow's own; others decode.
_PLAIN = ("Value", "ClassLabel", "Array2D", "Array3D", "Array4D", "Array5D")
_LISTS = ("Sequence", "List", "LargeList")

_FORMATTERS = {
    None: ("datasets.formatting.formatting", "PythonFormatter"),
    "numpy": ("datasets.formatting.np_formatter", "NumpyFormatter"),
    "torch": ("datasets.formatting.torch_formatter", "TorchFormatter"),
}

# Source and target of the conversions on the way.
CASTS = frozenset(
    {
        *((getattr(torch, name), torch.int64) for name in ("int8", "int16", "int32")),
        *((getattr(torch, name), torch.int64) for name in ("uint8", "uint16", "uint32")),
        (torch.float32, torch.float64),
        (torch.float64, torch.float32),
    }
)

_DTYPES = {
    str(dtype).removeprefix("torch."): dtype
    for dtype in (torch.int64, torch.bool, *(source for source, _ in CASTS))
}

# As Arrow writes their names.
_TYPES = {{"float32": "float", "float64": "double"}.get(name, name) for name in _DTYPES}


class Chunk(NamedTuple):
    """Rows of all columns that lie in one piece, and the dtypes that they have in a batch."""

    columns: list[np.ndarray]
    dtypes: list[torch.dtype]


class Arrow(NamedTuple):
    names: tuple[str, ...]
    chunks: list[Chunk]
    lookup: np.ndarray | None  # the dataset's own mapping of indices


def dataset_class() -> Any:
    """``datasets.Dataset`` where it is imported and indexed by its own code; None otherwise."""
    module = sys.modules.get("datasets.arrow_dataset")
    cls = getattr(module, "Dataset", None)
    for name in ("__getitem__", "__getitems__", "_getitem"):
        method = getattr(cls, name, None)
        if getattr(method, "__module__", None) != "datasets.arrow_dataset":
            return None
        if method.__qualname__ != f"Dataset.{name}":
            return None
    return cls


def is_dataset(dataset: Any) -> bool:
    cls = dataset_class()
    return cls is not None and type(dataset) is cls


def arrow_of(dataset: Any) -> Arrow | None:
    """The dataset's columns, or None where only its own code can tell what a sample is."""
    state = [vars(dataset).get(name, dataset) for name in ATTRIBUTES]
    if any(value is dataset for value in state):  # another version, with other attributes
        return None
    data, indices, info, kind, options, chosen, all_columns = state
    if not _formats_plainly(kind) or any(key != "dtype" for key in options or ()):
        return None
    wanted = (options or {}).get("dtype")
    if wanted is not None and (kind != "torch" or not isinstance(wanted, torch.dtype)):
        return None
    table = getattr(data, "table", None)
    if table is None or table.num_rows == 0:
        return None
    names = [name for name in table.column_names if chosen is None or name in chosen]
    if not names or (all_columns and len(names) < len(table.column_names)):
        return None
    features = info.features or {}
    if not all(_is_plain(features.get(name)) for name in names):
        return None
    columns = []
    for name in names:
        pieces = [_rows_of(chunk) for chunk in table.column(name).chunks if len(chunk)]
        if any(piece is None for piece in pieces):
            return None
        dtype = _dtype_in_a_batch(pieces[0], kind, wanted)
        if dtype is None or any(piece.dtype != pieces[0].dtype for piece in pieces):
            return None
        columns.append((pieces, dtype))
    return Arrow(tuple(names), _aligned(columns, table.num_rows), _lookup(indices))


def _formats_plainly(kind: Any) -> bool:
    """Whether the format is one of ours, and its formatter the library's own."""
    if kind not in _FORMATTERS:
        return False
    registered = getattr(sys.modules.get("datasets.formatting"), "_FORMAT_TYPES", {}).get(kind)
    return (
        getattr(registered, "__module__", None),
        getattr(registered, "__qualname__", None),
    ) == _FORMATTERS[kind]


def _is_plain(feature: Any) -> bool:
    cls = type(feature)
    if cls.__module__ != "datasets.features.features":
        return False
    if cls.__name__ in _LISTS:
        return _is_plain(feature.feature)
    return cls.__name__ in _PLAIN


def _rows_of(array: Any) -> np.ndarray | None:
    """(rows, ...) over the memory of an Arrow array; None where rows are not alike, or null."""
    rows = len(array)
    shape: list[int] = []
    while array.null_count == 0:
        array = getattr(array, "storage", array)  # of an extension type: Array2D and its like
        if array.null_count:
            return None
        kind = str(array.type)
        if kind in _TYPES:
            # Arrow's booleans are bits: these alone are copied.
            values = array.to_numpy(zero_copy_only=kind != "bool")
            return values.reshape(rows, *shape)
        if hasattr(array.type, "list_size"):
            size = array.type.list_size
        elif hasattr(array, "offsets") and hasattr(array, "flatten"):
            lengths = np.diff(array.offsets.to_numpy())
            size = int(lengths[0])
            if (lengths != size).any():
                return None
        else:
            return None
        if size == 0:
            return None
        shape.append(size)
        array = array.flatten()
    return None


def _dtype_in_a_batch(rows: np.ndarray, kind: str | None, wanted: Any) -> torch.dtype | None:
    source = _DTYPES[rows.dtype.name]
    if kind is None and rows.ndim > 1:
        return None  # lists of numbers, which torch takes apart
    if wanted is not None:
        target = wanted
    elif source is torch.bool:
        target = source
    elif source.is_floating_point:
        target = torch.float64 if kind is None else torch.float32
    else:
        target = torch.int64
    return target if target is source or (source, target) in CASTS else None


def _aligned(columns: list[tuple[list[np.ndarray], torch.dtype]], rows: int) -> list[Chunk]:
    """Cut where any of the columns is."""
    dtypes = [dtype for _, dtype in columns]
    ends = [np.cumsum([len(piece) for piece in pieces]) for pieces, _ in columns]
    cuts = np.unique(np.concatenate(ends))
    chunks = []
    begin = 0
    for end in cuts.tolist():
        parts = []
        for (pieces, _), at in zip(columns, ends, strict=True):
            k = int(np.searchsorted(at, begin, side="right"))
            start = begin - (int(at[k - 1]) if k else 0)
            parts.append(pieces[k][start : start + end - begin])
        chunks.append(Chunk(parts, dtypes))
        begin = end
    assert begin == rows
    return chunks


def _lookup(indices: Any) -> np.ndarray | None:
    if indices is None:
        return None
    column = indices.column(0)
    parts = [chunk.to_numpy(zero_copy_only=False) for chunk in column.chunks]
    whole = parts[0] if len(parts) == 1 else np.concatenate([np.empty(0, np.uint64), *parts])
    return whole.view(np.int64) if whole.dtype == np.uint64 else whole.astype(np.int64)
