"""Sites: their sum on the server and on the clients, and what a dual step does to them (docs/method.md 2, 7)."""

from __future__ import annotations

import pytest
import torch
from torch import Tensor

import clients.ivon.solver
from bayesfed.families import gaussian
from bayesfed.federation.client.sites import DiskSites
from bayesfed.problem.likelihood import Categorical
from bayesfed.seeding import torch_generator
from clients.exact import ExactSolver
from clients.ivon import IVONSolver
from clients.von import VONSolver
from strategies import BayesADMM

FAMILIES = ("isotropic", "diagonal", "full")


def check_sum(run, tolerance: float) -> None:
    """``Hsum`` against the clients' stores: largest deviation relative to the largest entry of any site."""
    pairs = [run.site(k) for k in run.strategy.ledger.accepted]
    hsum = run.strategy.hsum
    for mine, theirs in ((hsum.linear, [v for v, _ in pairs]), (hsum.precision, [V for _, V in pairs])):
        assert mine.dtype == torch.float64
        scale = max(float(site.abs().max()) for site in theirs)
        assert scale > 0
        assert float((mine - sum(theirs)).abs().max()) <= tolerance * scale


@pytest.mark.parametrize("dtype", [torch.float64, torch.float32])
@pytest.mark.parametrize("family", FAMILIES)
def test_server_sum_is_the_sum_of_sites(quadratics, federation, family: str, dtype: torch.dtype) -> None:
    """Also in float32: both sides start from the same wire values."""
    data = quadratics.random(11, 5, 6)
    strategy = BayesADMM(family=family, rho=0.7, damping=0.6, prior_precision=20.0, temperature=0.5)
    run = federation(data.problem(), strategy, dtype=dtype).run(8)
    assert run.posteriors[-1].mean.dtype == dtype
    check_sum(run, 1e-12)


def test_server_sum_with_ivon_in_float32(quadratics, federation) -> None:
    data = quadratics.random(12, 4, 6)
    strategy = BayesADMM(family="diagonal", rho=0.5, damping=0.5, prior_precision=50.0, temperature=0.5)
    run = federation(data.problem(), strategy, IVONSolver(lr=0.05, epochs=4, batch_size=4), torch.float32).run(6)
    check_sum(run, 1e-12)


@pytest.mark.parametrize("absent", ["mean", "agree"])
def test_server_sum_with_sampling_and_lost_replies(quadratics, federation, tmp_path, absent: str) -> None:
    """Sampled clients; every fourth reply is lost after the client trained: its site must not count."""
    data, count = quadratics.random(13, 6, 4), [0]

    def lose(reply):
        count[0] += reply.metadata.message_type == "train"
        return None if reply.metadata.message_type == "train" and count[0] % 4 == 0 else reply

    strategy = BayesADMM(
        family="diagonal", rho=0.7, damping=0.6, prior_precision=20.0, fraction=0.5, absent=absent, temperature=1.0
    )
    run = federation(data.problem(), strategy, sites=DiskSites(tmp_path), intercept=lose).run(20)
    assert run.refused == ["no reply before the timeout"] * 15
    assert {len(clients) for clients in run.accepted} > {2}
    check_sum(run, 1e-12)


HALVES = ("float16", "bfloat16")


@pytest.mark.parametrize("dtype", [torch.float64, torch.float32])
@pytest.mark.parametrize("wire", HALVES)
@pytest.mark.parametrize("family", ["isotropic", "diagonal"])
def test_server_sum_in_16_bits(quadratics, federation, tmp_path, family: str, wire: str, dtype: torch.dtype) -> None:
    """60 rounds of sampled clients and lost replies: both sides add up what the 16 bits decode to, and so agree as ever."""
    data, count = quadratics.random(19, 6, 5), [0]

    def lose(reply):
        count[0] += reply.metadata.message_type == "train"
        return None if reply.metadata.message_type == "train" and count[0] % 4 == 0 else reply

    strategy = BayesADMM(family=family, rho=0.7, damping=0.6, prior_precision=20.0, temperature=0.5, fraction=0.5)
    run = federation(data.problem(), strategy, dtype=dtype, wire=wire, sites=DiskSites(tmp_path), intercept=lose).run(
        60
    )
    assert len(run.refused) == 45
    assert len(strategy.ledger.accepted) == 6
    check_sum(run, 1e-12)


@pytest.mark.parametrize("wire", HALVES)
def test_server_sum_in_16_bits_with_ivon(quadratics, federation, wire: str) -> None:
    data = quadratics.random(12, 4, 6)
    strategy = BayesADMM(family="diagonal", rho=0.5, damping=0.5, prior_precision=50.0, temperature=0.5)
    solver = IVONSolver(lr=0.05, epochs=4, batch_size=4)
    run = federation(data.problem(), strategy, solver, torch.float32, wire=wire).run(20)
    check_sum(run, 1e-12)


@pytest.mark.parametrize(("wire", "tolerance"), [("float16", 2.0**-11), ("bfloat16", 2.0**-8)])
def test_16_bits_reach_the_same_posterior(quadratics, federation, wire: str, tolerance: float) -> None:
    """Within the rounding of one message; not the many of it at which a server stalls that builds on rounded means only."""
    data = quadratics.diagonal(20, 5, 6)
    ends = []
    for each in ("full", wire):
        strategy = BayesADMM(family="diagonal", rho=0.2, damping=0.3, prior_precision=3.0, temperature=1.0)
        ends.append(federation(data.problem(), strategy, wire=each).run(80).posteriors[-1])
    full, half = ends
    assert float((half.mean - full.mean).abs().max()) < tolerance * float(full.mean.abs().max())
    assert float((half.precision / full.precision).log().abs().max()) < tolerance


def natural_gradient(family: str, mean: Tensor, gradient: Tensor, hessian: Tensor) -> tuple[Tensor, Tensor]:
    """grad_mu E_q[l] = (g - H m, H/2) with H in the family's structure; returned as its negative, in site units (v, V)."""
    if family == "full":
        return hessian @ mean - gradient, hessian
    diagonal = hessian.diagonal() if family == "diagonal" else hessian.diagonal().mean()
    return diagonal * mean - gradient, diagonal


@pytest.mark.parametrize("family", FAMILIES)
@pytest.mark.parametrize("gamma", [1.0, 0.3])
def test_site_is_a_moving_average_of_natural_gradients(quadratics, federation, family: str, gamma: float) -> None:
    """eta_k <- (1 - gamma) eta_k - gamma/tau grad_mu E_{q_k}[l_k] for exact clients, whatever rho is; to 1e-11."""
    data, tau = quadratics.random(14, 3, 5), 0.4
    strategy = BayesADMM(family=family, rho=0.9, damping=gamma, prior_precision=20.0, temperature=tau)
    run = federation(data.problem(), strategy)
    old = [(torch.zeros(5).double(), torch.zeros(())) for _ in range(3)]
    for round in range(1, 6):
        run.run(1)
        for k in range(3):
            mean = run.uploaded(round, k).mean
            gradient = data.curvature(k) @ mean - data.pull(k)
            target = natural_gradient(family, mean, gradient / tau, data.curvature(k) / tau)
            for before, after, goal in zip(old[k], run.site(k), target, strict=True):
                expected = (1 - gamma) * before + gamma * goal
                assert float((after - expected).abs().max()) < 1e-11 * float(goal.abs().max())
            old[k] = run.site(k)


def test_moving_average_on_a_loss_that_is_not_quadratic(linear_problem, federation) -> None:
    """Logistic regression, full covariance, VON run to convergence with the delta method; to 1e-9."""
    g, gamma, tau, rho = torch_generator(15), 0.4, 0.5, 0.8
    inputs = [torch.randn(20, 3, generator=g, dtype=torch.float64) for _ in range(2)]
    labels = [(x[:, 0] + 0.5 * torch.randn(20, generator=g) > 0).long() for x in inputs]
    strategy = BayesADMM(family="full", rho=rho, damping=gamma, prior_precision=2.0, temperature=tau)
    solver = VONSolver(epochs=25, mc_samples=0, local_schedule="constant")
    run = federation(linear_problem(inputs, labels, Categorical(), 2), strategy, solver)
    old = [(torch.zeros(6).double(), torch.zeros(6, 6).double()) for _ in range(2)]
    for round in (1, 2, 3):
        run.run(1)
        for k in range(2):

            def loss(theta: Tensor, x=inputs[k], y=labels[k]) -> Tensor:
                return torch.nn.functional.cross_entropy(x @ theta.view(2, 3).T, y, reduction="sum") / tau

            mean = run.uploaded(round, k).mean
            gradient = torch.func.grad(loss)(mean)
            target = natural_gradient("full", mean, gradient, torch.func.hessian(loss)(mean))
            for before, after, goal in zip(old[k], run.site(k), target, strict=True):
                assert float((after - (1 - gamma) * before - gamma * goal).abs().max()) < 1e-9
            old[k] = run.site(k)


@pytest.mark.parametrize(("dtype", "tolerance"), [(torch.float64, 1e-12), (torch.float32, 1e-4)])
def test_curvature_form_of_the_dual(quadratics, federation, monkeypatch, dtype, tolerance: float) -> None:
    """V_k += gamma N/tau h_k; v_k += gamma rho S_g (m_k - m_g) + gamma N/tau h_k m_k (docs/method.md 7), from IVON's own h.

    In float32 the handler's S_k - S_g cancels digits that h has: hence the wider tolerance, relative to the largest entry.
    """
    optimizers = spy(monkeypatch)
    data, rho, gamma, tau = quadratics.random(16, 3, 5), 0.5, 0.3, 0.5
    strategy = BayesADMM(family="diagonal", rho=rho, damping=gamma, prior_precision=10.0, temperature=tau)
    run = federation(data.problem(), strategy, IVONSolver(lr=0.05, epochs=20, batch_size=4), dtype)
    v, V = torch.zeros(3, 5).double(), torch.zeros(3, 5).double()
    for round in range(1, 5):
        server = run.posteriors[-1].to(torch.float64)
        optimizers.clear()
        run.run(1)
        for k, optimizer in enumerate(optimizers):
            sent, weight = run.uploaded(round, k), len(data.inputs[k]) / tau
            V[k] += gamma * weight * optimizer.hess
            v[k] += gamma * rho * server.precision * (sent.mean - server.mean)
            v[k] += gamma * weight * optimizer.hess * sent.mean
            for mine, theirs in zip((v[k], V[k]), run.site(k), strict=True):
                assert float((mine - theirs).abs().max()) < tolerance * float(theirs.abs().max())


def spy(monkeypatch) -> list[clients.ivon.solver.IVON]:
    """Every IVON that a client builds from now on; ``start`` is (h, mean, precision) when its first sample is drawn."""
    built: list[clients.ivon.solver.IVON] = []

    class Spied(clients.ivon.solver.IVON):
        start = None

        def __init__(self, *arguments, **options):
            super().__init__(*arguments, **options)
            built.append(self)

        def sampled_params(self, train: bool = False):
            if self.start is None:
                self.start = (self.hess.clone(), self.mean.clone(), self.precision.clone())
            return super().sampled_params(train=train)

    monkeypatch.setattr(clients.ivon.solver, "IVON", Spied)
    return built


@pytest.mark.parametrize("dtype", [torch.float64, torch.float32])
@pytest.mark.parametrize("family", ["diagonal", "isotropic"])
def test_ivon_starts_at_the_server_from_round_two(quadratics, federation, monkeypatch, family: str, dtype) -> None:
    """h = hess_init at the network initialisation in round 1; h = 0 exactly at (m_g, S_g) later (1.10 test 8)."""
    optimizers = spy(monkeypatch)
    data = quadratics.random(17, 3, 5)
    strategy = BayesADMM(family=family, rho=0.5, damping=0.3, prior_precision=10.0, temperature=0.5)
    run = federation(data.problem(), strategy, IVONSolver(lr=0.05, epochs=3, batch_size=4, hess_init=0.7), dtype)
    for round in (1, 2, 3):
        server = run.posteriors[-1]
        optimizers.clear()
        run.run(1)
        assert len(optimizers) == 3
        for k, optimizer in enumerate(optimizers):
            h, mean, precision = optimizer.start
            if round == 1:
                ess = len(data.inputs[k]) / (0.5 * 0.5)
                assert torch.equal(mean, run.trainer.initial)
                assert torch.allclose(h, torch.full_like(h, 0.7))
                assert torch.allclose(precision, torch.full_like(precision, ess * 0.7 + 10.0), rtol=1e-6)
            else:
                assert torch.equal(h, torch.zeros_like(h))
                assert torch.equal(mean, server.mean)
                assert torch.allclose(precision, server.precision.expand_as(precision), rtol=1e-6)
                assert not torch.equal(optimizer.hess, h)


def test_exact_rounds_ignore_the_network_initialisation(quadratics, federation) -> None:
    """Another seed draws another network; the quadratic iterates are the same bits."""
    data, results = quadratics.random(18, 3, 4), []
    for seed in (1, 2):
        run = federation(
            data.problem(),
            BayesADMM(family="full", rho=1.0, prior_precision=2.0, damping=1.0, temperature=1.0),
            ExactSolver(),
            seed=seed,
        ).run(3)
        results.append((run.trainer.initial, run.posteriors[-1]))
    assert not torch.equal(results[0][0], results[1][0])
    assert torch.equal(results[0][1].mean, results[1][1].mean)
    assert gaussian("full") is type(results[0][1])
