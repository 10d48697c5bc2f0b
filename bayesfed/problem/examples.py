"""Rows of a data set, as a view."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, field, replace

import torch
from torch import Tensor

from bayesfed.problem.inputs import Inputs, cut, each, moved, scalable
from bayesfed.problem.scaling import Scaling
from bayesfed.problem.shift import ClientShift


@dataclass(frozen=True, eq=False)
class Examples:
    """Some rows of shared (often memory-mapped) arrays; never a copy of them.

    Attributes:
        x: (N, ...) as stored, or several such tensors by name.
        y: (N,) int64 class labels, or (N,) / (N, D) float targets.
        index: (n,) int64 rows of ``x`` and ``y`` that belong to this set; None = all.
        scaling: applied to every batch of ``x`` (one tensor of floats or bytes; nothing else is scaled or cast).
        shift: of the client whose examples these are, applied before the scaling; None = none.
    """

    x: Inputs
    y: Tensor
    index: Tensor | None = None
    scaling: Scaling = field(default_factory=Scaling.identity)
    shift: ClientShift | None = None

    def __len__(self) -> int:
        return len(self.y) if self.index is None else len(self.index)

    def subset(self, positions: Tensor) -> Examples:
        """The rows at ``positions`` (n,) int64 within this set, as a view."""
        index = positions if self.index is None else self.index[positions]
        return replace(self, index=index)

    def batch(
        self, positions: Tensor | slice, dtype: torch.dtype, device: torch.device | str, *, trim: bool = True
    ) -> tuple[Inputs, Tensor]:
        """Gather rows, move them, scale them: ``x`` is what the model takes.

        Args:
            positions: (B,) int64 or a slice, within this set.
            dtype: of the inputs and of float targets; integer labels stay int64.
            device: where both go.
            trim: cut padded rows to the longest of the batch.

        Returns:
            x (B, ...) and y (B,) or (B, D). Where nothing has to be cast or scaled a slice gives a view:
            don't write to it.
        """
        rows = positions if self.index is None else self.index[positions]
        x, y = each(lambda stored: _rows(stored, rows), self.x), _rows(self.y, rows)
        owned = not isinstance(rows, slice)
        if self.shift is not None:
            y = self.shift.targets(y)
        if not scalable(x):
            return moved(cut(x) if trim else x, dtype, device), moved(y, dtype, device)
        if self.shift is not None:
            work = torch.promote_types(x.dtype, dtype) if x.is_floating_point() else dtype
            shifted = self.shift.inputs(x.to(device=device, dtype=work))
            owned, x = owned or shifted is not x, shifted
        return self.scaling.convert(x, dtype, device, owned=owned), moved(y, dtype, device)

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

    def batch(self, positions: slice, dtype: torch.dtype, device: torch.device | str) -> tuple[Inputs, Tensor]:
        """:meth:`Examples.batch` for a slice without step."""
        pieces, begin = [], 0
        start, stop, _ = positions.indices(len(self))
        for part in self.parts:
            low, high = max(start - begin, 0), min(stop - begin, len(part))
            if low < high:
                pieces.append(part.batch(slice(low, high), dtype, device, trim=False))
            begin += len(part)
        x, y = zip(*pieces, strict=True)
        first = x[0]
        joined = {n: torch.cat([p[n] for p in x]) for n in first} if isinstance(first, dict) else torch.cat(x)
        return cut(joined), torch.cat(y)

    def targets(self) -> Tensor:
        """y of all sets: (n,) or (n, D)."""
        return torch.cat([part.targets() for part in self.parts])


def _rows(stored: Tensor, rows: Tensor | slice) -> Tensor:
    return stored[rows] if isinstance(rows, slice) else stored.index_select(0, rows)
