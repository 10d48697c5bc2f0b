"""Predictive distributions against closed forms."""

import math
import threading
import time

import pytest
import torch
from torch import nn

from bayesfed.errors import InputError
from bayesfed.evaluation import evaluate, inputs, predict
from bayesfed.evaluation.inputs import InputBatches, input_batches
from bayesfed.evaluation.outputs import outputs, parameter_draws, together
from bayesfed.families import DiagonalGaussian, FullGaussian, PointMass
from bayesfed.problem import Categorical, Gaussian
from bayesfed.problem.flat import FlatModel
from bayesfed.problem.likelihood.metrics import reliability

CATEGORICAL, GAUSSIAN = Categorical(), Gaussian(4.0)


class Rows:
    """A test set in memory."""

    def __init__(self, x, y):
        self.x, self.y, self.reads = x, y, 0

    def __len__(self):
        return len(self.x)

    def batch(self, positions, dtype, device):
        self.reads += 1
        return self.x[positions].to(device, dtype), self.y[positions].to(device)

    def targets(self):
        return self.y


def stream(seed=0):
    return torch.Generator().manual_seed(seed)


def linear(inputs, outputs, dtype=torch.float64, bias=False):
    return FlatModel(nn.Linear(inputs, outputs, bias=bias), dtype=dtype)


@pytest.fixture
def classification():
    """A linear classifier of 60 examples in 3 classes with a posterior around its parameters."""
    generator = stream(1)
    model = linear(4, 3)
    x = torch.randn(60, 4, dtype=torch.float64, generator=generator)
    y = torch.randint(3, (60,), generator=generator)
    mean = torch.randn(12, dtype=torch.float64, generator=generator)
    posterior = DiagonalGaussian.from_mean_precision(mean, torch.full((12,), 2.0, dtype=torch.float64))
    return model, posterior, Rows(x, y)


def test_model_averaging_averages_probabilities(classification):
    model, posterior, rows = classification
    scores = evaluate(model, posterior, rows, CATEGORICAL, samples=5, generator=stream(), batch_size=7)
    generator = stream()
    thetas = [posterior.sample(1, generator=generator)[0] for _ in range(5)]
    average = torch.stack([(rows.x @ t.view(3, 4).T).softmax(1) for t in thetas]).mean(0)
    of_label = average[torch.arange(60), rows.y]
    one_hot = nn.functional.one_hot(rows.y, 3)
    assert scores["bayes/nll"] == pytest.approx(-of_label.log().mean().item(), rel=1e-12)
    assert scores["bayes/accuracy"] == pytest.approx(100 * (average.argmax(1) == rows.y).double().mean().item())
    assert scores["bayes/brier"] == pytest.approx((average - one_hot).square().sum(1).mean().item(), rel=1e-12)
    at_mean = (rows.x @ posterior.mean.view(3, 4).T).log_softmax(1)[torch.arange(60), rows.y]
    assert scores["mean/nll"] == pytest.approx(-at_mean.mean().item(), rel=1e-12)
    assert set(scores) == {f"{k}/{m}" for k in ("mean", "bayes") for m in ("accuracy", "nll", "ece", "brier")}


def test_confident_draws_do_not_underflow():
    model = linear(1, 2)
    draws = [torch.tensor([0.0, 2000.0]), torch.tensor([0.0, 3000.0])]
    one = torch.ones(1, 1, dtype=torch.float64).__getitem__
    logs = predict(model, draws, InputBatches(one, 1, 1), CATEGORICAL)["log_probabilities"]
    assert logs[0, 0].item() == pytest.approx(-2000 + math.log(0.5))


def test_model_and_mode_are_restored(classification):
    model, posterior, rows = classification
    model.module = nn.Sequential(model.module, nn.Dropout(0.9), nn.BatchNorm1d(3, dtype=torch.float64))
    model.module.train()
    model.module[1].eval()
    first = evaluate(model, posterior, rows, CATEGORICAL, samples=3, generator=stream())
    assert [m.training for m in model.module] == [True, False, True]
    assert torch.equal(model.vector, posterior.mean)
    assert all(p.grad is None for p in model.parameters)
    assert model.module[2].running_mean.count_nonzero() == 0  # a test set must not train normalisation
    assert evaluate(model, posterior, rows, CATEGORICAL, samples=3, generator=stream()) == first


def test_mode_is_restored_after_an_error(classification):
    model, posterior, rows = classification
    rows.x = rows.x[:, :3]
    with pytest.raises(RuntimeError):
        evaluate(model, posterior, rows, CATEGORICAL, samples=3, generator=stream())
    assert model.module.training
    assert torch.equal(model.vector, posterior.mean)


def test_without_bayes_only_the_mean_is_scored(classification):
    model, posterior, rows = classification
    generator = stream()
    scores = evaluate(model, posterior, rows, CATEGORICAL, samples=3, generator=generator, bayes=False)
    assert set(scores) == {"mean/accuracy", "mean/nll", "mean/ece", "mean/brier"}
    assert torch.equal(generator.get_state(), stream().get_state())


def test_a_point_mass_has_one_predictive(classification):
    model, posterior, rows = classification
    scores = evaluate(model, PointMass(posterior.mean), rows, CATEGORICAL, samples=9, generator=stream())
    assert all(scores[f"bayes/{m}"] == scores[f"mean/{m}"] for m in ("accuracy", "nll", "ece", "brier"))


def test_inputs_are_converted_once_unless_too_large(classification, monkeypatch):
    model, posterior, rows = classification
    small = evaluate(model, posterior, rows, CATEGORICAL, samples=4, generator=stream(), batch_size=20)
    assert rows.reads == 3
    monkeypatch.setattr(inputs, "CACHE_BYTES", 60 * 4 * 8 - 1)
    rows.reads = 0
    assert evaluate(model, posterior, rows, CATEGORICAL, samples=4, generator=stream(), batch_size=20) == small
    assert rows.reads == 15


@pytest.mark.parametrize(("device", "sizes"), [("cpu", [512, 512, 76]), ("meta", [1100])])
def test_batches_are_small_on_a_cpu_and_as_large_as_they_are_asked_to_be(device, sizes):
    model, rows = linear(4, 3, torch.float32), Rows(torch.zeros(1100, 4), torch.zeros(1100, dtype=torch.long))
    model.vector = model.vector.to(device)
    assert [part.stop - part.start for part, _ in input_batches(model, rows, None)] == sizes
    assert [part.stop - part.start for part, _ in input_batches(model, rows, 800)] == [800, 300]


@pytest.mark.parametrize("size", [0, -1, 2.5])
def test_a_batch_has_at_least_one_row(classification, size):
    model, posterior, rows = classification
    with pytest.raises(InputError, match="batch_size"):
        evaluate(model, posterior, rows, CATEGORICAL, samples=1, generator=stream(), batch_size=size)


def test_an_empty_test_set_is_refused(classification):
    model, posterior, rows = classification
    with pytest.raises(ValueError, match="no examples"):
        evaluate(model, posterior, Rows(rows.x[:0], rows.y[:0]), CATEGORICAL, samples=1, generator=stream())


def test_linear_gaussian_predictive_moments():
    """theta ~ N(m, S^-1), y = x theta + noise: mean x m and variance x S^-1 x + 1/precision."""
    generator = stream(2)
    root = torch.randn(3, 3, dtype=torch.float64, generator=generator)
    precision = root @ root.T + torch.eye(3, dtype=torch.float64)
    mean = torch.randn(3, dtype=torch.float64, generator=generator)
    x = torch.randn(5, 3, dtype=torch.float64, generator=generator)
    posterior = FullGaussian.from_mean_precision(mean, precision)
    samples = 4000
    draws = parameter_draws(posterior, samples, generator)
    predicted = predict(linear(3, 1), draws, InputBatches(lambda rows: x[rows], 5, 2), GAUSSIAN)
    spread = (x @ posterior.covariance * x).sum(1)
    error = spread.sqrt() / math.sqrt(samples)
    assert ((predicted["mean"][:, 0] - x @ mean).abs() < 4 * error).all()
    relative = (predicted["variance"][:, 0] - 0.25) / spread - 1
    assert (relative.abs() < 4 * math.sqrt(2 / samples)).all()


def test_regression_nll_is_that_of_the_mixture():
    x = torch.tensor([[1.0], [2.0]], dtype=torch.float64)
    y = torch.tensor([0.5, -1.0], dtype=torch.float64)
    posterior = DiagonalGaussian.from_mean_precision(
        torch.tensor([0.3], dtype=torch.float64), torch.tensor([1.0], dtype=torch.float64)
    )
    scores = evaluate(linear(1, 1), posterior, Rows(x, y), GAUSSIAN, samples=6, generator=stream())
    generator = stream()
    slopes = torch.stack([posterior.sample(1, generator=generator)[0, 0] for _ in range(6)])
    noise = torch.distributions.Normal(slopes * x, 0.5)
    mixture = noise.log_prob(y[:, None]).exp().mean(1)
    assert scores["bayes/nll"] == pytest.approx(-mixture.log().mean().item(), rel=1e-12)
    assert scores["bayes/rmse"] == pytest.approx((slopes.mean() * x[:, 0] - y).square().mean().sqrt().item())
    at_mean = torch.distributions.Normal(0.3 * x[:, 0], 0.5).log_prob(y)
    assert scores["mean/nll"] == pytest.approx(-at_mean.mean().item(), rel=1e-12)
    assert scores["mean/rmse"] == pytest.approx((0.3 * x[:, 0] - y).square().mean().sqrt().item())
    assert set(scores) == {"mean/rmse", "mean/nll", "bayes/rmse", "bayes/nll"}


@pytest.mark.parametrize("shape", [(4,), (4, 1)])
def test_one_column_of_targets_is_the_same_as_none(shape):
    x = torch.arange(4, dtype=torch.float64)[:, None]
    posterior = PointMass(torch.tensor([2.0], dtype=torch.float64))
    y = (2 * x[:, 0] + 1).reshape(shape)
    scores = evaluate(linear(1, 1), posterior, Rows(x, y), GAUSSIAN, samples=2, generator=stream())
    assert scores["mean/rmse"] == pytest.approx(1.0)


def test_reliability_counts_every_example_and_is_json(classification):
    import json

    model, posterior, rows = classification
    predictions = {}
    scores = evaluate(model, posterior, rows, CATEGORICAL, samples=3, generator=stream(), predictions=predictions)
    diagram = reliability(predictions, rows.targets(), bins=10)
    assert json.loads(json.dumps(diagram, allow_nan=False)) == diagram
    for kind in ("mean", "bayes"):
        bins = diagram[kind]
        assert sum(bins["count"]) == 60
        assert [c == 0 for c in bins["count"]] == [a is None for a in bins["accuracy"]]
        correct = sum(a * c for a, c in zip(bins["accuracy"], bins["count"], strict=True) if a is not None)
        assert 100 * correct / 60 == pytest.approx(scores[f"{kind}/accuracy"])


@pytest.mark.parametrize("at_once", [2, 5, 7, 100])
def test_draws_evaluated_together_give_the_same_prediction(classification, at_once):
    model, posterior, rows = classification

    def predicted(size):
        batches = InputBatches(lambda part: rows.batch(part, torch.float64, "cpu")[0], 60, 17)
        draws = parameter_draws(posterior, 7, stream(3))
        return predict(model, draws, batches, CATEGORICAL, at_once=size)["log_probabilities"]

    assert torch.allclose(predicted(at_once), predicted(1), rtol=0, atol=1e-12)


def test_a_regression_with_draws_together():
    model = linear(2, 1)
    posterior = DiagonalGaussian.from_mean_precision(
        torch.tensor([1.0, -1.0]).double(), torch.tensor([3.0, 5.0]).double()
    )
    x, y = torch.randn(9, 2, dtype=torch.float64, generator=stream(4)), torch.zeros(9)
    batches = InputBatches(lambda part: x[part], 9, 4)
    one, four = (
        predict(model, parameter_draws(posterior, 6, stream(5)), batches, Gaussian(2.0), y, size) for size in (1, 4)
    )
    for name in ("mean", "variance", "log_density"):
        assert torch.allclose(one[name], four[name], rtol=1e-12), name


def test_progress_is_told_of_every_draw_and_changes_nothing(classification):
    model, posterior, rows = classification
    seen = []
    options = {"samples": 3, "generator": stream()}
    scores = evaluate(model, posterior, rows, CATEGORICAL, **options, progress=lambda *draw: seen.append(draw))
    assert seen == [(1, 3), (2, 3), (3, 3)]  # and nothing of the mean
    assert scores == evaluate(model, posterior, rows, CATEGORICAL, samples=3, generator=stream())
    seen.clear()
    point = PointMass(posterior.mean)
    evaluate(model, point, rows, CATEGORICAL, **options, progress=lambda *draw: seen.append(draw))
    assert seen == []


def test_how_many_draws_together():
    assert together(torch.device("cpu")) == 1
    assert together(torch.device("cuda")) == 8
    assert together(torch.device("cpu"), 3) == 3


class KeepsFeatures(torch.nn.Linear):
    """A forward that keeps what it computes, and reads it back a moment later."""

    def forward(self, x):
        self.kept = super().forward(x)
        time.sleep(1e-3)
        return 1 * self.kept


@pytest.mark.parametrize("copied", [True, False])
def test_batches_side_by_side_do_not_share_what_a_forward_keeps(monkeypatch, copied):
    model = FlatModel(KeepsFeatures(3, 2))
    if not copied:
        model.module.lock = threading.Lock()  # can't be copied: one batch after the other
    x = torch.randn(40, 3, generator=torch.Generator().manual_seed(0))
    draws = torch.randn(3, model.dim, generator=torch.Generator().manual_seed(1))
    monkeypatch.setattr("bayesfed.evaluation.outputs._cores", lambda device: 4)
    found = list(outputs(model, draws, InputBatches(lambda rows: x[rows], 40, 5)))
    expected = [x @ theta[:6].view(2, 3).T + theta[6:] for theta in draws]
    torch.testing.assert_close(torch.stack(found), torch.stack(expected).double(), rtol=1e-5, atol=1e-6)
