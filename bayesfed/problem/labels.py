"""Class labels of any kind as numbers 0..C-1, with their names."""

from __future__ import annotations

from collections.abc import Sequence
from logging import getLogger
from typing import Any

import numpy as np

from bayesfed.errors import InputError
from bayesfed.foreign import plain_text
from bayesfed.problem.likelihood import Categorical

log = getLogger("bayesfed")
Coded = tuple[np.ndarray, np.ndarray, int, list[str] | None]


def coded(
    y: np.ndarray, test_y: np.ndarray, classes: int | Sequence[Any] | None, likelihood: Categorical, *, alone: bool
) -> Coded:
    """Labels as the model's outputs count them.

    Whole numbers that leave none of 0..C-1 out stay as they are. Others (text, booleans, numbers from 1 or with gaps)
    are numbered in ascending order of what both sets hold, or in the order of ``classes``, and keep their names. A row
    of one-hot labels is the position of its 1.

    Args:
        y, test_y: (N,) labels, (N, 1), or one-hot (N, C); may be the same array.
        classes: C, or the names, if they were given.
        likelihood: checks numbers.
        alone: the data are one client's, and may lack classes that others have: nothing is numbered anew.

    Returns:
        both as int64 (N,), C, and the names (None: they are 0..C-1).

    Raises:
        InputError: no labels, or not those of ``classes``, naming the first bad row.
    """
    count, names = (None, list(map(_name, classes))) if isinstance(classes, Sequence) else (classes, None)
    if names is not None and len(set(names)) < len(names):
        raise InputError("data.classes", classes, "names a class twice")
    sets = [_one_column(each) for each in ((y,) if test_y is y else (y, test_y))]
    columns = sets[0][1]
    if columns is not None and (count or len(names or range(columns))) != columns:
        raise InputError("data.classes", classes, f"y is one-hot with {columns} columns")
    values = [each for each, _ in sets]
    if columns is not None:
        count = columns
    elif names is not None:
        values, count = [_positions(each, names, classes) for each in values], len(names)
    elif any(each.dtype.kind == "U" for each in values) or all(each.dtype.kind == "b" for each in values):
        values, names = _by_name(values, count, alone)
        count = len(names)
    else:
        values = [likelihood.targets(each) for each in values]
        values, names, count = _numbered(values, count, likelihood.name, alone)
    _report_unseen(values, names, alone)
    return values[0], values[-1], count, names


def _one_column(y: np.ndarray) -> tuple[np.ndarray, int | None]:
    """(N,) labels, and the number of columns they had if they were one-hot."""
    if y.ndim == 2 and y.shape[1] == 1:
        return y[:, 0], None
    if y.ndim == 2 and y.dtype.kind in "fiub" and np.isin(y, (0, 1)).all() and (y.sum(axis=1) == 1).all():
        return y.argmax(axis=1), y.shape[1]
    if y.ndim != 1:
        fix = f"needs one label per example (or one-hot rows), y has shape {y.shape}"
        raise InputError("likelihood", Categorical.name, fix)
    return y, None


def _name(label: Any) -> str:
    """A label as text: 3.0 is 3."""
    plain = label.item() if isinstance(label, np.generic) else label
    return str(int(plain)) if isinstance(plain, float) and plain.is_integer() else str(plain)


def _positions(y: np.ndarray, names: list[str], given: Any) -> np.ndarray:
    distinct, inverse = np.unique(y, return_inverse=True)
    place = {name: position for position, name in enumerate(names)}
    positions = np.array([place.get(_name(label), -1) for label in distinct])[inverse]
    if (positions < 0).any():
        row = int(np.argmin(positions))
        raise InputError("data.classes", given, f"y of row {row} is {plain_text(_name(y[row]), 60)}, none of them")
    return positions.astype(np.int64)


def _by_name(values: list[np.ndarray], count: int | None, alone: bool) -> tuple[list[np.ndarray], list[str]]:
    """Text and booleans."""
    if all(each.dtype.kind == "b" for each in values):
        names = ["False", "True"]
    elif alone:
        fix = (
            "a node that holds its own data may lack some of the federation's classes: name all of them, "
            "e.g. data.classes=[cat,dog], for server and nodes alike"
        )
        raise InputError("data.classes", None, fix)
    else:
        names = sorted({_name(label) for each in values for label in np.unique(each)})
    _at_least_two(values)
    if count not in (None, len(names)):
        raise InputError("data.classes", count, f"y holds {len(names)} classes; name them all: data.classes=[...]")
    return [_positions(each, names, names) for each in values], names


def _numbered(
    values: list[np.ndarray], count: int | None, likelihood: str, alone: bool
) -> tuple[list[np.ndarray], list[str] | None, int]:
    """Whole numbers from 0."""
    largest, rows = max(int(each.max()) for each in values), sum(map(len, values)) * (3 - len(values))
    if count is not None:
        if largest >= count:
            row = int(np.argmax(next(each for each in values if each.max() == largest)))
            raise InputError("data.classes", count, f"needs labels 0..{count - 1}, y of row {row} is {largest}")
        return values, None, count
    if largest >= rows:
        fix = (
            f"needs labels 0..C-1, the largest is {largest} in {len(values[0])} rows: number the classes consecutively"
        )
        raise InputError("likelihood", likelihood, f"{fix}, or name them in data.classes")
    distinct = np.unique(np.concatenate([np.unique(each) for each in values]))
    if not alone or largest == 0:
        _at_least_two(values)
    if alone or largest + 1 == len(distinct):
        return values, None, largest + 1
    return [np.searchsorted(distinct, each) for each in values], [str(label) for label in distinct], len(distinct)


def _at_least_two(values: list[np.ndarray]) -> None:
    distinct = {_name(label) for each in values for label in np.unique(each)}
    if len(distinct) < 2:
        fix = f"needs at least two classes, all labels are {plain_text(distinct.pop(), 60)}"
        raise InputError("likelihood", Categorical.name, f"{fix}; data.classes names those that are missing")


def _report_unseen(values: list[np.ndarray], names: list[str] | None, alone: bool) -> None:
    unseen = [] if alone else np.setdiff1d(values[-1], values[0]).tolist()
    if unseen:
        listed = plain_text(", ".join(str(label) if names is None else names[label] for label in unseen), 200)
        log.warning("y_test has classes that y lacks, so that nobody learns them: %s", listed)
