"""The two partitioners that do not look at labels."""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np

from bayesfed.errors import InputError
from bayesfed.problem.partition.partitioner import NO_CLIENTS, Partitioner
from bayesfed.seeding import numpy_generator


class Iid(Partitioner):
    """A random permutation cut into K parts whose sizes differ by at most one.

    Args:
        num_clients: K; null = 10.
    """

    name = "iid"

    def assign(self, labels: np.ndarray | None, num_examples: int, clients: int, seed: int) -> Sequence[np.ndarray]:
        order = numpy_generator(seed, "partition", "iid").permutation(num_examples)
        return [np.sort(part) for part in np.array_split(order, clients)]


class NaturalId(Partitioner):
    """The split that a client column gives; says so if the data have none.

    Args:
        num_clients: null, or the number of distinct ids.
    """

    name = "natural_id"

    def assign(self, labels: np.ndarray | None, num_examples: int, clients: int, seed: int) -> Sequence[np.ndarray]:
        raise InputError("partition", self.name, NO_CLIENTS)
