"""LMD under BayesADMM and PVI: local fixed point, aggregation, whole runs."""

import math

import pytest
import torch

import bayesfed
from bayesfed.errors import InputError
from bayesfed.families import LogNormal, NaturalParameters, PointMass
from bayesfed.federation.local import LocalProblem
from bayesfed.federation.server.strategy import Reply, Sent
from bayesfed.problem import Examples
from bayesfed.problem.flat import FlatModel
from bayesfed.problem.likelihood import Gaussian
from clients.lmd import LMDSolver
from strategies import PVI, BayesADMM

F64 = {"dtype": torch.float64}


def pose(server, site=None, **options):
    """Linear regression with three weights."""
    model = FlatModel(torch.nn.Linear(3, 1, bias=False), torch.float64)
    generator = torch.Generator().manual_seed(0)
    x = torch.randn(40, 3, generator=generator, **F64)
    y = x @ torch.tensor([1.0, -0.5, 0.0], **F64) + 0.3 * torch.randn(40, generator=generator, **F64)
    settings = {
        "model": model,
        "initial": model.vector.clone(),
        "data": Examples(x, y[:, None]),
        "likelihood": Gaussian(2.0),
        "server": server,
        "site": site,
        "rho": 0.5,
        "temperature": 0.8,
        "proximal": 0.0,
        "learn_precision": True,
        "round": 2,
        "client": 0,
        "seed": 1,
    }
    return LocalProblem(**(settings | options))


@pytest.mark.parametrize(("signed", "lr"), [(True, 0.03), (False, 0.5)])
def test_local_fixed_point(signed, lr):
    """G/tau + v - V z + rho S (z - z_g) = 0 where it ends, to 0.02 in z (the slope changes by 240 a unit); G by 100,000
    samples.
    """
    z_g = torch.randn(6, generator=torch.Generator().manual_seed(3), **F64) * 0.3 - 0.5
    server = LogNormal.from_log_median(z_g, torch.tensor(25.0, **F64))
    v = torch.randn(6, generator=torch.Generator().manual_seed(4), **F64) * 5
    problem = pose(server, NaturalParameters("lognormal", v, torch.tensor(-4.0, **F64)))
    solver = LMDSolver(lr=lr, epochs=400, batch_size=40, mc_samples=4, signed=signed)
    found = solver.solve(problem).posterior
    assert torch.equal(found.precision, server.precision)

    def slope(q):
        parts = q.sample_parts(100_000, torch.Generator().manual_seed(5))
        w = parts[:, :3] - parts[:, 3:]
        x, y = problem.data.x, problem.data.y[:, 0]
        gradient = 2.0 * (w @ (x.T @ x) - x.T @ y)
        expected = torch.cat([(parts[:, :3] * gradient).mean(0), (-parts[:, 3:] * gradient).mean(0)])
        return expected / 0.8 + v - 8.0 * q.log_median + 0.5 * 25.0 * (q.log_median - z_g)

    assert float(slope(server).abs().max()) > 50
    assert float(slope(found).abs().max()) < 4.5
    assert float((found.log_median - z_g).abs().max()) > 0.3


def clients_of(server, count=3):
    return [
        LogNormal.from_log_median(
            server.log_median + 0.2 * torch.randn(8, generator=torch.Generator().manual_seed(k), **F64),
            server.precision,
        )
        for k in range(count)
    ]


def aggregate(strategy, clients):
    sums, sent = strategy.empty(), Sent(strategy.posterior)
    for q in clients:
        strategy.accumulate(sums, Reply(q, 10, {}, {}, sent))
    strategy.combine(sums, sent, len(clients))


@pytest.mark.parametrize("damping", [0.0, 0.3])
def test_bayes_admm_combines_log_medians(damping):
    """Two rounds: z_g = (1 - a) mean z_k + a (z_0 + gamma rho sum of all (z_k - z_g)); the precision stays."""
    strategy = BayesADMM(family="lognormal", rho=0.5, damping=damping, prior_precision=16.0, temperature=1.0)
    strategy.setup(torch.tensor([0.4, -0.2, 0.0, 0.3], **F64), num_clients=3)
    z_0 = strategy.posterior.log_median
    dual, alpha, z_g = torch.zeros(8, **F64), 1 / (1 + 3 * 0.5), z_0
    for _ in range(2):
        clients = clients_of(strategy.posterior)
        aggregate(strategy, clients)
        dual = dual + damping * 0.5 * sum(q.log_median - z_g for q in clients)
        z_g = (1 - alpha) * sum(q.log_median for q in clients) / 3 + alpha * (z_0 + dual)
        torch.testing.assert_close(strategy.posterior.log_median, z_g, rtol=1e-12, atol=1e-13)
        assert float(strategy.posterior.precision) == pytest.approx(16.0)
    m = z_g.exp()
    torch.testing.assert_close(strategy.posterior.mean, (m[:4] - m[4:]) * math.exp(1 / 32), rtol=1e-12, atol=1e-13)


def test_pvi_multiplies_sites():
    """Undamped: log medians of prior and sites add up in units of the precision."""
    strategy = PVI(family="lognormal", damping=1.0, prior_precision=16.0, temperature=1.0)
    strategy.setup(torch.tensor([0.4, -0.2, 0.0, 0.3], **F64), num_clients=3)
    z_0 = strategy.posterior.log_median
    clients = clients_of(strategy.posterior)
    aggregate(strategy, clients)
    expected = z_0 + sum(q.log_median - z_0 for q in clients)
    torch.testing.assert_close(strategy.posterior.log_median, expected, rtol=1e-12, atol=1e-13)


def run(tmp_path, *overrides):
    options = ["experiment=digits_het10", "engine=inline", "display=false", "figures=false", "rounds=4", "eval.every=4"]
    return bayesfed.run([*options, f"hydra.run.dir={tmp_path / 'run'}", *overrides])


@pytest.mark.parametrize("strategy", ["bayes_admm", "pvi"])
def test_digits(tmp_path, strategy):
    result = run(tmp_path, f"strategy={strategy}", "strategy.family=lognormal")
    assert isinstance(result.posterior, LogNormal)
    assert result.summary["client"] == "lmd"
    first, last = result.rounds[0], result.rounds[-1]
    assert first["mean/accuracy"] < 20
    assert last["mean/accuracy"] > 60
    assert last["bayes/nll"] < 1.6 < first["bayes/nll"]
    loaded = bayesfed.load(result.run_dir)
    assert torch.equal(loaded.posterior.log_median, result.posterior.log_median)
    assert loaded.predict(torch.zeros(2, 8, 8)).shape == (2, 10)


def test_point_estimates_and_low_precision(tmp_path):
    result = run(tmp_path, "strategy=fedavg", "client=lmd", "client.mx=e2m3", "client.epochs=2")
    assert isinstance(result.posterior, PointMass)
    assert result.rounds[-1]["mean/accuracy"] > 40


def test_what_it_cannot_do_says_what_is_uploaded(tmp_path):
    with pytest.raises(InputError, match="lognormal, point"):
        run(tmp_path, "strategy=bayes_admm", "client=lmd")
    lacking = dict.fromkeys(("fedprox", "feddyn", "fedadmm"), "no proximal term and no dual")
    lacking |= dict.fromkeys(("scaffold", "fedpa", "fednova"), "no control variates, samples or step counts")
    for strategy, missing in lacking.items():
        line = rf"^client=lmd: has {missing} for point estimates, which strategy={strategy} needs; "
        line += "use strategy=fedavg.*lognormal$"
        with pytest.raises(InputError, match=line):
            run(tmp_path, f"strategy={strategy}", "client=lmd")
        assert not (tmp_path / "run").exists()  # before anything starts
    assert run(tmp_path, "strategy=fedprox", "strategy.mu=0", "client=lmd", "rounds=1").summary["status"] == "finished"


@pytest.mark.parametrize(
    ("options", "field"),
    [
        ({"mx": "fp4"}, "mx"),
        ({"sigma": -1.0}, "sigma"),
        ({"decay": -1.0}, "decay"),
        ({"beta1": 1.0}, "beta1"),
        ({"noise": "x"}, "noise"),
    ],
)
def test_solver_errors(options, field):
    with pytest.raises(InputError) as error:
        LMDSolver(lr=0.01, epochs=1, batch_size=1, **options)
    assert error.value.field == field
