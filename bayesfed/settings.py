"""Settings as fields of a dataclass: a default, a type and a range in one line, checked in one place."""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import field, fields
from typing import Any

from bayesfed.errors import choice, integer, number


def setting(default: Any, *, init: bool = True, choices: Iterable[str] = (), **bounds: float) -> Any:
    """A field whose values :func:`check_settings` knows the range of.

    Args:
        default: its value where the constructor isn't given one.
        init: False makes it a constant of the class: the constructor doesn't take it.
        choices: the valid strings.
        bounds: of a number: ``above``, ``at_least``, ``at_most``.
    """
    return field(default=default, init=init, metadata={"choices": tuple(choices), "bounds": bounds})


def check_settings(settings: Any, group: str = "") -> None:
    """Check a dataclass's fields that are :func:`setting` against their types and ranges; numbers become Python's.

    Args:
        settings: the instance, from its ``__post_init__``.
        group: of the configuration, for the errors; empty if the caller adds it.

    Raises:
        InputError: a value of the wrong type or out of range.
    """
    for entry in fields(settings):
        if "bounds" not in entry.metadata:
            continue
        name, value = f"{group}.{entry.name}" if group else entry.name, getattr(settings, entry.name)
        kind = entry.type if isinstance(entry.type, str) else getattr(entry.type, "__name__", str(entry.type))
        optional, bounds = "None" in kind, entry.metadata["bounds"]
        if kind.startswith("float"):
            value = number(name, value, optional=optional, **bounds)
            value = None if value is None else float(value)
        elif kind.startswith("int"):
            value = integer(name, value, optional=optional, **bounds)
        elif entry.metadata["choices"]:
            choice(name, value, entry.metadata["choices"])
        object.__setattr__(settings, entry.name, value)  # also of a frozen one
