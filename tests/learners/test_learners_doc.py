"""The Python of docs/learners.md works as it stands."""

from __future__ import annotations

import re
from pathlib import Path

import pytest
import torch

from bayesfed.families import FullGaussian
from clients.optim import IVON, SRVN, nva, srvn_step

TEXT = (Path(__file__).parents[2] / "docs" / "learners.md").read_text()
BLOCKS = re.findall(r"```python\n(.*?)```", TEXT, flags=re.DOTALL)


@pytest.fixture
def names():
    generator = torch.Generator().manual_seed(0)
    x = torch.randn(50, 3, generator=generator)
    y = x @ torch.tensor([1.0, -1.0, 0.5])
    with torch.random.fork_rng():
        torch.manual_seed(0)
        model = torch.nn.Linear(3, 1)
    mean_squares = torch.nn.MSELoss()
    return {
        "torch": torch, "IVON": IVON, "SRVN": SRVN, "nva": nva, "srvn_step": srvn_step, "FullGaussian": FullGaussian,
        "model": model, "x": x, "y": y, "loss": lambda outputs, y: mean_squares(outputs[:, 0], y),
    }  # fmt: skip


def test_there_is_a_block_for_each():
    assert len(BLOCKS) == 5
    assert max(len(block.splitlines()) for block in BLOCKS) == 5


@pytest.mark.parametrize("number", [0, 1, 2])
def test_optimizers_lower_the_loss(names, number):
    before = float(names["loss"](names["model"](names["x"]), names["y"]))
    exec(BLOCKS[number], names)
    assert float(names["loss"](names["model"](names["x"]), names["y"])) < 0.2 * before
    if number == 2:
        assert names["posterior"].dim == 4


def test_pure_step(names):
    exec(BLOCKS[3], names)
    torch.testing.assert_close(names["mean"], torch.ones(3))
    torch.testing.assert_close(names["covariance"], torch.diag(1 / torch.tensor([1.0, 4.0, 9.0])))


def test_search(names):
    exec(BLOCKS[4], names)
    maxima = torch.tensor(
        [[3, 2], [-2.805118, 3.131312], [-3.779310, -3.283186], [3.584428, -1.848126]], dtype=torch.float64
    )
    assert float(torch.cdist(maxima, names["places"]).amin(1).max()) < 0.1
