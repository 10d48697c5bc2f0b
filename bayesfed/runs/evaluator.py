"""What a run's probes say."""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from typing import Any

from bayesfed.configured import own_code, reason
from bayesfed.errors import InputError, RunFailed
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
            with own_code("eval.probes", type(probe).__name__, "begin"):
                probe.begin(subject)

    @timed("evaluation")
    def after_round(self, round: int, posterior: Posterior) -> dict[str, float]:
        """The metrics that are due after ``round``; ``posterior`` is on the model's device.

        Raises:
            RunFailed: a probe fails, its metrics are no numbers, or have the name of another's.
        """
        metrics: dict[str, float] = {}
        for probe in self.probes:
            source = f"{type(probe).__name__}.after_round"
            with _failing(f"round {round}: {source}"):
                own = plain_numbers(probe.after_round(round, posterior), source)
            if twice := metrics.keys() & own:
                raise RunFailed(f"round {round}: {source}: another probe has a metric '{min(twice)}'")
            metrics |= own
        return metrics

    def at_end(self, round: int, posterior: Posterior, ask: Ask) -> dict[str, float]:
        """See :meth:`bayesfed.evaluation.probes.Probe.at_end`."""
        return self._all("at_end", f"round {round}", round, posterior, ask)

    def in_summary(self, records: Sequence[dict[str, Any]]) -> dict[str, float | None]:
        """See :meth:`bayesfed.evaluation.probes.Probe.in_summary`."""
        return self._all("in_summary", "summary.json", records)

    def _all(self, hook: str, where: str, *args: Any) -> dict[str, Any]:
        values: dict[str, Any] = {}
        for probe in self.probes:
            with _failing(f"{where}: {type(probe).__name__}.{hook}"):
                values |= getattr(probe, hook)(*args)
        return values

    @timed("evaluation")
    def reliability(self, round: int, posterior: Posterior) -> dict[str, Any] | None:
        """See :meth:`bayesfed.evaluation.probes.scores.Scores.reliability`."""
        return next(p for p in self.probes if isinstance(p, Scores)).reliability(round, posterior)


@contextmanager
def _failing(where: str) -> Iterator[None]:
    """What a stranger's probe raises in the block becomes one line."""
    try:
        yield
    except (InputError, RunFailed):
        raise
    except Exception as error:
        raise RunFailed(f"{where} fails: {reason(error)}") from error
