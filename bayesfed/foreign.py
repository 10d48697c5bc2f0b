"""Text that somebody else wrote (a node, a file, a user's class): data, never markup or terminal control."""

from __future__ import annotations

import unicodedata

LIMIT = 300  # characters of a stranger's text that are shown or kept


def plain_text(text: object, limit: int = LIMIT) -> str:
    """``text`` as one printable line of at most ``limit`` characters.

    Control and format characters (terminal escapes, line breaks, bidirectional overrides) and lone surrogates appear as
    Python escapes such as ``\\x1b``; what is cut off is counted. Idempotent for texts within the limit. Rich needs
    ``markup=False``, or ``rich.markup.escape``, and HTML ``html.escape``, besides.
    """
    whole = str(text)
    shown = "".join(_visible(c) for c in whole[:limit])[:limit]
    left_out = len(whole) - limit
    return f"{shown} ... ({left_out:,} more characters)" if left_out > 0 else shown


def _visible(character: str) -> str:
    if character == " " or character.isprintable():
        return character
    if unicodedata.category(character) == "Zs":  # no-break spaces and their like
        return " "
    return character.encode("unicode_escape").decode("ascii")
