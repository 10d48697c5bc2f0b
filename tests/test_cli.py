"""The ``bayesfed`` command: exit codes and what it says."""

from __future__ import annotations

import json
import os
import shlex
import subprocess
import sys

import pytest
import yaml

from bayesfed import cli
from bayesfed.overrides import parse
from bayesfed.verbs import verbs
from bayesfed.verbs.run import how_to_resume
from clients.exact import ExactSolver
from strategies import BayesADMM

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


def test_a_run_that_diverged_is_not_to_be_resumed(tmp_path, capsys, monkeypatch):
    combine = BayesADMM.combine

    def away(self, sums, *others):
        found = combine(self, sums, *others)
        self.hsum = self.hsum * float("inf")
        return found

    monkeypatch.setattr(BayesADMM, "combine", away)
    assert code([*LINREG, f"hydra.run.dir={tmp_path}/r"]) == 1
    said = capsys.readouterr().err
    assert "failed: diverged: round 1: the server's state hsum.first is not finite" in said
    assert "continue with" not in said


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
    assert code(["--version"]) == 0
    assert capsys.readouterr().out.startswith("bayesfed 0.")


def test_help_lists_the_verbs_first(capsys):
    assert code(["--help"]) == code(["-h"]) == code(["help"]) == 0
    lines = capsys.readouterr().out.splitlines()
    named = [line.split()[0] for line in lines[2 : 2 + len(verbs())]]
    assert named == list(verbs()) == ["compare", "deploy", "list", "partition", "profile", "run", "status"]


@pytest.mark.parametrize("verb", verbs())
def test_each_verb_has_help(capsys, verb):
    assert code([verb, "--help"]) == code([verb, "-h"]) == code(["help", verb]) == 0
    text = capsys.readouterr().out
    assert text.startswith("usage: bayesfed")
    assert text == text[: len(text) // 3] * 3
    assert verb in text.splitlines()[0]


def test_the_module_is_the_command():
    done = subprocess.run([sys.executable, "-m", "bayesfed", "--version"], capture_output=True, text=True, check=True)
    assert done.stdout.startswith("bayesfed 0.")


def test_help_into_a_pipe_that_is_closed():
    read, write = os.pipe()
    os.close(read)
    command = [sys.executable, "-m", "bayesfed", "--help"]
    with os.fdopen(write) as pipe:
        done = subprocess.run(command, stdout=pipe, stderr=subprocess.PIPE, check=False)
    assert (done.returncode, done.stderr) == (0, b"")


def test_a_sweep_says_each_round_once(tmp_path, monkeypatch, capfd):
    monkeypatch.chdir(tmp_path)
    assert code(["-m", *LINREG, "seed=1,2", "hydra.sweep.dir=sweep"]) == 0
    said = "".join(capfd.readouterr())
    assert said.count("round 1") == 2
    assert "min_replies" not in said


def test_a_job_that_crashes_says_so_and_the_sweep_goes_on(tmp_path, monkeypatch, capfd):
    def crash(cfg, *parts):
        if cfg.seed == 2:
            raise ZeroDivisionError("no luck")

    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr("bayesfed.runs.session.check_fit", crash)
    assert code(["-m", *LINREG, "seed=1,2,3", "hydra.sweep.dir=sweep"]) == 1
    err = capfd.readouterr().err
    (line,) = [line for line in err.splitlines() if "no luck" in line]
    assert "seed=2: ZeroDivisionError: no luck (traceback in" in line
    assert "Traceback" not in err
    assert "Traceback" in (tmp_path / "sweep" / "1" / "traceback.txt").read_text()
    statuses = [json.loads((tmp_path / "sweep" / job / "summary.json").read_text())["status"] for job in "02"]
    assert statuses == ["finished", "finished"]


def test_a_search_with_optuna_minimises_the_nll(tmp_path, monkeypatch, capfd):
    pytest.importorskip("hydra_plugins.hydra_optuna_sweeper")
    monkeypatch.chdir(tmp_path)
    search = [
        "hydra/sweeper=optuna",
        "hydra.sweeper.n_trials=3",
        "strategy.damping=interval(0.01,0.9)",
        "hydra.sweep.dir=s",
    ]
    assert code(["-m", *LINREG, *search]) == 0, capfd.readouterr().err
    best = yaml.safe_load((tmp_path / "s" / "optimization_results.yaml").read_text())
    last = [(tmp_path / "s" / str(i) / "rounds.jsonl").read_text().splitlines()[-1] for i in range(3)]
    assert best["best_value"] == min(json.loads(line)["bayes/nll"] for line in last)


def test_a_search_for_the_largest_nll_is_refused(tmp_path, monkeypatch, capfd):
    monkeypatch.chdir(tmp_path)
    assert code(["-m", "hydra/sweeper=optuna", "hydra.sweeper.direction=maximize", "seed=1,2", *LINREG]) == 2
    assert "hydra.sweeper.direction=maximize" in capfd.readouterr().err
    assert not (tmp_path / "runs").exists()


def test_changing_the_folder_is_refused(tmp_path, monkeypatch, capfd):
    monkeypatch.chdir(tmp_path)
    for option in ([], ["-m"], ["--cfg", "job"]):
        assert code([*option, *LINREG, "hydra.job.chdir=true"]) == 2
        assert "hydra.job.chdir=True" in capfd.readouterr().err
    assert list(tmp_path.iterdir()) == []


def test_the_command_that_goes_on_can_be_pasted(tmp_path):
    where = tmp_path / "my runs" / "a b=1"
    (where / "checkpoint").mkdir(parents=True)
    (where / "checkpoint" / "server-000001.safetensors").write_bytes(b"")
    (where / "config.yaml").touch()
    (resume,) = parse(shlex.split(how_to_resume(str(where)).partition("bayesfed ")[2]))
    assert resume.value() == str(where)
