"""How good one posterior is for each client: scores on their own test distributions, and how unequal these are."""

from __future__ import annotations

import math
from collections.abc import Sequence
from typing import Any

import numpy as np
import torch

from bayesfed.evaluation.metrics import classification_scores, regression_scores
from bayesfed.evaluation.predictive import (
    Posterior,
    class_log_probabilities,
    gaussian_predictive,
    input_batches,
    noise_precision,
    parameter_draws,
)
from bayesfed.problem.examples import Examples, Joined
from bayesfed.problem.flat import FlatModel

WORST = 0.1  # share of the clients in the mean over the worst


def evaluate_clients(
    model: FlatModel,
    posterior: Posterior,
    tests: Sequence[Examples],
    likelihood: Any,
    *,
    samples: int,
    generator: torch.Generator,
    batch_size: int = 2048,
    at_once: int | None = None,
) -> list[dict[str, float] | None]:
    """Scores of the model-averaged predictive (at the mean for a point mass) on each client's test set, in one pass.

    Args:
        model: its parameters are the posterior mean afterwards.
        posterior: a member of ``bayesfed.families``.
        tests: of each client; None stands in the result for empty ones.
        likelihood: a ``categorical`` or ``gaussian`` likelihood.
        samples, generator, batch_size, at_once: see :func:`bayesfed.evaluation.evaluate`.

    Returns:
        per client ``accuracy`` (%), ``nll``, ``ece``, ``brier``, or ``rmse`` and ``nll``.
    """
    joined = Joined([part for part in tests if len(part)])
    if not joined.parts:
        return [None] * len(tests)
    inputs, y = input_batches(model, joined, batch_size), joined.targets().cpu()
    sizes = [len(part) for part in joined.parts]
    precision = noise_precision(likelihood)
    thetas = parameter_draws(posterior, samples, generator)
    scores: list[dict[str, float]] = []
    try:
        if precision is None:
            logs = class_log_probabilities(model, thetas, inputs, at_once)
            scores = [classification_scores(a, b) for a, b in zip(logs.split(sizes), y.split(sizes), strict=True)]
        else:
            predicted = gaussian_predictive(model, thetas, inputs, precision, y, at_once)
            assert predicted.log_density is not None
            pieces = (predicted.mean, predicted.log_density, y.reshape(predicted.mean.shape))
            scores = [regression_scores(*of) for of in zip(*(piece.split(sizes) for piece in pieces), strict=True)]
    finally:
        model.load(posterior.mean)
    found = iter(scores)
    return [next(found) if len(part) else None for part in tests]


def fairness(scores: Sequence[dict[str, float] | None]) -> dict[str, float]:
    """Mean over clients, mean over the worst tenth (at least one client), and spread (standard deviation over clients).

    Args:
        scores: of each client; None is left out.

    Returns:
        ``accuracy_mean``, ``accuracy_worst10``, ``accuracy_spread`` and the same for ``nll`` and ``rmse``, where there are such scores.
    """
    found: dict[str, float] = {}
    for metric in ("accuracy", "rmse", "nll"):
        values = np.array([s[metric] for s in scores if s is not None and metric in s])
        if not len(values):
            continue
        ranked = np.sort(values) if metric == "accuracy" else -np.sort(-values)
        worst = ranked[: math.ceil(WORST * len(ranked) - 1e-9)]
        found |= {
            f"{metric}_mean": float(values.mean()),
            f"{metric}_worst10": float(worst.mean()),
            f"{metric}_spread": float(values.std()),
        }
    return found
