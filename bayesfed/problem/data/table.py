"""Bring your own table."""

from __future__ import annotations

import json
import re
from collections.abc import Sequence
from logging import getLogger
from pathlib import Path
from typing import TYPE_CHECKING

import numpy as np

from bayesfed.checksum import files_of
from bayesfed.errors import InputError, did_you_mean
from bayesfed.problem.data.own import Own
from bayesfed.problem.data.source import Loaded

if TYPE_CHECKING:
    import pyarrow

log = getLogger("bayesfed")
CSV = (".csv", ".tsv")  # also compressed, .csv.gz
UNNAMED = ("", "Unnamed: 0")  # what pandas calls its index in a CSV file


class Table(Own):
    """A table, one row an example: a Parquet file, a CSV file, or a folder of either; features become float64.

    The files of a folder are one table; folders in it that are called ``column=value`` are a column of text. The index
    that pandas stores is no feature.

    Args:
        path: the file or folder.
        features: input columns; null = all but the target and the client column.
        target: column of labels (numbers, text or booleans) or of real targets.
        client: column of client ids (numbers or strings); the partitioner is then skipped.
        fraction: see ``Source``.
        scaling: see ``Source``; tables often want ``standardize``.
        test_fraction: held out for testing with the run's seed.
        classes: see ``Own``.

    Raises:
        InputError: naming the option, the column or the first bad row.
    """

    expected = "a .parquet table, a .csv table or a folder of either"
    folder = True

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
        classes: int | Sequence[str | int | bool] | None = None,
    ):
        super().__init__(path, fraction=fraction, scaling=scaling, test_fraction=test_fraction, classes=classes)
        if isinstance(features, str) or (features is not None and len(features) == 0):
            raise InputError("features", features, "must be a list of column names (or null for all others)")
        self.features = None if features is None else [str(name) for name in features]
        self.target, self.client = target, client
        if self.features and len(set(self.features)) < len(self.features):
            raise InputError("features", self.features, "names a column twice")

    def files(self) -> list[Path]:
        return [self.path]

    def load(self, seed: int) -> Loaded:
        import pyarrow

        parts = self._parts()
        tables = [self._read(part) for part in parts]
        columns = tables[0][1]
        for part, (_, names) in zip(parts, tables, strict=True):
            if sorted(names) != sorted(columns):
                odd = ", ".join(sorted(set(names) ^ set(columns)))
                raise InputError("path", part, f"has not the columns of {parts[0].name}: {odd}")
        try:
            table = pyarrow.concat_tables([read for read, _ in tables], promote_options="permissive")
        except pyarrow.ArrowException as error:
            raise InputError("path", self.path, f"its files don't fit together ({_line(error)})") from error
        target = self._column("target", self.target, columns)
        client = None if self.client is None else self._column("client", self.client, columns)
        features = self.features or self._others(table, [target, client])
        for name in features:
            self._column("features", name, columns)
            if name in (target, client):
                raise InputError("features", name, "is also the target or the client column")
        if not features:
            raise InputError("features", self.features, "the table has no column besides target and client")
        x = np.stack([_numbers(table, "features", name) for name in features], axis=1)
        owners = None if client is None else _ids(table, client, written=_is_csv(parts[0]))
        y = _target(table, target)
        return self.taken(x, y, seed, client=owners, columns=features, target=("data.target", target))

    def _parts(self) -> list[Path]:
        """The files that make up the table, by name."""
        if self.path.is_file():
            return [self.path]
        files = [path for path in files_of(self.path) if not path.name.startswith("_")]
        parts = [path for path in files if _is_csv(path) or path.suffix == ".parquet"]
        if not parts or len({_is_csv(part) for part in parts}) > 1:
            reason = "holds both .parquet and .csv files" if parts else "holds no .parquet or .csv file"
            raise InputError("path", self.path, f"{reason}; needs the files of one table")
        return parts

    def _read(self, part: Path) -> tuple[pyarrow.Table, list[str]]:
        """One file, and the names of all its columns, among them ``column=value`` in its path below the folder."""
        import pyarrow
        import pyarrow.csv
        import pyarrow.parquet

        csv = _is_csv(part)
        try:
            if csv:
                text = {self.client: pyarrow.string()}  # 007 is another client than 7
                options = pyarrow.csv.ConvertOptions(column_types=text if self.client else None)
                parse = pyarrow.csv.ParseOptions(delimiter=_delimiter(part), newlines_in_values=True)
                table = pyarrow.csv.read_csv(str(part), parse_options=parse, convert_options=options)
                names = list(table.column_names)
            else:
                names = list(pyarrow.parquet.read_schema(part).names)
                asked = None if self.features is None else {*self.features, self.target, self.client}
                wanted = [name for name in names if asked is None or name in asked]
                table = pyarrow.parquet.read_table(part, columns=wanted, partitioning=None)
        except (pyarrow.ArrowException, OSError) as error:
            kind = "CSV" if csv else "Parquet"
            raise InputError("path", part, f"not a readable {kind} table ({_line(error)})") from error
        for folder in part.relative_to(self.path).parts[:-1]:
            name, equals, value = folder.partition("=")
            if equals and name not in names:
                table = table.append_column(name, pyarrow.array([value] * len(table), pyarrow.string()))
                names.append(name)
        twice = [name for name in names if names.count(name) > 1]
        if twice:
            raise InputError("path", part, f"has two columns '{twice[0]}'")
        return table, names

    def _others(self, table: pyarrow.Table, taken: Sequence[str | None]) -> list[str]:
        """All columns but ``taken`` and those that hold pandas' index."""
        stored = json.loads((table.schema.metadata or {}).get(b"pandas", b"{}")).get("index_columns", [])
        index = [name for name in (*stored, *UNNAMED) if isinstance(name, str) and name in table.column_names]
        left = [name for name in index if name not in taken]
        if left and not all(name.startswith("__index_level_") for name in left):
            names = ", ".join(map(repr, left))
            log.warning(
                "data.path=%s: %s is the index of a pandas table and no feature (data.features)", self.path, names
            )
        return [name for name in table.column_names if name not in (*taken, *left)]

    def _column(self, option: str, name: str | None, columns: Sequence[str]) -> str:
        if name is None:
            raise InputError(option, name, f"must name a column; the table has {', '.join(columns)}")
        if name not in columns:
            fix = f"no such column: {did_you_mean(name, columns)}the table has {', '.join(columns)}"
            raise InputError(option, name, fix)
        return name


def _is_csv(path: Path) -> bool:
    return any(suffix.lower() in CSV for suffix in path.suffixes)


def _delimiter(path: Path) -> str:
    """Comma, semicolon or tab: which there are most of in the first line."""
    import pyarrow

    with pyarrow.input_stream(str(path)) as stream:  # decompresses
        head = stream.read(1 << 16).split(b"\n")[0]
    return max(",;\t", key=lambda mark: head.count(mark.encode()))


def _line(error: Exception) -> str:
    return str(error).strip().splitlines()[0] if str(error).strip() else type(error).__name__


def _column_of(table: pyarrow.Table, name: str) -> pyarrow.ChunkedArray:
    """A column; one that pandas stores as categories with its values."""
    import pyarrow

    column = table.column(name)
    return column.cast(column.type.value_type) if pyarrow.types.is_dictionary(column.type) else column


def _numbers(table: pyarrow.Table, option: str, name: str) -> np.ndarray:
    """(N,) float64; a missing value becomes nan, and is refused with its row."""
    import pyarrow
    from pyarrow import types

    column = _column_of(table, name)
    kind = column.type
    if not any(test(kind) for test in (types.is_integer, types.is_floating, types.is_boolean, types.is_decimal)):
        fix = f"column must hold numbers, holds {kind}" + "; use days since a date of your choice" * types.is_temporal(
            kind
        )
        raise InputError(
            option, name, fix + "; name the columns to use with data.features=[...]" * (option == "features")
        )
    try:
        return np.array(
            column.cast(pyarrow.float64()).to_numpy()
        )  # a copy: Arrow's are read-only, which torch warns about
    except pyarrow.ArrowInvalid as error:
        raise InputError(option, name, f"column holds numbers that float64 doesn't have ({_line(error)})") from error


def _target(table: pyarrow.Table, name: str) -> np.ndarray:
    """(N,) numbers, or text as labels."""
    from pyarrow import types

    column = _column_of(table, name)
    text = types.is_string(column.type) or types.is_large_string(column.type)
    if column.null_count and not types.is_floating(column.type):
        row = int(np.argmax(column.is_null().to_numpy()))
        raise InputError("target", name, f"{column.null_count} rows have no value, the first is row {row}")
    if text:
        return column.to_numpy().astype(str)
    if types.is_boolean(column.type) or types.is_integer(column.type) or types.is_floating(column.type):
        return np.array(column.to_numpy())
    return _numbers(table, "target", name)


def _ids(table: pyarrow.Table, name: str, written: bool) -> np.ndarray:
    """Ids of a column; those ``written`` in a file of text are numbers if all are written as numbers are."""
    column = _column_of(table, name)
    values = column.to_numpy()
    missing = column.null_count or (int((values == "").sum()) if values.dtype.kind == "O" else 0)
    if missing:
        raise InputError("client", name, f"{missing} rows have no client id")
    if values.dtype.kind != "O":
        return values
    values = values.astype(str)
    numbers = written and all(re.fullmatch("0|-?[1-9][0-9]{0,15}", text) for text in np.unique(values))
    return values.astype(np.int64) if numbers else values
