"""Messages: named arrays and plain values, as Flower records."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import numpy as np
import torch
from flwr.app import Array, ArrayRecord, ConfigRecord
from torch import Tensor

from bayesfed.profiling import timed

DTYPES = {"float32": torch.float32, "float64": torch.float64}


class BadMessage(ValueError):
    """A message whose content is not what the protocol says; the text says what was wrong."""


@timed("pack")
def pack(arrays: Mapping[str, Tensor]) -> ArrayRecord:
    """Named tensors as an ``ArrayRecord`` (moved to the CPU, dtype kept)."""
    return ArrayRecord({name: Array(value.detach().cpu().numpy()) for name, value in arrays.items()})


@timed("unpack")
def unpack(record: object, shapes: Mapping[str, tuple[int, ...]], dtype: torch.dtype) -> dict[str, Tensor]:
    """The tensors of an ``ArrayRecord``, after checking names, shapes and dtype.

    Raises:
        BadMessage: naming what differs.
    """
    if not isinstance(record, ArrayRecord):
        raise BadMessage(f"expected arrays {sorted(shapes)}, got {type(record).__name__}")
    if set(record) != set(shapes):
        raise BadMessage(f"expected arrays {sorted(shapes)}, got {sorted(record)}")
    tensors = {}
    for name, shape in shapes.items():
        try:
            values = np.asarray(record[name].numpy())
        except (ValueError, TypeError, EOFError, OSError) as error:
            raise BadMessage(f"array '{name}' cannot be read: {error}") from error
        if values.shape != tuple(shape):
            raise BadMessage(f"array '{name}' has shape {values.shape}, expected {tuple(shape)}")
        if values.dtype != np.dtype(str(dtype).removeprefix("torch.")):
            raise BadMessage(f"array '{name}' has dtype {values.dtype}, expected {dtype}")
        tensors[name] = torch.from_numpy(values)
    return tensors


def nbytes(record: ArrayRecord) -> int:
    """Payload of the arrays in bytes."""
    return sum(len(array.data) for array in record.values())


def value(record: object, name: str, kind: type) -> Any:
    """A plain value of a ``ConfigRecord``.

    Raises:
        BadMessage: it is missing or of another type.
    """
    if not isinstance(record, ConfigRecord) or name not in record:
        raise BadMessage(f"value '{name}' is missing")
    found = record[name]
    if kind is float and isinstance(found, int) and not isinstance(found, bool):
        found = float(found)
    if type(found) is not kind:
        raise BadMessage(f"value '{name}' is {found!r}, expected a {kind.__name__}")
    return found
