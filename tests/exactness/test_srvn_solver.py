"""client=srvon against the closed form, VON, and the pooled posterior of linear-Gaussian and logistic federations."""

from __future__ import annotations

import dataclasses
import importlib.util
from pathlib import Path

import pytest
import torch

import bayesfed
from bayesfed.errors import InputError
from bayesfed.families import DiagonalGaussian, FullGaussian, NaturalParameters
from bayesfed.federation.local import LocalProblem
from bayesfed.problem.flat import FlatModel
from bayesfed.problem.likelihood import Categorical
from bayesfed.seeding import torch_generator
from clients.exact import ExactSolver
from clients.srvn import SRVNSolver
from clients.von import VONSolver
from strategies import PVI, BayesADMM

RHO, TAU = 0.5, 0.1


def local_problem(data, server, site, client=0):
    problem = data.problem()
    model = FlatModel(problem.build_model(1), torch.float64)
    return LocalProblem(
        model=model,
        initial=model.vector.clone(),
        data=problem.clients[client],
        likelihood=problem.likelihood,
        server=server,
        site=site,
        rho=RHO,
        temperature=TAU,
        proximal=0.0,
        learn_precision=True,
        round=2,
        client=client,
        seed=5,
    )


def vector(name, low, high, dim):
    return torch.empty(dim, dtype=torch.float64).uniform_(low, high, generator=torch_generator(7, name))


def full_case(quadratics):
    data, g = quadratics.random(41, 1, 6), torch_generator(42)
    root = torch.randn(6, 6, generator=g, dtype=torch.float64)
    server = FullGaussian.from_mean_precision(vector("m", -1, 1, 6), 20 * torch.eye(6).double() + root @ root.T)
    noise = torch.randn(6, 6, generator=g, dtype=torch.float64)
    return data, server, NaturalParameters("full", vector("v", -30, 30, 6), -0.5 * (noise + noise.T))


def diagonal_case(quadratics, copies):
    columns = torch.tensor([6.0, 8.0, 10.0, 12.0], dtype=torch.float64).repeat(copies)
    targets = torch.tensor([5.0, -6.0, 18.0, 6.0], dtype=torch.float64).repeat(copies)
    server = DiagonalGaussian.from_mean_precision(
        vector("mean", -1, 1, 4).repeat(copies), vector("precision", 50, 150, 4).repeat(copies)
    )
    site = NaturalParameters(
        "diagonal", vector("v", -300, 300, 4).repeat(copies), vector("V", -200, 200, 4).repeat(copies) / -2
    )
    return quadratics([torch.diag(columns)], [targets], 1.0), server, site


@pytest.mark.parametrize("mc_samples", [0, 3])
def test_full_covariance_against_the_closed_form(quadratics, relative, mc_samples):
    """Site, server and data to 1e-8 with the delta method; with samples the precision still is exact."""
    problem = local_problem(*full_case(quadratics))
    exact = ExactSolver().solve(problem).posterior
    solution = SRVNSolver(epochs=40, mc_samples=mc_samples, local_schedule="constant").solve(problem)
    assert relative(solution.posterior.precision, exact.precision) < 1e-8
    assert relative(solution.posterior.mean, exact.mean) < (1e-8 if mc_samples == 0 else 0.1)


def test_diagonal_covariance_against_the_closed_form(quadratics, relative):
    problem = local_problem(*diagonal_case(quadratics, 1))
    exact = ExactSolver().solve(problem).posterior
    found = SRVNSolver(epochs=40, curvature="hessian", mc_samples=0).solve(problem).posterior
    assert relative(found.mean, exact.mean) < 1e-8
    assert relative(found.precision, exact.precision) < 1e-8


def test_data_far_more_precise_than_the_server_take_no_more_steps(quadratics, relative):
    """Curvature 1e10 times the server's precision: scaled down once, the covariance need not be halved seventeen
    times.
    """
    data, server, site = diagonal_case(quadratics, 1)
    sharp = quadratics([1e5 * data.inputs[0]], data.targets, 1.0)
    problem = local_problem(sharp, server, site)
    found = SRVNSolver(epochs=12, curvature="hessian", mc_samples=0).solve(problem).posterior
    assert relative(found.precision, ExactSolver().solve(problem).posterior.precision) < 1e-6


def test_diagonal_covariance_from_gradients_alone(quadratics, relative):
    """m to 1e-2 and S to 5 %, averaged over 32 copies of the problem."""
    problem = local_problem(*diagonal_case(quadratics, 32))
    exact = ExactSolver().solve(problem).posterior
    solver = SRVNSolver(
        lr=0.02,
        lr_covariance=0.005,
        epochs=1200,
        batch_size=128,
        mc_samples=2,
        antithetic=True,
        min_precision=0,
        local_schedule="cosine",
    )
    found = solver.solve(problem).posterior
    assert relative(found.mean.view(32, 4).mean(0), exact.mean[:4]) < 1e-2
    assert float((found.precision.view(32, 4).mean(0) / exact.precision[:4] - 1).abs().max()) < 0.05


def test_full_covariance_from_gradients_alone(quadratics, relative):
    problem = local_problem(*full_case(quadratics))
    exact = ExactSolver().solve(problem).posterior
    solver = SRVNSolver(
        lr=0.03,
        lr_covariance=0.004,
        epochs=1200,
        batch_size=100,
        curvature="stein",
        mc_samples=2,
        antithetic=True,
        local_schedule="cosine",
    )
    found = solver.solve(problem).posterior
    assert relative(found.mean, exact.mean) < 0.02
    assert relative(found.precision, exact.precision) < 0.2


def test_a_local_precision_that_is_not_positive_is_an_error_that_says_what_to_do(quadratics):
    data, server, _ = full_case(quadratics)
    site = NaturalParameters("full", vector("v", -30, 30, 6), -0.5 * 1e4 * torch.eye(6, dtype=torch.float64))
    with pytest.raises(ValueError, match=r"not positive definite; use a smaller strategy\.damping"):
        SRVNSolver(epochs=30, mc_samples=0).solve(local_problem(data, server, site))


SOLVERS = {
    "von": lambda epochs: VONSolver(epochs=epochs, mc_samples=0, local_schedule="constant"),
    "srvon": lambda epochs: SRVNSolver(epochs=epochs, mc_samples=0),
}


@pytest.mark.parametrize("solver", SOLVERS)
def test_linear_gaussian_federation_is_there_after_one_round(quadratics, federation, relative, solver):
    data = quadratics.random(43, 3, 4)
    run = federation(
        data.problem(),
        BayesADMM(family="full", rho=1 / 3, prior_precision=1.0, damping=1.0, temperature=1.0),
        SOLVERS[solver](25),
    ).run(1)
    mean, precision = data.posterior(1.0)
    assert relative(run.posteriors[1].mean, mean) < 1e-6
    assert relative(run.posteriors[1].precision, precision) < 1e-6


def test_diagonal_federation_reaches_the_exact_clients_posterior(quadratics, federation, relative):
    """PVI with diagonal covariances: the same server posteriors, round by round, as with client=exact."""
    data = quadratics.diagonal(44, 3, 4)
    solver = SRVNSolver(epochs=25, curvature="hessian", mc_samples=0)
    ours, exact = (
        federation(data.problem(), PVI(family="diagonal", damping=0.3, prior_precision=1.0, temperature=1.0), s).run(3)
        for s in (solver, ExactSolver())
    )
    for one, two in zip(ours.posteriors, exact.posteriors, strict=True):
        assert relative(one.precision, two.precision) < 1e-6
        assert float((one.mean - two.mean).abs().max()) < 1e-6


def conftest():
    path = Path(__file__).parent / "conftest.py"
    spec = importlib.util.spec_from_file_location("bayesfed_exactness_srvn", path)
    module = importlib.util.module_from_spec(spec)
    import sys

    sys.modules[spec.name] = module
    spec.loader.exec_module(module)
    return module


@pytest.fixture(scope="module")
def logistic():
    """Three clients with other inputs and labels: (problem, mean, precision of the pooled Laplace posterior, prior
    1).
    """
    g = torch_generator(45, "logistic")
    inputs = [torch.randn(30, 3, generator=g, dtype=torch.float64) + shift for shift in (-0.5, 0.0, 0.5)]
    slope = torch.tensor([1.0, -1.5, 0.5], dtype=torch.float64)
    labels = [(x @ slope + torch.randn(30, generator=g, dtype=torch.float64) > 0).long() for x in inputs]
    problem = conftest().make_problem(inputs, labels, Categorical(), 2)
    x, y = torch.cat(inputs), torch.cat(labels)

    def loss(theta):
        return (
            torch.nn.functional.cross_entropy(x @ theta.view(2, 3).T, y, reduction="sum") + 0.5 * theta.square().sum()
        )

    theta = torch.zeros(6, dtype=torch.float64)
    for _ in range(30):
        hessian = torch.func.hessian(loss)(theta)
        theta = theta - torch.linalg.solve(hessian, torch.func.grad(loss)(theta))
    return problem, theta, torch.func.hessian(loss)(theta)


def test_logistic_federation_reaches_the_pooled_posterior_in_as_many_rounds_as_von(logistic, federation, relative):
    """Delta method: to 1e-6 of the pooled Laplace posterior in 4 rounds each."""
    problem, mean, precision = logistic
    for name, solver in SOLVERS.items():
        strategy = BayesADMM(family="full", rho=1 / 3, damping=1.0, prior_precision=1.0, temperature=1.0)
        run = federation(problem, strategy, solver(15)).run(4)
        errors = [max(relative(q.mean, mean), relative(q.precision, precision)) for q in run.posteriors]
        assert errors[4] < 1e-6 < errors[3], name


def test_under_pvi_the_server_gets_the_same_posteriors_as_from_von(logistic, federation, relative):
    ours, von = (
        federation(
            logistic[0], PVI(family="full", damping=1 / 3, prior_precision=1.0, temperature=1.0), SOLVERS[name](15)
        ).run(3)
        for name in ("srvon", "von")
    )
    for one, two in zip(ours.posteriors, von.posteriors, strict=True):
        assert relative(one.precision, two.precision) < 1e-6
        assert float((one.mean - two.mean).abs().max()) < 1e-6


def test_a_whole_run_reaches_the_posterior_of_exact_clients(tmp_path, relative):
    results = {
        client: bayesfed.run(
            [
                "experiment=linreg",
                f"client={client}",
                "display=false",
                "figures=false",
                f"hydra.run.dir={tmp_path}/{client}",
            ]
        )
        for client in ("exact", "srvon")
    }
    ours, exact = (results[name].posterior for name in ("srvon", "exact"))
    assert relative(ours.mean, exact.mean) < 1e-6
    assert relative(ours.precision, exact.precision) < 1e-6


def test_under_a_fixed_diagonal_precision_correlated_features_are_solved(tmp_path):
    """Where the diagonal of the curvature alone would let every step overshoot."""
    shared = [
        "experiment=linreg",
        "strategy.family=diagonal",
        "strategy.covariance=fixed",
        "figures=false",
        "display=false",
    ]
    found = [
        bayesfed.run([*shared, "eval.samples=2", f"client={client}", f"hydra.run.dir={tmp_path / client}"])
        for client in ("exact", "srvon")
    ]
    torch.testing.assert_close(found[1].posterior.mean, found[0].posterior.mean, rtol=0, atol=1e-6)
    assert torch.equal(found[1].posterior.precision, found[0].posterior.precision)
    assert found[1].summary["mean/rmse"] == pytest.approx(found[0].summary["mean/rmse"], rel=1e-6)


def test_a_learned_diagonal_precision_does_not_run_away_either(tmp_path):
    shared = [
        "experiment=linreg",
        "strategy.family=diagonal",
        "figures=false",
        "display=false",
        "rounds=10",
        "eval.samples=2",
    ]
    exact, mine = (
        bayesfed.run([*shared, f"client={client}", f"hydra.run.dir={tmp_path / client}"]).summary["mean/rmse"]
        for client in ("exact", "srvon")
    )
    assert mine == pytest.approx(exact, rel=0.02)


def test_isotropic_is_refused_before_the_run(tmp_path):
    with pytest.raises(InputError, match=r"client=srvon: solves for these families: diagonal, full"):
        bayesfed.run(["strategy.family=isotropic", "client=srvon", f"hydra.run.dir={tmp_path}/r"])


def test_settings_that_contradict_each_other(quadratics):
    with pytest.raises(InputError, match="mc_samples=0"):
        SRVNSolver(curvature="stein", mc_samples=0)
    problem = local_problem(*diagonal_case(quadratics, 1))
    with pytest.raises(InputError, match="mc_samples=0"):
        SRVNSolver(mc_samples=0).solve(problem)
    large = dataclasses.replace(problem, model=FlatModel(torch.nn.Linear(200, 200), torch.float64))
    with pytest.raises(InputError, match=r"curvature=hessian.*use curvature=stein"):
        SRVNSolver(curvature="hessian").solve(large)
