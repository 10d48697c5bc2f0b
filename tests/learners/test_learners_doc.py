"""The Python of docs/learners.md works as it stands."""

from __future__ import annotations

import copy
import io
import re
from pathlib import Path

import pytest
import torch

from bayesfed.families import FullGaussian
from clients.optim import IVON, LMD, SRVN, nva, srvn_step

TEXT = (Path(__file__).parents[2] / "docs" / "learners.md").read_text()
OWN_LOOP = re.search(r"\n## In your own loop\n.*?(?=\n## )", TEXT, flags=re.DOTALL).group()
BLOCKS, LOOPS = (re.findall(r"```python\n(.*?)```", t, flags=re.DOTALL) for t in (TEXT.replace(OWN_LOOP, ""), OWN_LOOP))
RECIPES = {"skip": 0, "scaler": 1, "clip": 2, "freeze": 3, "copy": 4, "ranks": 5}


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


@pytest.fixture
def loop(names, tmp_path):
    """A recipe's names: 100 batches, one of them bad."""
    bad = names["x"].clone()
    bad[0] = torch.nan
    batches = [(names["x"], names["y"]) for _ in range(100)]
    return names | {"batches": batches, "bad": (bad, names["y"]), "device": "cpu", "copy": copy, "file": io.BytesIO()}


def test_there_is_a_recipe_for_each():
    assert len(LOOPS) == len(RECIPES)


@pytest.mark.parametrize("recipe", ["skip", "scaler", "clip", "freeze"])
@pytest.mark.parametrize(
    "learner",
    [lambda p: IVON(p, 0.1, 50), lambda p: SRVN(p, 0.05, 50, lr_covariance=0.005), lambda p: LMD(p, 0.02, decay=0.0)],
    ids=["ivon", "srvn", "lmd"],
)
def test_loops_lower_the_loss(loop, recipe, learner):
    loop["optimizer"] = learner(loop["model"].parameters())
    if recipe in ("skip", "scaler"):
        loop["batches"][3] = loop["bad"]
    before, bias = float(loop["loss"](loop["model"](loop["x"]), loop["y"])), loop["model"].bias.item()
    good = loop["x"]
    exec(LOOPS[RECIPES[recipe]], loop)
    assert float(loop["loss"](loop["model"](good), loop["y"])) < 0.2 * before
    assert (loop["model"].bias.item() == bias) is (recipe == "freeze")
    assert recipe != "scaler" or loop["scaler"].get_scale() == 512.0


def test_copies_and_parts(loop):
    model, optimizer = loop["model"], IVON(loop["model"].parameters(), 0.1, 50)
    exec(LOOPS[RECIPES["copy"]], loop | {"optimizer": optimizer})
    loop["file"].seek(0)
    saved = torch.load(loop["file"])["weight"]
    assert torch.equal(saved, model.weight)
    assert saved.untyped_storage().nbytes() == 4 * 3


def test_ranks(loop, tmp_path):
    """One rank; two are in test_own_loop.py."""
    torch.distributed.init_process_group("gloo", init_method=f"file://{tmp_path}/store", rank=0, world_size=1)
    try:
        wrapped = torch.nn.parallel.DistributedDataParallel(loop["model"])
        exec(LOOPS[RECIPES["ranks"]], loop | {"rank": 0, "wrapped": wrapped})
    finally:
        torch.distributed.destroy_process_group()
    assert float(loop["loss"](loop["model"](loop["x"]), loop["y"])) < 0.2
