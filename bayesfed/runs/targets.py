"""What it took a run to reach an accuracy."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any


def to_targets(rounds: Sequence[dict[str, Any]], targets: Sequence[float]) -> dict[str, float | None]:
    """``to_target/80/rounds``, ``.../bytes``, ``.../gradients``, ``.../seconds`` until an accuracy was reached first; None if never.

    Args:
        rounds: ``rounds.jsonl``; the model-averaged accuracy counts, that at the mean in a run that never averages.
        targets: accuracies in percent.
    """
    kind = "bayes" if any(r.get("bayes/accuracy") is not None for r in rounds) else "mean"
    found: dict[str, float | None] = {}
    for target in targets:
        name, sent = f"to_target/{target:g}", 0.0
        found |= dict.fromkeys(f"{name}/{cost}" for cost in ("rounds", "bytes", "gradients", "seconds"))
        for record in rounds:
            sent += (record.get("bytes/down") or 0) + (record.get("bytes/up") or 0)
            accuracy = record.get(f"{kind}/accuracy")
            if accuracy is not None and accuracy >= target:
                found |= {
                    f"{name}/rounds": record["round"],
                    f"{name}/bytes": sent,
                    f"{name}/gradients": record.get("gradients/total"),
                    f"{name}/seconds": record.get("seconds/total"),
                }
                break
    return found
