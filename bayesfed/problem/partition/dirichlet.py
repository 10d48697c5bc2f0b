"""The heterogeneous split of the Bayes-ADMM experiments."""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np

from bayesfed.errors import number
from bayesfed.problem.partition.partitioner import Partitioner
from bayesfed.seeding import numpy_generator


class DirichletSizesAndClasses(Partitioner):
    r"""Dirichlet client sizes times Dirichlet class mixes, every class fully distributed (arXiv 2506.13150).

    .. math:: p \sim Dir(\alpha_{sizes} 1_K), \quad c_k \sim Dir(\alpha_{classes} 1_C), \quad
        n_{kc} = round(n_c \, p_k c_{kc} / \sum_j p_j c_{jc})

    and a count of 1 becomes 2. Client k receives a slice of n_kc rows of a shuffled list of class c. The largest
    counts of a class absorb what rounding leaves over or lacks, so every row has exactly one owner.

    Args:
        num_clients: K; null = 10.
        alpha_sizes: concentration of the sizes, > 0; 1e15 gives equal sizes.
        alpha_classes: concentration of each client's classes, > 0; small = few classes per client.

    Raises:
        InputError: naming the option.
    """

    name = "dirichlet_sizes_and_classes"
    needs_labels = True

    def __init__(self, num_clients: int | None = None, *, alpha_sizes: float = 1.0, alpha_classes: float = 0.5):
        super().__init__(num_clients)
        number("alpha_sizes", alpha_sizes, above=0)
        number("alpha_classes", alpha_classes, above=0)
        self.alpha_sizes, self.alpha_classes = float(alpha_sizes), float(alpha_classes)

    def assign(self, labels: np.ndarray | None, num_examples: int, clients: int, seed: int) -> Sequence[np.ndarray]:
        assert labels is not None
        classes, sizes = np.unique(labels, return_counts=True)
        generator = numpy_generator(seed, "partition", "dirichlet_sizes_and_classes")
        sizes_of_clients = generator.dirichlet(np.full(clients, self.alpha_sizes))
        mixes = generator.dirichlet(np.full(len(classes), self.alpha_classes), size=clients)
        weights = sizes_of_clients[:, None] * mixes
        parts: list[list[np.ndarray]] = [[] for _ in range(clients)]
        for column, (label, size) in enumerate(zip(classes, sizes, strict=True)):
            rows = generator.permutation(np.flatnonzero(labels == label))
            ends = np.cumsum(class_counts(weights[:, column], int(size)))[:-1]
            for part, slice_of_rows in zip(parts, np.split(rows, ends), strict=True):
                part.append(slice_of_rows)
        return [np.sort(np.concatenate(part)) for part in parts]


def class_counts(weights: np.ndarray, size: int) -> np.ndarray:
    """How many of ``size`` examples of a class each client gets: (K,) whole numbers that sum to ``size``.

    Args:
        weights: (K,) non-negative, not normalised.
        size: n_c.
    """
    total = weights.sum()
    shares = weights / total if total > 0 else np.full(len(weights), 1 / len(weights))  # all underflowed to 0
    counts = np.round(size * shares).astype(np.int64)
    counts[counts == 1] = 2
    left = size - int(counts.sum())
    if left > 0:
        counts[np.argmax(shares)] += left
    for _ in range(-left):
        counts[np.argmax(counts)] -= 1
    return counts
