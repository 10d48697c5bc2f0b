"""Rows of a data set, as a view."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, field, replace

import torch
from torch import Tensor

from bayesfed.problem.scaling import Scaling
from bayesfed.problem.shift import ClientShift


@dataclass(frozen=True, eq=False)
class Examples:
    """Some rows of shared (often memory-mapped) arrays; never a copy of them.

    Attributes:
        x: (N, ...) uint8 or float, as stored.
        y: (N,) int64 class labels, or (N,) / (N, D) float targets.
        index: (n,) int64 rows of ``x`` and ``y`` that belong to this set; None = all.
        scaling: applied to every batch of ``x``.
        shift: of the client whose examples these are, applied before the scaling; None = none.
    """

    x: Tensor
    y: Tensor
    index: Tensor | None = None
    scaling: Scaling = field(default_factory=Scaling.identity)
    shift: ClientShift | None = None

    def __len__(self) -> int:
        return len(self.x) if self.index is None else len(self.index)

    def subset(self, positions: Tensor) -> Examples:
        """The rows at ``positions`` (n,) int64 within this set, as a view."""
        index = positions if self.index is None else self.index[positions]
        return replace(self, index=index)

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
        owned = not isinstance(rows, slice)
        if self.shift is not None:
            work = torch.promote_types(x.dtype, dtype) if x.is_floating_point() else dtype
            shifted = self.shift.inputs(x.to(device=device, dtype=work))
            owned, x, y = owned or shifted is not x, shifted, self.shift.targets(y)
        x = self.scaling.convert(x, dtype, device, owned=owned)
        return x, y.to(device=device, dtype=dtype) if y.is_floating_point() else y.to(device=device)

    def targets(self) -> Tensor:
        """y of the rows in this set: (n,) or (n, D)."""
        y = self.y if self.index is None else self.y[self.index]
        return y if self.shift is None else self.shift.targets(y)


@dataclass(frozen=True, eq=False)
class Joined:
    """Several sets one after the other, for a single pass over all of them.

    Attributes:
        parts: the sets.
    """

    parts: Sequence[Examples]

    def __len__(self) -> int:
        return sum(len(part) for part in self.parts)

    def batch(self, positions: slice, dtype: torch.dtype, device: torch.device | str) -> tuple[Tensor, Tensor]:
        """:meth:`Examples.batch` for a slice without step."""
        pieces, begin = [], 0
        start, stop, _ = positions.indices(len(self))
        for part in self.parts:
            low, high = max(start - begin, 0), min(stop - begin, len(part))
            if low < high:
                pieces.append(part.batch(slice(low, high), dtype, device))
            begin += len(part)
        x, y = zip(*pieces, strict=True)
        return torch.cat(x), torch.cat(y)

    def targets(self) -> Tensor:
        """y of all sets: (n,) or (n, D)."""
        return torch.cat([part.targets() for part in self.parts])
