"""``bayesfed status`` and ``list``, and the structured log."""

from __future__ import annotations

import json
from pathlib import Path

import pytest

import bayesfed
from bayesfed.cli import main
from bayesfed.errors import InputError
from bayesfed.runs.status import RunState, listing, status


def test_finished_run_with_a_failing_client(run, sabotage, mend, tmp_path) -> None:
    def raises(solution):
        raise RuntimeError("no battery")

    sabotage(raises, client=1, round=2)
    done = run("rounds=3")
    mend()
    state = RunState.read(done.run_dir)
    assert (state.status, state.round, state.rounds, state.checkpoint, state.method) == (
        "finished",
        3,
        3,
        3,
        "bayes_admm",
    )
    assert {(c.accepted, c.refused, c.last) for k, c in state.clients.items() if k != 1} == {(3, 0, 3)}
    assert (state.clients[1].accepted, state.clients[1].refused) == (2, 1)
    assert "no battery" in state.clients[1].reason
    assert len(status(done.run_dir)) == 2
    assert listing(tmp_path).row_count == 1
    lines = [json.loads(line) for line in (done.run_dir / "log.jsonl").read_text().splitlines()]
    assert [line["level"] for line in lines if "no battery" in line["message"]] == ["warning"]
    assert all(set(line) == {"time", "level", "logger", "message"} for line in lines)


def shown(path: Path) -> dict[str, str]:
    """The upper table of ``bayesfed status``."""
    facts = status(path)[0]
    return {name: text.plain for name, text in zip(facts.columns[0].cells, facts.columns[1].cells, strict=True)}


def test_killed_run_is_unfinished(run) -> None:
    done = run("rounds=2")
    (done.run_dir / "summary.json").unlink()
    assert RunState.read(done.run_dir).status == "unfinished"
    assert shown(done.run_dir)["status"] == "unfinished (killed)"
    assert shown(done.run_dir)["go on with"] == f"bayesfed resume={done.run_dir}"


def test_what_is_shown_has_names_and_units(run) -> None:
    done = run("rounds=2")
    found, last = shown(done.run_dir), done.rounds[-1]
    assert found["method"] == "bayes_admm on linreg"
    assert (found["status"], found["rounds finished"], found["checkpoint"]) == ("finished", "2 of 2", "after round 2")
    assert found["RMSE at the mean"] == f"{last['mean/rmse']:.4g}"
    assert found["NLL, model-averaged"] == f"{last['bayes/nll']:.4g} nats per example"
    assert found["clients"] == "5 of 5 replied in round 2"
    assert found["time in rounds"].endswith(" s")
    assert "go on with" not in found


def test_point_estimates_have_no_model_average(tmp_path) -> None:
    options = ["experiment=linreg", "strategy=fedavg", "rounds=1", "display=false", "figures=false"]
    found = shown(bayesfed.run([*options, f"hydra.run.dir={tmp_path}/r"]).run_dir)
    assert {"RMSE", "NLL"} <= found.keys()
    assert not any("averaged" in name or "at the mean" in name for name in found)


def test_replies_of_a_round_that_is_not_finished(run) -> None:
    done = run("rounds=3")
    lines = (done.run_dir / "rounds.jsonl").read_text().splitlines(keepends=True)
    (done.run_dir / "rounds.jsonl").write_text("".join(lines[:3]))
    assert RunState.read(done.run_dir).begun == 5
    assert shown(done.run_dir)["rounds finished"] == "2 of 3; 5 replies of round 3 so far"


def test_a_deployed_run_goes_on_by_deploying(run) -> None:
    done = run("rounds=2")
    (done.run_dir / "summary.json").unlink()
    record = {"run_dir": "first", "overrides": ["experiment=linreg", "data.features=[a,b]", "rounds=2"]}
    (done.run_dir / "deployment.json").write_text(json.dumps(record))
    command = "bayesfed deploy SUPERLINK experiment=linreg 'data.features=[a,b]' rounds=2 resume=first"
    assert shown(done.run_dir)["go on with"] == command


def test_names_are_whole_where_output_is_no_terminal(run, tmp_path, capsys) -> None:
    name = "a_name_that_is_" + 6 * "much_" + "too_long_for_a_terminal_of_eighty_columns"
    run("rounds=1", to=name)
    with pytest.raises(SystemExit):
        main(["list", str(tmp_path)])
    assert f" {name} " in capsys.readouterr().out


def test_run_resumed_for_more_rounds_is_unfinished_from_the_start(run) -> None:
    done = run("rounds=2")
    config = done.run_dir / "config.yaml"
    config.write_text(config.read_text().replace("rounds: 2\n", "rounds: 4\n", 1))  # what resuming writes first
    made = RunState.read(done.run_dir)
    assert (made.status, made.round, made.rounds) == ("unfinished", 2, 4)


def test_commands(run, tmp_path, capsys, monkeypatch) -> None:
    monkeypatch.setenv("COLUMNS", "200")
    done = run("rounds=1")
    for words, expected in ((["status", str(done.run_dir)], "bayes_admm on linreg"), (["list", str(tmp_path)], "1/1")):
        with pytest.raises(SystemExit) as stop:
            main(words)
        assert stop.value.code == 0
        assert expected in capsys.readouterr().out
    for words in (["status"], ["status", str(tmp_path)], ["list", str(tmp_path / "none")]):
        with pytest.raises(SystemExit) as stop:
            main(words)
        assert stop.value.code == 2


def test_not_a_run(tmp_path) -> None:
    with pytest.raises(InputError, match="not a run directory"):
        RunState.read(tmp_path)
