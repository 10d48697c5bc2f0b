"""The classes that a configuration names, anybody's: built and looked at, so that what is wrong with them is one line before any work."""

from __future__ import annotations

import inspect
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

from omegaconf import DictConfig, OmegaConf

from bayesfed.errors import InputError, RunFailed
from bayesfed.foreign import plain_text
from bayesfed.groups import build, resolve

BASES = {
    "strategy": ("strategies.FederatedStrategy", ("setup", "start", "prepare", "combine", "family", "asks")),
    "client": ("clients.local.Solver", ("solve", "solve_many", "require", "check", "families", "lacks")),
    "handler": ("clients.handler.Trainer", ("train", "query")),
}
HANDLED = (
    "name",
    "family",
    "solver",
    "problem",
    "sites",
    "seed",
    "dtype",
    "device",
    "wire_format",
)  # by `bayesfed.app`


def part(section: DictConfig, group: str) -> Any:
    """A strategy or solver.

    Raises:
        InputError: its constructor raises, methods are missing, or it is something else.
    """
    with own_code(group, section["_target_"], "its constructor"):
        made = build(section, group)
    _look(made, group, section["_target_"])
    return made


def look_at_handler(target: str) -> None:
    """Raise InputError if a handler can't be imported, is something else or takes other arguments than ``Trainer``."""
    kind = resolve(OmegaConf.create({"_target_": target}), "handler")
    _look(kind, "handler", target)
    with own_code("handler", target, "its constructor"):
        inspect.signature(kind).bind(**dict.fromkeys(HANDLED))


@contextmanager
def own_code(group: str, target: str, what: str) -> Iterator[None]:
    """What a class of the group raises in the block becomes one line."""
    try:
        yield
    except (InputError, RunFailed):
        raise
    except Exception as error:
        reason = plain_text(f"{what} failed: {type(error).__name__}: {error}")
        raise InputError(f"{group}._target_", target, reason) from error


def _look(made: object, group: str, target: str) -> None:
    base, needed = BASES[group]
    missing = [name for name in needed if not hasattr(made, name)]
    if missing:
        raise InputError(f"{group}._target_", target, f"has no {', '.join(missing)}; derive it from {base}")
