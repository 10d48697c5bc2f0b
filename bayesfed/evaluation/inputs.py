"""The inputs of a test set, scaled and in batches."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from typing import Protocol

import torch
from torch import Tensor

from bayesfed.errors import integer
from bayesfed.problem.flat import FlatModel
from bayesfed.problem.inputs import Inputs, arrays_of

CPU_BATCH = 512  # rows in a forward pass: few enough for a core's caches, and for every core to have several batches
GPU_BATCH = 2048
CACHE_BYTES = 2**27  # scaled inputs up to 128 MiB (10,000 float32 CIFAR images) are kept between draws


class EvaluationSet(Protocol):
    """What is needed of ``bayesfed.problem`` examples."""

    def __len__(self) -> int: ...
    def batch(self, positions: slice, dtype: torch.dtype, device: torch.device) -> tuple[Inputs, Tensor]: ...
    def targets(self) -> Tensor: ...


class InputBatches:
    """Inputs as the model takes them, in batches, iterated once for every draw of the parameters.

    Converting and scaling can cost as much as a small model, so the batches are kept if all of them fit in
    ``CACHE_BYTES``; otherwise each pass makes them anew.

    Args:
        load: gives the inputs of a slice of rows.
        count: number of rows N.
        batch_size: rows in one batch.
    """

    def __init__(self, load: Callable[[slice], Inputs], count: int, batch_size: int):
        self._load, self.count = load, count
        self._slices = [slice(start, min(start + batch_size, count)) for start in range(0, count, batch_size)]
        self._kept: list[Inputs] = []
        self._keep = True

    def __len__(self) -> int:
        return len(self._slices)

    def __iter__(self) -> Iterator[tuple[slice, Inputs]]:
        for position, rows in enumerate(self._slices):
            if position < len(self._kept):
                yield rows, self._kept[position]
                continue
            x = self._load(rows)
            size = sum(array.nbytes / len(array) for array in arrays_of(x)) * self.count  # bytes of all rows
            self._keep = self._keep and size <= CACHE_BYTES
            if self._keep:
                self._kept.append(x)
            yield rows, x


def input_batches(model: FlatModel, examples: EvaluationSet, batch_size: int | None) -> InputBatches:
    """The scaled inputs of ``examples`` where the model lives; ``batch_size`` as in :func:`evaluate`."""
    if len(examples) == 0:
        raise ValueError("there are no examples to evaluate on")
    integer("batch_size", batch_size, at_least=1, optional=True)
    vector = model.vector
    size = batch_size or (CPU_BATCH if vector.device.type == "cpu" else GPU_BATCH)
    return InputBatches(lambda rows: examples.batch(rows, vector.dtype, vector.device)[0], len(examples), size)
