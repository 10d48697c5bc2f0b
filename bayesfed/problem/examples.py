"""Rows of a data set, as a view."""

from __future__ import annotations

from dataclasses import dataclass, field

import torch
from torch import Tensor

from bayesfed.problem.scaling import Scaling


@dataclass(frozen=True, eq=False)
class Examples:
    """Some rows of shared (often memory-mapped) arrays; never a copy of them.

    Attributes:
        x: (N, ...) uint8 or float, as stored.
        y: (N,) int64 class labels, or (N,) / (N, D) float targets.
        index: (n,) int64 rows of ``x`` and ``y`` that belong to this set; None = all.
        scaling: applied to every batch of ``x``.
    """

    x: Tensor
    y: Tensor
    index: Tensor | None = None
    scaling: Scaling = field(default_factory=Scaling.identity)

    def __len__(self) -> int:
        return len(self.x) if self.index is None else len(self.index)

    def subset(self, positions: Tensor) -> Examples:
        """The rows at ``positions`` (n,) int64 within this set, as a view."""
        index = positions if self.index is None else self.index[positions]
        return Examples(self.x, self.y, index, self.scaling)

    def batch(self, positions: Tensor | slice, dtype: torch.dtype, device: torch.device | str) -> tuple[Tensor, Tensor]:
        """Gather rows, move them, scale them.

        Args:
            positions: (B,) int64 or a slice, within this set.
            dtype: of the inputs and of float targets; integer labels stay int64.
            device: where both go.

        Returns:
            x (B, ...) and y (B,) or (B, D). Where nothing has to be cast or scaled a slice gives a view:
            don't write to it.
        """
        rows = positions if self.index is None else self.index[positions]
        if isinstance(rows, slice):
            x, y = self.x[rows], self.y[rows]
        else:
            x, y = self.x.index_select(0, rows), self.y.index_select(0, rows)
        x = self.scaling.convert(x, dtype, device, owned=not isinstance(rows, slice))
        return x, y.to(device=device, dtype=dtype) if y.is_floating_point() else y.to(device=device)

    def targets(self) -> Tensor:
        """y of the rows in this set: (n,) or (n, D)."""
        return self.y if self.index is None else self.y[self.index]
