"""Numbers are numbers, whichever library made them."""

from __future__ import annotations

import numpy as np
import pytest
import torch

from bayesfed.errors import InputError, integer, number


@pytest.mark.parametrize("value", [2, np.int64(2), np.uint8(2), np.array(2), torch.tensor(2)])
def test_whole_numbers_of_all_makes(value):
    found = integer("n", value, at_least=1)
    assert type(found) is int
    assert found == 2


@pytest.mark.parametrize("value", [0.5, np.float32(0.5), np.float64(0.5), np.array(0.5), torch.tensor(0.5)])
def test_numbers_of_all_makes(value):
    found = number("lr", value, above=0)
    assert found == 0.5
    assert isinstance(found, float)


@pytest.mark.parametrize(
    "value", [True, np.bool_(True), torch.tensor(True), "1", 1j, [1], np.array([1]), torch.ones(1), None]
)
def test_what_is_no_number(value):
    with pytest.raises(InputError, match="n="):
        integer("n", value, at_least=0)
    with pytest.raises(InputError, match="lr="):
        number("lr", value)


@pytest.mark.parametrize("value", [float("nan"), np.float32("nan"), torch.tensor(float("inf")), -1.0, np.float32(-1)])
def test_ranges_hold_for_all_makes(value):
    with pytest.raises(InputError):
        number("lr", value, above=0)
