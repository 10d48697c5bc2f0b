"""What it took to reach an accuracy."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import Any

from bayesfed.errors import number
from bayesfed.evaluation.probes.base import Probe
from bayesfed.scores import prediction

COSTS = ("rounds", "bytes", "gradients", "seconds")


@dataclass(kw_only=True)
class Targets(Probe):
    """``to_target/80/rounds``, ``.../bytes``, ``.../gradients``, ``.../seconds`` until an accuracy was reached first;
    None if never.

    Args:
        target_accuracy: accuracies in percent; :func:`bayesfed.scores.prediction` says which accuracy counts.
    """

    target_accuracy: list[float] = field(default_factory=list)

    def __post_init__(self) -> None:
        for target in self.target_accuracy:
            number("target_accuracy", target, at_least=0, at_most=100)

    def in_summary(self, records: Sequence[dict[str, Any]]) -> dict[str, float | None]:
        kind = prediction(records, "accuracy")
        costs: dict[str, float | None] = {}
        for target in self.target_accuracy:
            name, sent = f"to_target/{target:g}", 0.0
            costs |= dict.fromkeys(f"{name}/{cost}" for cost in COSTS)
            for record in records:
                sent += (record.get("bytes/down") or 0) + (record.get("bytes/up") or 0)
                accuracy = record.get(f"{kind}/accuracy")
                if accuracy is not None and accuracy >= target:
                    totals = (record["round"], sent, record.get("gradients/total"), record.get("seconds/total"))
                    costs |= {f"{name}/{cost}": total for cost, total in zip(COSTS, totals, strict=True)}
                    break
        return costs
