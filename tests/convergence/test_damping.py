"""When FedLap and PVI need damping.

With ``alpha = rho = 1`` a client's new site is the exact maximum of the dual objective over that site, the others held.
One client at a time is therefore ascent for any convex losses; p clients at once with ``gamma = 1/p`` are the mean of p
ascents, so ascent by concavity. Undamped, clients of equal curvature a multiply the error of the sum of sites by ``(1 -
K) a/(a + delta)`` in a round: divergence for ``a > delta/(K - 2)``.
"""

from __future__ import annotations

import itertools

import pytest
import torch

from strategies import FedLap

CURVATURE, DIM, CLIENTS = 1.0, 3, 10


@pytest.fixture
def equal(quadratics):
    g = torch.Generator().manual_seed(41)
    targets = [torch.randn(DIM, generator=g, dtype=torch.float64) for _ in range(CLIENTS)]
    return quadratics([torch.eye(DIM).double()] * CLIENTS, targets)


@pytest.mark.parametrize(("delta", "gamma"), [(2.0, 1.0), (9.0, 1.0), (2.0, 0.1), (2.0, 0.2)])
def test_error_of_the_sum_of_sites_in_closed_form(equal, federate, relative, delta, gamma) -> None:
    """Its factor in a round is ``1 - gamma (p + K (1 - p))`` with ``p = delta/(a + delta)``: beyond -1 for (2, 1)."""
    run = federate(equal, FedLap(prior_precision=delta, damping=gamma), 6)
    p = delta / (CURVATURE + delta)
    factor = 1 - gamma * (p + CLIENTS * (1 - p))
    optimum = equal.posterior(delta)[0]
    errors = [mean - optimum for mean in run.means]
    for before, after in itertools.pairwise(errors):
        assert relative(after, factor * before) < 1e-8
    assert (abs(factor) > 1) == (gamma * (p + CLIENTS * (1 - p)) > 2)


def test_thirty_percent_undamped_diverges_and_damped_by_the_participants_converges(convex, federate, relative) -> None:
    data, delta = convex(42, CLIENTS, DIM), 4.0
    optimum = data.posterior(delta)[0]
    undamped = federate(data, FedLap(prior_precision=delta, damping=1.0, fraction=0.3), 100)
    damped = federate(data, FedLap(prior_precision=delta, damping=1 / 3, fraction=0.3), 1000)
    assert relative(undamped.means[-1], optimum) > 1e3
    assert relative(damped.means[-1], optimum) < 1e-6


def test_one_client_at_a_time_needs_no_damping(convex, federate, relative) -> None:
    data, delta = convex(43, 5, DIM), 10.0
    run = federate(data, FedLap(prior_precision=delta, damping=1.0, fraction=0.2), 300)
    assert relative(run.means[-1], data.posterior(delta)[0]) < 1e-6
