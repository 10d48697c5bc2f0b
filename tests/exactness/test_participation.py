"""Client sampling on diagonal quadratics (docs/method.md 2)."""

from __future__ import annotations

import pytest
import torch

from strategies import BayesADMM

PRIOR = 1.5


@pytest.mark.parametrize(
    "options",
    [{"rho": 0.5, "absent": "mean"}, {"rho": 0.05, "absent": "agree"}, {"rho": 1.0, "alpha": 1.0}],
    ids=["mean", "agree", "pvi"],
)
def test_sampled_clients_reach_the_posterior(quadratics, federation, relative, options: dict) -> None:
    """20 clients, 4 a round, 400 rounds: mean and precision to 1e-6; the precision is never below the prior's."""
    data = quadratics.diagonal(21, 20, 3)
    run = federation(
        data.problem(),
        BayesADMM(family="diagonal", damping=1.0, prior_precision=PRIOR, fraction=0.2, temperature=1.0, **options),
    ).run(400)
    mean, precision = data.posterior(PRIOR)
    assert relative(run.posteriors[-1].mean, mean) < 1e-6
    assert relative(run.posteriors[-1].precision, precision.diagonal()) < 1e-6
    assert min(float(q.precision.min()) for q in run.posteriors) >= PRIOR * (1 - 1e-12)
    assert {len(clients) for clients in run.accepted} == {4}
    assert set().union(*run.accepted) == set(range(20))


@pytest.mark.parametrize("family", ["isotropic", "diagonal", "full"])
def test_all_clients_sampled_is_the_full_path(quadratics, federation, family: str) -> None:
    """fraction = 1 under either rule, and a fraction that rounds to all clients: the same bits every round."""
    data = quadratics.random(22, 4, 5)
    runs = [
        federation(
            data.problem(),
            BayesADMM(family=family, rho=0.6, damping=0.4, prior_precision=9.0, temperature=1.0, **options),
        ).run(5)
        for options in ({}, {"absent": "agree"}, {"fraction": 0.95}, {"fraction": 0.9, "absent": "agree"})
    ]
    for posteriors in zip(*(run.posteriors for run in runs), strict=True):
        for other in posteriors[1:]:
            assert torch.equal(other.mean, posteriors[0].mean)
            assert torch.equal(other.precision, posteriors[0].precision)


@pytest.mark.parametrize("absent", ["mean", "agree"])
def test_one_sampled_round_in_closed_form(quadratics, federation, relative, absent: str) -> None:
    """K in alpha is all clients; the sum of sites holds the absent ones' too; the mean follows the rule."""
    data, clients, rho, gamma = quadratics.random(23, 6, 4), 6, 0.3, 0.5
    strategy = BayesADMM(
        family="diagonal", rho=rho, damping=gamma, prior_precision=9.0, fraction=0.5, absent=absent, temperature=1.0
    )
    run = federation(data.problem(), strategy).run(2)
    sites = {k: (torch.zeros(4).double(), torch.zeros(4).double()) for k in range(clients)}
    alpha = 1 / (1 + clients * rho)
    for round, present in enumerate(run.accepted, start=1):
        server = run.posteriors[round - 1].natural
        sent = {k: run.uploaded(round, k).natural for k in present}
        for k, q in sent.items():
            v, h = sites[k]
            sites[k] = (
                v + gamma * rho * (q.linear - server.linear),
                h + gamma * rho * (q.quadratic - server.quadratic),
            )
        for part, prior in (("linear", 0.0), ("quadratic", -0.5 * 9.0)):
            index, old = ("linear", "quadratic").index(part), getattr(server, part)
            total = sum(getattr(q, part) for q in sent.values())
            mean = total / 3 if absent == "mean" else (total + 3 * old) / 6
            expected = (1 - alpha) * mean + alpha * (prior + sum(site[index] for site in sites.values()))
            assert relative(getattr(run.posteriors[round].natural, part), expected) < 1e-13
    assert run.accepted[0] != run.accepted[1]
