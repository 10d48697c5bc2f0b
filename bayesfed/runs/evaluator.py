"""What a run's probes say."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

from bayesfed.evaluation.outputs import Posterior
from bayesfed.evaluation.probes import Subject, make_probes
from bayesfed.evaluation.probes.base import Ask
from bayesfed.evaluation.probes.scores import Scores
from bayesfed.metrics import plain_numbers
from bayesfed.profiling import timed


class Evaluator:
    """All probes of a run.

    Args:
        section: ``eval`` of the configuration.
        subject: the run.

    Raises:
        InputError: a probe doesn't fit the problem.
    """

    def __init__(self, section: Mapping[str, Any], subject: Subject):
        self.probes = make_probes(section)
        for probe in self.probes:
            probe.begin(subject)

    @timed("evaluation")
    def after_round(self, round: int, posterior: Posterior) -> dict[str, float]:
        """The metrics that are due after ``round``; ``posterior`` is on the model's device.

        Raises:
            ValueError: a probe's are no numbers, or have the name of another's.
        """
        metrics: dict[str, float] = {}
        for probe in self.probes:
            source = f"{type(probe).__name__}.after_round"
            own = plain_numbers(probe.after_round(round, posterior), source)
            if twice := metrics.keys() & own:
                raise ValueError(f"{source}: another probe has a metric '{min(twice)}'")
            metrics |= own
        return metrics

    def at_end(self, round: int, posterior: Posterior, ask: Ask) -> dict[str, float]:
        """See :meth:`bayesfed.evaluation.probes.Probe.at_end`."""
        return {k: v for probe in self.probes for k, v in probe.at_end(round, posterior, ask).items()}

    def in_summary(self, records: Sequence[dict[str, Any]]) -> dict[str, float | None]:
        """See :meth:`bayesfed.evaluation.probes.Probe.in_summary`."""
        return {k: v for probe in self.probes for k, v in probe.in_summary(records).items()}

    @timed("evaluation")
    def reliability(self, round: int, posterior: Posterior) -> dict[str, Any] | None:
        """See :meth:`bayesfed.evaluation.probes.scores.Scores.reliability`."""
        return next(p for p in self.probes if isinstance(p, Scores)).reliability(round, posterior)
