"""Weights & Biases without a key: offline, into the run directory."""

from __future__ import annotations

import socket
import time

import pytest

from bayesfed.errors import InputError
from bayesfed.runs import loggers


def test_nothing_is_logged_by_default(run):
    assert not (run("rounds=1").run_dir / "wandb").exists()


@pytest.fixture
def no_key(monkeypatch, tmp_path):
    monkeypatch.delenv("WANDB_API_KEY", raising=False)
    monkeypatch.delenv("WANDB_MODE", raising=False)
    monkeypatch.setenv("HOME", str(tmp_path / "home"))
    (tmp_path / "home").mkdir()


def test_offline_without_a_key(run, no_key, monkeypatch):
    pytest.importorskip("wandb")
    connect = socket.socket.connect

    def local_only(self, address):
        assert self.family == socket.AF_UNIX or address[0] in ("127.0.0.1", "::1", "localhost"), (
            f"connects to {address}"
        )
        return connect(self, address)

    monkeypatch.setattr(socket.socket, "connect", local_only)
    result = run("rounds=2", "logger=wandb")
    assert result.summary["status"] == "finished"
    (folder,) = (result.run_dir / "wandb").glob("offline-run-*")
    (log,) = folder.glob("*.wandb")
    deadline = time.monotonic() + 20
    while b"finished" not in log.read_bytes():  # wandb's own process writes it, a moment later
        assert time.monotonic() < deadline
        time.sleep(0.05)
    assert b"mean/nll" in log.read_bytes()
    assert (result.run_dir / "wandb" / "id").read_text() in log.name


def test_a_key_means_online(no_key, monkeypatch):
    assert not loggers._has_key()
    monkeypatch.setenv("WANDB_API_KEY", "0" * 40)
    assert loggers._has_key()


def test_bad_mode():
    with pytest.raises(InputError, match=r"mode=onlin: did you mean 'online'"):
        loggers.WandbLogger(mode="onlin")


# -- wandb's environment -----------------------------------------------------------------------------------------------


@pytest.fixture
def started(monkeypatch, tmp_path):
    """What ``wandb.init`` is called with; ``fail`` holds the errors of the first calls."""
    wandb = pytest.importorskip("wandb")
    calls: list[dict] = []
    fail: list[Exception] = []

    class Wandb:
        def __init__(self, mode: str | None):
            self.offline, self.steps, self.summary = mode == "offline", [], {}

        def log(self, numbers, step):
            self.steps.append(step)

        def finish(self, exit_code):
            pass

    def init(**arguments):
        calls.append(arguments)
        if fail:
            raise fail.pop(0)
        made.append(Wandb(arguments["mode"] or loggers.os.environ.get("WANDB_MODE")))
        return made[-1]

    made: list[Wandb] = []
    monkeypatch.setattr(wandb, "init", init)
    for name in [name for name in loggers.os.environ if name.startswith("WANDB_")]:
        monkeypatch.delenv(name)
    return calls, fail, made


@pytest.mark.parametrize(
    ("key", "variable", "value", "ours"),
    [
        ("project", "WANDB_PROJECT", "theirs", "bayesfed"),
        ("mode", "WANDB_MODE", "offline", "offline"),
        ("mode", "WANDB_MODE", "disabled", "offline"),
        ("name", "WANDB_NAME", "theirs", "run"),
        ("group", "WANDB_RUN_GROUP", "theirs", None),
        ("dir", "WANDB_DIR", "/theirs", "run"),
    ],
)
def test_the_environment_holds_unless_our_key_is_set(
    started, no_key, monkeypatch, tmp_path, key, variable, value, ours
):
    run_dir = tmp_path / "run"
    loggers.WandbLogger().begin(run_dir, {})
    monkeypatch.setenv(variable, value)
    loggers.WandbLogger().begin(run_dir, {})
    without, left = (call[key] for call in started[0])
    assert without == (str(run_dir) if key == "dir" else ours)
    assert left is None  # wandb reads the variable
    if key in ("project", "group", "mode"):
        asked = "online" if key == "mode" else "mine"
        loggers.WandbLogger(**{key: asked}).begin(run_dir, {})
        assert started[0][-1][key] == asked


def test_a_key_and_offline_in_the_environment_is_offline(started, no_key, monkeypatch, tmp_path):
    monkeypatch.setenv("WANDB_API_KEY", "a" * 40)
    monkeypatch.setenv("WANDB_MODE", "offline")
    loggers.WandbLogger().begin(tmp_path / "run", {})
    assert (started[0][0]["mode"], started[0][0]["resume"]) == (None, None)


def test_offline_where_wandb_cant_be_reached(started, run, monkeypatch):
    import wandb

    monkeypatch.setenv("WANDB_API_KEY", "a" * 40)
    started[1].append(wandb.errors.CommError("no such host"))
    result = run("rounds=2", "logger=wandb")
    online, offline = started[0]
    assert (online["mode"], online["resume"], offline["mode"], offline["resume"]) == (None, "allow", "offline", None)
    assert online["id"] != offline["id"] == (result.run_dir / "wandb" / "id").read_text()
    assert online["settings"].init_timeout == loggers.PATIENCE
    assert started[2][0].steps == [0, 1, 2]
    (line,) = (result.run_dir / "log.jsonl").read_text().splitlines()
    assert "no such host" in line


def test_a_resumed_offline_run_holds_all_rounds_under_one_id(started, run, no_key):
    first = run("rounds=2", "logger=wandb")
    run(f"resume={first.run_dir}", "rounds=4")
    assert [one.steps for one in started[2]] == [[0, 1, 2], [0, 1, 2, 3, 4]]
    assert started[0][0]["id"] == started[0][1]["id"]
    assert started[0][0]["name"] == started[0][1]["name"]


class Faulty(loggers.NoLogger):
    """Somebody's own logger, which fails."""

    def __init__(self, when: str = "begin"):
        self.when = when

    def begin(self, run_dir, config):
        self._maybe("begin")

    def log(self, record):
        if record["round"] == 1:
            self._maybe("log")

    def end(self, summary):
        self._maybe("end")

    def _maybe(self, method):
        if self.when == method:
            raise OSError("no room in the cloud")


@pytest.mark.parametrize("when", ["begin", "log", "end"])
def test_a_logger_that_fails_never_ends_a_run(run, digest, monkeypatch, when):
    quiet = digest(run("rounds=2", to="quiet").run_dir)
    monkeypatch.setattr("bayesfed.runs.session.Guarded", lambda logger, name: loggers.Guarded(Faulty(when), name))
    result = run("rounds=2", to="logged")
    assert result.summary["status"] == "finished"
    assert digest(result.run_dir) == quiet
    (line,) = (result.run_dir / "log.jsonl").read_text().splitlines() if when != "end" else ["no room in the cloud"]
    assert "no room in the cloud" in line


def test_an_interruption_in_a_logger_is_one(run):
    logger = loggers.Guarded(loggers.NoLogger(), "mine")
    logger._logger.log = lambda record: (_ for _ in ()).throw(KeyboardInterrupt)
    with pytest.raises(KeyboardInterrupt):
        logger.log({"round": 1})


@pytest.mark.parametrize("trouble", ["folder", "no home"])
def test_a_netrc_that_cant_be_read_is_no_key(no_key, monkeypatch, tmp_path, trouble):
    if trouble == "folder":
        (tmp_path / "home" / ".netrc").mkdir()
    else:
        monkeypatch.setattr(loggers.Path, "home", lambda: (_ for _ in ()).throw(RuntimeError("no home")))
    monkeypatch.delenv("NETRC", raising=False)
    assert not loggers._has_key()


def test_jobs_of_a_sweep_are_named_by_what_was_swept(tmp_path):
    (tmp_path / "sweep" / "3").mkdir(parents=True)
    text = "hydra:\n  overrides:\n    task: [rounds=2, 'seed=1,2', 'strategy=fedavg,pvi', 'client.lr=0.1,0.2']\n"
    (tmp_path / "sweep" / "multirun.yaml").write_text(text)
    config = {"rounds": 2, "seed": 2, "strategy": {"name": "pvi", "rho": 1}, "client": {"lr": 0.1}}
    assert loggers.sweep_job(tmp_path / "sweep" / "3", config) == ("3 seed=2,strategy=pvi,client.lr=0.1", "sweep")
    assert loggers.sweep_job(tmp_path / "sweep", config) == ("sweep", None)
