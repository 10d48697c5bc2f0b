"""How good one posterior is for each client: scores on their own test distributions, and how unequal these are."""

from __future__ import annotations

import math
from collections.abc import Sequence
from typing import Any

import numpy as np
import torch
from torch import Tensor

from bayesfed.evaluation.metrics import classification_scores, regression_scores
from bayesfed.evaluation.predictive import (
    Posterior,
    Progress,
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
    batch_size: int | None = None,
    at_once: int | None = None,
    progress: Progress | None = None,
) -> list[dict[str, float] | None]:
    """Scores of the model-averaged predictive (at the mean for a point mass) on each client's test set.

    An input that several clients are tested on, as they see it alike, is predicted once.

    Args:
        model: its parameters are the posterior mean afterwards.
        posterior: a member of ``bayesfed.families``.
        tests: of each client; None stands in the result for empty ones.
        likelihood: a ``categorical`` or ``gaussian`` likelihood.
        samples, generator, batch_size, at_once, progress: see :func:`bayesfed.evaluation.evaluate`.

    Returns:
        per client ``accuracy`` (%), ``nll``, ``ece``, ``brier``, or ``rmse`` and ``nll``.
    """
    inputs, places = _distinct([part for part in tests if len(part)])
    if not places:
        return [None] * len(tests)
    batches, precision = input_batches(model, inputs, batch_size), noise_precision(likelihood)
    thetas = parameter_draws(posterior, samples, generator, progress)
    scored = zip(places, (part.targets().cpu() for part in tests if len(part)), strict=True)
    try:
        if precision is None:
            logs = class_log_probabilities(model, thetas, batches, at_once)
            scores = [classification_scores(logs[rows], y) for rows, y in scored]
        else:
            found = gaussian_predictive(model, thetas, batches, precision, inputs.targets().cpu(), at_once)
            assert found.log_density is not None
            mean, density = found.mean, found.log_density
            scores = [regression_scores(mean[rows], density[rows], y.reshape(mean[rows].shape)) for rows, y in scored]
    finally:
        model.load(posterior.mean)
    each = iter(scores)
    return [next(each) if len(part) else None for part in tests]


def _distinct(parts: Sequence[Examples]) -> tuple[Joined, list[Tensor]]:
    """The distinct inputs among ``parts``, and the positions of each part's examples among them."""
    groups: dict[tuple[int, int], list[int]] = {}  # parts that are rows of the same array, seen alike
    for i, part in enumerate(parts):
        moved = part.shift if part.shift is not None and part.shift.on_features else None
        groups.setdefault((id(part.x), id(moved)), []).append(i)
    places: dict[int, Tensor] = {}
    joined: list[Examples] = []
    begin = 0
    for members in groups.values():
        first = parts[members[0]]
        rows = {i: _rows(parts[i]) for i in members}
        union = torch.unique(torch.cat(list(rows.values())))
        places |= {i: begin + torch.searchsorted(union, own) for i, own in rows.items()}
        joined.append(Examples(first.x, first.y, union, first.scaling, first.shift))
        begin += len(union)
    return Joined(joined), [places[i] for i in range(len(parts))]


def _rows(part: Examples) -> Tensor:
    return torch.arange(len(part.y), device="cpu") if part.index is None else part.index


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
