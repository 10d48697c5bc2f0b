"""Commands that are shown can be pasted: Hydra and the shell give back what was meant."""

from __future__ import annotations

import random
import shlex

import pytest

from bayesfed.commands import command, override
from bayesfed.config import parse

AWKWARD = [
    "my runs/a b=1",
    "~/run",
    "größe.npz",
    "a(1).npz",
    "x'y\"z",
    "a\\",
    "\\'",
    "",
    "null",
    "TRUE",
    "1",
    "1e3",
    "a ",
    "[1]",
]


@pytest.mark.parametrize("value", AWKWARD)
def test_awkward_values_come_back(value):
    assert parse([override("resume", value)])[0].value() == value


def test_random_values_come_back():
    generator = random.Random(0)
    for _ in range(500):
        value = "".join(generator.choices("ab=(),~&'\"\\ {}[]ö:#*?!<>|;\t", k=generator.randint(1, 8)))
        assert parse([override("resume", value)])[0].value() == value


@pytest.mark.parametrize("value", [1, 2.5, 1e-05])
def test_numbers_stay_numbers(value):
    assert parse([override("client.lr", value)])[0].value() == value


@pytest.mark.parametrize("value", AWKWARD)
def test_the_shell_sees_the_same_words(value):
    words = shlex.split(command(override("resume", value)))
    assert words[0] == "bayesfed"
    assert parse(words[1:])[0].value() == value
