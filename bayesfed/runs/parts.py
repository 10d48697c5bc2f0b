"""A user's strategy and handler before any work: what is wrong with them becomes one line."""

from __future__ import annotations

import inspect
from collections.abc import Iterator
from contextlib import contextmanager

from bayesfed.errors import InputError, RunFailed
from bayesfed.groups import look_at, reason, resolve

# what `bayesfed.app` gives a handler
HANDLED = ("name", "family", "solver", "problem", "sites", "seed", "dtype", "device", "wire_format")


def look_at_handler(target: str) -> None:
    """Raise InputError if a handler can't be imported, is something else or takes other arguments than ``Trainer``."""
    kind = resolve({"_target_": target}, "handler")
    look_at(kind, "handler", target)
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
        raise InputError(f"{group}._target_", target, f"{what} fails: {reason(error)}") from error
