import math
from pathlib import Path

import numpy as np
import pytest
import torch
from omegaconf import OmegaConf

from bayesfed.configured import build
from bayesfed.errors import InputError
from bayesfed.problem import Categorical, Gaussian, Likelihood
from bayesfed.scores import score


def test_categorical_loss_is_the_mean_negative_log_probability():
    outputs = torch.tensor([[0.0, 0.0], [math.log(3.0), 0.0]])
    loss = Categorical().loss(outputs, torch.tensor([0, 1]))
    assert loss.item() == pytest.approx((math.log(2) + math.log(4)) / 2)


@pytest.mark.parametrize("shape", [(3,), (3, 1), (3, 2)])
def test_gaussian_loss_is_the_mean_negative_log_density(shape):
    generator = torch.Generator().manual_seed(0)
    outputs = torch.randn(3, *(shape[1:] or (1,)), generator=generator, dtype=torch.float64)
    y = torch.randn(shape, generator=generator, dtype=torch.float64)
    density = torch.distributions.Normal(outputs, 0.5).log_prob(y.reshape(outputs.shape)).sum(1)
    loss = Gaussian(precision=4.0).loss(outputs, y)
    assert loss.item() == pytest.approx(-density.mean().item(), rel=1e-12)


def test_gaussian_loss_refuses_to_broadcast():
    with pytest.raises(ValueError, match=r"outputs \(3, 2\) do not match targets \(3,\)"):
        Gaussian().loss(torch.zeros(3, 2), torch.zeros(3))


@pytest.mark.parametrize(
    ("likelihood", "outputs", "y"),
    [
        (Categorical(), (5, 3), torch.tensor([0, 2, 1, 1, 0])),
        (Gaussian(4.0), (5, 1), torch.arange(5.0)),
        (Gaussian(4.0), (5, 2), torch.arange(10.0).view(5, 2)),
    ],
)
def test_losses_of_single_examples(likelihood, outputs, y):
    outputs = torch.randn(outputs, generator=torch.Generator().manual_seed(0))
    losses = likelihood.losses(outputs, y)
    alone = torch.stack([likelihood.loss(outputs[i : i + 1], y[i : i + 1]) for i in range(5)])
    assert torch.allclose(losses, alone)
    assert torch.allclose(losses.mean(), likelihood.loss(outputs, y))
    assert torch.allclose(Likelihood.losses(likelihood, outputs, y), alone)  # what a likelihood without its own gets


def test_number_of_outputs():
    assert Categorical().num_outputs(torch.tensor([0, 4, 1])) == 5
    assert Gaussian().num_outputs(torch.zeros(7)) == 1
    assert Gaussian().num_outputs(torch.zeros(7, 3)) == 3


@pytest.mark.parametrize("precision", [0, -1.0, float("nan"), float("inf"), "1", True])
def test_gaussian_needs_a_positive_precision(precision):
    with pytest.raises(InputError, match=r"precision=.*> 0"):
        Gaussian(precision=precision)


@pytest.mark.parametrize(
    ("y", "message"),
    [
        (np.array([0, 1, -2]), "y of row 2 is -2"),
        (np.array([0.0, 1.5, 0.5]), "y of row 1 is 1.5.*likelihood=gaussian"),
        (np.zeros((3, 2), dtype=int), r"one label per example.*\(3, 2\)"),
    ],
)
def test_categorical_refuses_targets_that_are_no_labels(y, message):
    with pytest.raises(InputError, match=message):
        Categorical().targets(y)


def test_categorical_accepts_whole_floats_and_small_integers():
    for dtype in (np.float32, np.uint8, np.bool_):
        labels = Categorical().targets(np.array([0, 1], dtype=dtype))
        assert labels.dtype == np.int64
        assert labels.tolist() == [0, 1]


def test_gaussian_refuses_labels_and_keeps_float_precision():
    with pytest.raises(InputError, match=r"likelihood=gaussian: .*likelihood=categorical"):
        Gaussian().targets(np.array([1, 2]))
    with pytest.raises(InputError, match="shape"):
        Gaussian().targets(np.zeros((2, 2, 2)))
    assert Gaussian().targets(np.zeros(2, dtype=">f8")).dtype == np.float64
    assert Gaussian().targets(np.zeros(2, dtype=np.float16)).dtype == np.float32


# -- what every likelihood has -----------------------------------------------------------------------------------------

CONF = Path(__file__).resolve().parents[2] / "conf" / "likelihood"
TARGETS = {"categorical": np.arange(40) % 3, "gaussian": np.random.default_rng(0).normal(size=(40, 2))}


@pytest.mark.parametrize("name", sorted(path.stem for path in CONF.glob("*.yaml")))
def test_every_likelihood_predicts_scores_and_answers(name):
    likelihood = build(OmegaConf.load(CONF / f"{name}.yaml"), "likelihood")
    assert likelihood.name == name
    y = torch.from_numpy(likelihood.targets(TARGETS[name]))
    generator = torch.Generator().manual_seed(0)
    draws = torch.randn(5, 40, likelihood.num_outputs(y), generator=generator, dtype=torch.float64)
    predictive = likelihood.predictive(iter([likelihood.transform(draw) for draw in draws]), y)
    assert {len(values) for values in predictive.values()} == {40}
    assert ("log_probabilities" in predictive) == likelihood.classes
    found = likelihood.scores(predictive, y)
    assert list(found) == [measure.name for measure in likelihood.measures]
    assert all(score(measure.name) is measure for measure in likelihood.measures)
    assert likelihood.measures[0].role == "main"
    rows = torch.tensor([3, 1, 30])
    some = likelihood.predictive([likelihood.transform(draw[rows]) for draw in draws], y[rows])
    part = {key: values[rows] for key, values in predictive.items()}
    assert likelihood.scores(part, y[rows]) == pytest.approx(likelihood.scores(some, y[rows]), rel=1e-12)
    answer = likelihood.answer(likelihood.predictive([likelihood.transform(draw) for draw in draws]))
    for array in [answer] if isinstance(answer, torch.Tensor) else answer:
        assert len(array) == 40
        assert bool(array.isfinite().all())
    alone = likelihood.predictive([likelihood.transform(draws[0])], y)
    assert likelihood.scores(alone, y)["nll"] == pytest.approx(likelihood.loss(draws[0], y).item(), rel=1e-12)
    with pytest.raises(ValueError, match="no parameters"):
        likelihood.predictive([])
