"""What a run's submitter may decide on a machine that holds data, and what only that machine decides."""

from __future__ import annotations

import hashlib
import json
import shlex
from collections.abc import Mapping, Sequence
from typing import Any

from bayesfed.app import Plain
from bayesfed.config import RESUMABLE, parse
from bayesfed.errors import InputError

SERVER_ONLY = (*RESUMABLE, "checkpoint")  # rounds, evaluation, logging ...: nothing a client needs


def split(text: str) -> list[str]:
    """The overrides in the run configuration's one string (quoted as in a shell).

    Raises:
        InputError: a quote is not closed.
    """
    try:
        return shlex.split(text)
    except ValueError as error:
        raise InputError("overrides", text, f"{error}".lower()) from error


def for_client(overrides: Sequence[str]) -> list[str]:
    """The overrides a client takes over from the run: choices by name and plain values.

    Left out are those that concern the server alone, and ``data.path``: where data lies is the node's own business.

    Raises:
        InputError: an override would name a class or a search path, or replace a group by values of its own.
    """
    taken = []
    for override, text in zip(parse(overrides), overrides, strict=True):
        key = override.key_or_group
        leaf = key.rpartition(".")[2]
        if leaf.startswith("_") or key.startswith("tuned") or "@" in text.partition("=")[0]:
            raise InputError(key, override.value(), "a client takes no class names from a run")
        if _holds_mapping(override.value()):
            raise InputError(key, override.value(), "a client takes single values and lists of numbers from a run only")
        if "${" in text:
            raise InputError(key, text.partition("=")[2], "a client resolves no references")
        top = key.partition(".")[0]
        if (
            top in ("rounds", "accelerate")
            or key == "eval.validation"
            or (top not in SERVER_ONLY and key != "data.path")
        ):
            taken.append(text)
    return taken


def _holds_mapping(value: object) -> bool:
    if isinstance(value, Mapping):
        return True
    return isinstance(value, list) and any(isinstance(item, list | Mapping) for item in value)


def experiment_key(config: Plain, run: str) -> str:
    """Name of a run's folder among a node's sites: the same when the run is resumed, another for every other run.

    Args:
        config: the client's configuration.
        run: run directory on the server, or its Flower run id.
    """
    lasting: dict[str, Any] = {key: value for key, value in config.items() if key not in SERVER_ONLY}
    lasting["client"] = {
        k: v for k, v in config["client"].items() if k != "schedule_rounds"
    }  # the server's factors count
    # a run that began before the key existed finds its sites again
    lasting["data"] = {k: v for k, v in config["data"].items() if (k, v) != ("classes", None)}
    return hashlib.sha256(json.dumps([lasting, run], sort_keys=True).encode()).hexdigest()[:16]
