"""``bayesfed status`` and ``list``, and the structured log."""

from __future__ import annotations

import json

import pytest

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


def test_killed_run_is_unfinished(run) -> None:
    done = run("rounds=2")
    (done.run_dir / "summary.json").unlink()
    assert RunState.read(done.run_dir).status == "unfinished"


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
