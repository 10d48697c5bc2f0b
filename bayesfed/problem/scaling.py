"""Affine scaling of inputs, fitted on the training rows only."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass, field
from typing import Any

import numpy as np
import torch
from torch import Tensor

from bayesfed.errors import InputError
from bayesfed.problem.inputs import Arrays, scalable

KINDS = ("raw", "unit", "standardize")
_ROWS_AT_ONCE = 4096  # bounds the memory of the statistics: a data set may be memory-mapped


@dataclass(frozen=True, eq=False)
class Scaling:
    """``scaled = (x - offset) * factor``.

    Attributes:
        offset: float64, broadcastable to one example.
        factor: float64, broadcastable to one example.
    """

    offset: Tensor
    factor: Tensor
    is_identity: bool = field(init=False)
    _constants: dict[tuple[torch.dtype, torch.device], tuple[Tensor | None, Tensor]] = field(
        init=False, repr=False, default_factory=dict
    )

    def __post_init__(self) -> None:
        offset = torch.as_tensor(self.offset, dtype=torch.float64, device="cpu")
        factor = torch.as_tensor(self.factor, dtype=torch.float64, device="cpu")
        object.__setattr__(self, "offset", offset)
        object.__setattr__(self, "factor", factor)
        object.__setattr__(self, "is_identity", not bool((offset != 0).any() or (factor != 1).any()))

    @classmethod
    def identity(cls) -> Scaling:
        """Leaves values as they are."""
        return cls(torch.tensor(0.0, dtype=torch.float64), torch.tensor(1.0, dtype=torch.float64))

    def __call__(self, x: Tensor, dtype: torch.dtype | None = None) -> Tensor:
        """Scaled copy of ``x`` in ``dtype`` (default: that of ``x``, or float32 for integers)."""
        if dtype is None:
            dtype = x.dtype if x.is_floating_point() else torch.float32
        return self.convert(x, dtype, x.device, owned=False)

    def convert(self, x: Tensor, dtype: torch.dtype, device: torch.device | str, *, owned: bool) -> Tensor:
        """Move, cast and scale; in place where ``x`` is ``owned`` (a fresh copy) or casting made one.

        float64 inputs are scaled before they are narrowed: (x - offset) cancels digits that float32 does not have.
        """
        work = torch.promote_types(x.dtype, dtype) if x.is_floating_point() else dtype
        moved = x.to(device=device, dtype=work)
        if not self.is_identity:
            offset, factor = self._cast(work, moved.device)
            if moved is x and not owned:
                moved = moved.clone()
            if offset is not None:
                moved.sub_(offset)
            moved.mul_(factor)
        return moved.to(dtype)

    def description(self) -> dict[str, Any]:
        """Plain JSON, exact (Python prints float64 so that it reads back to the same bits)."""
        return {"offset": self.offset.tolist(), "factor": self.factor.tolist()}

    @classmethod
    def from_description(cls, description: dict[str, Any]) -> Scaling:
        """Inverse of ``description``."""
        values = (torch.tensor(description[key], dtype=torch.float64) for key in ("offset", "factor"))
        return cls(*values)

    def _cast(self, dtype: torch.dtype, device: torch.device) -> tuple[Tensor | None, Tensor]:
        key = (dtype, device)
        if key not in self._constants:
            offset = self.offset.to(device, dtype) if bool((self.offset != 0).any()) else None
            self._constants[key] = (offset, self.factor.to(device, dtype))
        return self._constants[key]


def fit_scaling(kind: str, x: Arrays, rows: np.ndarray, maximum: float | None) -> Scaling:
    """The scaling ``kind`` for ``x[rows]``.

    Statistics are per feature for tables (N, F), per channel for images (N, C, H, W), one value for (N, H, W). Features
    that are constant on the training rows are centred (or moved to 0) but not stretched.

    Args:
        kind: ``raw`` (values as stored), ``unit`` (divide by ``maximum``; without one, map the training range to
            [0, 1]) or ``standardize`` (training mean 0, standard deviation 1).
        x: (N, ...) all rows; or whole numbers, or several arrays, which only ``raw`` leaves be.
        rows: (n,) the training rows.
        maximum: the largest value the source can hold (255 for 8-bit images), if it has one.

    Raises:
        InputError: statistics of whole numbers or of several arrays.
    """
    if kind == "raw":
        return Scaling.identity()
    if not scalable(x):
        raise InputError("scaling", kind, "whole numbers and inputs of several arrays are taken as they are: use raw")
    if kind == "unit" and maximum is not None:
        return Scaling(torch.tensor(0.0), torch.tensor(1.0, dtype=torch.float64) / maximum)
    if kind == "unit":
        low, high = _extremes(x, rows)
        return _affine(low, high - low)
    mean = _mean(x, rows, None)
    return _affine(mean, np.sqrt(_mean(x, rows, mean)))


def _affine(offset: np.ndarray, spread: np.ndarray) -> Scaling:
    # rounding leaves a constant column a tiny spread; dividing by it would blow up noise on new data
    flat = spread <= 1e-12 * np.maximum(np.abs(offset), 1e-300)
    return Scaling(torch.from_numpy(offset.copy()), torch.from_numpy(1.0 / np.where(flat, 1.0, spread)))


def _chunks(x: np.ndarray, rows: np.ndarray) -> Iterator[np.ndarray]:
    for start in range(0, len(rows), _ROWS_AT_ONCE):
        yield x[rows[start : start + _ROWS_AT_ONCE]].astype(np.float64)


def _axes(x: np.ndarray) -> tuple[int, ...]:
    """Axes a statistic runs over, within an example of x and over examples."""
    return {2: (0,), 3: (0, 1, 2)}.get(x.ndim, (0, *range(2, x.ndim)))


def _mean(x: np.ndarray, rows: np.ndarray, centre: np.ndarray | None) -> np.ndarray:
    """Mean of x, or of (x - centre)^2: two passes, since one loses digits where the mean dwarfs the spread."""
    axes, total, count = _axes(x), np.zeros(()), 0
    for chunk in _chunks(x, rows):
        values = chunk if centre is None else (chunk - centre) ** 2
        total = total + values.sum(axis=axes, keepdims=True)[0]
        count += int(np.prod([chunk.shape[axis] for axis in axes]))
    return np.asarray(total / count)


def _extremes(x: np.ndarray, rows: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    axes = _axes(x)
    lows = [chunk.min(axis=axes, keepdims=True)[0] for chunk in _chunks(x, rows)]
    highs = [chunk.max(axis=axes, keepdims=True)[0] for chunk in _chunks(x, rows)]
    return np.min(lows, axis=0), np.max(highs, axis=0)
