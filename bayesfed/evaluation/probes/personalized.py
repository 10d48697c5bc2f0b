"""Scores of what every client makes of the server's posterior for itself, on its own test distribution."""

from __future__ import annotations

from dataclasses import dataclass

from bayesfed.evaluation.outputs import Posterior
from bayesfed.evaluation.probes.base import Ask, PredictiveProbe
from bayesfed.evaluation.probes.clients import fairness


@dataclass(kw_only=True)
class Personalized(PredictiveProbe):
    """``personalized/...`` in the summary: of the clients' local posteriors.

    Args:
        personalized: at the end, let each client solve its local problem once more from the global posterior, and
            test that.
    """

    personalized: bool = False

    def at_end(self, round: int, posterior: Posterior, ask: Ask) -> dict[str, float]:
        if not self.personalized:
            return {}
        problem, kind = self.subject.problem, "mean/" if posterior.is_point else "bayes/"
        scores: list[dict[str, float] | None] = [None] * len(problem.clients)
        for client, numbers in ask(self.samples).items():
            scores[client] = {k.removeprefix(kind): v for k, v in numbers.items() if k.startswith(kind)}
        self.subject.record(round, "personalized", scores)
        return {f"personalized/{name}": value for name, value in fairness(scores, problem.likelihood.measures).items()}
