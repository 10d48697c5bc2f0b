"""Several runs side by side, each in a process of its own; what is finished is not run again."""

from __future__ import annotations

import multiprocessing
import os
import sys
import time
from collections import deque
from collections.abc import Sequence
from dataclasses import dataclass
from multiprocessing.connection import Connection, wait
from multiprocessing.process import BaseProcess
from pathlib import Path

from rich.console import Console
from rich.progress import BarColumn, MofNCompleteColumn, Progress, TaskID, TextColumn, TimeElapsedColumn

from bayesfed.app import plain
from bayesfed.compare.child import PATIENCE, finished, work
from bayesfed.compare.grid import Run
from bayesfed.host import cores

POLL = 0.3  # seconds between looks at the runs' progress


@dataclass(frozen=True)
class Outcome:
    """How a run ended.

    Attributes:
        run: the run.
        directory: its run directory.
        status: ``finished``, ``failed`` or ``interrupted``.
        reason: why it failed.
        skipped: it had been finished before.
    """

    run: Run
    directory: Path
    status: str
    reason: str = ""
    skipped: bool = False


@dataclass
class _Active:
    """A run under way."""

    run: Run
    process: BaseProcess
    lifeline: Connection
    answer: Connection
    task: TaskID


def default_jobs(runs: Sequence[Run]) -> int:
    """One run a core; one at a time where an engine uses all cores itself."""
    if any(run.cfg.engine.name != "inline" for run in runs):
        return 1
    return cores()


class Runner:
    """Runs lists of runs below ``folder``.

    Args:
        folder: run directories go here, by name; logs beside it into ``logs``.
        jobs: runs at once.
        console: for the progress display; plain lines where it is no terminal.
    """

    def __init__(self, folder: Path, jobs: int, console: Console | None = None):
        self.folder, self.jobs = folder, jobs
        self.logs = folder.parent / "logs" / folder.name
        self.console = console or Console(stderr=True)
        self._context = multiprocessing.get_context("forkserver")
        # imported once: each run is forked from a process that has all modules, and trained nothing
        self._context.set_forkserver_preload(["bayesfed.compare.child", "bayesfed.runs.session"])

    def run(self, runs: Sequence[Run], title: str = "runs") -> list[Outcome]:
        """Run what is not finished; outcomes in the order of ``runs``.

        Raises:
            KeyboardInterrupt: interrupted; the runs under way were told to stop, and can be resumed.
        """
        outcomes: dict[str, Outcome] = {}
        waiting: deque[Run] = deque()
        for run in runs:
            directory = self.folder / run.name
            if finished(directory, plain(run.cfg)):
                outcomes[run.name] = Outcome(run, directory, "finished", skipped=True)
            else:
                waiting.append(run)
        self.folder.mkdir(parents=True, exist_ok=True)
        active: list[_Active] = []
        with self._progress() as progress:
            total = progress.add_task(title, total=len(runs), completed=len(outcomes), unit="runs")
            try:
                while waiting or active:
                    while waiting and len(active) < self.jobs:
                        active.append(self._start(waiting.popleft(), progress))
                    wait([item.process.sentinel for item in active], timeout=POLL)
                    for item in list(active):
                        progress.update(item.task, completed=_rounds(self.folder / item.run.name))
                        if not item.process.is_alive():
                            active.remove(item)
                            outcome = self._collect(item)
                            outcomes[item.run.name] = outcome
                            progress.remove_task(item.task)
                            progress.update(total, advance=1)
                            self._say(outcome, len(outcomes), len(runs))
            finally:
                _stop(active)
        return [outcomes[run.name] for run in runs]

    def _start(self, run: Run, progress: Progress) -> _Active:
        held, lifeline = self._context.Pipe()
        receiver, answer = self._context.Pipe(duplex=False)
        arguments = (
            run.overrides, self.folder / run.name, self.logs / f"{run.name}.log", lifeline, answer, dict(os.environ),
        )  # fmt: skip
        process = self._context.Process(target=work, args=arguments, name=run.name)
        process.start()
        lifeline.close()
        answer.close()
        task = progress.add_task(f"  {run.method}, seed {run.seed}", total=run.cfg.rounds, unit="rounds")
        return _Active(run, process, held, receiver, task)

    def _collect(self, item: _Active) -> Outcome:
        item.process.join()
        try:
            status, reason = item.answer.recv()
        except (EOFError, OSError):
            status, reason = "failed", f"its process ended with code {item.process.exitcode}"
        item.lifeline.close()
        item.answer.close()
        return Outcome(item.run, self.folder / item.run.name, status, reason.splitlines()[0] if reason else "")

    def _progress(self) -> Progress:
        return Progress(
            TextColumn("{task.description}"), BarColumn(), MofNCompleteColumn(), TextColumn("{task.fields[unit]}"),
            TimeElapsedColumn(), console=self.console, transient=True, disable=not self.console.is_terminal,
        )  # fmt: skip

    def _say(self, outcome: Outcome, done: int, total: int) -> None:
        run = outcome.run
        text = f"[{done}/{total}] {run.setting}, {run.method}, seed {run.seed}: {outcome.status}"
        self.console.print(text + (f": {outcome.reason}" if outcome.reason else ""), markup=False, highlight=False)


def _rounds(directory: Path) -> int:
    """Rounds done, from the lines of ``rounds.jsonl`` (the first is before training)."""
    try:
        return max((directory / "rounds.jsonl").read_bytes().count(b"\n") - 1, 0)
    except OSError:
        return 0


def _stop(active: Sequence[_Active]) -> None:
    """Interrupt runs, wait while they write their summaries, then kill what is left."""
    for item in active:
        item.process.terminate()
    deadline = time.monotonic() + PATIENCE
    for item in active:
        item.process.join(max(deadline - time.monotonic(), 0.1))
        if item.process.is_alive():
            item.process.kill()
            item.process.join()
    if active:
        print(f"{len(active)} runs stopped; they can be resumed", file=sys.stderr)
