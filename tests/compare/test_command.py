"""Whole comparisons: what is written, what is skipped, what a failure or a kill leaves."""

from __future__ import annotations

import csv
import json
import os
import signal
import subprocess
import sys
import time
from pathlib import Path

import psutil
import pytest

from bayesfed.compare.command import compare

QUICK = [
    "experiment=digits_het10",
    "model.hidden=[8]",
    "client.epochs=1",
    "eval.samples=2",
    "strategy=fedavg,bayes_admm",
]
TWO = [*QUICK, "rounds=2", "seed=1,2", "jobs=2"]


def table(folder: Path) -> list[dict[str, str]]:
    """``table.csv`` without seconds."""
    with (folder / "table.csv").open() as file:
        return [{k: v for k, v in row.items() if not k.startswith("seconds")} for row in csv.DictReader(file)]


def stamps(folder: Path) -> dict[str, int]:
    """When each run was written last."""
    return {path.parent.name: path.stat().st_mtime_ns for path in folder.glob("runs/*/rounds.jsonl")}


@pytest.fixture(scope="module")
def done(tmp_path_factory) -> Path:
    folder = tmp_path_factory.mktemp("compare") / "out"
    assert compare([*TWO, f"out={folder}"]) == 0
    return folder


def test_what_is_written(done):
    assert {path.name for path in done.iterdir()} >= {
        "table.csv",
        "table.md",
        "table.tex",
        "report.html",
        "figures",
        "runs",
    }
    assert [(row["method"], row["seeds"]) for row in table(done)] == [("fedavg", "2"), ("bayes_admm", "2")]
    assert len(list(done.glob("runs/*/summary.json"))) == 4
    assert not list(done.glob("runs/*/figures"))  # unless asked for
    assert not list(done.rglob("*.lock"))


def test_the_table_is_that_of_the_runs(done):
    for row in table(done):
        found = [json.loads(path.read_text()) for path in done.glob("runs/*/summary.json")]
        found = [summary for summary in found if summary["method"] == row["method"]]
        assert float(row["accuracy_mean"]) == pytest.approx(sum(s["bayes/accuracy"] for s in found) / 2)
        assert int(row["bytes_total"]) == pytest.approx(sum(s["bytes/total"] for s in found) / 2, abs=0.5)
        assert float(row["client_mean"]) == pytest.approx(sum(s["clients/accuracy_mean"] for s in found) / 2)
        assert float(row["client_worst10"]) <= float(row["client_mean"])
        assert [s["gradients/total"] for s in found] == [int(row["gradient_evaluations"])] * 2 == [2 * 1438] * 2


def test_runs_are_those_of_bayesfed_run(done, tmp_path, digest):
    import bayesfed

    (mine,) = done.glob("runs/*bayes_admm-seed2-*")
    args = [a for a in QUICK if not a.startswith("strategy")]
    alone = bayesfed.run([*args, "rounds=2", "seed=2", "display=false", "figures=false", f"hydra.run.dir={tmp_path}/a"])
    assert digest(alone.run_dir) == digest(mine)


def test_finished_runs_are_not_repeated(done):
    before, text = stamps(done), (done / "table.csv").read_bytes()
    assert compare([*TWO, f"out={done}"]) == 0
    assert stamps(done) == before
    assert (done / "table.csv").read_bytes() == text
    assert compare([*TWO, "seed=1,2", "rounds=1", "strategy=fedavg", f"out={done}"]) == 0  # another grid, other runs
    assert before.items() < stamps(done).items()
    assert compare([*TWO, f"out={done}"]) == 0


def test_a_failed_run_is_reported_and_the_others_go_on(tmp_path, capsys):
    args = [*QUICK[:-1], "strategy=fedavg", "rounds=1", "client.lr=0.01,1e30", "strategy.min_replies=1,11"]
    assert compare([*args, f"out={tmp_path}/out"]) == 1
    good, short, diverged, _ = table(tmp_path / "out")
    assert (good["method"], good["status"], good["seeds"]) == ("fedavg lr=0.01 min_replies=1", "ok", "1")
    assert (short["seeds"], diverged["seeds"], diverged["accuracy_mean"]) == ("0", "0", "")
    assert short["status"].startswith(
        "failed 1 of 1: seed 1: round 1: 10 of 10 clients replied, strategy.min_replies=11"
    )
    assert diverged["status"].startswith("failed 1 of 1: seed 1: diverged: ")
    assert "failed 1 of 1" in (tmp_path / "out" / "report.html").read_text()
    assert "failed 1 of 1" in capsys.readouterr().out


def test_another_comparison_or_foreign_files_are_left_alone(tmp_path):
    from bayesfed.errors import InputError

    (tmp_path / "thesis.tex").write_text("")
    with pytest.raises(InputError, match="holds other files"):
        compare([*TWO, f"out={tmp_path}"])


@pytest.mark.parametrize("how", [signal.SIGKILL, signal.SIGINT])
def test_ended_half_way_and_started_again(how, tmp_path):
    """Killed in the middle of runs: nothing outlives it, finished runs stay, and the table is that of an undisturbed
    one.
    """
    args = [*QUICK, "rounds=6", "seed=1", "jobs=1"]
    code = "from bayesfed.cli import main; main()"
    command = [sys.executable, "-c", code, "compare", *args, f"out={tmp_path}/cut"]
    process = subprocess.Popen(command, stderr=subprocess.PIPE, start_new_session=True, env=os.environ.copy())
    second = f"{tmp_path}/cut/runs/*bayes_admm*/checkpoint/server-000002.safetensors"
    deadline = time.monotonic() + 120
    while not list(tmp_path.glob(second.removeprefix(f"{tmp_path}/"))):
        assert process.poll() is None, process.stderr.read()
        assert time.monotonic() < deadline
        time.sleep(0.02)
    family = psutil.Process(process.pid).children(recursive=True)
    process.send_signal(how)
    said = process.communicate(timeout=60)[1].decode()
    if how == signal.SIGINT:
        assert process.returncode == 130
        assert "start the same command again" in said
    _, alive = psutil.wait_procs(family, timeout=30)
    assert alive == []
    before = stamps(tmp_path / "cut")
    (first,) = [name for name in before if "fedavg" in name]

    assert compare([*args, f"out={tmp_path}/cut"]) == 0
    assert compare([*args, f"out={tmp_path}/whole"]) == 0
    assert stamps(tmp_path / "cut")[first] == before[first]
    assert table(tmp_path / "cut") == table(tmp_path / "whole")
    for whole in (tmp_path / "whole").glob("runs/*/posterior.safetensors"):
        assert whole.read_bytes() == (tmp_path / "cut" / "runs" / whole.parent.name / whole.name).read_bytes()


def test_tuning_gives_each_method_the_same_number_of_trials(tmp_path):
    pytest.importorskip("optuna")
    args = [*QUICK, "rounds=1", "seed=1", "tune=3", "client.batch_size=128", f"out={tmp_path}"]
    assert compare(args) == 0
    found = json.loads((tmp_path / "tuning.json").read_text())
    assert [(search["method"], len(search["trials"])) for search in found] == [("fedavg", 3), ("bayes_admm", 3)]
    for search in found:
        scores = [trial["score"] for trial in search["trials"]]
        assert search["trials"][0]["values"] == {}  # the configuration's own
        best = search["trials"][scores.index(max(scores))]
        assert search["chosen"] == best["values"]
        (run,) = tmp_path.glob(f"runs/*{search['method']}*/config.yaml")
        from omegaconf import OmegaConf

        used = OmegaConf.load(run)
        assert all(float(OmegaConf.select(used, k)) == float(v) for k, v in best["values"].items())
        assert (used.seed, used.eval.validation) == (1, 0.0)
    trials = [json.loads(path.read_text()) for path in tmp_path.glob("tuning/*/summary.json")]
    assert {(t["seed"], t["evaluated_on"]) for t in trials} == {(1001, "validation")}
    before = {path: path.stat().st_mtime_ns for path in tmp_path.glob("*/*/rounds.jsonl")}
    assert compare(args) == 0  # the same proposals again: nothing is run twice
    assert {path: path.stat().st_mtime_ns for path in tmp_path.glob("*/*/rounds.jsonl")} == before
