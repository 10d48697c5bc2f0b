"""Somebody's names in a figure."""

from __future__ import annotations

from collections.abc import Sequence
from textwrap import wrap

from matplotlib.axis import Axis
from matplotlib.font_manager import FontProperties, findfont, get_font

from bayesfed.foreign import plain_text

MOST_NAMES = 40  # at the ticks of an axis; more get numbers


def label(text: object, limit: int = 32, width: int | None = None) -> str:
    """Somebody's ``text`` as a label: at most ``limit`` characters, its middle left out, in lines of ``width``
    characters.

    No mathematics between dollars. Characters that the font lacks would be equal boxes; they stand as escapes.
    """
    font = get_font(findfont(FontProperties()))
    whole = plain_text(text, 10_000)
    whole = "".join(c if font.get_char_index(ord(c)) else c.encode("unicode_escape").decode("ascii") for c in whole)
    if len(whole) > limit:
        head = (2 * limit) // 3
        whole = f"{whole[:head]}…{whole[head + 1 - limit :]}"
    lines = wrap(whole, width) if width is not None else [whole]
    return "\n".join(lines).replace("$", r"\$")


def name_ticks(axis: Axis, names: Sequence[str] | None, *, rotated: bool = False) -> None:
    """Names at positions 0..n-1 of an axis, cut to 16 characters, where there are any and they can be read."""
    if names is not None and len(names) <= MOST_NAMES:
        texts = [label(name, 16) for name in names]
        long = rotated and max(map(len, texts)) * len(texts) > 60
        axis.set_ticks(range(len(texts)), texts, rotation=90 if long else 0)
