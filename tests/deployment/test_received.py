"""What a client takes over from a run, and what it does not."""

from __future__ import annotations

import json
import subprocess
import sys

import pytest
from flwr.app import Context, RecordDict

from bayesfed.deployment import command
from bayesfed.deployment.apps import client_config, server, session_of
from bayesfed.deployment.command import deploy, run_config
from bayesfed.deployment.received import experiment_key, for_client
from bayesfed.errors import InputError


@pytest.fixture(autouse=True)
def tracebacks_as_before(monkeypatch):
    """The server app cuts them for its own process; here later tests live in it."""
    monkeypatch.setattr(sys, "tracebacklimit", 1000, raising=False)


def context(run_config: dict, node_config: dict | None = None) -> Context:
    return Context(run_id=7, node_id=1, node_config=node_config or {}, state=RecordDict(), run_config=run_config)


@pytest.mark.parametrize(
    "override",
    [
        "client._target_=os.system", "+strategy._target_=subprocess.Popen",
        "client={_target_:os.system,name:ivon}", "+tuned.ivon={lr:1}", "+model.hidden=[{_target_:os.system}]",
        "client.lr=${oc.env:HOME}", "data.path=${oc.env:HOME}", "+data@client=npz",
    ],
)  # fmt: skip
def test_class_names_are_not_taken_from_a_run(override: str) -> None:
    with pytest.raises(InputError, match="a client"):
        for_client(["experiment=linreg", override])
    with pytest.raises(InputError):
        client_config(context({"overrides": f"experiment=linreg '{override}'"}))


def test_what_concerns_the_server_alone_stays_there() -> None:
    given = [
        "experiment=linreg",
        "client.lr=0.1",
        "data.path=/etc/passwd",
        "engine=ray",
        "logger=wandb",
        "eval.samples=2",
        "eval.validation=0.1",
        "hydra.run.dir=/x",
        "hydra.searchpath=[/evil]",
        "checkpoint.every=2",
        "rounds=3",
        "device=cuda",
        "resume=/y",
        "display=false",
    ]
    assert for_client(given) == ["experiment=linreg", "client.lr=0.1", "eval.validation=0.1", "rounds=3"]


def test_the_node_says_where_its_data_lie() -> None:
    run = {"overrides": "data=npz data.path=/etc/passwd model=linear likelihood=gaussian partition=iid"}
    config = client_config(context(run, {"data-path": "/mine.npz", "partition-id": 2, "device": "cpu"}))
    assert (config["data"]["path"], config["own_client"], config["device"]) == ("/mine.npz", 2, "cpu")
    assert client_config(context(run))["data"]["path"] is None


def test_sites_of_two_runs_do_not_meet_but_those_of_a_resumed_one_do() -> None:
    first = client_config(context({"overrides": "experiment=linreg rounds=3"}))
    longer = client_config(context({"overrides": "experiment=linreg rounds=5"}))
    other = client_config(context({"overrides": "experiment=linreg seed=9"}))
    assert experiment_key(first, "a") == experiment_key(longer, "a")
    assert len({experiment_key(c, run) for c in (first, other) for run in ("a", "b")}) == 4


def test_run_configuration_of_the_command() -> None:
    made = run_config(["experiment=linreg", "strategy.rho=0.5", "hydra.run.dir=here"])
    assert made == {"overrides": "experiment=linreg strategy.rho=0.5", "run-dir": "here", "resume": False}
    assert run_config(["experiment=linreg", "resume=here"])["resume"] is True
    for bad in (["strategi=x"], ["hydra.run.dir=a", "resume=b"], ["handler=os.system"]):
        with pytest.raises(InputError):
            run_config(bad)


def test_words_of_the_command() -> None:
    for words, reason in (
        (["local", "--rounds", "3"], "takes no options"),
        ([], "name a connection"),
        (["rounds=3"], "name a connection"),
    ):
        with pytest.raises(InputError, match=reason):
            deploy(words)


def test_why_the_superlink_took_no_run(capsys, monkeypatch) -> None:
    said = '{"success": false, "error-message": "\\nconnection \'nowhere\' not found"}'
    monkeypatch.setattr(command, "_flwr", lambda *words: subprocess.CompletedProcess(words, 1, said, ""))
    assert deploy(["nowhere", "experiment=linreg"]) == 1
    assert capsys.readouterr().err == "failed: the SuperLink took no run\nconnection 'nowhere' not found\n"


def test_server_session(tmp_path, monkeypatch, caplog) -> None:
    caplog.set_level("INFO", "bayesfed")  # as the app does, for this test only
    monkeypatch.setenv("BAYESFED_RUNS", str(tmp_path))
    text = "experiment=linreg rounds=1 figures=false"
    with session_of(context({"overrides": text})) as session:
        assert session.directory.path == tmp_path / "7"
        recorded = json.loads((tmp_path / "7" / "deployment.json").read_text())
        assert recorded == {"run_dir": "7", "overrides": text.split()}
        session.strategy.ledger.accepted = {0: 1}
        for session.recorder.round in (0, 1):
            session.directory.append("rounds", {"round": session.round})
        session.recorder.checkpoint()
        with pytest.raises(InputError, match=r"another process .* is at work there"):
            server(None, context({"overrides": text}))
    monkeypatch.setattr(sys, "tracebacklimit", 1000, raising=False)
    with pytest.raises(InputError, match="already holds a run"):
        server(None, context({"overrides": text}))
    assert sys.tracebacklimit == 0  # Flower prints what went wrong in one line
    with (
        pytest.raises(InputError, match="strategy"),
        session_of(context({"overrides": text + " strategy.rho=0.123", "run-dir": "7", "resume": True})),
    ):
        pass
    with session_of(
        context({"overrides": "experiment=linreg rounds=4 figures=false", "run-dir": "7", "resume": True})
    ) as longer:
        assert (longer.round, longer.cfg.rounds, longer.strategy.ledger.accepted) == (1, 4, {0: 1})
    assert "rounds=4" in json.loads((tmp_path / "7" / "deployment.json").read_text())["overrides"]
