"""Scores on the test set: at the posterior mean and averaged over the posterior."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

from bayesfed.errors import integer
from bayesfed.evaluation.outputs import Posterior
from bayesfed.evaluation.predictive import evaluate
from bayesfed.evaluation.probes.base import PredictiveProbe, Subject
from bayesfed.problem.likelihood import Predictive
from bayesfed.problem.likelihood.metrics import reliability


@dataclass(kw_only=True)
class Scores(PredictiveProbe):
    """``mean/...`` and ``bayes/...`` of the likelihood's scores.

    Args:
        every: rounds between evaluations; the last round is always evaluated.
        bayes_every: rounds between model-averaged evaluations.
    """

    every: int = 1
    bayes_every: int = 1

    def __post_init__(self) -> None:
        super().__post_init__()
        integer("every", self.every, at_least=1)
        integer("bayes_every", self.bayes_every, at_least=1)

    def begin(self, subject: Subject) -> None:
        super().begin(subject)
        self._predictions: dict[str, Predictive] = {}  # of the last round

    def after_round(self, round: int, posterior: Posterior) -> dict[str, float]:
        last = round == self.subject.rounds
        if not len(self.subject.problem.test) or not (last or round % self.every == 0):
            return {}
        return self._evaluate(round, posterior, bayes=last or round % self.bayes_every == 0)

    def reliability(self, round: int, posterior: Posterior) -> dict[str, Any] | None:
        """Calibration bins after the last round, see :func:`bayesfed.problem.likelihood.metrics.reliability`; None
        without."""
        problem = self.subject.problem
        if not problem.likelihood.classes or not len(problem.test):
            return None
        if not self._predictions:  # an earlier process evaluated that round
            self._evaluate(round, posterior, bayes=True)
        return reliability(self._predictions, problem.test.targets().cpu())

    def _evaluate(self, round: int, posterior: Posterior, bayes: bool) -> dict[str, float]:
        subject = self.subject
        return evaluate(
            subject.model, posterior, subject.problem.test, subject.problem.likelihood, samples=self.samples,
            generator=subject.generator(round), bayes=bayes, progress=subject.progress,
            predictions=self._predictions if round == subject.rounds else None, **self.options,
        )  # fmt: skip
