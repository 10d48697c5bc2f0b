"""Methods that claim the pooled optimum reach it on random strongly convex quadratics; FedAvg and FedProx reach their
bias.
"""

from __future__ import annotations

import pytest
import torch

from clients.laplace import LaplaceSolver
from clients.point import PointSolver
from strategies import PVI, BayesADMM, FedADMM, FedAvg, FedDyn, FedLap, FedLapCov, FedProx, Scaffold

CLIENTS, DIM, PRIOR = 10, 3, 2.0


@pytest.fixture
def data(convex):
    return convex(31, CLIENTS, DIM)


def full_batch_sgd(lr: float, steps: int) -> PointSolver:
    return PointSolver(optimizer="sgd", lr=lr, epochs=steps, batch_size=1000)


def smoothness(data) -> float:
    """The largest eigenvalue of a client's mean loss' Hessian."""
    return max(float(torch.linalg.eigvalsh(data.curvature(k))[-1]) / len(data.inputs[k]) for k in range(len(data)))


@pytest.mark.parametrize("fraction", [1.0, 0.3])
@pytest.mark.parametrize(
    ("kind", "options"),
    [
        (FedDyn, {"alpha": 1.0}),
        (FedADMM, {"rho": 1.0}),
        (FedADMM, {"rho": 2.0}),
    ],
    ids=["feddyn", "fedadmm", "fedadmm-large-rho"],
)
def test_dual_methods_for_point_estimates(data, federate, optimum, relative, kind, options, fraction) -> None:
    """Unequal sizes, exact clients: the minimum of the *summed* loss, also if 30 % of the clients take part."""
    run = federate(data, kind(fraction=fraction, **options), 60 if fraction == 1 else 300)
    assert relative(run.means[-1], optimum(data)) < 1e-6


@pytest.mark.parametrize("fraction", [1.0, 0.3])
def test_scaffold(data, federate, optimum, relative, fraction) -> None:
    """Five full-batch steps: the drift of the clients is corrected completely."""
    lr = 0.2 / smoothness(data)
    rounds = 60 if fraction == 1 else 250
    run = federate(data, Scaffold(fraction=fraction), rounds, solver=full_batch_sgd(lr, 5))
    assert relative(run.means[-1], optimum(data)) < 1e-6


def test_scaffold_with_equal_weights_has_the_mean_loss_as_its_objective(data, federate, relative) -> None:
    """The published form, p_k = 1/K: the optimum of mean_k l_k/N_k."""
    lr = 0.2 / smoothness(data)
    strategy = Scaffold(weighting="uniform")
    run = federate(data, strategy, 60, solver=full_batch_sgd(lr, 5))
    sizes = [len(x) for x in data.inputs]
    curvature = sum(data.curvature(k) / n for k, n in enumerate(sizes))
    expected = torch.linalg.solve(curvature, sum(data.pull(k) / n for k, n in enumerate(sizes)))
    assert relative(run.means[-1], expected) < 1e-6


def damping(options: dict) -> float:
    """One over the number of participants: ascent of the dual objective (``test_damping.py``)."""
    return 1 / (CLIENTS * options["fraction"])


@pytest.mark.parametrize("fraction", [1.0, 0.3])
@pytest.mark.parametrize(
    "make",
    [
        lambda **o: FedLap(damping=damping(o), **o),
        lambda **o: PVI(family="full", damping=damping(o), temperature=1.0, **o),
        lambda **o: PVI(family="isotropic", covariance="fixed", damping=damping(o), temperature=1.0, **o),
        lambda **o: BayesADMM(family="full", rho=0.1, damping=1.0, temperature=1.0, **o),
        lambda **o: BayesADMM(family="isotropic", rho=1.0, damping=1.0, covariance="fixed", temperature=1.0, **o),
    ],
    ids=["fedlap", "pvi-full", "pvi-fixed", "bayes_admm-full", "bayes_admm-fixed"],
)
def test_methods_with_a_prior(data, federate, relative, make, fraction) -> None:
    """The mean of the pooled posterior, damped by the number of participants (BayesADMM: undamped), with all clients or
    30 % of them.
    """
    prior = 40.0  # first-order methods: about the curvature of a client, so that tens of rounds do
    run = federate(data, make(prior_precision=prior, fraction=fraction), 200 if fraction == 1 else 300)
    mean, precision = data.posterior(prior)
    assert relative(run.means[-1], mean) < 1e-6
    if run.posteriors[-1].precision.dim() == 2:
        assert relative(run.posteriors[-1].precision, precision) < 1e-6


@pytest.mark.parametrize("fraction", [1.0, 0.3])
def test_fedlap_cov(quadratics, convex, federate, relative, fraction) -> None:
    """Mean and precision of the pooled posterior where that is diagonal; the mean of it in general."""
    diagonal = quadratics.diagonal(33, CLIENTS, DIM)
    run = federate(
        diagonal, FedLapCov(prior_precision=PRIOR, damping=damping({"fraction": fraction}), fraction=fraction), 200
    )
    mean, precision = diagonal.posterior(PRIOR)
    assert relative(run.means[-1], mean) < 1e-6
    assert relative(run.posteriors[-1].precision, precision.diagonal()) < 1e-6
    general = convex(34, CLIENTS, DIM)
    run = federate(
        general, FedLapCov(prior_precision=PRIOR, damping=damping({"fraction": fraction}), fraction=fraction), 200
    )
    assert relative(run.means[-1], general.posterior(PRIOR)[0]) < 1e-6
    assert relative(run.posteriors[-1].precision, general.posterior(PRIOR)[1].diagonal()) < 1e-6


def test_fedlap_cov_with_its_own_client(quadratics, federate, relative) -> None:
    """Laplace's client: plain gradient descent to the mode, then the Gauss-Newton diagonal, no closed form."""
    data = quadratics.diagonal(35, 4, DIM)
    solver = LaplaceSolver(optimizer="sgd", lr=0.5, epochs=30, batch_size=100)
    run = federate(data, FedLapCov(prior_precision=PRIOR), 70, solver=solver)
    mean, precision = data.posterior(PRIOR)
    assert relative(run.means[-1], mean) < 1e-6
    assert relative(run.posteriors[-1].precision, precision.diagonal()) < 1e-6


@pytest.mark.parametrize("mu", [0.0, 0.7])
def test_fedavg_and_fedprox_keep_their_bias(data, federate, optimum, relative, mu) -> None:
    """With local problems solved exactly the fixed point solves sum_k N_k (w_k(w) - w) = 0, which is not the pooled
    optimum.
    """
    run = federate(data, FedProx(mu=mu) if mu else FedAvg(), 60 if mu else 1)
    left, right = torch.zeros(DIM, DIM).double(), torch.zeros(DIM).double()
    for k in range(CLIENTS):
        size = len(data.inputs[k])
        hessian, pull = data.curvature(k) / size, data.pull(k) / size
        inverse = torch.linalg.inv(hessian + mu * torch.eye(DIM).double())
        left += size * (inverse @ hessian)
        right += size * (inverse @ pull)
    assert relative(run.means[-1], torch.linalg.solve(left, right)) < 1e-6
    assert relative(run.means[-1], optimum(data)) > 0.05


def test_fedavg_with_many_local_steps_keeps_its_bias(data, federate, optimum, relative) -> None:
    """E steps of gradient descent: w_k = w_k* + (I - lr H_k)^E (w - w_k*); the fixed point of their weighted mean."""
    lr, steps = 0.3 / smoothness(data), 20
    run = federate(data, FedAvg(), 20, solver=full_batch_sgd(lr, steps))
    left, right = torch.zeros(DIM, DIM).double(), torch.zeros(DIM).double()
    for k in range(CLIENTS):
        size = len(data.inputs[k])
        hessian, pull = data.curvature(k) / size, data.pull(k) / size
        power = torch.eye(DIM).double()
        path = torch.zeros(DIM, DIM).double()
        for _ in range(steps):
            path, power = path + lr * power, power @ (torch.eye(DIM).double() - lr * hessian)
        left += size * (torch.eye(DIM).double() - power)
        right += size * path @ pull
    assert relative(run.means[-1], torch.linalg.solve(left, right)) < 1e-6
    assert relative(run.means[-1], optimum(data)) > 0.05
