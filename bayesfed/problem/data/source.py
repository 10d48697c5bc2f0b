"""What every data source offers."""

from __future__ import annotations

import os
from abc import ABC, abstractmethod
from dataclasses import dataclass
from pathlib import Path

import numpy as np

from bayesfed.errors import InputError, choice, number
from bayesfed.problem.data.sampling import hold_out
from bayesfed.problem.scaling import KINDS
from bayesfed.seeding import numpy_generator


@dataclass(frozen=True, eq=False)
class Loaded:
    """A data set in memory or memory-mapped, unscaled.

    Attributes:
        x: (N, ...) uint8, float32 or float64; images are (N, C, H, W).
        y: (N,) labels or targets, or (N, D) targets.
        test_x, test_y: where the test rows live; may be ``x`` and ``y`` themselves.
        train_rows, test_rows: rows of the arrays above; None = all.
        client: (N,) client ids of the rows of ``x``, if the data come with a split.
        num_classes: C if the source fixes it.
        maximum: largest value an input can hold (255, 16), if the source has one.
    """

    x: np.ndarray
    y: np.ndarray
    test_x: np.ndarray
    test_y: np.ndarray
    train_rows: np.ndarray | None = None
    test_rows: np.ndarray | None = None
    client: np.ndarray | None = None
    num_classes: int | None = None
    maximum: float | None = None


class Source(ABC):
    """A data source.

    Args:
        fraction: of the training data to keep, in (0, 1]; drawn per client and class with the run's seed.
        scaling: ``raw`` (as stored), ``unit`` (divide by the source's largest value; tables: training range to [0, 1])
            or ``standardize`` (training mean 0, standard deviation 1 per feature or channel).

    Raises:
        InputError: naming the option.
    """

    def __init__(self, *, fraction: float = 1.0, scaling: str = "raw"):
        number("fraction", fraction, above=0, at_most=1)
        choice("scaling", scaling, KINDS)
        self.fraction, self.scaling = float(fraction), scaling

    def files(self) -> list[Path]:
        """Files and folders that :meth:`load` reads: when one of them has changed, what was loaded is out of date.

        Here: all that an attribute names. A source that reads others says so.
        """
        named = [value for value in vars(self).values() if isinstance(value, str | Path)]
        return [Path(name) for name in named if os.path.exists(name)]

    def stamps(self) -> tuple[tuple[str, int, int], ...]:
        """Name, size (bytes) and modification time (ns) of each of the :meth:`files`, and of what is in its folders."""
        found = [file.expanduser().resolve() for file in self.files()]
        inside = [each for file in found for each in (sorted(file.rglob("*")) if file.is_dir() else [file])]
        return tuple((str(f), s.st_size, s.st_mtime_ns) for f in inside if f.exists() for s in (f.stat(),))

    @abstractmethod
    def load(self, seed: int) -> Loaded:
        """Read the data.

        Args:
            seed: of the run; keys every draw a source makes (synthetic data, a held-out test set).

        Raises:
            InputError: on missing or unusable data, naming the option and what to do.
        """


def from_table(
    x: np.ndarray,
    y: np.ndarray,
    *,
    test: tuple[np.ndarray, np.ndarray] | None,
    client: np.ndarray | None,
    test_fraction: float,
    seed: int,
) -> Loaded:
    """A user's arrays, checked; without ``test`` a seeded ``test_fraction`` of the rows is held out.

    The hold-out is stratified by class (whole-number ``y``) and by client.

    Raises:
        InputError: naming the array and the first bad row.
    """
    x, y = check_arrays("x", x, "y", y)
    maximum = 255.0 if x.dtype == np.uint8 else None
    if client is not None:
        if client.ndim != 1 or len(client) != len(x):
            raise InputError(
                "client", f"array of shape {client.shape}", f"needs one id for each of the {len(x)} rows of x"
            )
        if client.dtype.kind not in "iuUS":
            raise InputError("client", f"array of {client.dtype}", "ids must be whole numbers or strings, none missing")
    if test is not None:
        test_x, test_y = check_arrays("x_test", test[0], "y_test", test[1])
        for name, a, b in (("x_test", x, test_x), ("y_test", y, test_y)):
            if a.shape[1:] != b.shape[1:]:
                raise InputError(name, f"rows of shape {b.shape[1:]}", f"training rows have shape {a.shape[1:]}")
        return Loaded(x, y, test_x.astype(x.dtype, copy=False), test_y, client=client, maximum=maximum)
    strata = [column for column in (client, y if y.ndim == 1 and y.dtype.kind in "iu" else None) if column is not None]
    held, kept = hold_out(np.arange(len(x)), strata, test_fraction, numpy_generator(seed, "data", "test"))
    if len(held) == 0 or len(kept) == 0:
        fix = f"leaves {len(kept)} of {len(x)} rows to train on and {len(held)} to test on; both need at least one"
        raise InputError("test_fraction", test_fraction, fix)
    return Loaded(x, y, x, y, kept, held, client, maximum=maximum)


def check_arrays(x_name: str, x: np.ndarray, y_name: str, y: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    """Numbers, equally many rows, at least one row, all finite; ``x`` (N,) becomes (N, 1).

    Raises:
        InputError: naming the array and, for values that are not finite, the first bad row.
    """
    for name, array in ((x_name, x), (y_name, y)):
        if array.dtype.kind not in "fiub":
            raise InputError(name, f"array of {array.dtype}", "must hold numbers")
        if array.ndim == 0 or 0 in array.shape:
            raise InputError(name, f"array of shape {array.shape}", "holds no data; needs at least one row and column")
    if len(x) != len(y):
        raise InputError(y_name, f"{len(y)} rows", f"{x_name} has {len(x)}; both need the same number")
    for name, array in ((x_name, x), (y_name, y)):
        finite = np.isfinite(array).reshape(len(array), -1).all(axis=1)
        if not finite.all():
            row = int(np.argmin(finite))
            fix = f"must be finite; {int((~finite).sum())} of {len(array)} rows are not (rows count from 0)"
            raise InputError(name, f"not finite in row {row}", fix)
    if x.dtype == np.bool_:
        x = x.astype(np.uint8)
    elif x.dtype not in (np.uint8, np.float32, np.float64):
        x = x.astype(np.float32 if x.dtype == np.float16 else np.float64)
    return (x[:, None] if x.ndim == 1 else x), y
