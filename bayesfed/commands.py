"""Commands that bayesfed shows: quoted for Hydra and for the shell, so that they can be pasted."""

from __future__ import annotations

import re
import shlex

_BARE = re.compile(
    r"(?!(?:null|true|false|inf|nan)$)[A-Za-z_./][A-Za-z0-9_./+@%-]*", re.IGNORECASE
)  # strings without quotes


def override(key: str, value: object) -> str:
    """``key=value`` as Hydra reads it back; strings and paths with more than plain characters stand in Hydra's
    quotes."""
    text = str(value)
    if _BARE.fullmatch(text) or isinstance(value, int | float):
        return f"{key}={text}"
    escaped = re.sub(r"(\\*)('|$)", lambda m: m[1] * 2 + ("\\'" if m[2] else ""), text)
    return f"{key}='{escaped}'"


def command(*words: object) -> str:
    """``bayesfed`` with ``words`` (verbs, or what :func:`override` gives) as a line for a POSIX shell."""
    return shlex.join(["bayesfed", *map(str, words)])
