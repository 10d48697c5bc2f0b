"""What every data source offers."""

from __future__ import annotations

import os
from abc import ABC, abstractmethod
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np

from bayesfed.checksum import files_of
from bayesfed.errors import choice, number
from bayesfed.problem.inputs import Arrays, check_arrays
from bayesfed.problem.scaling import KINDS


@dataclass(frozen=True, eq=False)
class Loaded:
    """A data set in memory or memory-mapped, unscaled.

    Attributes:
        x: (N, ...) uint8 or floats, images (N, C, H, W), which are scaled and cast to the run's dtype; or other whole
            numbers (token ids), which the model gets as they are; or several such arrays by name, of which the model
            gets the dict (its floats cast, nothing scaled). Rows of different length:
            :func:`bayesfed.problem.inputs.padded`.
        y: (N,) labels (numbers, booleans or text) or targets, or (N, D) targets or one-hot labels.
        test_x, test_y: where the test rows live; may be ``x`` and ``y`` themselves.
        train_rows, test_rows: rows of the arrays above; None = all.
        client: (N,) client ids of the rows of ``x``, if the data come with a split.
        num_classes: C if the source fixes it.
        maximum: largest value an input can hold (255, 16), if the source has one.
        classes: the class names, or their number, as the user gave them.
        columns: names of the columns of a table's ``x``.
        target: field and value that an error about ``y`` names.
        own: a user's data, which nobody has looked at.
    """

    x: Arrays
    y: np.ndarray
    test_x: Arrays
    test_y: np.ndarray
    train_rows: np.ndarray | None = None
    test_rows: np.ndarray | None = None
    client: np.ndarray | None = None
    num_classes: int | None = None
    maximum: float | None = None
    classes: int | Sequence[Any] | None = None
    columns: Sequence[str] | None = None
    target: tuple[str, object] = ("data.y", "array")
    own: bool = False

    def __post_init__(self) -> None:
        check_arrays("data.x", self.x, len(self.y))
        check_arrays("data.test_x", self.test_x, len(self.test_y))


class Source(ABC):
    """A data source.

    Args:
        fraction: of the training data to keep, in (0, 1]; drawn per client and class with the run's seed.
        scaling: of one array of floats or bytes: ``raw`` (as stored), ``unit`` (divide by the source's largest value;
            tables: training range to [0, 1]) or ``standardize`` (training mean 0, standard deviation 1 per feature or
            channel).

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
        named = [value for key, value in vars(self).items() if isinstance(value, str | Path) and key != "scaling"]
        return [Path(name) for name in named if os.path.exists(name)]

    def stamps(self) -> tuple[tuple[str, int, int], ...]:
        """Name, size (bytes) and modification time (ns) of each of the :meth:`files`, and of what is in its folders."""
        files = [file for path in self.files() for file in files_of(path.expanduser().resolve())]
        return tuple((str(file), s.st_size, s.st_mtime_ns) for file in files for s in (file.stat(),))

    @abstractmethod
    def load(self, seed: int) -> Loaded:
        """Read the data.

        Args:
            seed: of the run; keys every draw a source makes (synthetic data, a held-out test set).

        Raises:
            InputError: on missing or unusable data, naming the option and what to do.
        """
