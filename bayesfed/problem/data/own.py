"""A user's arrays: what is taken, what is refused, and no value that changes on the way in."""

from __future__ import annotations

import os
from collections.abc import Sequence
from dataclasses import replace
from logging import getLogger
from pathlib import Path
from typing import ClassVar

import numpy as np

from bayesfed.errors import InputError, integer, number
from bayesfed.problem.data.sampling import hold_out
from bayesfed.problem.data.source import Loaded, Source
from bayesfed.seeding import numpy_generator

log = getLogger("bayesfed")
EXACT = 2**53  # whole numbers up to here are float64 numbers
APART = 50.0  # a test set this many times larger or smaller than the training set was scaled otherwise
INSTEAD = {
    "U": "text is for y and client; give each category a column of 0 and 1, or a number",
    "S": "text is for y and client; give each category a column of 0 and 1, or a number",
    "M": "dates are none; use days or seconds since a day of your choice",
    "m": "time spans are none; divide them by numpy.timedelta64(1, 's')",
    "c": "complex ones are none; give real and imaginary part a column each",
}


class Own(Source):
    """A user's data in a file (or folder).

    Args:
        path: of the file.
        fraction, scaling: see ``Source``.
        test_fraction: held out for testing with the run's seed, where the data bring no test set.
        classes: number of classes (labels 0..C-1), or their names in the order of the model's outputs; null = those in
            the data.

    Raises:
        InputError: naming the option.
    """

    expected: ClassVar[str]  # what stands at ``path``
    folder: ClassVar[bool] = False  # whether that may be a folder

    def __init__(
        self,
        path: str | None = None,
        *,
        fraction: float = 1.0,
        scaling: str = "raw",
        test_fraction: float = 0.2,
        classes: int | Sequence[str | int | bool] | None = None,
    ):
        super().__init__(fraction=fraction, scaling=scaling)
        number("test_fraction", test_fraction, above=0, below=1)
        if isinstance(classes, str) or (isinstance(classes, Sequence) and len(classes) < 2):
            raise InputError("classes", classes, "must be a list of two names or more, their number, or null")
        if not isinstance(classes, Sequence):
            integer("classes", classes, at_least=2, optional=True)
        self.test_fraction, self.classes = float(test_fraction), classes
        self.path = self._existing(path)

    def _existing(self, path: str | None) -> Path:
        if path is None:
            raise InputError("path", path, f"needs {self.expected}")
        file = Path(path).expanduser()
        if not os.path.isfile(file) and not (self.folder and os.path.isdir(file)):  # False also for too long names
            reason = "is a folder" if os.path.isdir(file) else "does not exist"
            raise InputError("path", path, f"{reason}; needs {self.expected}")
        return file

    def taken(
        self,
        x: np.ndarray,
        y: np.ndarray,
        seed: int,
        *,
        test: tuple[np.ndarray, np.ndarray] | None = None,
        client: np.ndarray | None = None,
        columns: Sequence[str] | None = None,
        target: tuple[str, object] | None = None,
    ) -> Loaded:
        """Arrays, checked; without ``test`` a seeded ``test_fraction`` of the rows is held out.

        The hold-out is stratified by class (whole-number labels, text) and by client.

        Raises:
            InputError: naming the array and the first bad row.
        """
        maximum = {"u1": 255.0, "b1": 1.0}.get(x.dtype.str[1:])
        x, y = check_arrays("x", x, "y", y, columns)
        loaded = Loaded(
            x, y, x, y, client=None if client is None else ids(client, len(x)), maximum=maximum, classes=self.classes,
            columns=columns, target=target or ("data.y", f"array of {y.dtype}"), own=True,
        )  # fmt: skip
        if test is not None:
            test_x, test_y = check_arrays("x_test", test[0], "y_test", test[1], columns)
            for name, a, b in (("x_test", x, test_x), ("y_test", y, test_y)):
                if a.shape[1:] != b.shape[1:]:
                    raise InputError(name, f"rows of shape {b.shape[1:]}", f"training rows have shape {a.shape[1:]}")
            if (y.dtype.kind == "U") != (test_y.dtype.kind == "U"):
                raise InputError(
                    "y_test", f"array of {test_y.dtype}", f"y is an array of {y.dtype}; use one kind of labels"
                )
            largest, tested = float(np.abs(x).max()), float(np.abs(test_x).max())
            if max(largest, tested) > APART * min(largest, tested):
                log.warning("x reaches %.4g, x_test %.4g: were they scaled alike?", largest, tested)
            return replace(loaded, test_x=test_x, test_y=test_y)
        labels = y if y.ndim == 1 and y.dtype.kind in "iuU" else None
        strata = [column for column in (loaded.client, labels) if column is not None]
        test_rows, train_rows = hold_out(
            np.arange(len(x)), strata, self.test_fraction, numpy_generator(seed, "data", "test")
        )
        if len(test_rows) == 0 or len(train_rows) == 0:
            fix = f"leaves {len(train_rows)} of {len(x)} rows to train on and {len(test_rows)} to test on"
            fix += "; both need at least one"
            raise InputError("test_fraction", self.test_fraction, fix)
        return replace(loaded, train_rows=train_rows, test_rows=test_rows)


def check_arrays(
    x_name: str, x: np.ndarray, y_name: str, y: np.ndarray, columns: Sequence[str] | None = None
) -> tuple[np.ndarray, np.ndarray]:
    """Inputs and targets that PyTorch takes, with the values that were given.

    Returns:
        ``x`` (N, ...) uint8, float32 or float64, from (N,) (N, 1); ``y`` numbers or text, text and whole numbers (N, 1)
        as (N,).

    Raises:
        InputError: naming the array and, for a bad value, its first row: other things than numbers, no or unequally
            many rows, values that aren't finite or that float64 doesn't have, images with the channels last.
    """
    if x.dtype.kind not in "fiub":
        raise InputError(x_name, f"array of {x.dtype}", f"must hold numbers{_instead(x)}")
    if y.dtype.kind not in "fiubUS":
        raise InputError(y_name, f"array of {y.dtype}", f"must hold numbers, or text as labels{_instead(y)}")
    for name, array in ((x_name, x), (y_name, y)):
        if array.ndim == 0 or 0 in array.shape:
            raise InputError(name, f"array of shape {array.shape}", "holds no data; needs at least one row and column")
    if len(x) != len(y):
        raise InputError(y_name, f"{len(y)} rows", f"{x_name} has {len(x)}; both need the same number")
    if x.ndim == 4 and x.shape[1] > 4 and x.shape[3] in (1, 3, 4) and x.shape[2:] != (1, 1):
        fix = f"images are (N, C, H, W), these look like (N, H, W, C): store numpy.transpose({x_name}, (0, 3, 1, 2))"
        raise InputError(x_name, f"array of shape {x.shape}", fix)
    x, y = _native(x_name, x, columns), _native(y_name, y) if y.dtype.kind not in "US" else _text(y_name, y)
    if x.dtype not in (np.uint8, np.float32, np.float64):
        x = x.astype(np.uint8 if x.dtype == np.bool_ else np.float64)
    y = y[:, 0] if y.ndim == 2 and y.shape[1] == 1 and y.dtype.kind != "f" else y
    return (x[:, None] if x.ndim == 1 else x), y


def ids(client: np.ndarray, rows: int) -> np.ndarray:
    """(N,) client ids: whole numbers (floats that are, too) or text.

    Raises:
        InputError: other ids, or not one for each of the ``rows``.
    """
    if client.ndim == 2 and client.shape[1] == 1:
        client = client[:, 0]
    if client.ndim != 1 or len(client) != rows:
        raise InputError("client", f"array of shape {client.shape}", f"needs one id for each of the {rows} rows of x")
    kind = client.dtype.kind
    if kind == "f" and (np.isfinite(client) & (client == np.floor(client)) & (np.abs(client) <= EXACT)).all():
        return client.astype(np.int64)  # what a join makes of whole numbers
    if kind == "S":
        return _text("client", client)
    if kind not in "iuU":
        raise InputError("client", f"array of {client.dtype}", "ids must be whole numbers or strings, none missing")
    return client.astype(client.dtype.newbyteorder("="), copy=False)


def _native(name: str, array: np.ndarray, columns: Sequence[str] | None = None) -> np.ndarray:
    """Numbers in this machine's byte order and in a width that PyTorch has.

    Raises:
        InputError: a value isn't finite, or not one of float64's.
    """
    good, fix = np.isfinite(array), "must be finite; {bad} of {all} rows are not (rows count from 0)"
    if good.all() and array.dtype.kind in "iu":
        good = (array <= EXACT) & (array >= -EXACT) if array.dtype.itemsize == 8 else good
        fix = "whole numbers beyond 2**53 lose digits: {bad} of {all} rows; use float64, or smaller numbers"
    elif good.all() and array.dtype.itemsize > 8:
        with np.errstate(over="ignore"):
            good = array.astype(np.float64) == array
        fix = "has more digits than float64: {bad} of {all} rows; store it as float64"
    if not good.all():
        rows = good.reshape(len(array), -1).all(axis=1)
        row = int(np.argmin(rows))
        what = "not finite" if fix.startswith("must") else "not exact"
        fix = place(array, int(np.argmin(good[row].reshape(-1))), columns) + fix.format(
            bad=int((~rows).sum()), all=len(rows)
        )
        raise InputError(name, f"{what} in row {row}", fix)
    wide = {"f2": np.float32}.get(array.dtype.str[1:], np.float64 if array.dtype.itemsize > 8 else None)
    return array.astype(wide or array.dtype.newbyteorder("="), copy=False)


def place(array: np.ndarray, position: int, columns: Sequence[str] | None) -> str:
    """Which column of a table a value stands in, as the start of a sentence."""
    if array.ndim != 2 or array.shape[1] == 1:
        return ""
    return f"column {position if columns is None else repr(columns[position])}: "


def _text(name: str, array: np.ndarray) -> np.ndarray:
    """Strings, none missing.

    Raises:
        InputError: bytes that are no UTF-8, or an empty string.
    """
    try:
        text = (
            np.char.decode(array, "utf-8") if array.dtype.kind == "S" else array.astype(array.dtype.newbyteorder("="))
        )
    except UnicodeDecodeError as error:
        raise InputError(
            name, f"array of {array.dtype}", "holds bytes that are no UTF-8 text; store strings"
        ) from error
    missing = np.isin(text, ("", "nan")).reshape(len(text), -1).any(axis=1)
    if missing.any():
        fix = f"{int(missing.sum())} of {len(text)} rows are empty; leave them out, or give them a name"
        raise InputError(name, f"missing in row {int(np.argmax(missing))}", fix)
    return text


def _instead(array: np.ndarray) -> str:
    return f"; {INSTEAD[array.dtype.kind]}" if array.dtype.kind in INSTEAD else ""
