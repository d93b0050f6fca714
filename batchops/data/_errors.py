"""What went wrong with a batch, and where in it.

Messages begin with torch's own text. What follows says where: the way to the value inside the
sample, the position in the batch, what is there and what was expected.
"""

from __future__ import annotations

import builtins
from collections.abc import Mapping, Sequence
from typing import Any, NoReturn

import numpy as np
import torch
from torch._utils import KeyErrorMessage

from batchops.data._threads import get_worker_info

_MARK = "\n  in the batch: "
_SHOWN = 16


class MissingKey(KeyError):
    """A KeyError whose text goes on after the key. ``args[0]`` is the key, as ever."""

    def __init__(self, key: Any, where: str = "") -> None:
        super().__init__(key)
        self._where = where

    def __str__(self) -> str:
        return super().__str__() + self._where

    def and_then(self, text: str) -> MissingKey:
        return MissingKey(self.args[0], self._where + text)

    def __reduce__(self) -> Any:
        return (MissingKey, (self.args[0], self._where))


class Place:
    """Where an error happened: kept on the exception on its way up."""

    def __init__(self) -> None:
        self.path: list[Any] = []
        self.position: int | None = None
        self.text = ""
        self.of_whole_batch = False  # the position is one in the loader's own batch
        self.told = False  # what follows is another collation, that the same object is raised in


class WholeBatch:
    """The collation of a loader's batch, as it came from the dataset.

    Only of an error in here is the position that of an index: a dataset may collate in
    ``__getitem__``, and a function of the user's may leave samples out. A worker process hands on
    no more than text: there this method's name in the traceback tells.
    """

    def __init__(self, collate: Any) -> None:
        self._collate = collate

    def __call__(self, batch: Any) -> Any:
        return self.collate_whole_batch(batch)

    def collate_whole_batch(self, batch: Any) -> Any:
        try:
            return self._collate(batch)
        except Exception as error:
            place = noted(error)
            if place is not None:
                place.of_whole_batch = True
            raise


_IN_WHOLE_BATCH = f", in {WholeBatch.collate_whole_batch.__name__}\n"


def noted(error: Exception) -> Place | None:
    return getattr(error, "_batchops_place", None)


def note(error: Exception, batch: Sequence[Any], position: int | None = None) -> None:
    """Remember what `batch`, in which it happened, tells about the error: which sample is odd,
    unless it is known to be that at `position`."""
    place = noted(error)
    if place is not None and not place.told:
        return
    place = Place()
    try:
        if position is None:
            place.position, place.text = _odd_one(batch)
        else:
            place.position, place.text = position, _describe(batch[position])
        error._batchops_place = place
    except Exception:
        pass  # an explanation must not hide the error


def step(error: Exception, key: Any) -> None:
    """The error came from the part `key` of the samples."""
    place = noted(error)
    if place is not None:
        place.path.append(key)


def explained(error: Exception) -> Exception:
    """The error with the place in its text, or as it is where its text is not ours to change."""
    place = noted(error)
    if place is None:
        return error
    place.told = True
    path = "sample" + "".join(f"[{key!r}]" for key in reversed(place.path))
    where = _MARK + (f"position {place.position}, " if place.position is not None else "")
    where += f"{path}: {place.text}"
    if isinstance(error, KeyError):
        new: Exception = MissingKey(error.args[0] if error.args else None, where)
        if get_worker_info() is not None:
            new = KeyError(KeyErrorMessage(new))  # nothing but the text is handed on
    elif getattr(builtins, type(error).__name__, None) is type(error) and len(error.args) == 1:
        new = type(error)(f"{error.args[0]}{where}")
    else:
        return error
    return _like(error, new)


def with_indices(error: Exception, indices: Any) -> Exception:
    """The error with the dataset's index of the sample that caused it."""
    position = _position(error)
    if position is None:
        return error
    try:
        index = list(indices)[position]
    except (TypeError, IndexError):
        return error
    return _with_text(error, f" (dataset index {index})")


def with_batch(error: Exception, indices: Any) -> Exception:
    """An error that was handed on, with the dataset's indices: of its sample, or of its batch."""
    if _position(error) is not None:
        return with_indices(error, indices)
    if isinstance(indices, list | tuple):
        shown = ", ".join(map(repr, indices[:_SHOWN]))
        more = f", and {len(indices) - _SHOWN} more" if len(indices) > _SHOWN else ""
        return _with_text(error, f"{_MARK}dataset indices {shown}{more}")
    return _with_text(error, f"{_MARK}dataset index {indices!r}")


def _position(error: Exception) -> int | None:
    """In the loader's batch, of the sample that caused the error, where that is known."""
    place = noted(error)
    if place is not None:
        return place.position if place.of_whole_batch else None
    text = str(error)
    return position_in(text) if _IN_WHOLE_BATCH in text else None


def _with_text(error: Exception, text: str) -> Exception:
    """The error with `text` behind its own, or as it is where its text is not ours to change."""
    if len(error.args) != 1:
        return error
    if isinstance(error, MissingKey):
        new: Exception = error.and_then(text)
    elif getattr(builtins, type(error).__name__, None) is not type(error):
        return error
    elif isinstance(error, KeyError):
        if not isinstance(error.args[0], KeyErrorMessage):
            return error  # args[0] is the key
        new = KeyError(KeyErrorMessage(f"{error.args[0]}{text}"))
    else:
        new = type(error)(f"{error.args[0]}{text}")
    return _like(error, new)


def _like(error: Exception, new: Exception) -> Exception:
    """`new` with all that `error` has besides its arguments: attributes and notes too."""
    new.__dict__.update({**error.__dict__, **new.__dict__})
    new.__traceback__ = error.__traceback__
    new.__context__ = error.__context__
    new.__cause__ = error.__cause__  # which says that the context is not to be shown
    new.__suppress_context__ = error.__suppress_context__
    return new


def raise_better(error: Exception, better: Exception) -> NoReturn:
    """Raises `better` in the place of an error that is being handled, or that once more.

    No frame on the way is left with a name for it: they are in its traceback, and would keep it,
    themselves and all that they hold until the garbage collector comes by.
    """
    try:
        if better is error:
            raise
        raise better from better.__cause__
    finally:
        del better, error


def raise_alone(error: Exception, indices: Any) -> NoReturn:
    """Raises an error that was handed on from a worker, with the dataset's index.

    The frames in which it was made again hold it, and it them, and with them the iterator: until
    the garbage collector comes by, workers would live on, and torch's then take seconds to end.
    The text holds the worker's own traceback; that of the hand-over is left out.
    """
    better = error if indices is None else with_batch(error, indices)
    error.__traceback__ = None
    try:
        raise better.with_traceback(None) from None
    finally:
        del better, error


def position_in(text: str) -> int | None:
    """The position that a message names; a worker process hands on no more than the text."""
    _, found, rest = text.rpartition(f"{_MARK}position ")
    digits = rest.split(",", 1)[0]
    return int(digits) if found and digits.isdigit() else None


def _describe(value: Any) -> str:
    if isinstance(value, torch.Tensor):
        return f"{type(value).__name__} of shape {tuple(value.shape)}, {value.dtype}"
    if isinstance(value, np.ndarray):
        return f"{type(value).__name__} of shape {value.shape}, {value.dtype}"
    if isinstance(value, Mapping):
        return f"{type(value).__name__} with keys {list(value)}"
    if isinstance(value, Sequence) and not isinstance(value, str | bytes):
        return f"{type(value).__name__} of length {len(value)}"
    return f"{type(value).__name__}"


def _kind(value: Any) -> Any:
    if isinstance(value, torch.Tensor | np.ndarray):
        return (type(value), tuple(value.shape), str(value.dtype))
    if isinstance(value, Mapping):
        return (type(value), frozenset(value))
    if isinstance(value, Sequence) and not isinstance(value, str | bytes):
        return (type(value), len(value))
    return type(value)


def _odd_one(batch: Sequence[Any]) -> tuple[int | None, str]:
    """The first sample that is unlike the first one."""
    first = _kind(batch[0])
    for position, value in enumerate(batch):
        if _kind(value) != first:
            return position, f"{_describe(value)}, expected as at position 0: {_describe(batch[0])}"
    return 0, f"{_describe(batch[0])}, and the other {len(batch) - 1} alike"
