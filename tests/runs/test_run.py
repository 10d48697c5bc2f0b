"""Runs in which something goes wrong, and what the user is told."""

from __future__ import annotations

import json
import math
import signal

import pytest
import torch

import bayesfed
from bayesfed.cli import main
from bayesfed.errors import RunFailed
from bayesfed.evaluation.probes import scores
from bayesfed.federation.local import LocalSolution
from bayesfed.runs import figures
from bayesfed.runs.directory import read_jsonl

LINREG = [
    "experiment=linreg",
    "strategy.family=diagonal",
    "strategy.damping=0.3",
    "eval.samples=2",
    "figures=false",
    "display=false",
]


def raises(solution):
    raise RuntimeError("out of memory")


def nan(solution: LocalSolution) -> LocalSolution:
    posterior = solution.posterior
    return LocalSolution(type(posterior)(torch.full_like(posterior.mean, math.nan), posterior.precision), {})


def negative(solution: LocalSolution) -> LocalSolution:
    return LocalSolution(type(solution.posterior)(solution.posterior.mean, -solution.posterior.precision), {})


@pytest.mark.parametrize(
    ("act", "reason"), [(raises, "RuntimeError: out of memory"), (nan, "finite"), (negative, "positive")]
)
@pytest.mark.parametrize("damping", [0.3, 0.0])
def test_failing_client_is_counted_named_and_left_out(run, sabotage, caplog, act, reason, damping):
    sabotage(act, client=2, round=2)
    result = run("rounds=3", f"strategy.damping={damping}")
    assert [line["clients/failed"] for line in result.rounds[1:]] == [0, 1, 0]
    assert [line["clients/replied"] for line in result.rounds[1:]] == [5, 4, 5]
    assert [line["clients/sampled"] for line in result.rounds[1:]] == [5, 5, 5]
    (failed,) = [line for line in read_jsonl(result.run_dir / "clients.jsonl") if not line["accepted"]]
    assert (failed["round"], failed["client"]) == (2, 2)
    assert reason in failed["reason"]
    assert "client 2 left out" in caplog.text
    assert reason in caplog.text
    assert bool(torch.isfinite(result.posterior.mean).all())


def test_failing_client_changes_the_result_as_if_it_had_not_been_asked(run, sabotage):
    """The dual of a client that failed stays what it was: it goes on from there."""
    whole = run("rounds=3", to="whole")
    sabotage(raises, client=2, round=2)
    part = run("rounds=3", to="part")
    assert part.rounds[1]["dual/norm"] == whole.rounds[1]["dual/norm"]
    assert part.rounds[2]["dual/norm"] != whole.rounds[2]["dual/norm"]


def test_everyone_failing_ends_the_run_resumable(run, sabotage, mend, digest):
    whole = run("rounds=3", to="whole")
    sabotage(raises, round=2)
    with pytest.raises(RunFailed, match=r"round 2: 0 of 5 clients replied.*out of memory"):
        run("rounds=3", to="failed")
    failed = whole.run_dir.parent / "failed"
    summary = json.loads((failed / "summary.json").read_text())
    assert summary["status"] == "failed"
    assert summary["rounds"] == 1
    mend()
    result = bayesfed.run([f"resume={failed}"])
    assert result.summary["status"] == "finished"
    assert digest(failed) == digest(whole.run_dir)


def test_too_few_replies(run, sabotage):
    sabotage(raises, client=0)
    with pytest.raises(RunFailed, match=r"4 of 5 clients replied, strategy.min_replies=5"):
        run("rounds=1", "strategy.min_replies=5")


# -- through the command -----------------------------------------------------------------------------------------------


@pytest.fixture
def command(tmp_path, capfd, monkeypatch):
    monkeypatch.chdir(tmp_path)
    handlers = {s: signal.getsignal(s) for s in (signal.SIGINT, signal.SIGTERM)}

    def call(*args: str) -> tuple[int, str, str]:
        with pytest.raises(SystemExit) as stop:
            main(args)
        return stop.value.code, *capfd.readouterr()

    yield call
    for number, handler in handlers.items():
        signal.signal(number, handler)


def test_done(command, tmp_path):
    code, out, _ = command("run", *LINREG, "rounds=1", "hydra.run.dir=out")
    assert code == 0
    assert "bayes_admm, 1 rounds" in out
    assert "RMSE" in out
    assert "results in out" in out


def test_failed(command, tmp_path, sabotage):
    sabotage(raises)
    code, _, err = command(*LINREG, "rounds=1", "hydra.run.dir=out")
    assert code == 1
    assert "failed: round 1: 0 of 5 clients replied" in err
    assert "bayesfed resume=out" in err
    assert "Traceback" not in err


@pytest.mark.parametrize("number", [signal.SIGINT, signal.SIGTERM])
def test_interrupted(command, tmp_path, sabotage, mend, digest, number):
    command(*LINREG, "rounds=3", "hydra.run.dir=whole")
    sabotage(lambda solution: signal.raise_signal(number), client=3, round=2)
    code, _, err = command(*LINREG, "rounds=3", "hydra.run.dir=out")
    assert code == 130
    assert "continue with: bayesfed resume=out" in err
    assert "Traceback" not in err
    summary = json.loads((tmp_path / "out" / "summary.json").read_text())
    assert (summary["status"], summary["rounds"]) == ("interrupted", 1)
    mend()
    assert command("resume=out")[0] == 0
    assert digest(tmp_path / "out") == digest(tmp_path / "whole")
    assert [line["round"] for line in read_jsonl(tmp_path / "out" / "rounds.jsonl")] == [0, 1, 2, 3]
    clients = [(line["round"], line["client"]) for line in read_jsonl(tmp_path / "out" / "clients.jsonl")]
    assert clients == [(r, c) for r in (1, 2, 3) for c in range(5)]


def test_used_directory(command):
    command(*LINREG, "rounds=1", "hydra.run.dir=out")
    code, _, err = command(*LINREG, "rounds=1", "hydra.run.dir=out")
    assert code == 2
    assert len(err.splitlines()) == 1
    assert "resume=out" in err


# -- what a run evaluates and draws ------------------------------------------------------------------------------------


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


def test_the_reliability_diagram_is_that_of_the_last_evaluation(tmp_path, monkeypatch):
    """Without a second evaluation, unless an earlier process made the first one: then to the same numbers."""
    diagrams, evaluations = [], []
    score = scores.evaluate
    monkeypatch.setattr(scores, "evaluate", lambda *a, **k: evaluations.append(k["bayes"]) or score(*a, **k))
    monkeypatch.setattr(
        figures, "make_figures", lambda path, *, label_counts, reliability, **names: diagrams.append(reliability)
    )
    options = ["client.epochs=1", "eval.samples=3", "display=false"]
    result = bayesfed.run(["rounds=2", *options, f"hydra.run.dir={tmp_path}/r"])
    assert evaluations == [True] * 3
    for kind in ("mean", "bayes"):
        pairs = zip(diagrams[0][kind]["accuracy"], diagrams[0][kind]["count"], strict=True)
        correct, count = sum(a * c for a, c in pairs if c), sum(diagrams[0][kind]["count"])
        assert 100 * correct / count == pytest.approx(result.summary[f"{kind}/accuracy"])

    summary = json.loads((result.run_dir / "summary.json").read_text())
    (result.run_dir / "summary.json").write_text(json.dumps({**summary, "status": "interrupted"}))
    bayesfed.run([f"resume={result.run_dir}", "display=false"])
    assert evaluations == [True] * 4
    assert diagrams[1] == diagrams[0]


def test_a_run_without_display_tells_its_rounds_to_the_log(run, caplog):
    caplog.set_level("INFO", "bayesfed")
    run("rounds=2")
    told = [line for line in caplog.messages if line.startswith("round ")]
    assert [line.rpartition(",")[0] for line in told] == [f"round {t} of 2: 5 of 5 clients replied" for t in (1, 2)]
