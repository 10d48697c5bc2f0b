"""The positivity guard against an injected dual of negative curvature (docs/method.md 8)."""

from __future__ import annotations

import logging

import pytest
import torch

from bayesfed.errors import RunFailed
from bayesfed.families import NaturalParameters
from strategies import BayesADMM

PRIOR, DIM, CLIENTS, BAD = 2.0, 4, 3, 1e6


def inject(family: str) -> NaturalParameters:
    """Sites whose precision is hugely negative along the first coordinate (everywhere, if isotropic)."""
    direction = torch.tensor([1.0, 0, 0, 0]).double()
    second = {
        "isotropic": torch.tensor(1.0).double(),
        "diagonal": direction,
        "full": torch.outer(direction, direction),
    }[family] * (0.5 * BAD)
    return NaturalParameters(family, torch.tensor([3.0, -1.0, 0.5, 2.0]).double(), second)


@pytest.mark.parametrize("family", ["isotropic", "diagonal", "full"])
def test_guard_lifts_counts_and_logs(quadratics, federation, relative, caplog, family: str) -> None:
    data, rho, gamma = quadratics.random(31, CLIENTS, DIM), 0.5, 0.4
    run = federation(
        data.problem(), BayesADMM(family=family, rho=rho, damping=gamma, prior_precision=PRIOR, temperature=1.0)
    )
    before = inject(family)
    run.strategy.hsum = before.clone()
    with caplog.at_level(logging.WARNING, logger="bayesfed"):
        run.run(1)
    floor, posterior = 0.1 * PRIOR, run.posteriors[1]
    assert run.metrics[0]["guard/count"] == 1
    assert len([r for r in caplog.records if "precision guard: 1 of" in r.message and "0.2" in r.message]) == 1
    assert bool(posterior.mean.isfinite().all())
    matrix = posterior.precision if family == "full" else torch.diag(posterior.precision.expand(DIM))
    values, vectors = torch.linalg.eigh(matrix)
    assert float(values.min()) == pytest.approx(floor, rel=1e-9)

    # Hsum is what the recursion says, as if there were no guard
    sent = [run.uploaded(1, k).natural for k in range(CLIENTS)]
    server = run.posteriors[0].natural
    for part in ("linear", "quadratic"):
        change = gamma * rho * sum(getattr(q, part) - getattr(server, part) for q in sent)
        assert relative(getattr(run.strategy.hsum, part), getattr(before, part) + change) < 1e-13

    # where it acted, the mean is the participants'; elsewhere nothing changed
    first, second = sum(q.linear for q in sent) / CLIENTS, sum(q.quadratic for q in sent) / CLIENTS
    mean = run.strategy.gaussian.solve(second * -2, first)
    alpha = 1 / (1 + CLIENTS * rho)
    plain_first = (1 - alpha) * first + alpha * run.strategy.hsum.linear
    plain_second = (1 - alpha) * second + alpha * (run.strategy.prior.quadratic + run.strategy.hsum.quadratic)
    if family == "isotropic":
        assert relative(posterior.mean, mean) < 1e-12
    elif family == "diagonal":
        assert abs(float(posterior.mean[0] - mean[0])) < 1e-12
        assert relative(posterior.mean[1:], (plain_first / (-2 * plain_second))[1:]) < 1e-12
        assert relative(posterior.precision[1:], -2 * plain_second[1:]) < 1e-12
    else:
        bad = vectors[:, 0]
        assert float(bad @ (posterior.mean - mean)) == pytest.approx(0, abs=1e-6)  # 1e6 in the matrix: 1e-10 relative
        kept = posterior.natural.linear - plain_first
        assert float((kept - bad * (bad @ kept)).abs().max()) < 1e-8


@pytest.mark.parametrize("family", ["isotropic", "diagonal", "full"])
def test_guard_is_silent_on_convex_problems(quadratics, federation, caplog, family: str) -> None:
    data = quadratics.random(32, CLIENTS, DIM)
    with caplog.at_level(logging.WARNING, logger="bayesfed"):
        run = federation(
            data.problem(), BayesADMM(family=family, rho=0.5, damping=0.4, prior_precision=PRIOR, temperature=1.0)
        ).run(5)
    assert [m["guard/count"] for m in run.metrics] == [0] * 5
    assert not caplog.records


@pytest.mark.parametrize("family", ["isotropic", "diagonal", "full"])
def test_recovers_once_the_sites_are_sane(quadratics, federation, relative, family: str) -> None:
    """After a guarded round with the injected curvature taken out again, the run converges to the exact posterior mean."""
    data = quadratics.diagonal(33, CLIENTS, DIM)
    run = federation(
        data.problem(),
        BayesADMM(family=family, rho=0.5, prior_precision=PRIOR, alpha=1.0, damping=1.0, temperature=1.0),
    )
    bad = inject(family)
    run.strategy.hsum = bad.clone()
    run.run(1)
    run.strategy.hsum = run.strategy.hsum - bad
    run.run(60)
    mean, _ = data.posterior(PRIOR)
    assert relative(run.posteriors[-1].mean, mean) < (1e-6 if family != "isotropic" else 1e-4)


@pytest.mark.parametrize("family", ["isotropic", "diagonal", "full"])
def test_client_with_negative_curvature_is_refused(quadratics, federation, family: str) -> None:
    """A client whose own site exceeds its curvature has no posterior: an error reply with the reason, no NaN."""
    data = quadratics.random(34, 2, DIM)
    run = federation(
        data.problem(), BayesADMM(family=family, rho=0.5, prior_precision=PRIOR, damping=1.0, temperature=1.0)
    ).run(1)
    second = run.strategy.prior.quadratic * 1e5
    for k in range(2):
        first, _ = run.site(k)
        run.sites.save(k, 1, {"site.first": first, "site.second": second})
    with pytest.raises(RunFailed, match=r"precision is not positive"):
        run.run(1)
    assert len(run.posteriors) == 2
