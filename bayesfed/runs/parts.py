"""A user's strategy and its client half before any work: what is wrong with them becomes one line."""

from __future__ import annotations

import inspect
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

from bayesfed.errors import InputError, RunFailed
from bayesfed.federation.client.handler import Trainer
from bayesfed.foreign import plain_text
from bayesfed.groups import reason

# what `bayesfed.app` gives a client half
GIVEN = ("name", "family", "solver", "problem", "sites", "seed", "dtype", "device", "wire_format")


def look_at_client(strategy: Any) -> None:
    """Raise InputError if a strategy's client half is no ``Trainer``, or takes other arguments."""
    kind = strategy.client
    if not (isinstance(kind, type) and issubclass(kind, Trainer)):
        fix = f"derive it from {Trainer.__module__}.{Trainer.__name__}"
        raise InputError("strategy.client", plain_text(getattr(kind, "__name__", kind)), fix)
    with own_code("strategy", f"{kind.__module__}.{kind.__qualname__}", "the constructor of its client half"):
        inspect.signature(kind).bind(**dict.fromkeys(GIVEN))


@contextmanager
def own_code(group: str, target: str, what: str) -> Iterator[None]:
    """What a class of the group raises in the block becomes one line."""
    try:
        yield
    except (InputError, RunFailed):
        raise
    except Exception as error:
        raise InputError(f"{group}._target_", target, f"{what} fails: {reason(error)}") from error
