"""Clients that drop out or do part of their steps: duals stay those of accepted replies, and the fixed point stays the
pooled optimum.
"""

from __future__ import annotations

import pytest
import torch

from bayesfed.system import System
from clients.point import PointSolver
from strategies import BayesADMM, FedADMM, FedAvg, FedDyn, FedNova, Scaffold

CLIENTS, DIM = 10, 3


@pytest.fixture
def data(convex):
    return convex(31, CLIENTS, DIM)


def under(strategy, data, **settings):
    """``strategy`` in a simulated system."""
    system, sizes = System(**settings), [len(x) for x in data.inputs]
    strategy.fates = lambda clients, round: system.fates(3, clients, round, sizes)
    return strategy


@pytest.mark.parametrize(
    "settings", [{"dropout": 0.4}, {"deadline": 1.5, "speed_spread": 0.0, "jitter": 1.0}], ids=["dropout", "deadline"]
)
@pytest.mark.parametrize(
    "make",
    [
        lambda: FedDyn(alpha=1.0),
        lambda: FedADMM(rho=1.0),
        lambda: BayesADMM(family="full", rho=0.1, damping=1.0, prior_precision=40.0, temperature=1.0),
        lambda: BayesADMM(
            family="isotropic", rho=1.0, damping=1.0, covariance="fixed", prior_precision=40.0, temperature=1.0
        ),
    ],
    ids=["feddyn", "fedadmm", "bayes_admm-full", "bayes_admm-fixed"],
)
def test_exact_clients_that_drop_out(data, federate, optimum, relative, make, settings):
    strategy = under(make(), data, **settings)
    rounds = 60 if isinstance(strategy, BayesADMM) else 150
    run = federate(data, strategy, rounds)
    assert sum(m["clients/failed"] for m in run.metrics) > 3 * rounds
    expected = data.posterior(40.0)[0] if isinstance(strategy, BayesADMM) else optimum(data)
    assert relative(run.means[-1], expected) < 1e-6


def test_the_servers_sum_of_duals_is_that_of_the_clients(data, federate):
    """After every third round lost on average: a dual moved exactly when its reply counted."""
    strategy = under(
        BayesADMM(family="diagonal", rho=0.5, damping=0.3, prior_precision=40.0, temperature=1.0), data, dropout=0.33
    )
    run = federate(data, strategy, 12)
    total = torch.zeros(DIM, dtype=torch.float64), torch.zeros(DIM, dtype=torch.float64)
    for client in range(CLIENTS):
        record = run.sites.read(client, strategy.ledger.accepted[client])
        total = total[0] + record["site.first"], total[1] + record["site.second"]
    torch.testing.assert_close(strategy.hsum.linear, total[0], rtol=1e-12, atol=1e-12)
    torch.testing.assert_close(strategy.hsum.quadratic, total[1], rtol=1e-12, atol=1e-12)


def sgd(lr: float, steps: int) -> PointSolver:
    return PointSolver(optimizer="sgd", lr=lr, epochs=steps, batch_size=1000)


def smoothness(data) -> float:
    return max(float(torch.linalg.eigvalsh(data.curvature(k))[-1]) / len(data.inputs[k]) for k in range(len(data)))


def test_scaffold_with_stragglers(data, federate, optimum, relative):
    """Control variates by the steps really taken: the fixed point needs c_k = grad l_k/N_k whatever the number of
    steps.
    """
    lr = 0.2 / smoothness(data)
    strategy = under(Scaffold(), data, stragglers=0.7, least_work=0.2, dropout=0.2)
    run = federate(data, strategy, 300, solver=sgd(lr, 5))
    assert relative(run.means[-1], optimum(data)) < 1e-6


def fixed_point(data, steps: dict[int, int], lr: float, normalised: bool) -> torch.Tensor:
    """Where sum_k N_k (w_k(w) - w)/a_k = 0 with w_k = w_k* + (I - lr H_k)^steps (w - w_k*), H_k of the mean loss; a_k =
    steps, or 1.
    """
    left, right = torch.zeros(DIM, DIM).double(), torch.zeros(DIM).double()
    for k, count in steps.items():
        size = len(data.inputs[k])
        hessian, pull = data.curvature(k) / size, data.pull(k) / size
        gain = torch.eye(DIM).double() - torch.linalg.matrix_power(torch.eye(DIM).double() - lr * hessian, count)
        weight = size / (count if normalised else 1)
        left += weight * gain
        right += weight * gain @ torch.linalg.solve(hessian, pull)
    return torch.linalg.solve(left, right)


def test_fednova_with_fixed_stragglers_loses_most_of_the_bias_that_fedavg_keeps(data, federate, optimum, relative):
    lr = 0.1 / smoothness(data)
    settings = {"stragglers": 1.0, "least_work": 0.1, "most_work": 1.0, "fixed": True}
    steps = {k: max(1, int(10 * System(**settings).fate(3, k, 1).work)) for k in range(CLIENTS)}
    assert min(steps.values()) <= 2
    assert max(steps.values()) >= 8
    bias = {}
    for kind in (FedAvg, FedNova):
        run = federate(data, under(kind(), data, **settings), 90, solver=sgd(lr, 10))
        assert relative(run.means[-1], fixed_point(data, steps, lr, kind is FedNova)) < 1e-4
        bias[kind] = relative(run.means[-1], optimum(data))
    assert bias[FedNova] < 0.6 * bias[FedAvg]
    slow = {kind: relative(fixed_point(data, steps, lr / 100, kind is FedNova), optimum(data)) for kind in bias}
    assert slow[FedNova] < 0.03 * bias[FedNova]  # of first order in the rate
    assert slow[FedAvg] > 0.7 * bias[FedAvg]
