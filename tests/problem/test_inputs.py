"""Inputs that are not one scaled tensor: whole numbers, rows of different length, dicts of arrays."""

from __future__ import annotations

from dataclasses import replace

import numpy as np
import pytest
import torch

import bayesfed
from bayesfed.errors import InputError
from bayesfed.problem.data.source import Loaded
from bayesfed.problem.examples import Examples, Joined
from bayesfed.problem.inputs import cut, padded

OWN = '''
import numpy as np
import torch
from torch import nn

from bayesfed.problem.data import Loaded, Source
from bayesfed.problem.inputs import padded


def draw(seed, count=240):
    """Rows of 2 to 9 token ids below 20; the class says which half most ids are from."""
    generator = np.random.default_rng(seed)
    y = generator.integers(0, 2, count)
    rows = [10 * label ^ 10 * (generator.random(n) < 0.2) for label, n in zip(y, generator.integers(2, 10, count))]
    return [row + generator.integers(0, 10, len(row)) for row in rows], y


class Tokens(Source):
    def load(self, seed):
        rows, y = draw(seed)
        x = padded(rows)
        return Loaded(x, y, x, y, np.arange(200), np.arange(200, 240))


class Pair(Source):
    """Whole numbers and floats by name."""

    def load(self, seed):
        generator = np.random.default_rng(seed)
        ids, y = generator.integers(0, 5, 240), generator.integers(0, 2, 240)
        x = {"id": ids, "numbers": generator.normal(size=(240, 3)) + 2 * (2 * y - 1)[:, None] * (ids - 2)[:, None]}
        return Loaded(x, y, x, y, np.arange(200), np.arange(200, 240))


class Bag(nn.Module):
    def __init__(self, input_shape, num_outputs, words: int = 20):
        super().__init__()
        self.embed, self.head = nn.Embedding(words, 8), nn.Linear(8, num_outputs)

    def forward(self, x):
        mask = x["mask"][..., None]
        return self.head((self.embed(x["tokens"]) * mask).sum(-2) / mask.sum(-2))


class Gated(nn.Module):
    def __init__(self, input_shape, num_outputs):
        super().__init__()
        self.embed, self.head = nn.Embedding(5, input_shape["numbers"][0]), nn.Linear(3, num_outputs)

    def forward(self, x):
        return self.head(self.embed(x["id"]) * x["numbers"])
'''


@pytest.fixture
def own(tmp_path, monkeypatch):
    """``own("Tokens", "Bag", "client=adam")``: a run, and the module with its data and model."""
    name = f"own_inputs_{tmp_path.name.replace('-', '_')}"
    (tmp_path / f"{name}.py").write_text(OWN)
    for group, names in (("data", ("Tokens", "Pair")), ("model", ("Bag", "Gated"))):
        (tmp_path / "conf" / group).mkdir(parents=True)
        for each in names:
            (tmp_path / "conf" / group / f"{each}.yaml").write_text(
                f"_target_: {name}.{each}\n" + "scaling: raw\n" * (group == "data")
            )
    monkeypatch.chdir(tmp_path)
    monkeypatch.syspath_prepend(str(tmp_path))

    def run(data: str, model: str, *overrides: str):
        settings = [f"data={data}", f"model={model}", "partition=iid", "partition.num_clients=3", "rounds=2"]
        settings += ["engine=inline", "display=false", "figures=false", "eval.bayes_every=1", "eval.samples=4"]
        return bayesfed.run([*settings, f"hydra.run.dir={tmp_path / 'run'}", *overrides])

    return run


CLIENTS = {
    "adam": ["strategy=fedavg", "client=adam", "client.lr=0.01", "client.epochs=3"],
    "ivon": ["strategy=bayes_admm", "client=ivon", "client.lr=0.1", "client.hess_init=0.1", "client.epochs=5",
             "strategy.temperature=1", "strategy.prior_precision=1", "strategy.rho=1"],
}  # fmt: skip


@pytest.mark.parametrize(
    ("data", "model", "client"), [("Tokens", "Bag", "adam"), ("Tokens", "Bag", "ivon"), ("Pair", "Gated", "ivon")]
)
def test_a_run_learns_from_them_and_its_posterior_predicts(own, data, model, client):
    found = own(data, model, *CLIENTS[client])
    nll = [round["mean/nll"] for round in bayesfed.load(found.run_dir).rounds]
    assert nll[0] > nll[1] > nll[2]
    trained = bayesfed.load(found.run_dir)
    source = bayesfed.app.problem_of(bayesfed.app.plain(bayesfed.runs.directory.RunDirectory(found.run_dir).config()))
    x = {name: array[200:] for name, array in source.test.x.items()}
    p = trained.predict(x, samples=0)
    y = source.test.targets()
    assert float(-p.gather(1, y[:, None]).log().mean()) == pytest.approx(found.summary["mean/nll"], rel=1e-5)
    assert len(trained.predict({name: array[:3].numpy() for name, array in x.items()})) == 3


def test_side_by_side_agrees_with_one_client_after_the_other(own):
    # inline trains the clients of a round together where the solver can; more clients than that is no other result
    together = own("Tokens", "Bag", *CLIENTS["adam"], "partition.num_clients=5")
    posterior = bayesfed.load(together.run_dir).posterior.mean
    alone = own("Tokens", "Bag", *CLIENTS["adam"], "partition.num_clients=5", "engine.clients_per_batch=1",
                f"hydra.run.dir={together.run_dir}-alone")  # fmt: skip
    torch.testing.assert_close(bayesfed.load(alone.run_dir).posterior.mean, posterior, rtol=1e-4, atol=1e-6)


def test_padding_is_cut_to_the_longest_row_of_a_batch():
    x = {name: torch.from_numpy(array) for name, array in padded([[1, 2], [3], [4, 5, 6, 7]]).items()}
    assert x["tokens"].tolist() == [[1, 2, 0, 0], [3, 0, 0, 0], [4, 5, 6, 7]]
    examples = Examples({**x, "age": torch.tensor([1.0, 2.0, 3.0])}, torch.tensor([0, 1, 1]))
    batch, y = examples.batch(torch.tensor([1, 0]), torch.float64, "cpu")
    assert batch["tokens"].tolist() == [[3, 0], [1, 2]]
    assert batch["mask"].tolist() == [[True, False], [True, True]]
    assert (batch["tokens"].dtype, batch["age"].dtype, y.tolist()) == (torch.int64, torch.float64, [1, 0])
    both, _ = Joined([examples.subset(torch.tensor([1])), examples.subset(torch.tensor([0]))]).batch(
        slice(0, 2), torch.float64, "cpu"
    )
    assert torch.equal(both["tokens"], batch["tokens"])
    left = {
        "tokens": torch.tensor([[0, 0, 1], [0, 2, 3]]),
        "mask": torch.tensor([[False, False, True], [False, True, True]]),
    }
    assert cut(left)["tokens"].tolist() == [[0, 1], [2, 3]]
    assert cut({"mask": torch.zeros(2, 3, dtype=torch.bool)})["mask"].shape == (2, 3)


def test_whole_numbers_are_neither_scaled_nor_cast_but_bytes_are():
    ids = Examples(torch.tensor([[2**40 + 1], [7]]), torch.zeros(2))
    assert ids.batch(slice(None), torch.float32, "cpu")[0].tolist() == [[2**40 + 1], [7]]
    pixels = Examples(torch.tensor([[255]], dtype=torch.uint8), torch.zeros(1))
    assert pixels.batch(slice(None), torch.float32, "cpu")[0].dtype == torch.float32


@pytest.mark.parametrize(
    ("overrides", "says"),
    [
        (["data.scaling=standardize"], r"data\.scaling=standardize: whole numbers and inputs of several"),
        (["partition=continuous"], r"partition\.by=mean: needs inputs of one array"),
        (["shift.rotation=30"], r"shift\.rotation=30: needs images"),
        (["eval.ood=noise"], r"eval\.ood=noise: needs inputs of one array"),
        (["model=linear"], r"model=linear: takes one array, the data give mask, tokens"),
    ],
)
def test_what_does_not_fit_is_refused(own, overrides, says):
    with pytest.raises(InputError, match=says):
        own("Tokens", "Bag", "strategy=fedavg", *overrides)


@pytest.mark.parametrize(
    ("x", "says"),
    [
        ({}, r"data\.x=\{\}: needs at least one array"),
        ({"a": np.zeros((3, 1))}, r"data\.x\.a=array of shape \(3, 1\): needs one row for each of the 2 targets"),
        ({"a": [[1], [2, 3]]}, r"data\.x\.a=list: must be an array of numbers"),
        ({"a": np.array(["x", "y"])}, r"data\.x\.a=<U1: must be an array of numbers"),
        ({"mask": np.ones((2, 3))}, r"data\.x\.mask=float64 array .*booleans"),
    ],
)
def test_what_is_no_input_is_named(x, says):
    with pytest.raises(InputError, match=says):
        Loaded(x, np.zeros(2), x, np.zeros(2))


def test_predict_says_what_it_needs(own):
    trained = bayesfed.load(own("Tokens", "Bag", "strategy=fedavg", "rounds=0").run_dir)
    x = padded([[1, 2, 3], [4, 5]])
    assert trained.predict(x).shape == (2, 2)
    assert torch.equal(
        trained.predict({name: array[1:] for name, array in x.items()}), trained.predict(padded([[4, 5]]))
    )
    for wrong, says in (
        (x["tokens"], "needs a dict of mask, tokens"),
        ({"tokens": x["tokens"]}, "x=tokens: needs a dict of mask, tokens"),
        ({**x, "tokens": x["tokens"] + 0.5}, "must hold numbers of type int64"),
        ({**x, "tokens": x["tokens"][:1]}, r"x=\[2, 1\] rows: needs equally many"),
    ):
        with pytest.raises(InputError, match=says):
            trained.predict(wrong)


def test_loaded_keeps_its_arrays():
    x = np.zeros((2, 1))
    assert replace(Loaded(x, np.zeros(2), x, np.zeros(2)), own=True).x is x
