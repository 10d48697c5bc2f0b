"""The pathological MNIST split of the Bayes-ADMM experiments."""

from __future__ import annotations

from collections.abc import Sequence
from logging import getLogger

import numpy as np

from bayesfed.errors import InputError, integer
from bayesfed.problem.partition.partitioner import Partitioner
from bayesfed.seeding import numpy_generator

log = getLogger("bayesfed")


class TwoClassesPerClient(Partitioner):
    """Each client holds equally many examples of two classes (``hetmnist`` in the code of arXiv 2506.13150).

    A client's first class is the least used one so far, its second a random other class with fewer than 2K/C uses; if
    no other class has room (where the reference loops for ever), the least used other class. When a class has too few
    unused rows left, its last ``examples_per_class`` rows are handed out again, with a warning: those clients share
    data. Rows beyond what the clients need stay unused.

    Args:
        num_clients: K; null = 100.
        examples_per_class: of each of the two classes; a client has twice as many.

    Raises:
        InputError: naming the option, or the class that is too small.
    """

    name = "two_classes_per_client"
    default_clients = 100
    needs_labels = True

    def __init__(self, num_clients: int | None = None, *, examples_per_class: int = 300):
        super().__init__(num_clients)
        integer("examples_per_class", examples_per_class, at_least=1)
        self.examples_per_class = examples_per_class

    def assign(self, labels: np.ndarray | None, num_examples: int, clients: int, seed: int) -> Sequence[np.ndarray]:
        assert labels is not None
        classes, sizes = np.unique(labels, return_counts=True)
        if len(classes) < 2:
            raise InputError("partition", self.name, "needs at least two classes")
        if sizes.min() < self.examples_per_class:
            smallest = int(np.argmin(sizes))
            fix = f"class {classes[smallest]} has only {sizes[smallest]} training examples"
            raise InputError("examples_per_class", self.examples_per_class, fix)
        generator = numpy_generator(seed, "partition", "two_classes_per_client")
        rows = [generator.permutation(np.flatnonzero(labels == label)) for label in classes]
        taken, shared = np.zeros(len(classes), dtype=np.int64), 0
        parts = []
        for pair in choose_pairs(clients, len(classes), generator):
            slices = []
            for chosen in pair:
                start = int(taken[chosen])
                if start + self.examples_per_class > sizes[chosen]:
                    start, shared = int(sizes[chosen]) - self.examples_per_class, shared + 1
                slices.append(rows[chosen][start : start + self.examples_per_class])
                taken[chosen] += self.examples_per_class
            parts.append(np.sort(np.concatenate(slices)))
        if shared:
            text = f"two_classes_per_client: classes ran out {shared} times; those clients share examples with others"
            log.warning(text)
        return parts


def choose_pairs(clients: int, classes: int, generator: np.random.Generator) -> list[tuple[int, int]]:
    """Two different classes for each client, each class used about 2K/C times."""
    room = -(-2 * clients // classes)  # rounded up
    uses = np.zeros(classes, dtype=np.int64)
    pairs = []
    for _ in range(clients):
        first = int(np.argmin(uses))
        uses[first] += 1
        others = np.delete(np.arange(classes), first)
        free = others[uses[others] < room]
        second = int(generator.choice(free)) if len(free) else int(others[np.argmin(uses[others])])
        uses[second] += 1
        pairs.append((first, second))
    return pairs
