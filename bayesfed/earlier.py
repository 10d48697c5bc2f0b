"""Run directories of earlier versions: what became of keys that are gone. No other place knows them."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from bayesfed.errors import InputError

# of built-in classes, with the values that a run can go on without (None: any) and why it can't go on with another
GONE: dict[str, dict[str, tuple[tuple[object, ...] | None, str]]] = {
    "client": {
        "native": (None, ""),  # speed alone; `accelerate` is its successor
        "compile": (None, ""),  # speed alone
    },
    "strategy": {
        "reference_quirks": ((False, None), "the variants of published code that it chose are gone: start a new run"),
    },
}
# the client halves that bayesfed had; today's stand beside their strategies
HANDLERS = (
    "clients.handler.Trainer",
    "clients.scaffold.ScaffoldTrainer",
    "clients.fedadmm.FedADMMTrainer",
    "clients.fedpa.FedPATrainer",
)


def of_today(group: str, stored: Mapping[str, Any], known: Mapping[str, Any]) -> dict[str, Any]:
    """A stored ``group`` of a built-in class without the keys that are gone.

    Args:
        known: the group's keys of today.

    Raises:
        InputError: one of them had a value that changed the results, so that the run can't go on.
    """
    section = {str(key): value for key, value in stored.items()}
    if section.get("handler") in HANDLERS:
        del section["handler"]
    for key, (harmless, why) in GONE.get(group, {}).items():
        if key not in section or key in known:
            continue
        value = section.pop(key)
        if harmless is not None and value not in harmless:
            raise InputError("resume", f"{group}.{key}={value}", why)
    return section
