"""One run of a comparison in a process of its own, which never outlives the comparison."""

from __future__ import annotations

import os
import shutil
import signal
import sys
import threading
import time
from collections.abc import Sequence
from multiprocessing.connection import Connection
from pathlib import Path

from bayesfed import accelerate
from bayesfed.app import Plain, plain
from bayesfed.checksum import data_digest
from bayesfed.compare.grid import digest
from bayesfed.config import compose_config
from bayesfed.errors import InputError, RunFailed
from bayesfed.lock import NAME, alone
from bayesfed.runs.directory import RunDirectory
from bayesfed.runs.launch import run_config

PATIENCE = 20.0  # seconds an interrupted run has to write its summary


def work(
    overrides: Sequence[str],
    directory: Path,
    log: Path,
    lifeline: Connection,
    answer: Connection,
    environment: dict[str, str],
) -> None:
    """Run ``overrides`` in ``directory``, or go on with what is there, and send ``(status, reason)``.

    The process ends when the other end of ``lifeline`` is gone: a comparison killed by force leaves no run behind.

    Args:
        overrides: of the run, without its directory.
        directory: the run directory.
        log: takes what the run prints.
        lifeline: nothing is ever sent on it.
        answer: where the outcome goes.
        environment: environment variables of the command.
    """
    os.environ.update(environment)
    _print_to(log)
    _end_gently()
    threading.Thread(target=_watch, args=(lifeline,), daemon=True).start()
    try:
        _run(overrides, directory)
        outcome = ("finished", "")
    except KeyboardInterrupt:
        outcome = ("interrupted", "")
    except (InputError, RunFailed) as error:
        outcome = ("failed", str(error))
    except Exception as error:  # whatever it is, the other runs go on
        import traceback

        traceback.print_exc()
        outcome = ("failed", f"{type(error).__name__}: {error}")
    answer.send(outcome)


def finished(directory: Path, config: Plain) -> bool:
    """Whether ``directory`` holds a finished run with this (plain) configuration.

    Raises:
        InputError: it holds a run with another configuration, or on other data.
    """
    run = RunDirectory(directory)
    if not run.is_run:
        return False
    if digest(plain(run.config())) != digest(config):
        fix = "was made with another configuration; move it away or choose another folder"
        raise InputError("out", directory, fix)
    summary = run.summary()
    if summary.get("data_xxh3") not in (None, data_digest(config["data"].get("path"))):
        raise InputError("out", directory, "was made with other data than data.path holds now; choose another folder")
    return summary.get("status") == "finished" and summary.get("rounds") == config["rounds"]


def _run(overrides: Sequence[str], directory: Path) -> None:
    """Run, or go on; a run whose comparison was just killed, and that still works on the directory, is waited for."""
    began, patience = time.perf_counter(), 2 * PATIENCE
    quiet = [*overrides, "display=false"]
    if directory.exists() and not RunDirectory(directory).resumable:  # killed before its first checkpoint
        with alone(directory, "out", patience):
            for left in directory.iterdir():
                if left.name != NAME:
                    shutil.rmtree(left) if left.is_dir() else left.unlink()
    if RunDirectory(directory).is_run:
        cfg, given = compose_config(quiet), []
        cfg.resume = str(directory)
    else:
        cfg, given = compose_config(quiet, str(directory)), quiet
    accelerate.start(cfg.accelerate)  # a process of bayesfed's own
    run_config(cfg, given, began, patience)


def _print_to(log: Path) -> None:
    log.parent.mkdir(parents=True, exist_ok=True)
    with log.open("a") as file:
        for stream in filter(None, (sys.stdout, sys.stderr)):
            stream.flush()
        os.dup2(file.fileno(), 1)
        os.dup2(file.fileno(), 2)


def _end_gently() -> None:
    def stop(signum: int, frame: object) -> None:
        for number in (signal.SIGINT, signal.SIGTERM):  # once is enough: the summary is being written
            signal.signal(number, signal.SIG_IGN)
        raise KeyboardInterrupt

    for number in (signal.SIGINT, signal.SIGTERM):
        signal.signal(number, stop)


def _watch(lifeline: Connection) -> None:
    try:
        lifeline.recv()
    except (EOFError, OSError):
        os.kill(os.getpid(), signal.SIGTERM)
        time.sleep(PATIENCE)
        os._exit(130)
