"""Known algorithms as settings of BayesADMM, each against its own recursion (docs/method.md 5, 6)."""

from __future__ import annotations

import pytest
import torch
from torch import Tensor

from strategies import BayesADMM

FAMILIES = ("isotropic", "diagonal", "full")


def admm(data, delta: float, rho: float, gamma: float, alpha: float, rounds: int, form: str) -> list[Tensor]:
    """Server means of federated ADMM with precision delta and rho_s = rho delta; two forms of the server's step."""
    rho_s, eye = rho * delta, torch.eye(data.dim, dtype=torch.float64)
    mean, duals, means = torch.zeros(data.dim).double(), [torch.zeros(data.dim).double() for _ in range(len(data))], []
    for _ in range(rounds):
        local = [
            torch.linalg.solve(data.curvature(k) + rho_s * eye, data.pull(k) - duals[k] + rho_s * mean)
            for k in range(len(data))
        ]
        duals = [v + gamma * rho_s * (m - mean) for v, m in zip(duals, local, strict=True)]
        average, total = sum(local) / len(local), sum(duals)
        if form == "mixture":
            mean = (1 - alpha) * average + alpha / delta * total
        else:
            a = 1 / (delta + len(data) * rho_s)
            mean = (1 - delta * a) * average + a * total
        means.append(mean)
    return means


@pytest.mark.parametrize(("rho", "gamma"), [(1.0, 1.0), (0.25, 1.0), (0.6, 0.4)])
@pytest.mark.parametrize("family", FAMILIES)
def test_fixed_covariance_is_federated_admm(
    quadratics, federation, relative, family: str, rho: float, gamma: float
) -> None:
    data, delta = quadratics.random(1, 4, 6), 1.7
    strategy = BayesADMM(
        family=family, rho=rho, damping=gamma, prior_precision=delta, covariance="fixed", temperature=1.0
    )
    run = federation(data.problem(), strategy).run(20)
    for form in ("mixture", "penalty"):
        expected = admm(data, delta, rho, gamma, 1 / (1 + 4 * rho), 20, form)
        for posterior, mean in zip(run.posteriors[1:], expected, strict=True):
            assert relative(posterior.mean, mean) < 1e-12
            assert bool((posterior.precision_diagonal() == delta).all())


def test_fedlap(quadratics, federation, relative) -> None:
    """N lbar + delta v'w + delta/2 ||w - w_g||^2, v += gamma (w - w_g), w_g = sum v: alpha = rho = 1."""
    data, delta, gamma = quadratics.random(2, 3, 5), 2.5, 0.3
    eye, w_g, v = torch.eye(5).double(), torch.zeros(5).double(), [torch.zeros(5).double() for _ in range(3)]
    strategy = BayesADMM(
        family="isotropic",
        rho=1.0,
        alpha=1.0,
        damping=gamma,
        prior_precision=delta,
        covariance="fixed",
        temperature=1.0,
    )
    run = federation(data.problem(), strategy).run(20)
    for posterior in run.posteriors[1:]:
        w = [torch.linalg.solve(data.curvature(k) + delta * eye, data.pull(k) + delta * (w_g - v[k])) for k in range(3)]
        v = [v[k] + gamma * (w[k] - w_g) for k in range(3)]
        w_g = sum(v)
        assert relative(posterior.mean, w_g) < 1e-12


def feddyn(data, a: float, rounds: int) -> list[Tensor]:
    """Acar et al. 2021 at full participation on sums of losses."""
    eye, theta, means = torch.eye(data.dim).double(), torch.zeros(data.dim).double(), []
    gradients, h = [torch.zeros(data.dim).double() for _ in range(len(data))], torch.zeros(data.dim).double()
    for _ in range(rounds):
        local = [
            torch.linalg.solve(data.curvature(k) + a * eye, data.pull(k) + gradients[k] + a * theta)
            for k in range(len(data))
        ]
        gradients = [g - a * (w - theta) for g, w in zip(gradients, local, strict=True)]
        h = h - a / len(data) * sum(w - theta for w in local)
        theta = sum(local) / len(data) - h / a
        means.append(theta)
    return means


def test_feddyn_is_the_flat_prior_limit(quadratics, federation, relative) -> None:
    """delta -> 0 at fixed rho delta: the distance is O(delta); a tenth of delta gives a tenth of it."""
    data, rho_s, errors = quadratics.random(3, 4, 5), 2.0, []
    expected = feddyn(data, rho_s, 12)
    for delta in (1e-4, 1e-5):
        strategy = BayesADMM(
            family="isotropic",
            rho=rho_s / delta,
            prior_precision=delta,
            covariance="fixed",
            damping=1.0,
            temperature=1.0,
        )
        run = federation(data.problem(), strategy).run(12)
        errors.append(max(relative(q.mean, m) for q, m in zip(run.posteriors[1:], expected, strict=True)))
    assert errors[1] < 1e-4
    assert 0.095 < errors[1] / errors[0] < 0.105


def structured(matrix: Tensor, family: str) -> Tensor:
    """The part of a curvature matrix that a family's precision can hold, as a matrix."""
    if family == "full":
        return matrix
    diagonal = matrix.diagonal()
    return torch.diag(diagonal if family == "diagonal" else diagonal.mean().expand(len(matrix)))


def as_matrix(precision: Tensor, dim: int) -> Tensor:
    return precision if precision.dim() == 2 else torch.diag(precision.expand(dim))


@pytest.mark.parametrize("gamma", [1.0, 0.2])
@pytest.mark.parametrize("family", FAMILIES)
def test_pvi_in_cavity_form(quadratics, federation, relative, family: str, gamma: float) -> None:
    """q_k = tilted by the cavity q_g / t_k; t_k <- t_k (q_k / q_g)^gamma; q_g = p_0 prod t_k (Bui et al. 2018)."""
    clients, dim, prior = 4, 5, 30.0
    data = quadratics.random(4, clients, dim)
    strategy = BayesADMM(family=family, rho=1.0, alpha=1.0, damping=gamma, prior_precision=prior, temperature=1.0)
    run = federation(data.problem(), strategy).run(8)

    eye, zero = torch.eye(dim).double(), torch.zeros(dim).double()
    first, precision = zero, prior * eye
    factors = [(zero, 0 * eye) for _ in range(clients)]
    for posterior in run.posteriors[1:]:
        updated = []
        for k, (r, s) in enumerate(factors):
            cavity_first, cavity = first - r, precision - s
            mean = torch.linalg.solve(cavity + data.curvature(k), cavity_first + data.pull(k))
            local = cavity + structured(data.curvature(k), family)
            updated.append((r + gamma * (local @ mean - first), s + gamma * (local - precision)))
        factors = updated
        first, precision = sum(r for r, _ in factors), prior * eye + sum(s for _, s in factors)
        assert relative(posterior.mean, torch.linalg.solve(precision, first)) < 1e-11
        assert relative(as_matrix(posterior.precision, dim), precision) < 1e-12


@pytest.mark.parametrize("family", FAMILIES)
def test_damping_one_over_k_averages_natural_parameters(quadratics, federation, relative, family: str) -> None:
    """PVI with gamma = 1/K from the prior: the server is the mean of what the clients sent."""
    data = quadratics.random(5, 4, 5)
    strategy = BayesADMM(family=family, rho=1.0, alpha=1.0, damping=1 / 4, prior_precision=3.0, temperature=1.0)
    run = federation(data.problem(), strategy).run(6)
    for round, posterior in enumerate(run.posteriors[1:], start=1):
        sent = [run.uploaded(round, k).natural for k in range(4)]
        assert relative(posterior.natural.linear, sum(q.linear for q in sent) / 4) < 1e-12
        assert relative(posterior.natural.quadratic, sum(q.quadratic for q in sent) / 4) < 1e-12


@pytest.mark.parametrize("family", FAMILIES)
@pytest.mark.parametrize("rho", [0.25, 1.0])
def test_alpha_is_irrelevant_if_gamma_rho_k_is_one(quadratics, federation, relative, family: str, rho: float) -> None:
    data, runs = quadratics.random(6, 4, 5), []
    for alpha in (None, 0.1, 1.0):
        strategy = BayesADMM(
            family=family, rho=rho, alpha=alpha, damping=1 / (4 * rho), prior_precision=3.0, temperature=1.0
        )
        runs.append(federation(data.problem(), strategy).run(6).posteriors[1:])
    for posteriors in zip(*runs, strict=True):
        for other in posteriors[1:]:
            assert relative(other.mean, posteriors[0].mean) < 1e-12
            assert relative(other.precision, posteriors[0].precision) < 1e-12


@pytest.mark.parametrize("sign", [1, -1])
def test_sign_convention_of_the_reference(quadratics, federation, relative, sign: int) -> None:
    """The T-sign recursion (sign = 1) and the one with v' = -v, V' = -V give the iterates of the strategy."""
    clients, dim, rho, gamma, prior, tau = 3, 4, 0.4, 0.7, 2.0, 0.5
    data, alpha = quadratics.random(7, clients, dim), 1 / (1 + clients * rho)
    strategy = BayesADMM(family="diagonal", rho=rho, damping=gamma, prior_precision=prior, temperature=tau)
    run = federation(data.problem(), strategy).run(15)
    m_g, s_g = torch.zeros(dim).double(), torch.full((dim,), prior).double()
    v, V = torch.zeros(clients, dim).double(), torch.zeros(clients, dim).double()
    for posterior in run.posteriors[1:]:
        m, s = torch.empty_like(v), torch.empty_like(v)
        for k in range(clients):
            A, b = data.curvature(k) / tau, data.pull(k) / tau
            m[k] = torch.linalg.solve(A + torch.diag(rho * s_g - sign * V[k]), b - sign * v[k] + rho * s_g * m_g)
            s[k] = s_g + (A.diagonal() - sign * V[k]) / rho
        v, V = v + sign * gamma * rho * (s * m - s_g * m_g), V + sign * gamma * rho * (s - s_g)
        s_g = (1 - alpha) * s.mean(0) + alpha * (prior + sign * V.sum(0))
        m_g = ((1 - alpha) * (s * m).mean(0) + alpha * sign * v.sum(0)) / s_g
        assert relative(posterior.mean, m_g) < 1e-12
        assert relative(posterior.precision, s_g) < 1e-12
