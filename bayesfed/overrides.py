"""Overrides of the command line: Hydra's syntax, in which names and paths need no quotes of Hydra's own."""

from __future__ import annotations

import re
from collections.abc import Sequence
from functools import lru_cache

from hydra.core.override_parser.overrides_parser import OverridesParser
from hydra.core.override_parser.types import Override
from hydra.errors import HydraException

from bayesfed import commands
from bayesfed.errors import InputError

_COMMAS = re.compile(r",(?![^(\[{]*[)\]}])")  # between the values of a sweep, not inside brackets


@lru_cache(maxsize=1024)
def readable(text: str) -> str:
    """The override ``text``, its value in quotes if Hydra can't read it without (``data.path=größe.npz``,
    ``resume=~/run``).

    Each value of a sweep is looked at on its own. What Hydra reads is left alone, and so is what no quotes can help.
    """
    key, equals, value = text.partition("=")
    if not equals or _reads(text):
        return text
    parts = [part.strip() for part in _COMMAS.split(value)]
    parts = [part if _reads(f"{key}={part}") else commands.override("", part)[1:] for part in parts]
    quoted = f"{key}={','.join(parts)}"
    return quoted if _reads(quoted) else text


def _reads(text: str) -> bool:
    try:
        OverridesParser.create().parse_override(text)
    except HydraException:
        return False
    return True


def parse(overrides: Sequence[str]) -> list[Override]:
    """Hydra's parse of ``overrides``.

    Raises:
        InputError: bad syntax, naming the override.
    """
    parser, parsed = OverridesParser.create(), []
    for text in overrides:
        try:
            parsed += parser.parse_overrides([readable(text)])
        except HydraException as error:
            lines = [
                line for line in str(error).splitlines() if not line.startswith(("Error parsing override", "See "))
            ]
            reason = f"Hydra can't read it ({lines[0]})" if "=" in text and lines else "must be key=value"
            raise InputError("override", text, reason) from error
    return parsed


def given_for(key: str, overrides: Sequence[str]) -> str | None:
    """The last value that ``overrides`` give to ``key``, as written."""
    values = [text.partition("=")[2] for text in overrides if text.partition("=")[0].lstrip("+~") == key]
    return values[-1] if values else None
