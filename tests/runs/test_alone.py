"""One process at a time works on a run, and its directory says which; what a killed one left is no obstacle."""

from __future__ import annotations

import json
import os
import signal
import subprocess
import threading
import time
from contextlib import contextmanager
from pathlib import Path

import pytest

import bayesfed
from bayesfed.commands import override
from bayesfed.errors import InputError
from bayesfed.lock import NAME, alone, holder, locked
from bayesfed.runs.status import RunState, listing, status

LINREG = [
    "experiment=linreg",
    "strategy.family=diagonal",
    "strategy.damping=0.3",
    "eval.samples=2",
    "display=false",
    "figures=false",
]


def contents(path: Path) -> dict[str, bytes]:
    return {str(p.relative_to(path)): p.read_bytes() for p in path.rglob("*") if p.is_file()}


@contextmanager
def another_process(folder: Path, *, child: bool = False):
    """A process that holds the folder's lock until it is killed; its pid. With ``child``, it dies at once and leaves a
    child.
    """
    reader, writer = os.pipe()
    pid = os.fork()
    if pid == 0:
        with alone(folder, "out") as handle:
            mine = os.getpid()
            if child:
                mine = subprocess.Popen(["sleep", "60"], pass_fds=(handle,)).pid
            os.write(writer, f"{mine}\n".encode())
            if not child:
                time.sleep(60)
            os._exit(0)  # as if killed: nothing is released by hand
    held = int(os.read(reader, 20))
    if child:
        os.waitpid(pid, 0)
    try:
        yield held
    finally:
        os.kill(held, signal.SIGKILL)
        if not child:
            os.waitpid(pid, 0)
        for end in (reader, writer):
            os.close(end)


def shown(path: Path) -> dict[str, str]:
    facts = status(path)[0]
    return {name: text.plain for name, text in zip(facts.columns[0].cells, facts.columns[1].cells, strict=True)}


def test_a_second_process_is_refused_and_writes_nothing(run, tmp_path, digest) -> None:
    path = run("rounds=1").run_dir
    with another_process(path) as pid:
        before = contents(path)
        for overrides in (f"resume={path}", "rounds=3"), (*LINREG, f"hydra.run.dir={path}"):
            with pytest.raises(
                InputError, match=rf"another process \(pid {pid} on host .*, since .*\) is at work there"
            ):
                bayesfed.run(overrides)
        assert contents(path) == before
        assert RunState.read(path).status == "running"
        assert shown(path)["status"].startswith(f"running (pid {pid} on host ")
        assert "go on with" not in shown(path)
        assert listing(tmp_path).columns[3]._cells[0].plain == "running"
    (path / "summary.json").unlink()
    assert shown(path)["status"].startswith(f"unfinished (killed; it was pid {pid} on host ")
    bayesfed.run([f"resume={path}", "rounds=3"])
    assert not (path / NAME).exists()
    assert digest(path) == digest(run("rounds=3", to="whole").run_dir)


def test_the_lock_lives_as_long_as_a_child_that_was_given_it(tmp_path) -> None:
    """The flower engine's: killed by force, it leaves a child that still writes."""
    with another_process(tmp_path, child=True):
        found = holder(tmp_path / NAME)
        assert found is not None
        assert found[1]
        with pytest.raises(InputError, match="at work there"), alone(tmp_path, "out"):
            pass
    deadline = time.monotonic() + 10
    while holder(tmp_path / NAME)[1] and time.monotonic() < deadline:
        time.sleep(0.05)
    with alone(tmp_path, "out"):
        pass
    assert list(tmp_path.iterdir()) == []


def test_a_fork_that_ends_leaves_its_parents_lock(tmp_path) -> None:
    with locked(tmp_path / NAME):
        pid = os.fork()
        if pid == 0:
            try:
                raise KeyboardInterrupt  # goes through the context manager in the test below, here through the file
            except KeyboardInterrupt:
                os._exit(0)
        os.waitpid(pid, 0)
        assert holder(tmp_path / NAME)[1]
    holding = locked(tmp_path / NAME)
    holding.__enter__()
    pid = os.fork()
    if pid == 0:
        holding.__exit__(None, None, None)
        os._exit(0)
    os.waitpid(pid, 0)
    assert holder(tmp_path / NAME)[1]
    holding.__exit__(None, None, None)
    assert list(tmp_path.iterdir()) == []


def test_threads_of_one_process_and_new_runs_into_one_folder(tmp_path) -> None:
    """Exactly one of them writes: the others find it at work, or find its run."""
    start, outcomes = threading.Barrier(3), []

    def attempt(seed: int) -> None:
        start.wait()
        try:
            with alone(tmp_path / "run", "hydra.run.dir"):
                outcomes.append(seed)
                time.sleep(1)
        except InputError as error:
            outcomes.append(str(error))

    threads = [threading.Thread(target=attempt, args=(seed,)) for seed in range(3)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join(30)
    refused = [text for text in outcomes if isinstance(text, str)]
    assert len(outcomes) == 3
    assert len(refused) == 2
    assert all(f"pid {os.getpid()} on host" in text for text in refused)


def test_an_exception_releases_the_directory(run, sabotage, mend, tmp_path) -> None:
    def raises(solution):
        raise KeyboardInterrupt

    sabotage(raises, round=2)
    with pytest.raises(KeyboardInterrupt):
        run("rounds=3")
    mend()
    assert not (tmp_path / "run" / NAME).exists()
    assert len(bayesfed.run([f"resume={tmp_path / 'run'}"]).rounds) == 4


def test_what_a_killed_process_was_writing_is_removed_and_nothing_else(run, tmp_path) -> None:
    path = run("rounds=1").run_dir
    ours = [".rounds.jsonl.ab12cd34.partial", ".posterior.safetensors.77.partial", "checkpoint/server-000002.partial",
            "checkpoint/sites/client-00000/round-000002.77-1.partial"]  # fmt: skip
    others = ["notes.partial", ".hidden", "figures.partial"]
    for name in ours + others:
        (path / name).write_text("")
    bayesfed.run([f"resume={path}", "rounds=2"])
    names = {str(entry.relative_to(path)) for entry in path.rglob("*")}
    assert not names.intersection(ours)
    assert set(others) <= names


def test_two_sweeps_in_one_second_have_their_own_folders() -> None:
    from omegaconf import OmegaConf

    from bayesfed.composing import ROOT, conf_dir

    text = OmegaConf.to_container(OmegaConf.load(conf_dir() / f"{ROOT}.yaml").hydra.sweep)["dir"]
    assert text.endswith("%S-%f}")


# -- why a run ended ---------------------------------------------------------------------------------------------------


def test_a_crash_leaves_its_reason_and_goes_on(run, tmp_path, monkeypatch, digest) -> None:
    """Before anything was kept: the same command line would be refused, resuming begins with round 0."""
    from bayesfed.runs.recorder import Recorder

    path = tmp_path / "it's a=b ö"

    def fails(self, round, metrics):
        raise RuntimeError("mean is\nnot a number")

    with monkeypatch.context() as patch:
        patch.setattr(Recorder, "end_round", fails)
        with pytest.raises(RuntimeError):
            bayesfed.run([*LINREG, "rounds=2", override("hydra.run.dir", path)])
    summary = json.loads((path / "summary.json").read_text())
    assert (summary["status"], summary["reason"], summary["rounds"]) == (
        "failed",
        "RuntimeError: mean is\\nnot a number",
        0,
    )
    found = shown(path)
    assert (found["status"], found["reason"]) == ("failed", summary["reason"])
    monkeypatch.chdir("/")
    words = _shell(found["go on with"])
    assert words[0] == "bayesfed"
    assert [line["round"] for line in bayesfed.run(words[1:]).rounds] == [0, 1, 2]
    assert digest(path) == digest(run("rounds=2", "eval.samples=2", to="whole").run_dir)
    assert "reason" not in json.loads((path / "summary.json").read_text())


def _shell(line: str) -> list[str]:
    """What a shell makes of a line."""
    done = subprocess.run(["sh", "-c", f"printf '%s\\0' {line}"], capture_output=True, check=True)
    return done.stdout.decode().split("\0")[:-1]


def test_an_engine_that_cannot_start_is_a_reason_too(run, tmp_path, monkeypatch) -> None:
    from bayesfed.engine.inline import InlineEngine

    def fails(self, session):
        raise InputError("engine.address", "auto", "can't join Ray: nobody there")

    with monkeypatch.context() as patch:
        patch.setattr(InlineEngine, "run", fails)
        with pytest.raises(InputError):
            run("rounds=1")
    assert shown(tmp_path / "run")["reason"] == "engine.address=auto: can't join Ray: nobody there"
    assert len(bayesfed.run([f"resume={tmp_path / 'run'}"]).rounds) == 2


# -- folders -----------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("field", ["hydra.run.dir", "resume"])
def test_long_names(run, tmp_path, field) -> None:
    with pytest.raises(InputError) as refused:
        bayesfed.run([*(LINREG if field != "resume" else []), f"{field}={tmp_path / ('n' * 300)}"])
    assert refused.value.field == field
    for use in (lambda p: status(p), listing, bayesfed.load):
        with pytest.raises(InputError):
            use(tmp_path / ("n" * 300))


def test_folders_that_cannot_be_written(tmp_path, monkeypatch) -> None:
    """Tests may run as root, whom no permission stops: the system call refuses."""
    from bayesfed.compare.command import compare
    from bayesfed.splits.command import partition

    def refuse(*args, **kwargs):
        raise PermissionError(13, "Permission denied")

    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr(Path, "mkdir", refuse)
    starts = (
        lambda: bayesfed.run(LINREG),
        lambda: compare(["experiment=linreg", "client=sgd,adam", "strategy=fedavg", "rounds=1", "budget=none"]),
        lambda: partition(["experiment=linreg"]),
    )
    for start in starts:
        with pytest.raises(InputError, match=r"can't be written \(Permission denied\)$"):
            start()
    assert list(tmp_path.iterdir()) == []
