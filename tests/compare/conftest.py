"""Made-up results with known numbers, and small comparisons."""

from __future__ import annotations

import numpy as np
import pytest

from bayesfed.compare.results import Group, Trace

QUICK = ["experiment=digits_het10", "model.hidden=[8]", "client.epochs=1", "eval.samples=2", "rounds=2"]


def trace(seed: int, accuracies: list[float], size: float = 1e6) -> Trace:
    """A run whose accuracy (percent) after rounds 0, 1, ... is given; NLL is (100 - accuracy)/50, ECE a tenth of 100 -
    accuracy.
    """
    accuracy = np.array(accuracies, dtype=np.float64)
    rounds = np.arange(len(accuracy), dtype=np.float64)
    return Trace(
        seed,
        rounds,
        {"round": rounds, "bytes": size * rounds, "gradients": 500 * rounds, "seconds": 0.5 * rounds},
        {"accuracy": accuracy, "nll": (100 - accuracy) / 50, "ece": (100 - accuracy) / 10},
        {"accuracy": float(accuracy[-1]) - 1},
    )


@pytest.fixture
def groups() -> list[Group]:
    """Two methods of three seeds in the setting ``one & only``."""
    setting = "one & only"
    return [
        Group(setting, "fedavg", [trace(1, [10, 60, 80]), trace(2, [10, 62, 81]), trace(3, [10, 61, 84])]),
        Group(
            setting,
            "bayes_admm/<diagonal>",
            [trace(1, [10, 70, 85], 2e6), trace(2, [10, 75, 86], 2e6), trace(3, [10, 71, 91], 2e6)],
        ),
    ]
