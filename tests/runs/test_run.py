"""What a run leaves in its directory, how it fails, and how it is resumed."""

from __future__ import annotations

import json

import numpy as np
import pytest
import torch
from omegaconf import OmegaConf
from safetensors import safe_open

import bayesfed
from bayesfed.errors import InputError, RunFailed
from clients.exact import ExactSolver

REGRESSION = {"mean/rmse", "mean/nll", "bayes/rmse", "bayes/nll"}
EVERY_ROUND = {
    "round", "clients/sampled", "clients/replied", "clients/failed", "bytes/down", "bytes/up", "seconds/round",
    "seconds/total", "posterior/precision_min", "posterior/precision_max", "dual/norm", "guard/count", "guard/clients",
    "admm/primal_mean", "admm/primal_max", "admm/dual", "admm/dual_norm_mean",
}  # fmt: skip
CLASSIFICATION = {f"{kind}/{name}" for kind in ("mean", "bayes") for name in ("accuracy", "nll", "ece", "brier")}


def test_rounds_hold_the_documented_keys(run):
    result = run("rounds=2")
    assert [r["round"] for r in result.rounds] == [0, 1, 2]
    assert set(result.rounds[0]) >= REGRESSION
    for record in result.rounds[1:]:
        assert set(record) >= EVERY_ROUND | REGRESSION


def test_classification_keys(tmp_path):
    result = bayesfed.run(
        [
            "rounds=1",
            "client.epochs=1",
            "eval.samples=2",
            "display=false",
            "figures=false",
            f"hydra.run.dir={tmp_path}/r",
        ]
    )
    assert set(result.rounds[1]) >= CLASSIFICATION | {"hessian/moved"}
    assert 0 <= result.rounds[1]["mean/accuracy"] <= 100


def test_summary(run):
    result = run("rounds=4")
    summary = json.loads((result.run_dir / "summary.json").read_text())
    assert summary == result.summary
    assert summary["status"] == "finished"
    assert (summary["method"], summary["seed"], summary["rounds"], summary["parameters"]) == ("bayes_admm", 1, 4, 6)
    values = [r["mean/nll"] for r in result.rounds]
    assert summary["mean/nll"] == values[-1]
    assert summary["last3/mean/nll"] == pytest.approx(np.mean(values[-3:]), rel=1e-12)
    assert summary["best/mean/nll"] == min(values[1:])
    assert summary["bytes/total"] == sum(r["bytes/up"] + r["bytes/down"] for r in result.rounds[1:])
    assert summary["versions"]["flwr"].startswith("1.39")


def test_bytes_are_those_of_the_arrays(run):
    record = run("rounds=1").rounds[1]
    # 5 clients, mean and diagonal precision of 6 float64 numbers, each with npy's header of 128 bytes
    assert record["bytes/down"] == record["bytes/up"] == 5 * 2 * (6 * 8 + 128)


def test_posterior_file_has_one_metadata_key(run):
    result = run("rounds=1")
    with safe_open(result.run_dir / "posterior.safetensors", framework="pt") as file:
        assert set(file.metadata()) == {"bayesfed"}
        text = file.metadata()["bayesfed"]
        assert set(file.keys()) == {"mean", "precision"}
    assert text == json.dumps(json.loads(text), sort_keys=True)
    assert torch.equal(bayesfed.load(result.run_dir).posterior.mean, result.posterior.mean)


def test_clients_file(run):
    result = run("rounds=2")
    lines = [json.loads(line) for line in (result.run_dir / "clients.jsonl").read_text().splitlines()]
    assert [(r["round"], r["client"]) for r in lines] == [(r, c) for r in (1, 2) for c in range(5)]
    assert all(r["accepted"] and r["num-examples"] == 50 for r in lines)


def test_stored_configuration_can_be_read(run):
    cfg = OmegaConf.load(run("rounds=1").run_dir / "config.yaml")
    assert cfg.strategy.family == "diagonal"
    assert "hydra" not in cfg


# -- resuming ---------------------------------------------------------------------------------------------------------------


def test_resumed_run_equals_an_uninterrupted_one(run, digest):
    whole = run("rounds=4", to="whole")
    parts = run("rounds=2", to="parts")
    parts = run(f"resume={parts.run_dir}", "rounds=4")
    assert digest(parts.run_dir) == digest(whole.run_dir)
    drop = ("seconds/round", "seconds/total", "seconds/train")
    for one, other in zip(parts.rounds, whole.rounds, strict=True):
        assert {k: v for k, v in one.items() if k not in drop} == {k: v for k, v in other.items() if k not in drop}


def test_rarer_checkpoints_resume_from_the_last_one(run, digest, monkeypatch):
    whole = run("rounds=5", to="whole")
    solve, calls = ExactSolver.solve, []

    def interrupted(self, problem):
        calls.append(problem.round)
        if problem.round == 4 and problem.client == 2:
            raise KeyboardInterrupt
        return solve(self, problem)

    monkeypatch.setattr(ExactSolver, "solve", interrupted)
    with pytest.raises(KeyboardInterrupt):
        run("rounds=5", "checkpoint.every=2", to="cut")
    monkeypatch.undo()
    directory = whole.run_dir.parent / "cut"
    assert json.loads((directory / "summary.json").read_text())["status"] == "interrupted"
    resumed = run(f"resume={directory}")
    assert digest(directory) == digest(whole.run_dir)
    assert resumed.summary["status"] == "finished"
    assert [r["round"] for r in resumed.rounds] == list(range(6))


@pytest.mark.parametrize("override", ["seed=2", "strategy.rho=0.3", "client=ivon", "data.path=x", "checkpoint.every=3"])
def test_other_settings_cannot_change_on_resuming(run, override):
    result = run("rounds=1")
    with pytest.raises(InputError, match=override.partition("=")[0]):
        run(f"resume={result.run_dir}", "rounds=2", override)


def test_rounds_can_only_grow(run):
    result = run("rounds=2")
    with pytest.raises(InputError, match="rounds=1"):
        run(f"resume={result.run_dir}", "rounds=1")
    assert run(f"resume={result.run_dir}").summary["rounds"] == 2  # nothing left to do


def test_schedule_horizon_is_kept(tmp_path):
    base = ["client.epochs=1", "client.schedule=cosine", "eval.samples=1", "display=false", "figures=false"]
    path = tmp_path / "r"
    bayesfed.run([*base, "rounds=1", f"hydra.run.dir={path}"])
    bayesfed.run([f"resume={path}", "rounds=2"])
    assert OmegaConf.load(path / "config.yaml").client.schedule_rounds == 1


# -- failures ----------------------------------------------------------------------------------------------------------------


def broken(kind, client, only_round):
    solve = ExactSolver.solve

    def patched(self, problem):
        if problem.client == client and problem.round == only_round:
            if kind == "raises":
                raise RuntimeError("no power")
            solution = solve(self, problem)
            solution.posterior.mean[0] = torch.nan
            return solution
        return solve(self, problem)

    return patched


@pytest.mark.parametrize(("kind", "reason"), [("raises", "no power"), ("nan", "not finite")])
def test_a_failing_client_is_left_out_and_the_sums_stay_consistent(run, monkeypatch, kind, reason):
    monkeypatch.setattr(ExactSolver, "solve", broken(kind, 3, 2))
    result = run("rounds=3")
    assert [r["clients/failed"] for r in result.rounds[1:]] == [0, 1, 0]
    lines = [json.loads(line) for line in (result.run_dir / "clients.jsonl").read_text().splitlines()]
    (failed,) = [r for r in lines if not r["accepted"]]
    assert (failed["round"], failed["client"]) == (2, 3)
    assert reason in failed["reason"]


def test_no_replies_is_a_failure_that_can_be_resumed(run, monkeypatch, digest, tmp_path):
    def solve(self, problem):
        raise RuntimeError("no power")

    with monkeypatch.context() as patch:
        patch.setattr(ExactSolver, "solve", solve)
        with pytest.raises(RunFailed, match="0 of 5 clients replied"):
            run("rounds=2", to="failed")
    assert json.loads((tmp_path / "failed" / "summary.json").read_text())["status"] == "failed"
    assert digest(run(f"resume={tmp_path / 'failed'}").run_dir) == digest(run("rounds=2", to="whole").run_dir)


def test_wandb_is_offline_without_a_key(run, monkeypatch, tmp_path):
    pytest.importorskip("wandb")
    monkeypatch.delenv("WANDB_API_KEY", raising=False)
    monkeypatch.setenv("HOME", str(tmp_path))
    monkeypatch.delenv("WANDB_MODE", raising=False)
    result = run("rounds=1", "logger=wandb")
    assert list((result.run_dir / "wandb").glob("offline-run-*"))


def test_tuning_never_sees_the_test_set(tmp_path):
    common = ["rounds=1", "client.epochs=1", "eval.samples=1", "display=false", "figures=false"]
    tuned = bayesfed.run([*common, "eval.validation=0.2", f"hydra.run.dir={tmp_path}/v"])
    assert tuned.summary["evaluated_on"] == "validation"
    assert bayesfed.run([*common, f"hydra.run.dir={tmp_path}/t"]).summary["evaluated_on"] == "test"


def test_figures_are_drawn(tmp_path):
    result = bayesfed.run(
        ["rounds=2", "client.epochs=1", "eval.samples=2", "display=false", f"hydra.run.dir={tmp_path}/r"]
    )
    names = {path.name for path in (result.run_dir / "figures").iterdir()}
    assert names == {"learning_curves.png", "label_distribution.png", "reliability.png", "precision.png"}
