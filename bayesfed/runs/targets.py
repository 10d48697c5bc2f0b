"""What a run's rounds say as a whole: which prediction counts, what an accuracy took, whether it got worse."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any


def prediction(rounds: Sequence[dict[str, Any]], metric: str) -> str:
    """Which prediction stands for a run in ``metric``: ``bayes``, the model average, or ``mean``, the posterior mean's.

    The mean for a run that never averages or whose precision never changed (fixed covariances: averaging over a
    precision nobody learned says nothing about the method).

    Args:
        rounds: ``rounds.jsonl``.
        metric: ``accuracy``, ``nll``, ...
    """
    averages = any(r.get(f"bayes/{metric}") is not None for r in rounds)
    return "bayes" if averages and learned_precision(rounds) else "mean"


def learned_precision(rounds: Sequence[dict[str, Any]]) -> bool:
    """Whether the mean precision of the server's posterior changed over the rounds."""
    return len({r.get("posterior/precision_mean") for r in rounds}) > 1


def to_targets(rounds: Sequence[dict[str, Any]], targets: Sequence[float]) -> dict[str, float | None]:
    """``to_target/80/rounds``, ``.../bytes``, ``.../gradients``, ``.../seconds`` until an accuracy was reached first;
    None if never.

    Args:
        rounds: ``rounds.jsonl``; :func:`prediction` says which accuracy counts.
        targets: accuracies in percent.
    """
    kind = prediction(rounds, "accuracy")
    costs: dict[str, float | None] = {}
    for target in targets:
        name, sent = f"to_target/{target:g}", 0.0
        costs |= dict.fromkeys(f"{name}/{cost}" for cost in ("rounds", "bytes", "gradients", "seconds"))
        for record in rounds:
            sent += (record.get("bytes/down") or 0) + (record.get("bytes/up") or 0)
            accuracy = record.get(f"{kind}/accuracy")
            if accuracy is not None and accuracy >= target:
                costs |= {
                    f"{name}/rounds": record["round"],
                    f"{name}/bytes": sent,
                    f"{name}/gradients": record.get("gradients/total"),
                    f"{name}/seconds": record.get("seconds/total"),
                }
                break
    return costs


def worse_than_start(rounds: Sequence[dict[str, Any]]) -> str:
    """What to say of a run whose posterior mean predicts worse after the last round than before the first; "" of
    others."""
    known = [value for record in rounds if (value := record.get("mean/nll")) is not None]
    if len(known) < 2 or rounds[-1].get("mean/nll") is None or not known[-1] > known[0]:
        return ""
    return (
        f"the NLL at the mean ended at {known[-1]:.4g}, worse than the {known[0]:.4g} before training: "
        "try a smaller client.lr or, with IVON, client.clip_radius=1; standardised inputs and targets"
    )


def outcome(rounds: Sequence[dict[str, Any]]) -> dict[str, Any]:
    """What ``summary.json`` says of the rounds: the last one's values, ``last3/...`` (mean), ``best/...`` and
    ``total/...``."""
    last = rounds[-1] if rounds else {}
    summary: dict[str, Any] = {}
    for key in (key for key in last if key.startswith(("mean/", "bayes/"))):
        values = [r[key] for r in rounds if r.get(key) is not None and r["round"] > 0]
        if values:
            best = max(values) if key.endswith("accuracy") else min(values)
            summary |= {f"last3/{key}": sum(values[-3:]) / len(values[-3:]), f"best/{key}": best}
    summary |= {key: value for key, value in last.items() if key != "round"}
    return summary | {f"total/{key}": sum(r.get(key) or 0 for r in rounds) for key in ("guard/count", "guard/clients")}
