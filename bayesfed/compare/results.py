"""What the runs of a comparison left, as numbers: one group per setting and method."""

from __future__ import annotations

import math
from collections.abc import Iterable, Sequence
from dataclasses import dataclass, field
from typing import Any

import numpy as np

from bayesfed.compare.runner import Outcome
from bayesfed.errors import InputError
from bayesfed.runs.directory import RunDirectory
from bayesfed.runs.reading import damaged
from bayesfed.scores import learned_precision, prediction, present

COLUMNS = ("accuracy", "nll", "ece")  # of every table; other scores follow where a run has them
CLIENTS = ("mean", "worst10", "spread")  # of a metric over clients, each on its own test distribution
COSTS = {"rounds": "round", "bytes": "bytes", "gradients": "gradients", "seconds": "seconds"}


@dataclass(frozen=True)
class Trace:
    """One finished run, round by round.

    Attributes:
        seed: of the run.
        rounds: (R,) rounds, from 0.
        costs: by name (``round``, ``bytes``, ``gradients``, ``seconds``), (R,) totals up to each round.
        metrics: by name, (R,); nan where the round was not evaluated. Of the model average or at the mean, see
            :func:`bayesfed.scores.prediction`.
        at_mean: final metrics at the posterior mean.
        clients: accuracy (or RMSE) on the clients' own test distributions after the last round, by :data:`CLIENTS`;
            averaged or at the mean as ``metrics`` are.
    """

    seed: int
    rounds: np.ndarray
    costs: dict[str, np.ndarray]
    metrics: dict[str, np.ndarray]
    at_mean: dict[str, float]
    clients: dict[str, float] = field(default_factory=dict)

    @classmethod
    def read(cls, directory: RunDirectory, seed: int) -> Trace:
        """From a run directory.

        Raises:
            InputError: it is damaged.
        """
        records = _records(directory)
        names = [score.name for score in present(records)]
        metrics = {m: _column(records, f"{prediction(records, m)}/{m}") for m in names}
        sent = _column(records, "bytes/down", 0.0) + _column(records, "bytes/up", 0.0)
        costs = {
            "round": _column(records, "round"),
            "bytes": np.cumsum(sent),
            "gradients": _column(records, "gradients/total"),
            "seconds": _column(records, "seconds/total"),
        }
        last = records[-1]
        return cls(
            seed,
            costs["round"],
            costs,
            {m: values for m, values in metrics.items() if np.isfinite(values).any()},
            {m: float(last[f"mean/{m}"]) for m in names if last.get(f"mean/{m}") is not None},
            _over_clients(last, learned_precision(records)),
        )

    def final(self, metric: str) -> float:
        """The last value; nan if there is none."""
        return float(self.metrics[metric][-1]) if metric in self.metrics else math.nan

    def cost(self, name: str) -> float:
        """The whole run's ``bytes``, ``gradients`` or ``seconds``."""
        return float(self.costs[name][-1])

    def to_target(self, accuracy: float) -> dict[str, float]:
        """What it took to reach ``accuracy`` (percent) first, by cost; nan if it never did."""
        values = self.metrics.get("accuracy", np.array([]))
        reached = np.flatnonzero(values >= accuracy)
        return {name: float(costs[reached[0]]) if len(reached) else math.nan for name, costs in self.costs.items()}


@dataclass
class Group:
    """A method in a setting, over its seeds.

    Attributes:
        setting, method: as in :class:`bayesfed.compare.grid.Run`.
        traces: of the finished runs, by seed, ascending.
        failed: reason by seed.
        chosen: values that tuning chose.
    """

    setting: str
    method: str
    traces: list[Trace] = field(default_factory=list)
    failed: dict[int, str] = field(default_factory=dict)
    chosen: dict[str, str] = field(default_factory=dict)

    def finals(self, metric: str) -> dict[int, float]:
        """Final finite values by seed."""
        return {t.seed: v for t in self.traces if math.isfinite(v := t.final(metric))}

    @property
    def status(self) -> str:
        """``ok``, or which seeds failed and why."""
        if not self.failed:
            return "ok"
        reasons = "; ".join(f"seed {seed}: {reason}" for seed, reason in sorted(self.failed.items()))
        return f"failed {len(self.failed)} of {len(self.failed) + len(self.traces)}: {reasons}"


def ordered(metrics: Iterable[str]) -> list[str]:
    """Names of metrics, each once, in the order of a table."""
    return sorted(dict.fromkeys(metrics), key=lambda m: COLUMNS.index(m) if m in COLUMNS else len(COLUMNS))


def collect(outcomes: Sequence[Outcome]) -> list[Group]:
    """Groups, setting after setting, methods in the order they were given."""
    groups: dict[tuple[str, str], Group] = {}
    for setting in dict.fromkeys(o.run.setting for o in outcomes):
        for outcome in outcomes:
            run = outcome.run
            if run.setting != setting:
                continue
            group = groups.setdefault((setting, run.method), Group(setting, run.method))
            directory = RunDirectory(outcome.directory)
            if outcome.status != "finished":
                group.failed[run.seed] = outcome.reason or outcome.status
                continue
            try:
                if lost := _not_finite(directory):
                    group.failed[run.seed] = f"diverged: {lost} is not finite after the last round"
                else:
                    group.traces.append(Trace.read(directory, run.seed))
            except InputError as error:  # damaged; the others are compared
                group.failed[run.seed] = error.fix
    for group in groups.values():
        group.traces.sort(key=lambda trace: trace.seed)
    return list(groups.values())


def _not_finite(directory: RunDirectory) -> str:
    """A metric of the last round that is nan or infinite (null in JSON), or nothing."""
    last = _records(directory)[-1]
    return next((k for k, v in last.items() if k.startswith(("mean/", "bayes/")) and v is None), "")


def _records(directory: RunDirectory) -> list[dict[str, Any]]:
    """``rounds.jsonl`` of a finished run.

    Raises:
        InputError: it is damaged, or holds nothing.
    """
    records = directory.rounds()
    if not records or directory.summary().get("rounds", records[-1]["round"]) != records[-1]["round"]:
        raise damaged(directory.path / "rounds.jsonl", "it lacks the last round")
    return records


def _over_clients(last: dict[str, Any], averaged: bool) -> dict[str, float]:
    """:attr:`Trace.clients` from the last line of ``rounds.jsonl``; point estimates record one kind, at the mean."""
    metric = next((s.name for s in present([last]) if last.get(f"clients/{s.name}_mean") is not None), "")
    at_mean = not averaged and last.get(f"clients/at_mean/{metric}_mean") is not None
    name = f"clients/at_mean/{metric}" if at_mean else f"clients/{metric}"
    return {part: float(v) for part in CLIENTS if (v := last.get(f"{name}_{part}")) is not None}


def _column(records: Sequence[dict[str, Any]], key: str, missing: float = math.nan) -> np.ndarray:
    values = (record.get(key) for record in records)
    return np.array([missing if value is None else value for value in values], dtype=np.float64)
