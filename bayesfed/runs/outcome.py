"""What a run's rounds say as a whole: how it ended, and whether it got worse."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

from bayesfed.scores import score


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
            best = (max if score(key.partition("/")[2]).higher_is_better else min)(values)
            summary |= {f"last3/{key}": sum(values[-3:]) / len(values[-3:]), f"best/{key}": best}
    summary |= {key: value for key, value in last.items() if key != "round"}
    return summary | {f"total/{key}": sum(r.get(key) or 0 for r in rounds) for key in ("guard/count", "guard/clients")}
