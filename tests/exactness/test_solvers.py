"""Iterative solvers against the closed form of the local problem (docs/method.md 7)."""

from __future__ import annotations

import pytest
import torch
from torch import Tensor

from bayesfed.families import DiagonalGaussian, FullGaussian, IsotropicGaussian, NaturalParameters
from bayesfed.federation.local import LocalProblem
from bayesfed.problem.flat import FlatModel
from bayesfed.seeding import torch_generator
from clients.exact import ExactSolver
from clients.ivon import IVONSolver
from clients.point import PointSolver
from clients.srvn import SRVNSolver
from clients.von import VONSolver

RHO, TAU = 0.5, 0.1


def local_problem(data, server, site: NaturalParameters | None, **options) -> LocalProblem:
    problem = data.problem()
    model = FlatModel(problem.build_model(1), torch.float64)
    settings = {
        "rho": RHO,
        "temperature": TAU,
        "proximal": 0.0,
        "learn_precision": True,
        "round": 2,
        "client": 0,
        "seed": 5,
    }
    return LocalProblem(
        model=model, initial=model.vector.clone(), data=problem.clients[0], likelihood=problem.likelihood, server=server,
        site=site, **(settings | options),
    )  # fmt: skip


def vector(name: str, low: float, high: float, dim: int) -> Tensor:
    return torch.empty(dim, dtype=torch.float64).uniform_(low, high, generator=torch_generator(7, name))


COPIES = 32  # of a 4-d problem side by side: averages over them need fewer steps


def diagonal_case(quadratics) -> tuple:
    """Diagonal quadratic of 4 curvatures (A_k/tau 320 ... 1440), 128 parameters and examples; S_g about 100, sites of either sign."""
    columns = torch.tensor([6.0, 8.0, 10.0, 12.0], dtype=torch.float64).repeat(COPIES)
    targets = torch.tensor([5.0, -6.0, 18.0, 6.0], dtype=torch.float64).repeat(COPIES)
    server = DiagonalGaussian.from_mean_precision(
        vector("mean", -1, 1, 4).repeat(COPIES), vector("precision", 50, 150, 4).repeat(COPIES)
    )
    linear, quadratic = vector("v", -300, 300, 4).repeat(COPIES), vector("V", -200, 200, 4).repeat(COPIES)
    return (
        quadratics([torch.diag(columns)], [targets], 1.0),
        server,
        NaturalParameters("diagonal", linear, quadratic / -2),
    )


def closed_form(data, server, site) -> tuple[Tensor, Tensor]:
    """Mean and precision of a diagonal client, from the formulas of docs/method.md 7."""
    curvature, pull, V = data.curvature(0).diagonal() / TAU, data.pull(0) / TAU, site.precision
    precision = server.precision + (curvature - V) / RHO
    return (server.precision * server.mean + (pull - site.linear) / RHO) / precision, precision


def test_exact_solver_against_the_formula(quadratics, relative) -> None:
    data, server, site = diagonal_case(quadratics)
    mean, precision = closed_form(data, server, site)
    solution = ExactSolver().solve(local_problem(data, server, site)).posterior
    assert relative(solution.mean, mean) < 1e-12
    assert relative(solution.precision, precision) < 1e-12


def test_ivon_reaches_the_closed_form(quadratics, relative) -> None:
    """m to 1e-3, S to 10 % (one sample a step is noisy, and IVON's 1/2 (1-b2)^2 term biases S upwards)."""
    data, server, site = diagonal_case(quadratics)
    mean, precision = closed_form(data, server, site)
    solver = IVONSolver(lr=0.02, epochs=8000, batch_size=128, beta2=0.9995, min_precision=0, local_schedule="cosine")
    solution = solver.solve(local_problem(data, server, site)).posterior
    found_mean, found_precision = (value.view(COPIES, 4).mean(0) for value in (solution.mean, solution.precision))
    assert relative(found_mean, mean[:4]) < 1e-3
    assert float((found_precision / precision[:4] - 1).abs().max()) < 0.10
    assert relative(server.mean, mean) > 0.1
    assert float((server.precision / precision - 1).abs().min()) > 0.3


def test_point_solver_reaches_the_mode_with_fixed_precision(quadratics, relative) -> None:
    """(A/tau - V + rho S_g) m = b/tau - v + rho S_g m_g, by gradient descent and in closed form."""
    data, server, site = diagonal_case(quadratics)
    exact = ExactSolver().solve(local_problem(data, server, site, learn_precision=False)).posterior
    solver = PointSolver(optimizer="sgd", lr=0.5, epochs=400, batch_size=128)
    solution = solver.solve(local_problem(data, server, site, learn_precision=False)).posterior
    mean, _ = closed_form(data, server, site)
    for found in (exact, solution):
        assert relative(found.mean, mean) < 1e-9
        assert torch.equal(found.precision, server.precision)


def full_case(quadratics) -> tuple:
    data, g = quadratics.random(41, 1, 6), torch_generator(42)
    root = torch.randn(6, 6, generator=g, dtype=torch.float64)
    server = FullGaussian.from_mean_precision(vector("m", -1, 1, 6), 20 * torch.eye(6).double() + root @ root.T)
    noise = torch.randn(6, 6, generator=g, dtype=torch.float64)
    site = NaturalParameters("full", vector("v", -30, 30, 6), -0.5 * (noise + noise.T))
    return data, server, site


def test_von_reaches_the_full_posterior(quadratics, relative) -> None:
    """The delta method is exact on quadratics: the formula, VON and the exact solver agree to 1e-8 (mean and matrix)."""
    data, server, site = full_case(quadratics)
    V = site.precision
    precision = server.precision + (data.curvature(0) / TAU - V) / RHO
    first = server.precision @ server.mean + (data.pull(0) / TAU - site.linear) / RHO
    mean = torch.linalg.solve(precision, first)
    von = (
        VONSolver(epochs=25, mc_samples=0, local_schedule="constant").solve(local_problem(data, server, site)).posterior
    )
    exact = ExactSolver().solve(local_problem(data, server, site)).posterior
    for found in (von, exact):
        assert relative(found.mean, mean) < 1e-8
        assert relative(found.precision, precision) < 1e-8


def test_von_with_samples_is_unbiased_enough(quadratics, relative) -> None:
    """Monte-Carlo gradients: the curvature of a quadratic is exact in every sample, the mean averages out to 2 %."""
    data, server, site = full_case(quadratics)
    exact = ExactSolver().solve(local_problem(data, server, site)).posterior
    von = (
        VONSolver(epochs=60, mc_samples=4, local_schedule="inverse").solve(local_problem(data, server, site)).posterior
    )
    assert relative(von.precision, exact.precision) < 1e-6
    assert relative(von.mean, exact.mean) < 0.02


def test_von_federation_reaches_the_posterior_in_one_round(quadratics, federation, relative) -> None:
    from strategies import BayesADMM

    data = quadratics.random(43, 3, 4)
    solver = VONSolver(epochs=25, mc_samples=0, local_schedule="constant")
    run = federation(
        data.problem(), BayesADMM(family="full", rho=1 / 3, prior_precision=1.0, damping=1.0, temperature=1.0), solver
    ).run(1)
    mean, precision = data.posterior(1.0)
    assert relative(run.posteriors[1].mean, mean) < 1e-8
    assert relative(run.posteriors[1].precision, precision) < 1e-8


@pytest.mark.parametrize(
    "solver",
    [
        VONSolver(epochs=25, mc_samples=3, local_schedule="constant"),
        SRVNSolver(epochs=60, mc_samples=3),
        PointSolver(optimizer="sgd", lr=0.05, epochs=1500, batch_size=64),
    ],
    ids=["von", "srvon", "sgd"],
)
def test_a_federation_of_fixed_precision_is_that_of_the_exact_client(quadratics, federation, relative, solver) -> None:
    """Round by round; the exact client's goes to the pooled mean (tests/exactness/test_special_cases.py)."""
    from strategies import BayesADMM

    data = quadratics.random(43, 3, 4)
    runs = [
        federation(
            data.problem(),
            BayesADMM(family="full", rho=1.0, damping=0.2, prior_precision=5.0, covariance="fixed", temperature=1.0),
            s,
        ).run(3)
        for s in (ExactSolver(), solver)
    ]
    for exact, found in zip(*(run.posteriors[1:] for run in runs), strict=True):
        assert relative(found.mean, exact.mean) < 1e-6
        assert torch.equal(found.precision, exact.precision)


@pytest.mark.parametrize("sign", [1, -1])
def test_isotropic_exact_precision_is_the_mean_eigenvalue(quadratics, relative, sign: int) -> None:
    data = quadratics.random(44, 1, 6)
    server = IsotropicGaussian.isotropic(vector("m", -1, 1, 6), 7.0)
    site = NaturalParameters("isotropic", vector("v", -3, 3, 6), torch.tensor(sign * 0.6, dtype=torch.float64))
    found = ExactSolver().solve(local_problem(data, server, site)).posterior
    curvature = data.curvature(0) / TAU
    assert float(found.precision) == pytest.approx(7 + (float(curvature.trace()) / 6 + sign * 1.2) / RHO, rel=1e-12)
    left = curvature + (sign * 1.2 + RHO * 7) * torch.eye(6).double()
    right = data.pull(0) / TAU - site.linear + RHO * 7 * server.mean
    assert relative(found.mean, torch.linalg.solve(left, right)) < 1e-12
