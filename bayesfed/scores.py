"""Scores of predictions: what they are called, which direction is better, and which prediction of a run counts."""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any, Literal

OF_TARGET = "units of the target"  # differ between data sets


@dataclass(frozen=True)
class Score:
    """A number under ``mean/NAME`` or ``bayes/NAME`` of ``rounds.jsonl``.

    Attributes:
        name: key in files.
        label: in tables and pictures; "" = ``name``.
        short: where there is little room; "" = ``label``.
        unit: ``%``, ``nats per example`` ...; "" = none.
        digits: decimals in a table; None = four significant digits.
        higher_is_better: or lower.
        role: ``main`` scores are drawn and summarised over clients, ``shown`` ones stand in tables too, the others only in files.
    """

    name: str
    label: str = ""
    unit: str = ""
    digits: int | None = None
    higher_is_better: bool = False
    role: Literal["main", "shown", "recorded"] = "main"
    short: str = ""

    def __post_init__(self) -> None:
        object.__setattr__(self, "label", self.label or self.name)
        object.__setattr__(self, "short", self.short or self.label)

    @property
    def percent(self) -> bool:
        """Whether it is a percentage, whose sign always stands with it."""
        return self.unit == "%"

    @property
    def axis(self) -> str:
        """What to write at an axis."""
        return f"{self.label} ({self.unit})" if self.unit else self.label

    @property
    def header(self) -> str:
        """What to write over a column."""
        return self.axis if self.percent else self.label


ACCURACY = Score("accuracy", "accuracy", "%", 2, higher_is_better=True, short="acc.")
RMSE = Score("rmse", "RMSE", OF_TARGET)
NLL = Score("nll", "NLL", "nats per example", 3)
ECE = Score("ece", "ECE", "%", 2, role="shown")
BRIER = Score("brier", "Brier score", role="recorded")
KNOWN = {score.name: score for score in (ACCURACY, RMSE, NLL, ECE, BRIER)}


def register(scores: Iterable[Score]) -> None:
    """Let :func:`score` know the scores of a likelihood."""
    KNOWN.update((score.name, score) for score in scores)


def score(name: str) -> Score:
    """The description of a score; of one that no likelihood described here, its name."""
    return KNOWN.get(name) or Score(name)


def present(records: Iterable[Mapping[str, Any]]) -> list[Score]:
    """The scores under ``mean/`` and ``bayes/`` of records, but for those that are recorded only; known ones in their order."""
    names = {key.partition("/")[2]: None for record in records for key in record if key.startswith(("mean/", "bayes/"))}
    known = list(KNOWN)
    described = sorted(map(score, names), key=lambda s: known.index(s.name) if s.name in KNOWN else len(known))
    return [each for each in described if each.role != "recorded"]


def prediction(rounds: Sequence[dict[str, Any]], metric: str) -> str:
    """Which prediction stands for a run in ``metric``: ``bayes``, the model average, or ``mean``, the posterior mean's.

    The mean for a run that never averages or whose precision never changed (fixed covariances: averaging over a precision nobody
    learned says nothing about the method).

    Args:
        rounds: ``rounds.jsonl``.
        metric: ``accuracy``, ``nll``, ...
    """
    averages = any(r.get(f"bayes/{metric}") is not None for r in rounds)
    return "bayes" if averages and learned_precision(rounds) else "mean"


def learned_precision(rounds: Sequence[dict[str, Any]]) -> bool:
    """Whether the mean precision of the server's posterior changed over the rounds."""
    return len({r.get("posterior/precision_mean") for r in rounds}) > 1
