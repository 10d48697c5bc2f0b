"""Global generators: seeded for a stranger's code, put back afterwards."""

# ruff: noqa: NPY002 - the global generators are what these tests are about

import random

import numpy as np
import pytest
import torch
from omegaconf import OmegaConf

from bayesfed.configured import build
from bayesfed.seeding import global_generators


def draws() -> tuple[float, ...]:
    return random.random(), random.gauss(0, 1), np.random.random(), np.random.normal(), float(torch.randn(()))


class DrawingSolver:
    """What a client group must have, and a constructor that draws."""

    families, lacks, batches, stepwise = frozenset(), {}, False, True
    check = require = solve = solve_many = None

    def __init__(self):
        self.drawn = draws()


def test_equal_keys_draw_alike_and_the_host_goes_on_where_it_was():
    random.seed(1), np.random.seed(1), torch.manual_seed(1)
    expected = [draws() for _ in range(4)]
    random.seed(1), np.random.seed(1), torch.manual_seed(1)
    found, inside = [], []
    for key in (("a",), ("a",), ("b",)):
        found.append(draws())
        with global_generators(3, *key):
            inside.append(draws())
            with global_generators(3, "a"):  # as when a model is built while data are loaded
                nested = draws()
            inside.append(draws())
        assert nested == inside[0]
    with pytest.raises(KeyError), global_generators(3, "c"):
        raise KeyError
    found.append(draws())
    assert found == expected
    assert inside[:2] == inside[2:4]
    assert not set(inside[0]) & set(inside[4])


def test_constructors_draw_from_the_runs_seed():
    section = OmegaConf.create({"_target_": "tests.test_seeding.DrawingSolver", "name": "drawing"})
    first, again, other = (build(section, "client", seed).drawn for seed in (1, 1, 2))
    assert first == again
    assert not set(first) & set(other)
