"""Seeded subsets whose strata keep their proportions."""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np


def hold_out(
    rows: np.ndarray, strata: Sequence[np.ndarray], fraction: float, generator: np.random.Generator
) -> tuple[np.ndarray, np.ndarray]:
    """Split ``rows`` at random into ``fraction`` of them and the rest.

    Systematic sampling over shuffled rows sorted by stratum: the total is round(n * fraction) and every stratum of n_c
    rows gives n_c * fraction up to one row, without the drift that rounding each stratum on its own has.

    Args:
        rows: (n,) row numbers.
        strata: arrays indexed by row number; a stratum is one combination of their values.
        fraction: in [0, 1].
        generator: source of randomness.

    Returns:
        The chosen rows and the others, each ascending.
    """
    order = generator.permutation(rows)
    if strata:
        codes = np.zeros(len(order), dtype=np.int64)
        for column in strata:
            values, code = np.unique(column[order], return_inverse=True)
            codes = codes * len(values) + code
        order = order[np.argsort(codes, kind="stable")]
    marks = np.floor(np.arange(len(order) + 1) * fraction + 0.5 + 1e-9)  # 1e-9: 0.1 * 5 counts as a half
    chosen = marks[1:] > marks[:-1]
    return np.sort(order[chosen]), np.sort(order[~chosen])
