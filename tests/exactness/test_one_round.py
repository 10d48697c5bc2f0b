"""Quadratic clients with the exact solver: one round, or a known contraction (docs/method.md 3)."""

from __future__ import annotations

from itertools import pairwise

import numpy as np
import pytest
import torch

import bayesfed
from bayesfed.errors import InputError
from bayesfed.seeding import numpy_generator
from strategies import BayesADMM

SEEDS = range(6)


def sizes(seed: int) -> tuple[int, int]:
    """K <= 8 and P <= 30."""
    g = numpy_generator(seed, "sizes")
    return int(g.integers(2, 9)), int(g.integers(1, 31))


@pytest.mark.parametrize(
    ("strategy", "expected"),
    [
        (["strategy.family=full", "strategy.covariance=learned"], 4.5),
        (["strategy.family=diagonal", "strategy.covariance=learned"], 4.5),
        (["strategy.family=isotropic", "strategy.covariance=fixed"], 4.0),  # ADMM starts with the plain mean
    ],
)
def test_slide_example(tmp_path, strategy: list[str], expected: float) -> None:
    """The authors' example: clients (1, 2, 3) and (4, 6, 5, 5, 10) under a nearly flat prior; to 1e-8."""
    y = np.array([1, 2, 3, 4, 6, 5, 5, 10], dtype=np.float64)
    x = np.ones((8, 1))
    np.savez(tmp_path / "slide.npz", x=x, y=y, client=np.array([0] * 3 + [1] * 5), x_test=x, y_test=y)
    result = bayesfed.run(
        [
            "data=npz", f"data.path={tmp_path / 'slide.npz'}", "model=linear", "model.bias=false", "likelihood=gaussian",
            "likelihood.precision=1", "partition.num_clients=null", "client=exact", "strategy=bayes_admm", "strategy.rho=0.5", "strategy.damping=1",
            "strategy.prior_precision=1e-9", "strategy.temperature=1", "rounds=1", "dtype=float64", "engine=inline",
            "display=false", "figures=false", f"hydra.run.dir={tmp_path / 'run'}", *strategy,
        ]
    )  # fmt: skip
    assert result.posterior.mean.dtype == torch.float64
    assert abs(float(result.posterior.mean) - expected) < 1e-8
    if expected == 4.5:
        assert abs(float(result.posterior.precision) - 8) < 1e-8


@pytest.mark.parametrize("seed", SEEDS)
@pytest.mark.parametrize("temperature", [1.0, 0.3])
def test_pooled_posterior_after_one_round(quadratics, federation, relative, seed: int, temperature: float) -> None:
    """rho = 1/K, gamma = 1, server at the prior: mean and precision to 1e-10, and they stay there."""
    clients, dim = sizes(seed)
    data = quadratics.random(seed, clients, dim)
    strategy = BayesADMM(family="full", rho=1 / clients, damping=1.0, prior_precision=0.7, temperature=temperature)
    run = federation(data.problem(), strategy).run(3)
    mean, precision = data.posterior(0.7, temperature)
    for posterior in run.posteriors[1:]:
        assert relative(posterior.mean, mean) < 1e-10
        assert relative(posterior.precision, precision) < 1e-10


@pytest.mark.parametrize("settings", [{"family": "full"}, {"family": "full", "alpha": 1.0, "rho": 0.5}])
def test_a_prior_around_the_initial_weights(quadratics, federation, relative, settings: dict) -> None:
    """The pooled posterior under N(m_0, I/S_0), m_0 = the initialisation; the server starts at that prior."""
    clients, dim = sizes(1)
    data = quadratics.random(1, clients, dim)
    options = {"rho": 1 / clients, "damping": 1.0, "temperature": 0.3, "prior_precision": 0.7, "prior_mean": "initial"}
    run = federation(data.problem(), BayesADMM(**options | settings)).run(2)
    start = run.trainer.initial.to(torch.float64)
    assert float(start.abs().max()) > 0.1
    assert torch.equal(run.posteriors[0].mean, start)
    mean, precision = data.posterior(0.7, 0.3, start)
    for posterior in run.posteriors[1:]:
        assert relative(posterior.mean, mean) < 1e-10
        assert relative(posterior.precision, precision) < 1e-10


def test_a_family_that_is_always_around_zero_refuses_it() -> None:
    with pytest.raises(InputError, match="prior_mean=initial: needs a Gaussian"):
        BayesADMM(family="lognormal", prior_mean="initial")


@pytest.mark.parametrize("seed", SEEDS[:2])
def test_diagonal_family_is_exact_on_diagonal_quadratics(quadratics, federation, relative, seed: int) -> None:
    data = quadratics.diagonal(seed, 5, 7)
    posterior = (
        federation(
            data.problem(), BayesADMM(family="diagonal", rho=1 / 5, prior_precision=2.0, damping=1.0, temperature=1.0)
        )
        .run(1)
        .posteriors[1]
    )
    mean, precision = data.posterior(2.0)
    assert relative(posterior.mean, mean) < 1e-10
    assert relative(posterior.precision, precision.diagonal()) < 1e-10


@pytest.mark.parametrize("seed", SEEDS[:3])
@pytest.mark.parametrize("rho", [None, 1.0, 0.05])
def test_contraction(quadratics, federation, seed: int, rho: float | None) -> None:
    """Otherwise lambda_g - lambda* shrinks by exactly 1 - alpha = K rho/(1 + K rho) a round from round 2 on."""
    clients, dim = sizes(seed)
    data = quadratics.random(seed, clients, dim)
    prior, init = 0.7, (5.0 if rho is None else 0.7)  # rho = 1/K contracts only from a wrong start
    rho = 1 / clients if rho is None else rho
    strategy = BayesADMM(
        family="full", rho=rho, prior_precision=prior, init_precision=init, damping=1.0, temperature=1.0
    )
    run = federation(data.problem(), strategy).run(6)
    mean, precision = data.posterior(prior)
    first, second = precision @ mean, precision * -0.5
    errors = [(q.natural.linear - first, q.natural.quadratic - second) for q in run.posteriors]
    scale = max(float(first.abs().max()), float(second.abs().max()))
    assert float(errors[1][1].abs().max()) > 1.0
    factor = clients * rho / (1 + clients * rho)
    for before, after in pairwise(errors[1:]):
        for old, new in zip(before, after, strict=True):
            assert float((new - factor * old).abs().max()) < 1e-10 * scale


@pytest.mark.parametrize("seed", SEEDS[:3])
@pytest.mark.parametrize("rho", [1.0, 0.2])
def test_alpha_one_needs_one_round_from_anywhere(quadratics, federation, relative, seed: int, rho: float) -> None:
    clients, dim = sizes(seed)
    data = quadratics.random(seed, clients, dim)
    strategy = BayesADMM(
        family="full", rho=rho, alpha=1.0, prior_precision=0.7, init_precision=40.0, damping=1.0, temperature=1.0
    )
    posterior = federation(data.problem(), strategy).run(1).posteriors[1]
    mean, precision = data.posterior(0.7)
    assert relative(posterior.mean, mean) < 1e-10
    assert relative(posterior.precision, precision) < 1e-10
