"""Methods that are special cases of one another, and closed forms of single steps."""

from __future__ import annotations

import pytest
import torch

from bayesfed.seeding import torch_generator
from clients.point import PointSolver
from strategies import (
    PVI,
    BayesADMM,
    BregmanADMM,
    FedADMM,
    FedAvg,
    FedDyn,
    FedLap,
    FedNova,
    FedPA,
    NaturalAveraging,
    Scaffold,
)
from strategies.fedpa import PathSamples, posterior_delta

CLIENTS, DIM = 5, 3


@pytest.fixture
def data(convex):
    return convex(51, CLIENTS, DIM)


def sgd(steps: int, lr: float = 0.02, **options) -> PointSolver:
    return PointSolver(optimizer="sgd", lr=lr, epochs=steps, batch_size=1000, **options)


@pytest.mark.parametrize(("fraction", "tau"), [(1.0, 1.0), (0.6, 0.5)])
def test_fedlap_in_its_published_form_and_as_isotropic_bayes_admm(data, federate, relative, fraction, tau) -> None:
    delta, gamma, rounds = 7.0, 0.3, 15
    run = federate(data, FedLap(prior_precision=delta, damping=gamma, temperature=tau, fraction=fraction), rounds)
    same = BayesADMM(
        family="isotropic",
        rho=1.0,
        alpha=1.0,
        damping=gamma,
        covariance="fixed",
        prior_precision=delta,
        temperature=tau,
        fraction=fraction,
    )
    other = federate(data, same, rounds)
    v, server, eye = [torch.zeros(DIM).double()] * CLIENTS, torch.zeros(DIM).double(), torch.eye(DIM).double()
    for round, present in enumerate(run.accepted, start=1):
        for k in present:  # v_k in the paper's units, weights
            left, right = data.curvature(k) / tau + delta * eye, data.pull(k) / tau - delta * v[k] + delta * server
            v[k] = v[k] + gamma * (torch.linalg.solve(left, right) - server)
        server = sum(v)
        assert relative(run.means[round], server) < 1e-10
        assert relative(other.means[round], run.means[round]) < 1e-10


def test_feddyn_is_the_flat_limit_of_isotropic_bayes_admm(data, federate, relative) -> None:
    """The distance falls in proportion to delta; rho delta = alpha N/K (the losses here are sums)."""
    start = torch.randn(DIM, generator=torch_generator(1), dtype=torch.float64)
    alpha, scale = 1.3, sum(map(len, data.inputs)) / CLIENTS
    feddyn = federate(data, FedDyn(alpha=alpha), 12, start=start)
    gaps = []
    for delta in (1e-3, 1e-5):
        admm = BayesADMM(
            family="isotropic",
            rho=alpha * scale / delta,
            damping=1.0,
            covariance="fixed",
            prior_precision=delta,
            temperature=1.0,
        )
        gaps.append(relative(federate(data, admm, 12, start=start).means[-1], feddyn.means[-1]))
    assert gaps[0] < 1e-2
    assert gaps[1] < 1.1e-2 * gaps[0]


def test_fedadmm_is_feddyn_at_full_participation(data, federate, relative) -> None:
    one = federate(data, FedDyn(alpha=0.8), 10)
    other = federate(data, FedADMM(rho=0.8), 10)
    assert all(relative(a, b) < 1e-10 for a, b in zip(other.means, one.means, strict=True))


def test_fedadmm_follows_the_augmented_models_of_all_clients(data, federate, relative) -> None:
    """w_g = mean_k (w_k + y_k/rho), absent clients included."""
    run = federate(data, FedADMM(rho=0.8, fraction=0.4), 25)
    assert set(run.strategy.ledger.accepted) == set(range(CLIENTS))
    records = [run.sites.read(k, run.strategy.ledger.accepted[k]) for k in range(CLIENTS)]
    assert relative(sum(r["state.augmented"] for r in records) / CLIENTS, run.means[-1]) < 1e-12


def test_feddyn_h_is_the_mean_of_the_duals(data, federate, relative) -> None:
    run = federate(data, FedDyn(alpha=0.8, fraction=0.4), 25)
    duals = [run.sites.read(k, run.strategy.ledger.accepted[k])["site.first"] for k in range(CLIENTS)]
    assert relative(sum(duals) / CLIENTS, -run.strategy.h) < 1e-12


@pytest.mark.parametrize("wire", ["full", "float16"])
def test_scaffold_control_variates_sum_to_the_servers(data, federate, relative, wire) -> None:
    """c = sum_k N_k/N c_k under client sampling and lost replies, also as 16 bits carry them; c_k is the option-II
    estimate.
    """
    lost = iter(range(1000))
    run = federate(
        data, Scaffold(fraction=0.6), 30, solver=sgd(5), wire=wire, dtype=torch.float64,
        intercept=lambda reply: None if reply.metadata.message_type == "train" and next(lost) % 7 == 3 else reply,
    )  # fmt: skip
    sizes = [len(x) for x in data.inputs]
    controls = [
        run.sites.read(k, run.strategy.ledger.accepted[k])["state.control"]
        if k in run.strategy.ledger.accepted
        else torch.zeros(DIM).double()
        for k in range(CLIENTS)
    ]
    assert sum(len(present) for present in run.accepted) < 30 * 3
    assert relative(sum(n * c for n, c in zip(sizes, controls, strict=True)) / sum(sizes), run.strategy.control) < 1e-12


def test_scaffold_round_in_closed_form(data, federate, relative) -> None:
    """Two rounds of the paper's recursion with option II, weighted by size."""
    steps, lr, sizes = 4, 0.05, [len(x) for x in data.inputs]
    run = federate(data, Scaffold(server_step=0.7), 3, solver=sgd(steps, lr))
    x, c, own = run.means[0].clone(), torch.zeros(DIM).double(), [torch.zeros(DIM).double()] * CLIENTS
    for round in range(1, 4):
        moved, changed = torch.zeros(DIM).double(), torch.zeros(DIM).double()
        for k, n in enumerate(sizes):
            y = x.clone()
            for _ in range(steps):
                y = y - lr * ((data.curvature(k) @ y - data.pull(k)) / n - own[k] + c)
            new = own[k] - c + (x - y) / (steps * lr)
            moved, changed = moved + n * (y - x), changed + n * (new - own[k])
            own[k] = new
        x, c = x + 0.7 * moved / sum(sizes), c + changed / sum(sizes)
        assert relative(run.means[round], x) < 1e-10
    assert relative(run.strategy.control, c) < 1e-10


@pytest.mark.parametrize("family", ["diagonal", "full"])
def test_pvi_damped_by_clients_is_natural_parameter_averaging(data, federate, relative, family) -> None:
    """Its server step is the mean of what the clients send (FedGVI, Prop. 4.3); the first round is that of averaging
    without sites.
    """
    run = federate(data, PVI(family=family, prior_precision=4.0, temperature=1.0), 6)
    for round in range(1, 7):
        naturals = [run.uploaded(round, k).natural for k in range(CLIENTS)]
        mean = sum(naturals[1:], naturals[0]) / CLIENTS
        assert relative(run.posteriors[round].natural.linear, mean.linear) < 1e-10
        assert relative(run.posteriors[round].natural.quadratic, mean.quadratic) < 1e-10
    plain = federate(data, NaturalAveraging(family=family, prior_precision=4.0, temperature=1.0), 1)
    assert relative(plain.means[1], run.means[1]) < 1e-10


def test_natural_averaging_counts_the_data_again_every_round(data, federate, relative) -> None:
    """After t rounds S = S_0 + t mean_k A_k/rho: t/(K rho) times the data; with prior_weight=null once,
    in the limit.
    """
    total = sum(data.curvature(k) for k in range(CLIENTS))
    run = federate(data, NaturalAveraging(family="full", rho=2.0, prior_precision=4.0, temperature=1.0), 8)
    assert relative(run.posteriors[-1].precision, 4 * torch.eye(DIM).double() + 8 / (2 * CLIENTS) * total) < 1e-10
    kept = federate(
        data, NaturalAveraging(family="full", rho=0.4, prior_weight=None, prior_precision=4.0, temperature=1.0), 80
    )
    assert relative(kept.posteriors[-1].precision, data.posterior(4.0)[1]) < 1e-8


def test_bregman_admm_in_closed_form(quadratics, federate, relative) -> None:
    """The duals of the store follow v += gamma rho (m_k - m_g), V -= 2 gamma rho (E_k[theta^2] - E_g[theta^2]); the
    server has their sum.
    """
    data, gamma, rho = quadratics.diagonal(52, 3, 2), 0.2, 1.0
    run = federate(
        data, BregmanADMM(family="diagonal", rho=rho, damping=gamma, prior_precision=2.0, temperature=1.0), 5
    )
    for k in range(3):
        v, curvature = torch.zeros(2).double(), torch.zeros(2).double()
        for round in range(1, 6):
            own, server = run.uploaded(round, k), run.posteriors[round - 1]
            v = v + gamma * rho * (own.mean - server.mean)
            moment = 1 / own.precision + own.mean**2 - 1 / server.precision - server.mean**2
            curvature = curvature - 2 * gamma * rho * moment
        assert relative(run.site(k)[0], v) < 1e-10
        assert relative(run.site(k)[1], curvature) < 1e-10
    total = sum(run.sites.read(k, 5)["site.second"] for k in range(3))
    assert relative(run.strategy.hsum.quadratic, total) < 1e-10


def test_bregman_never_meets_negative_precisions(quadratics, federate) -> None:
    """Three scalar clients, nine settings of rho and gamma; with the sign of published code's second moments four and
    more do.
    """
    one = torch.ones(1, 1).double()
    data = quadratics([one, one * 2, one * 3], [torch.tensor([v]).double() for v in (1.0, -2.0, 4.0)])
    for rho in (0.3, 1.0, 3.0):
        for gamma in (0.1, 0.3, 1.0):
            run = federate(
                data, BregmanADMM(family="diagonal", rho=rho, damping=gamma, prior_precision=1.0, temperature=1.0), 60
            )
            assert not run.refused
            assert not any(metrics["guard/count"] for metrics in run.metrics)


@pytest.mark.parametrize("momentum", [0.0, 0.6])
def test_fednova_in_closed_form(data, federate, relative, momentum) -> None:
    """Unequal steps (batches of 4): x + tau_eff sum p_k (w_k - x)/a_k with the paper's ||a_k||_1."""
    solver = PointSolver(optimizer="sgd", lr=0.02, epochs=2, batch_size=4, momentum=momentum)
    run = federate(data, FedNova(server_step=0.9), 2, solver=solver)
    sizes = torch.tensor([len(x) for x in data.inputs]).double()
    steps = 2 * torch.ceil(sizes / 4)
    a = (steps - momentum * (1 - momentum**steps) / (1 - momentum)) / (1 - momentum)
    p = sizes / sizes.sum()
    for round in (1, 2):
        x = run.means[round - 1]
        changes = torch.stack([run.grid.uploads[round][k]["mean"] - x for k in range(CLIENTS)])
        expected = x + 0.9 * (p * a).sum() * ((p / a)[:, None] * changes).sum(0)
        assert relative(run.means[round], expected) < 1e-12
    assert len(set(steps.tolist())) > 1


def test_fednova_with_equal_steps_is_fedavg(data, federate, relative) -> None:
    one, other = (federate(data, kind(), 5, solver=sgd(3)) for kind in (FedNova, FedAvg))
    assert relative(one.means[-1], other.means[-1]) < 1e-12


@pytest.mark.parametrize("shrinkage", [0.0, 0.01, 2.0])
def test_fedpa_delta_against_the_dense_inverse(relative, shrinkage) -> None:
    g = torch_generator(5)
    samples = torch.randn(4, 6, generator=g, dtype=torch.float64)
    server = torch.randn(6, generator=g, dtype=torch.float64)
    share = 1 / (1 + 3 * shrinkage)
    covariance = share * torch.eye(6).double() + (1 - share) * torch.cov(samples.T)
    expected = torch.linalg.solve(covariance, server - samples.mean(0))
    assert relative(posterior_delta(server, samples, shrinkage), expected) < 1e-12


def test_fedpa_samples_are_means_of_pieces_after_the_burn_in() -> None:
    path = PathSamples(steps=11, burn_in=0.2, samples=3)
    for step in range(1, 12):
        path(step, torch.tensor([float(step)]))
    assert [float(v) for v in path.values] == [4.0, 7.0, 10.0]  # 3 4 5, 6 7 8, 9 10 11


def test_fedpa_round(data, federate, relative) -> None:
    """FedAvg while burning in, then w_g - sum p_k Delta_k from the clients' own paths."""
    options = {"solver": sgd(9)}
    run = federate(data, FedPA(samples=3, burn_in=0.3, burn_in_rounds=1, shrinkage=0.5, server_step=0.5), 2, **options)
    average = federate(data, FedAvg(), 1, solver=sgd(9))
    half = 0.5 * (run.means[0] + average.means[1])
    assert relative(run.means[1], half) < 1e-12
    sizes, x = [len(v) for v in data.inputs], run.means[1]
    expected = torch.zeros(DIM).double()
    for k, n in enumerate(sizes):
        path, w = PathSamples(9, 0.3, 3), x.clone()
        for step in range(1, 10):
            w = w - 0.02 * (data.curvature(k) @ w - data.pull(k)) / n
            path(step, w)
        expected -= 0.5 * n / sum(sizes) * posterior_delta(x, torch.stack(path.values), 0.5)
    assert relative(run.means[2] - x, expected) < 1e-8
