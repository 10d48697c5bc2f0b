"""Scores of predictions: what they are called, which direction is better, and which prediction of a run counts."""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from dataclasses import dataclass, field
from typing import Any, Literal


@dataclass(frozen=True)
class Score:
    """A number under ``mean/NAME`` or ``bayes/NAME`` of ``rounds.jsonl``.

    Attributes:
        name: key in files.
        label: in tables and pictures; "" = ``name``.
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
    title: str = field(init=False, compare=False)  # label with the unit, of a column or an axis

    def __post_init__(self) -> None:
        object.__setattr__(self, "label", self.label or self.name)
        object.__setattr__(self, "title", f"{self.label} ({self.unit})" if self.unit else self.label)


ACCURACY = Score("accuracy", "accuracy", "%", 2, higher_is_better=True)
RMSE = Score("rmse", "RMSE", "units of the target")
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
