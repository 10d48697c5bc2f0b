"""flwr-datasets' partitioners that fix sizes and leave classes to chance (quantity skew)."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import numpy as np

from bayesfed.errors import number
from bayesfed.problem.partition.flower import FlowerPartitioner, check_sum, clients_of
from bayesfed.seeding import numpy_generator


class _BySize(FlowerPartitioner):
    """Sizes that grow with the client id. flwr-datasets cuts the rows in order, so they are shuffled first."""

    def assign(self, labels: np.ndarray | None, num_examples: int, clients: int, seed: int) -> Sequence[np.ndarray]:
        order = numpy_generator(seed, "partition", "order").permutation(num_examples)
        return [np.sort(order[part]) for part in super().assign(None, num_examples, clients, seed)]

    def arguments(self, clients: int, seed: int) -> dict[str, Any]:
        return {"num_partitions": clients}


class Linear(_BySize):
    """Client k's size is proportional to k + 1."""

    name = "linear"
    kind = "LinearPartitioner"


class Square(_BySize):
    """Client k's size is proportional to (k + 1)^2."""

    name = "square"
    kind = "SquarePartitioner"


class Exponential(_BySize):
    """Client k's size is proportional to exp(k + 1)."""

    name = "exponential"
    kind = "ExponentialPartitioner"


class IdToSize(_BySize):
    """Client k's size is proportional to (k + 1)^power (flwr-datasets' IdToSizeFncPartitioner).

    Args:
        num_clients: K; null = 10.
        power: 0 gives equal sizes, 1 those of ``linear``, 2 those of ``square``.
    """

    name = "id_to_size"
    kind = "IdToSizeFncPartitioner"

    def __init__(self, num_clients: int | None = None, *, power: float = 1.5):
        super().__init__(num_clients)
        number("power", power, at_least=0)
        self.power = float(power)

    def arguments(self, clients: int, seed: int) -> dict[str, Any]:
        # flwr-datasets counts clients from 1 here
        return super().arguments(clients, seed) | {"partition_id_to_size_fn": lambda k: k**self.power}


class Size(_BySize):
    """Sizes as listed; examples beyond their sum stay unused (flwr-datasets' SizePartitioner).

    Args:
        num_clients: null, or the number of ``sizes``.
        sizes: examples of each client.
    """

    name = "size"
    kind = "SizePartitioner"

    def __init__(self, num_clients: int | None = None, *, sizes: Sequence[int] = (500, 250, 125)):
        super().__init__(clients_of(num_clients, sizes))
        self.sizes = [int(size) for size in sizes]

    def assign(self, labels: np.ndarray | None, num_examples: int, clients: int, seed: int) -> Sequence[np.ndarray]:
        check_sum(self.sizes, num_examples)
        return super().assign(labels, num_examples, clients, seed)

    def arguments(self, clients: int, seed: int) -> dict[str, Any]:
        return {"partition_sizes": self.sizes}
