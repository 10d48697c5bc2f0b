"""Image classification sets in the Hugging Face column layout."""

from __future__ import annotations

import os
from collections.abc import Iterable
from pathlib import Path
from typing import NamedTuple

import numpy as np

from bayesfed.errors import InputError, choice
from bayesfed.problem.data.decoding import decoded
from bayesfed.problem.data.source import Loaded, Source

IMAGE_COLUMNS, LABEL_COLUMNS = ("image", "img"), ("fine_label", "label")


class _Known(NamedTuple):
    repository: str
    num_classes: int


KNOWN = {
    "mnist": _Known("ylecun/mnist", 10),
    "fashion_mnist": _Known("zalando-datasets/fashion_mnist", 10),
    "cifar10": _Known("uoft-cs/cifar10", 10),
    "cifar100": _Known("uoft-cs/cifar100", 100),
}


class Images(Source):
    """MNIST, Fashion-MNIST, CIFAR-10 or CIFAR-100 as (N, C, H, W) uint8, decoded once and memory-mapped from then on.

    Args:
        dataset: ``mnist``, ``fashion_mnist``, ``cifar10`` or ``cifar100``.
        path: folder with ``train.parquet`` and ``test.parquet`` (columns ``image`` or ``img`` = {bytes, path},
            ``label`` or ``fine_label``). null = ``$BAYESFED_DATA/<dataset>`` if that is set, else Hugging Face.
        fraction: see ``Source``.
        scaling: see ``Source``; ``unit`` divides by 255.

    Raises:
        InputError: naming the option and, for missing data, what to do.
    """

    def __init__(self, dataset: str, path: str | None = None, *, fraction: float = 1.0, scaling: str = "unit"):
        super().__init__(fraction=fraction, scaling=scaling)
        choice("dataset", dataset, KNOWN)
        self.dataset, self.path = dataset, path

    @property
    def folder(self) -> str | None:
        """Where the files lie; None: on Hugging Face."""
        root = os.environ.get("BAYESFED_DATA")
        return self.path if self.path is not None else str(Path(root) / self.dataset) if root else None

    def files(self) -> list[Path]:
        return [] if self.folder is None else [Path(self.folder) / f"{split}.parquet" for split in ("train", "test")]

    def load(self, seed: int) -> Loaded:
        folder = self.folder
        (x, y), (test_x, test_y) = (
            self._local(Path(folder).expanduser(), split) if folder else self._download(split)
            for split in ("train", "test")
        )
        if x.shape[1:] != test_x.shape[1:]:
            fix = f"training images have shape {x.shape[1:]}, test images {test_x.shape[1:]}"
            raise InputError("path", folder, fix)
        return Loaded(x, y, test_x, test_y, num_classes=KNOWN[self.dataset].num_classes, maximum=255.0)

    def _local(self, folder: Path, split: str) -> tuple[np.ndarray, np.ndarray]:
        file = folder / f"{split}.parquet"
        if not file.is_file():
            missing = f"{split}.parquet is missing" if folder.is_dir() else "no such folder"
            fix = f"{missing}; needs a folder with train.parquet and test.parquet (columns image, label)"
            raise InputError("path", folder, fix)
        import pyarrow
        import pyarrow.parquet

        try:
            names = pyarrow.parquet.read_schema(file).names
            image = _first(file, IMAGE_COLUMNS, names)
            label = _first(file, LABEL_COLUMNS, names)
            labels = pyarrow.parquet.read_table(file, columns=[label]).column(label).to_numpy()
        except (pyarrow.ArrowException, OSError) as error:
            raise InputError("path", file, f"not a readable Parquet table ({error})") from error

        if len(labels) == 0:
            raise InputError("path", file, "holds no images")

        def encoded() -> list[bytes]:
            table = pyarrow.parquet.read_table(file, columns=[image])
            column = table.column(image).combine_chunks()
            if not pyarrow.types.is_struct(column.type):
                raise InputError("path", file, f"column {image} must be {{bytes, path}}, is {column.type}")
            return column.field("bytes").to_pylist()

        stat = file.stat()
        key = f"{file.resolve()}|{stat.st_size}|{stat.st_mtime_ns}"
        return self._checked(decoded(f"{self.dataset}-{split}", key, encoded), labels, file)

    def _download(self, split: str) -> tuple[np.ndarray, np.ndarray]:
        repository = KNOWN[self.dataset].repository
        try:
            import datasets  # slow to import

            rows = datasets.load_dataset(repository, split=split)
            image = next(name for name in IMAGE_COLUMNS if name in rows.column_names)
            label = next(name for name in LABEL_COLUMNS if name in rows.column_names)
            rows = rows.cast_column(image, datasets.Image(decode=False))
        except Exception as error:  # the library lets errors of a dozen kinds through
            reason = str(error).strip().splitlines()[0] if str(error).strip() else type(error).__name__
            fix = (
                f"could not fetch '{repository}' from Hugging Face ({reason}). Offline: set data.path=DIR with "
                f"train.parquet and test.parquet, or BAYESFED_DATA=ROOT with them in ROOT/{self.dataset}/; "
                "data=digits needs no download"
            )
            raise InputError("path", self.path, fix) from error

        def encoded() -> Iterable[bytes]:
            return (row["bytes"] for row in rows[image])

        key = f"huggingface|{repository}|{split}|{rows._fingerprint}"
        return self._checked(decoded(f"{self.dataset}-{split}", key, encoded), np.asarray(rows[label]), repository)

    def _checked(self, x: np.ndarray, labels: np.ndarray, source: object) -> tuple[np.ndarray, np.ndarray]:
        classes = KNOWN[self.dataset].num_classes
        wrong = (labels < 0) | (labels >= classes) if labels.dtype.kind in "iu" else np.ones(len(labels), dtype=bool)
        if wrong.any():
            row = int(np.argmax(wrong))
            fix = f"label of row {row} is {labels[row]}; {self.dataset} has whole-number labels 0..{classes - 1}"
            raise InputError("path", source, fix)
        return x, labels.astype(np.int64)


def _first(file: Path, wanted: Iterable[str], names: Iterable[str]) -> str:
    present = [name for name in wanted if name in names]
    if not present:
        raise InputError("path", file, f"has no column {' or '.join(wanted)}; columns: {', '.join(names)}")
    return present[0]
