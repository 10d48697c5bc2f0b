"""Each client's own test distribution."""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np

from bayesfed.seeding import numpy_generator

LEAST = 200  # test examples a client gets at least, where the test set has them


def client_tests(
    test_rows: np.ndarray,
    labels: np.ndarray | None,
    counts: np.ndarray | None,
    seed: int,
    clients: int,
    owner: np.ndarray | None = None,
) -> list[np.ndarray]:
    """Rows of the test set that stand for each client: its own if they are known, else in its label proportions.

    Client k gets ``M = max(N_test/K, 200)`` rows, or fewer where that many can't be had in its proportions: no row
    twice. Rows may be in the sets of several clients. Without labels every client's distribution is that of the whole
    test set.

    Args:
        test_rows: (N_test,) rows of the test arrays.
        labels: (N_test,) their classes; None for a regression.
        counts: (K, C) training examples per client and class, before any shift; None for a regression.
        seed: of the run.
        clients: K.
        owner: (N_test,) the client of each row, if the data say so (-1: none).

    Returns:
        K arrays of rows, ascending; empty for a client whose classes the test set lacks.
    """
    if owner is not None:
        return [test_rows[owner == k] for k in range(clients)]
    wanted = min(len(test_rows), max(len(test_rows) // clients, LEAST))
    of_class: list[np.ndarray] = []
    if labels is not None and counts is not None:
        of_class = [test_rows[labels == c] for c in range(counts.shape[1])]
    available = np.array([len(rows) for rows in of_class])
    sets = []
    for k in range(clients):
        generator = numpy_generator(seed, "client_tests", k)
        if counts is None or not of_class:
            sets.append(np.sort(generator.choice(test_rows, wanted, replace=False)))
            continue
        sizes = proportional(counts[k], available, wanted)
        drawn = [generator.choice(of_class[c], size, replace=False) for c, size in enumerate(sizes) if size]
        sets.append(np.sort(np.concatenate(drawn)) if drawn else test_rows[:0])
    return sets


def proportional(counts: Sequence[int] | np.ndarray, available: np.ndarray, wanted: int) -> np.ndarray:
    """(C,) whole numbers in the proportions of ``counts`` that sum to ``wanted``, or less if ``available`` is small.

    Classes the test set lacks are left out. Rounding is by largest remainder, so a size is at most one off its share.
    """
    held = np.where(available > 0, np.asarray(counts, dtype=np.float64), 0.0)
    if held.sum() == 0:
        return np.zeros(len(held), dtype=np.int64)
    shares = held / held.sum()
    limit = (available[shares > 0] / shares[shares > 0]).min()
    total = max(1, min(wanted, int(np.floor(limit + 1e-9))))
    sizes = np.floor(total * shares + 1e-9).astype(np.int64)
    rest = total - int(sizes.sum())
    order = np.argsort(-(total * shares - sizes), kind="stable")
    for c in order[:rest]:
        sizes[c] += 1
    return np.minimum(sizes, available)
