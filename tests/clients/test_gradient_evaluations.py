"""Clients count the gradients they evaluate: examples x posterior samples, summed over steps."""

from __future__ import annotations

import json

import pytest

import bayesfed
from bayesfed.runs.directory import read_jsonl
from clients.exact import ExactSolver

LINREG = ["experiment=linreg", "rounds=2", "display=false", "figures=false", "eval.samples=2"]
SIDE_BY_SIDE = "engine.clients_per_batch=4"


@pytest.mark.parametrize(
    ("overrides", "per_example"),
    [
        (["strategy=fedavg", "client=adam", "client.epochs=3"], lambda p: 3),
        (["strategy=fedavg", "client=sgd", "client.epochs=2", SIDE_BY_SIDE], lambda p: 2),
        (["strategy.family=diagonal", "client=ivon", "client.epochs=2", "client.mc_samples=4"], lambda p: 8),
        (
            ["strategy.family=diagonal", "client=ivon", "client.epochs=2", "client.mc_samples=4", SIDE_BY_SIDE],
            lambda p: 8,
        ),
        # a row of a Hessian is one more gradient
        (["client=von", "client.epochs=2", "client.mc_samples=3"], lambda p: 6 * (1 + p)),
        (["client=srvon", "client.epochs=2", "client.mc_samples=3"], lambda p: 6 * (1 + p)),
        (["client=exact"], lambda p: 1 + p),
    ],
)
def test_counts(overrides, per_example, tmp_path):
    result = bayesfed.run([*LINREG, *overrides, f"hydra.run.dir={tmp_path}/r"])
    examples = sum(r["num-examples"] for r in read_jsonl(tmp_path / "r" / "clients.jsonl") if r["round"] == 1)
    a_round = examples * per_example(result.summary["parameters"])
    assert [record["gradients/total"] for record in result.rounds] == [0, a_round, 2 * a_round]
    assert result.summary["gradients/total"] == 2 * a_round


def test_a_resumed_run_goes_on_counting(tmp_path):
    first = bayesfed.run([*LINREG, f"hydra.run.dir={tmp_path}/r"])
    more = bayesfed.run([f"resume={tmp_path}/r", "rounds=3"])
    assert more.summary["gradients/total"] == pytest.approx(1.5 * first.summary["gradients/total"])


def test_a_solver_that_does_not_count_leaves_the_total_unknown(tmp_path, monkeypatch):
    solve = ExactSolver.solve

    def uncounted(self, problem):
        solution = solve(self, problem)
        if problem.client == 2 and problem.round == 2:
            del solution.metrics["gradient-evaluations"]
        return solution

    monkeypatch.setattr(ExactSolver, "solve", uncounted)
    bayesfed.run([*LINREG, f"hydra.run.dir={tmp_path}/r"])
    lines = [json.loads(line) for line in (tmp_path / "r" / "rounds.jsonl").read_text().splitlines()]
    assert lines[1]["gradients/total"] > 0
    assert lines[2]["gradients/total"] is None
