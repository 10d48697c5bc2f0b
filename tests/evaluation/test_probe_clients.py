"""Scores on each client's own test distribution, and how unequal they are."""

from __future__ import annotations

import pytest
import torch
from torch import nn

from bayesfed.evaluation import evaluate
from bayesfed.evaluation.probes.clients import evaluate_clients, fairness
from bayesfed.families import DiagonalGaussian, PointMass
from bayesfed.problem import Categorical, Examples, Gaussian
from bayesfed.problem.examples import Joined
from bayesfed.problem.flat import FlatModel
from bayesfed.problem.shift import ClientShift

CATEGORICAL = Categorical()
GAUSSIAN = Gaussian(4.0)


def stream(seed: int = 0) -> torch.Generator:
    return torch.Generator().manual_seed(seed)


class Flat(nn.Module):
    """Linear on flattened images."""

    def __init__(self, outputs: int):
        super().__init__()
        self.layer = nn.Linear(9, outputs)

    def forward(self, x):
        return self.layer(x.flatten(1))


def shifted(angle: float = 0.0, labels: tuple[int, ...] = ()) -> ClientShift:
    return ClientShift(0, angle, 1.0, 0.0, (), labels, 1.0)


@pytest.fixture
def case():
    """60 images in three classes, and five clients: overlapping rows, rotated ones, permuted labels, none at all."""
    x, y = torch.rand(60, 1, 3, 3, generator=stream(1)), torch.randint(3, (60,), generator=stream(2))
    turn = shifted(90.0)
    rows = [torch.arange(0, 30), torch.arange(20, 60), torch.arange(5, 25), torch.arange(0), torch.tensor([1, 58, 7])]
    shifts = [None, None, turn, None, shifted(labels=(1, 2, 0))]
    tests = [Examples(x, y, r, shift=s) for r, s in zip(rows, shifts, strict=True)]
    model = FlatModel(Flat(3), torch.float64, torch.device("cpu"))
    mean = torch.randn(model.dim, generator=stream(3), dtype=torch.float64)
    return model, DiagonalGaussian.from_mean_precision(mean, torch.full_like(mean, 3.0)), tests


@pytest.mark.parametrize("batch_size", [7, 1000])
def test_the_scores_are_those_of_each_set_alone(case, batch_size):
    model, posterior, tests = case
    found = evaluate_clients(model, posterior, tests, CATEGORICAL, samples=3, generator=stream(), batch_size=batch_size)
    assert found[3] is None
    for own, scores in zip(tests, found, strict=True):
        if len(own):
            alone = evaluate(model, posterior, own, CATEGORICAL, samples=3, generator=stream())
            assert scores == pytest.approx(
                {k.removeprefix("bayes/"): v for k, v in alone.items() if k.startswith("bayes/")}
            )
    assert torch.equal(model.vector, posterior.mean)


def test_an_input_is_predicted_once(case, monkeypatch):
    model, posterior, tests = case
    seen = []
    forward = Flat.forward
    monkeypatch.setattr(Flat, "forward", lambda self, x: (seen.append(len(x)), forward(self, x))[1])
    evaluate_clients(model, posterior, tests, CATEGORICAL, samples=2, generator=stream())
    assert sum(seen) == 2 * (60 + 20)  # all upright ones, and those one client sees turned


def test_regression():
    x = torch.randn(40, 3, generator=stream(1), dtype=torch.float64)
    y = torch.randn(40, generator=stream(2), dtype=torch.float64)
    tests = [Examples(x, y, torch.arange(0, 25)), Examples(x, y, torch.arange(10, 40))]
    model = FlatModel(nn.Linear(3, 1), torch.float64, torch.device("cpu"))
    posterior = DiagonalGaussian.from_mean_precision(torch.ones(4).double(), torch.full((4,), 5.0).double())
    found = evaluate_clients(model, posterior, tests, GAUSSIAN, samples=4, generator=stream())
    for own, scores in zip(tests, found, strict=True):
        alone = evaluate(model, posterior, own, GAUSSIAN, samples=4, generator=stream())
        assert scores == pytest.approx({"rmse": alone["bayes/rmse"], "nll": alone["bayes/nll"]})


def test_a_point_mass_predicts_at_its_mean(case):
    model, posterior, tests = case
    point = PointMass(posterior.mean)
    found = evaluate_clients(model, point, tests[:1], CATEGORICAL, samples=9, generator=stream())
    alone = evaluate(model, point, tests[0], CATEGORICAL, samples=0, generator=stream())
    assert found[0] == pytest.approx({k.removeprefix("mean/"): v for k, v in alone.items() if k.startswith("mean/")})


def test_joined_sets_are_read_in_order():
    x, y = torch.arange(10.0).view(10, 1), torch.arange(10)
    joined = Joined(
        [
            Examples(x, y, torch.tensor([3, 1])),
            Examples(x, y, torch.tensor([9])),
            Examples(x, y, torch.tensor([2, 4, 6])),
        ]
    )
    assert len(joined) == 6
    assert joined.targets().tolist() == [3, 1, 9, 2, 4, 6]
    for start, stop in ((0, 6), (1, 4), (2, 3), (4, 99)):
        batch, labels = joined.batch(slice(start, stop), torch.float64, torch.device("cpu"))
        assert batch.flatten().tolist() == labels.tolist() == [3, 1, 9, 2, 4, 6][start:stop]


def test_fairness():
    scores = [{"accuracy": float(a), "nll": 1 - a / 100} for a in range(20)]
    found = fairness([*scores, None], Categorical.measures)
    assert found["accuracy_mean"] == pytest.approx(9.5)
    assert found["accuracy_worst10"] == pytest.approx(0.5)  # the two worst of twenty
    assert found["accuracy_spread"] == pytest.approx((sum((a - 9.5) ** 2 for a in range(20)) / 20) ** 0.5)
    assert found["nll_worst10"] == pytest.approx(0.995)  # the largest
    assert (
        fairness([{"accuracy": 50.0}, {"accuracy": 70.0}, {"accuracy": 90.0}], Categorical.measures)["accuracy_worst10"]
        == 50.0
    )
    assert fairness([{"rmse": 1.0, "nll": 2.0}], Gaussian.measures) == {
        "rmse_mean": 1.0,
        "rmse_worst10": 1.0,
        "rmse_spread": 0.0,
        "nll_mean": 2.0,
        "nll_worst10": 2.0,
        "nll_spread": 0.0,
    }
    assert fairness([None], Gaussian.measures) == {}
