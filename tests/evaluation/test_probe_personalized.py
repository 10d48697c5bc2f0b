"""Clients' local posteriors, started from the server's, on their own tests: closed forms, and nothing changes."""

from __future__ import annotations

import math

import numpy as np
import pytest
import torch
from flwr.clientapp import ClientApp

import bayesfed
from bayesfed.app import plain, problem_of
from bayesfed.config import compose_config
from bayesfed.engine.inline import InlineGrid
from bayesfed.federation.client.handler import Trainer
from bayesfed.federation.client.sites import MemorySites
from bayesfed.federation.server.ask import ask
from bayesfed.runs.directory import read_jsonl
from clients.exact import ExactSolver
from strategies import BayesADMM, FedAvg

LINREG = ["experiment=linreg", "display=false", "figures=false", "eval.samples=2"]
PRECISION = 4.0  # of the noise


@pytest.fixture(scope="module")
def problem():
    return problem_of(plain(compose_config(LINREG)))


def arrays(examples) -> tuple[np.ndarray, np.ndarray]:
    """Inputs with a column of ones if the model has a bias, and targets."""
    x, y = (t.numpy() for t in examples.batch(slice(None), torch.float64, "cpu"))
    return x, y.reshape(-1)


def design(problem, examples) -> tuple[np.ndarray, np.ndarray]:
    x, y = arrays(examples)
    wide = sum(p.numel() for p in problem.build_model(1).parameters()) > x.shape[1]
    return (np.c_[x, np.ones(len(x))] if wide else x), y


def rmse(problem, examples, weights: np.ndarray) -> float:
    x, y = design(problem, examples)
    return float(np.sqrt(np.mean((x @ weights - y) ** 2)))


def federation(problem, strategy, rounds: int):
    trainer = Trainer(
        name=strategy.name, family=strategy.family, solver=ExactSolver(), problem=problem, sites=MemorySites(), seed=1,
        dtype=torch.float64, device=torch.device("cpu"),
    )  # fmt: skip
    app = ClientApp()
    app.train()(trainer.train)
    app.query()(trainer.query)
    app.evaluate()(trainer.evaluate)
    strategy.setup(trainer.initial, len(problem.clients), 1)
    grid = InlineGrid(app, len(problem.clients))
    strategy.start(grid, num_rounds=rounds)
    return grid, trainer


def test_fedavg_personalised_is_each_clients_own_least_squares(problem):
    strategy = FedAvg()
    grid, _ = federation(problem, strategy, 2)
    answers = ask(strategy, grid, 2, "personalize", {"samples": 3})
    for k, client in enumerate(problem.clients):
        weights = np.linalg.lstsq(*design(problem, client), rcond=None)[0]
        assert answers[k]["mean/rmse"] == pytest.approx(rmse(problem, problem.client_tests[k], weights), rel=1e-9)
        assert answers[k]["num-examples"] == len(problem.client_tests[k])


def test_without_duals_the_local_posterior_counts_the_clients_data_twice(problem):
    """gamma = 0: S_k = S_g + A_k/rho, S_k m_k = S_g m_g + b_k/rho."""
    strategy = BayesADMM(family="full", rho=0.5, damping=0.0, prior_precision=1.0, temperature=1.0)
    grid, _ = federation(problem, strategy, 2)
    server = strategy.posterior
    answers = ask(strategy, grid, 2, "personalize", {"samples": 2})
    for k, client in enumerate(problem.clients):
        x, y = design(problem, client)
        precision = server.precision.numpy() + PRECISION * x.T @ x / 0.5
        mean = np.linalg.solve(precision, server.precision.numpy() @ server.mean.numpy() + PRECISION * x.T @ y / 0.5)
        assert answers[k]["mean/rmse"] == pytest.approx(rmse(problem, problem.client_tests[k], mean), rel=1e-9)


def test_at_the_fixed_point_the_local_posterior_is_the_servers(problem):
    """rho = 1/K, gamma = 1, full covariance: the pooled posterior after a round, and every dual its client's share of
    it.
    """
    strategy = BayesADMM(family="full", rho=1 / len(problem.clients), damping=1.0, prior_precision=1.0, temperature=1.0)
    grid, _ = federation(problem, strategy, 1)
    answers = ask(strategy, grid, 1, "personalize", {"samples": 2})
    x, y = (np.concatenate(parts) for parts in zip(*(design(problem, c) for c in problem.clients), strict=True))
    pooled = np.linalg.solve(np.eye(x.shape[1]) + PRECISION * x.T @ x, PRECISION * x.T @ y)
    for k in range(len(problem.clients)):
        assert answers[k]["mean/rmse"] == pytest.approx(rmse(problem, problem.client_tests[k], pooled), rel=1e-7)


def test_nothing_changes(problem):
    strategy = BayesADMM(family="diagonal", rho=1.0, damping=0.2, fraction=0.5, temperature=1.0)
    strategy.fates = lambda clients, round: (
        pytest.fail("personalised evaluation is not subject to dropouts") if round > 2 else {}
    )
    grid, trainer = federation(problem, strategy, 2)
    before = {k: v for k, v in vars(strategy).items() if not isinstance(v, torch.Tensor)}
    values = {**strategy.posterior.arrays(), **strategy.tensors()}
    values = {name: value.clone() for name, value in values.items()}
    kept = {(k, strategy.ledger.accepted[k]) for k in strategy.ledger.accepted}  # older records go with any message
    sites = {key: trainer.sites.read(*key) for key in kept}
    answers = ask(strategy, grid, 2, "personalize", {"samples": 2})
    assert sorted(answers) == list(range(5))  # all, whatever the fraction
    assert all(vars(strategy)[name] is value for name, value in before.items() if name not in ("fraction",))
    for name, value in {**strategy.posterior.arrays(), **strategy.tensors()}.items():
        assert torch.equal(value, values[name])
    after = {(k, r): trainer.sites.read(k, r) for k in range(5) for r in trainer.sites.rounds(k)}
    assert after.keys() == kept
    for key, record in sites.items():
        assert all(torch.equal(record[name], after[key][name]) for name in record)


def test_a_strategy_that_keeps_count_in_configure_train_is_left_alone(problem):
    class Counting(FedAvg):
        asked: list[int]

        def configure_train(self, server_round, arrays, config, grid):
            self.asked.append(server_round)
            return super().configure_train(server_round, arrays, config, grid)

    strategy = Counting()
    strategy.asked = []
    grid, _ = federation(problem, strategy, 2)
    ask(strategy, grid, 2, "personalize", {"samples": 1})
    assert strategy.asked == [1, 2]


def test_a_client_without_tests_or_with_an_error_is_named(problem, caplog, monkeypatch):
    strategy = FedAvg()
    grid, _ = federation(problem, strategy, 1)
    solve = ExactSolver.solve

    def fail(self, local):
        if local.client == 3:
            raise RuntimeError("no power")
        return solve(self, local)

    monkeypatch.setattr(ExactSolver, "solve", fail)
    answers = ask(strategy, grid, 1, "personalize", {"samples": 1})
    assert sorted(answers) == [0, 1, 2, 4]
    assert "client 3 did not answer 'personalize': RuntimeError: no power" in caplog.text


@pytest.mark.parametrize(
    "options",
    [
        ["strategy.family=diagonal", "client=ivon", "client.epochs=2", "client.keep_momentum=true"],
        ["strategy=scaffold", "client=sgd", "client.epochs=2"], ["strategy=fedadmm", "client=exact"],
        ["strategy=fedpa", "client=sgd", "client.epochs=6", "strategy.burn_in_rounds=1"],
        ["strategy=fedadam", "client=adam", "client.epochs=2"], ["strategy=fedavg", "client=adam", "wire=float16"],
    ],
    ids=lambda o: o[0].rpartition("=")[2],
)  # fmt: skip
def test_the_run_goes_on_to_the_same_bits(options, tmp_path, digest):
    base = [*LINREG, *options, "strategy.fraction=0.6"]
    whole = bayesfed.run([*base, "rounds=3", f"hydra.run.dir={tmp_path}/whole"])
    half = bayesfed.run([*base, "rounds=2", "eval.personalized=true", f"hydra.run.dir={tmp_path}/half"])
    assert half.summary["personalized/rmse_mean"] > 0
    again = bayesfed.run([f"resume={half.run_dir}", "rounds=3"])
    assert digest(again.run_dir) == digest(whole.run_dir)
    mine, theirs = again.rounds[-1], whole.rounds[-1]
    assert [mine[k] for k in ("bayes/nll", "gradients/total")] == [theirs[k] for k in ("bayes/nll", "gradients/total")]


def test_lines_and_summary(tmp_path):
    result = bayesfed.run([*LINREG, "eval.personalized=true", "eval.clients_every=2", f"hydra.run.dir={tmp_path}/r"])
    lines = read_jsonl(tmp_path / "r" / "client_tests.jsonl")
    tested = [(line["round"], line["client"]) for line in lines if "test/rmse" in line]
    assert tested == [(round, client) for round in (2, 3) for client in range(5)]
    values = [line["personalized/rmse"] for line in lines if "personalized/rmse" in line]
    assert result.summary["personalized/rmse_mean"] == pytest.approx(np.mean(values))
    assert result.summary["personalized/rmse_worst10"] == pytest.approx(max(values))
    own = [line["test/rmse"] for line in lines if line["round"] == 3 and "test/rmse" in line]
    assert result.rounds[3]["clients/rmse_mean"] == result.summary["clients/rmse_mean"] == pytest.approx(np.mean(own))
    at_mean = [line["test/at_mean/rmse"] for line in lines if line["round"] == 3 and "test/rmse" in line]
    assert result.rounds[3]["clients/at_mean/rmse_mean"] == pytest.approx(np.mean(at_mean))
    assert at_mean != pytest.approx(own)
    assert "clients/rmse_mean" not in result.rounds[1]
    last = bayesfed.run([*LINREG, "eval.clients_every=null", f"hydra.run.dir={tmp_path}/last"])
    assert ["clients/rmse_mean" in record for record in last.rounds] == [False, False, False, True]
    off = bayesfed.run([*LINREG, f"hydra.run.dir={tmp_path}/off"])
    assert not (off.run_dir / "client_tests.jsonl").exists()
    assert math.isfinite(off.summary["bayes/nll"])
