"""A stranger's text can't reach a terminal as control, and can't fill a log."""

from __future__ import annotations

import unicodedata

import pytest

from bayesfed.foreign import plain_text


@pytest.mark.parametrize(
    "character", [chr(c) for c in [*range(32), 127, *range(0x80, 0xA0), 0x202E, 0x2028, 0xFEFF, 0xD800]]
)
def test_control_characters_become_escapes(character):
    shown = plain_text(f"a{character}b")
    assert shown.startswith("a\\")
    assert shown.isascii()


def test_words_of_all_languages_stay():
    assert plain_text("größe 東京 Αθήνα é") == "größe 東京 Αθήνα é"


def test_what_is_cut_is_counted():
    shown = plain_text("x" * 20_000_000, limit=100)
    assert shown == "x" * 100 + " ... (19,999,900 more characters)"


def test_escapes_count_towards_the_limit():
    shown = plain_text("\x1b" * 300)
    assert len(shown) <= 300
    assert all(unicodedata.category(c) not in ("Cc", "Cf") for c in shown)
