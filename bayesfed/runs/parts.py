"""A user's strategy and handler before any work: what is wrong with them becomes one line."""

from __future__ import annotations

import inspect

from bayesfed.configured import look_at, own_code, resolve

# what `bayesfed.app` gives a handler
HANDLED = ("name", "family", "solver", "problem", "sites", "seed", "dtype", "device", "wire_format")


def look_at_handler(target: str) -> None:
    """Raise InputError if a handler can't be imported, is something else or takes other arguments than ``Trainer``."""
    kind = resolve({"_target_": target}, "handler")
    look_at(kind, "handler", target)
    with own_code("handler", target, "its constructor"):
        inspect.signature(kind).bind(**dict.fromkeys(HANDLED))
