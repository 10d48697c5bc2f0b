"""How good one posterior is for each client: scores on their own test distributions, and how unequal these are."""

from __future__ import annotations

import math
from collections.abc import Iterable, Sequence
from dataclasses import dataclass

import numpy as np
import torch
from torch import Tensor

from bayesfed.errors import integer
from bayesfed.evaluation.inputs import input_batches
from bayesfed.evaluation.outputs import Posterior, Progress, parameter_draws
from bayesfed.evaluation.predictive import predict
from bayesfed.evaluation.probes.base import ClientScores, PredictiveProbe
from bayesfed.problem.examples import Examples, Joined
from bayesfed.problem.flat import FlatModel
from bayesfed.problem.likelihood import Likelihood
from bayesfed.scores import Score

WORST = 0.1  # share of the clients in the mean over the worst


@dataclass(kw_only=True)
class ClientTests(PredictiveProbe):
    """``clients/...``: the model average on each client's own test distribution; ``clients/at_mean/...`` where that
    is another predictive.

    Args:
        clients_every: rounds between evaluations; None = after the last round, 0 = never.
    """

    clients_every: int | None = 0

    def __post_init__(self) -> None:
        super().__post_init__()
        integer("clients_every", self.clients_every, at_least=0, optional=True)

    def after_round(self, round: int, posterior: Posterior) -> dict[str, float]:
        subject, problem = self.subject, self.subject.problem
        if not self._due(round):
            return {}
        summary: dict[str, float] = {}
        kinds = {"": self.samples} | ({} if posterior.is_point else {"at_mean/": 0})
        scores: list[dict[str, float]] = [{} for _ in problem.client_tests]
        for kind, samples in kinds.items():
            each = evaluate_clients(
                subject.model, posterior, problem.client_tests, problem.likelihood, samples=samples,
                generator=subject.generator(round, "clients"), progress=subject.progress, **self.options,
            )  # fmt: skip
            fair = fairness(each, problem.likelihood.measures)
            summary |= {f"clients/{kind}{name}": value for name, value in fair.items()}
            for own, values in zip(scores, each, strict=True):
                own |= {f"{kind}{metric}": value for metric, value in (values or {}).items()}
        subject.record(round, "test", [own or None for own in scores])
        return summary

    def _due(self, round: int) -> bool:
        last = round == self.subject.rounds
        if self.clients_every is None:
            return last
        return bool(self.clients_every) and round > 0 and (last or round % self.clients_every == 0)


def evaluate_clients(
    model: FlatModel,
    posterior: Posterior,
    tests: Sequence[Examples],
    likelihood: Likelihood,
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
        likelihood: makes the predictive and scores it.
        samples, generator, batch_size, at_once, progress: see :func:`bayesfed.evaluation.evaluate`.

    Returns:
        per client the likelihood's scores.
    """
    tested = [part for part in tests if len(part)]
    inputs, places = _distinct(tested)
    if not places:
        return [None] * len(tests)
    try:
        thetas = parameter_draws(posterior, samples, generator, progress)
        batches, y = input_batches(model, inputs, batch_size), inputs.targets().cpu()
        predictive = predict(model, thetas, batches, likelihood, y, at_once)
        scores = [
            likelihood.scores({name: values[rows] for name, values in predictive.items()}, part.targets().cpu())
            for rows, part in zip(places, tested, strict=True)
        ]
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


def fairness(scores: ClientScores, measures: Iterable[Score]) -> dict[str, float]:
    """Mean over clients, mean over the worst tenth (at least one client), and spread (standard deviation over clients).

    Args:
        scores: of each client; None is left out.
        measures: of the likelihood.

    Returns:
        ``accuracy_mean``, ``accuracy_worst10``, ``accuracy_spread`` and the same for the other main scores, where
        there are some.
    """
    summary: dict[str, float] = {}
    for measure in measures:
        values = np.array([s[measure.name] for s in scores if s is not None and measure.name in s])
        if not len(values) or measure.role != "main":
            continue
        ranked = np.sort(values) if measure.higher_is_better else -np.sort(-values)
        worst = ranked[: math.ceil(WORST * len(ranked) - 1e-9)]
        summary |= {
            f"{measure.name}_mean": float(values.mean()),
            f"{measure.name}_worst10": float(worst.mean()),
            f"{measure.name}_spread": float(values.std()),
        }
    return summary
