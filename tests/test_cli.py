"""The ``bayesfed`` command: exit codes and what it says."""

from __future__ import annotations

import json

import pytest
import yaml

from bayesfed import cli
from clients.exact import ExactSolver

LINREG = ["experiment=linreg", "figures=false", "eval.samples=2", "rounds=1"]


def code(arguments: list[str]) -> int:
    with pytest.raises(SystemExit) as stop:
        cli.main(arguments)
    return stop.value.code


def test_done(tmp_path, capsys):
    assert code(["run", *LINREG, f"hydra.run.dir={tmp_path}/r"]) == 0
    out = capsys.readouterr().out
    assert "round 1/1" in out
    assert f"results in {tmp_path}/r" in out


def test_the_outcome_says_what_was_measured(tmp_path, capsys):
    assert code([*LINREG, f"hydra.run.dir={tmp_path}/r"]) == 0
    (line,) = [line for line in capsys.readouterr().out.splitlines() if line.startswith("bayes_admm, 1 rounds")]
    assert "at the mean: RMSE" in line
    assert "; model-averaged: RMSE" in line
    assert code([*LINREG, "strategy=fedavg", f"hydra.run.dir={tmp_path}/p"]) == 0
    out = capsys.readouterr().out
    assert "fedavg, 1 rounds; point estimate: RMSE" in out
    assert "averaged" not in out
    assert "bayes" not in out


def test_interrupted_says_how_to_go_on(tmp_path, capsys, monkeypatch):
    def solve(self, problem):
        raise KeyboardInterrupt

    monkeypatch.setattr(ExactSolver, "solve", solve)
    assert code([*LINREG, f"hydra.run.dir={tmp_path}/r"]) == 130
    assert f"bayesfed resume={tmp_path}/r" in capsys.readouterr().err
    assert json.loads((tmp_path / "r" / "summary.json").read_text())["status"] == "interrupted"
    monkeypatch.undo()
    assert code([f"resume={tmp_path}/r"]) == 0


def test_failed_says_why(tmp_path, capsys, monkeypatch):
    def solve(self, problem):
        raise RuntimeError("no power")

    monkeypatch.setattr(ExactSolver, "solve", solve)
    assert code([*LINREG, f"hydra.run.dir={tmp_path}/r"]) == 1
    err = capsys.readouterr().err
    assert "no power" in err
    assert "resume=" in err


def test_cfg_job_shows_what_would_run(tmp_path, capfd, monkeypatch):
    monkeypatch.chdir(tmp_path)
    assert code(["--cfg", "job", "strategy=fedprox"]) == 0
    shown = yaml.safe_load(capfd.readouterr().out)
    assert shown["client"]["name"] == "adam"
    assert code(["--cfg", "job", "strategy.family=full"]) == 0
    assert yaml.safe_load(capfd.readouterr().out)["client"]["name"] == "von"


def test_sweep(tmp_path, monkeypatch, capfd):
    monkeypatch.chdir(tmp_path)
    assert code(["-m", *LINREG, "seed=1,2", "hydra.sweep.dir=sweep", "strategy=fedavg,bayes_admm"]) == 0
    methods = [json.loads((tmp_path / "sweep" / str(i) / "summary.json").read_text()) for i in range(4)]
    assert [(m["seed"], m["method"], m["client"]) for m in methods] == [
        (1, "fedavg", "exact"),
        (1, "bayes_admm", "exact"),
        (2, "fedavg", "exact"),
        (2, "bayes_admm", "exact"),
    ]


def test_version(capsys):
    cli.main(["--version"])
    assert capsys.readouterr().out.startswith("bayesfed 0.")
