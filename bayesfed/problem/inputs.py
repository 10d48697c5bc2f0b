"""What a model takes: a tensor, or named tensors, of any dtype; rows of different length are padded and masked."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any

import numpy as np
import torch
from torch import Tensor

from bayesfed.errors import InputError

Inputs = Any  # a Tensor, or a dict of them by name: what ``model(x)`` takes
Arrays = Any  # the same of NumPy arrays: what a data source gives
Shape = Any  # of one example: tuple[int, ...], or a dict of them
MASK = "mask"  # the array of a dict that says which places of padded rows are real


def _is_float(x: Tensor | np.ndarray) -> bool:
    return x.is_floating_point() if isinstance(x, Tensor) else x.dtype.kind == "f"


def each(function: Callable[[Any], Any], x: Any) -> Any:
    """``function`` of a tensor or array, or of every one of a dict."""
    return {name: function(value) for name, value in x.items()} if isinstance(x, dict) else function(x)


def arrays_of(x: Any) -> list[Any]:
    """The tensor or array, or those of a dict, as a list."""
    return list(x.values()) if isinstance(x, dict) else [x]


def padded(rows: Sequence[np.ndarray | Sequence[Any]], name: str = "tokens", fill: float = 0) -> dict[str, np.ndarray]:
    """Rows of different length as inputs of a data source: ``{name: (N, L, ...), "mask": (N, L) bool}``.

    L is the longest row's length; places beyond a row's end hold ``fill`` and are False in the mask. A batch is cut to
    its longest row, so that what a model computes must not depend on masked places, nor on how many there are.
    """
    arrays = [np.asarray(row) for row in rows]
    lengths = np.array([len(array) for array in arrays])
    mask = np.arange(lengths.max(initial=1)) < lengths[:, None]
    values = np.full((*mask.shape, *arrays[0].shape[1:]), fill, dtype=np.result_type(*{a.dtype for a in arrays}))
    values[mask] = np.concatenate(arrays)
    return {name: values, MASK: mask}


def cut(x: Inputs) -> Inputs:
    """A batch without the places at either end that are padding in every row, as views."""
    if not isinstance(x, dict) or MASK not in x:
        return x
    real = x[MASK].any(0).nonzero()
    if not len(real):
        return x
    width, span = x[MASK].shape[1], slice(int(real[0]), int(real[-1]) + 1)
    return {name: v[:, span] if v.dim() > 1 and v.shape[1] == width else v for name, v in x.items()}


def scalable(x: Inputs | Arrays) -> bool:
    """Whether it is one array of floats, or of bytes as images are, which is scaled and cast to the run's dtype."""
    return not isinstance(x, dict) and (_is_float(x) or x.dtype == (torch.uint8 if isinstance(x, Tensor) else np.uint8))


def moved(x: Inputs, dtype: torch.dtype, device: torch.device | str) -> Inputs:
    """On ``device``: floats in ``dtype``, everything else as it is."""
    return each(lambda v: v.to(device=device, dtype=dtype if v.is_floating_point() else None), x)


def shape_of(x: Inputs | Arrays) -> Shape:
    """Of one example."""
    return each(lambda v: tuple(v.shape[1:]), x)


def dtypes_of(x: Inputs | Arrays) -> str | dict[str, str]:
    """``float``, or the exact type of other numbers: int64, bool ..."""
    return each(lambda v: "float" if _is_float(v) else str(v.dtype).removeprefix("torch."), x)


def tensors(x: Arrays) -> Inputs:
    """The same memory."""
    return each(torch.from_numpy, x)


def check_arrays(name: str, x: Arrays, rows: int) -> None:
    """Whether ``x`` are inputs of ``rows`` examples.

    Raises:
        InputError: naming the array that has another number of rows, isn't of numbers, or is no mask.
    """
    named = {f"{name}.{key}": array for key, array in x.items()} if isinstance(x, dict) else {name: x}
    if not named:
        raise InputError(name, "{}", "needs at least one array")
    for key, array in named.items():
        if not isinstance(array, np.ndarray) or array.dtype.kind not in "fiub":
            kind = getattr(array, "dtype", type(array).__name__)
            raise InputError(key, kind, "must be an array of numbers (rows of different length: problem.inputs.padded)")
        if array.ndim == 0 or len(array) != rows:
            raise InputError(key, f"array of shape {array.shape}", f"needs one row for each of the {rows} targets")
    if isinstance(x, dict) and MASK in x and (x[MASK].ndim != 2 or x[MASK].dtype != np.bool_):
        fix = "says which places of padded rows are real: (N, L) booleans"
        raise InputError(f"{name}.{MASK}", f"{x[MASK].dtype} array of shape {x[MASK].shape}", fix)
