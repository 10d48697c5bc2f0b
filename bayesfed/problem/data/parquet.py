"""Bring your own table."""

from __future__ import annotations

from collections.abc import Sequence
from typing import TYPE_CHECKING

import numpy as np

from bayesfed.errors import InputError, did_you_mean, number
from bayesfed.problem.data.npz import existing_file
from bayesfed.problem.data.source import Loaded, Source, from_table

if TYPE_CHECKING:
    import pyarrow


class Parquet(Source):
    """A Parquet table, one row an example; features become float64.

    Args:
        path: the file.
        features: input columns; null = all but the target and the client column.
        target: column of labels (whole numbers) or of real targets.
        client: column of client ids (numbers or strings); the partitioner is then skipped.
        fraction: see ``Source``.
        scaling: see ``Source``; tables often want ``standardize``.
        test_fraction: held out for testing with the run's seed.

    Raises:
        InputError: naming the option, the column or the first bad row.
    """

    def __init__(
        self,
        path: str | None = None,
        *,
        features: Sequence[str] | None = None,
        target: str | None = None,
        client: str | None = None,
        fraction: float = 1.0,
        scaling: str = "raw",
        test_fraction: float = 0.2,
    ):
        super().__init__(fraction=fraction, scaling=scaling)
        number("test_fraction", test_fraction, above=0)
        if test_fraction >= 1:
            raise InputError("test_fraction", test_fraction, "must be below 1")
        if isinstance(features, str) or (features is not None and len(features) == 0):
            raise InputError("features", features, "must be a list of column names (or null for all others)")
        self.path = existing_file(path, "a .parquet table")
        self.features = None if features is None else [str(name) for name in features]
        self.target, self.client, self.test_fraction = target, client, float(test_fraction)

    def load(self, seed: int) -> Loaded:
        import pyarrow
        import pyarrow.parquet

        try:
            columns = list(pyarrow.parquet.read_schema(self.path).names)
            target = self._column("target", self.target, columns)
            client = None if self.client is None else self._column("client", self.client, columns)
            features = self.features or [name for name in columns if name not in (target, client)]
            for name in features:
                self._column("features", name, columns)
                if name in (target, client):
                    raise InputError("features", name, "is also the target or the client column")
            if not features:
                raise InputError("features", self.features, "the table has no column besides target and client")
            wanted = [*features, target, *([client] if client else [])]
            table = pyarrow.parquet.read_table(self.path, columns=wanted)
        except (pyarrow.ArrowException, OSError) as error:
            raise InputError("path", self.path, f"not a readable Parquet table ({error})") from error
        x = np.stack([_numbers(table, "features", name).astype(np.float64) for name in features], axis=1)
        return from_table(
            x,
            _numbers(table, "target", target),
            test=None,
            client=None if client is None else _ids(table, client),
            test_fraction=self.test_fraction,
            seed=seed,
        )

    def _column(self, option: str, name: str | None, columns: Sequence[str]) -> str:
        if name is None:
            raise InputError(option, name, f"must name a column; the table has {', '.join(columns)}")
        if name not in columns:
            fix = f"no such column: {did_you_mean(name, columns)}the table has {', '.join(columns)}"
            raise InputError(option, name, fix)
        return name


def _numbers(table: pyarrow.Table, option: str, name: str) -> np.ndarray:
    values = table.column(name).to_numpy()  # a missing value becomes nan and is refused with its row
    if values.dtype.kind not in "fiub":
        raise InputError(option, name, f"column must hold numbers, holds {table.column(name).type}")
    values = values.astype(np.int64) if values.dtype.kind == "b" else values
    return np.require(values, requirements="W")  # Arrow's buffers are read-only, which torch warns about


def _ids(table: pyarrow.Table, name: str) -> np.ndarray:
    column = table.column(name)
    if column.null_count:
        raise InputError("client", name, f"{column.null_count} rows have no client id")
    values = column.to_numpy()
    return values.astype(str) if values.dtype.kind == "O" else values
