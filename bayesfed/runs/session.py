"""One run from checked configuration to summary: what happens around a strategy's rounds."""

from __future__ import annotations

import time
from itertools import count
from logging import ERROR, Handler, LogRecord, getLogger
from pathlib import Path
from typing import Any

from flwr.app import Context
from flwr.serverapp import Grid, ServerApp
from omegaconf import DictConfig

from bayesfed import accelerate
from bayesfed.app import Plain, client_app, device_of, note_unused_partition, plain, problem_of
from bayesfed.configured import build, own_code
from bayesfed.errors import InputError, RunFailed, reason_of
from bayesfed.federation.server.ask import ask
from bayesfed.foreign import plain_text
from bayesfed.problem.flat import FlatModel
from bayesfed.problem.model_check import check_forward
from bayesfed.profiling import span, timed
from bayesfed.runs.checkpoint import Checkpoint
from bayesfed.runs.directory import LOGS, RunDirectory, provenance
from bayesfed.runs.display import Display
from bayesfed.runs.json_log import JsonLog
from bayesfed.runs.loggers import Guarded
from bayesfed.runs.outcome import outcome, worse_than_start
from bayesfed.runs.parts import check_fit, look_at_client
from bayesfed.runs.profile import RunProfile
from bayesfed.runs.recorder import Recorder
from bayesfed.schedule import Schedule
from bayesfed.system import System
from bayesfed.wire import DTYPES

log = getLogger("bayesfed")


class Session:
    """Everything about a run that is neither strategy nor engine.

    Building it loads the data and checks that all parts fit together, so that bad input fails before any work; nothing
    is written until :meth:`open`.

    Attributes:
        workers: how many clients can be served at once; an engine with more than one says so.

    Args:
        cfg: validated configuration.

    Raises:
        InputError: data, model, strategy and client don't fit together.
    """

    def __init__(self, cfg: DictConfig):
        self.cfg = cfg
        self.config: Plain = plain(cfg)
        self.problem = problem_of(self.config)
        note_unused_partition(cfg, self.problem)
        self.strategy = build(cfg.strategy, "strategy", cfg.seed)
        self.strategy.name = cfg.strategy.name
        self.solver = build(cfg.client, "client", cfg.seed)
        look_at_client(self.strategy)
        self.logger = Guarded(build(cfg.logger, "logger", cfg.seed), cfg.logger.name)
        self.num_clients = len(self.problem.clients)
        module = self.problem.build_model(cfg.seed)
        self.num_parameters = sum(p.numel() for p in module.parameters() if p.requires_grad)
        check_fit(cfg, self.strategy, self.solver, self.problem, self.num_parameters)
        self.model = FlatModel(module, DTYPES[cfg.dtype], device_of(self.config))
        check_forward(self.problem, self.model, cfg.seed)
        with own_code("strategy", cfg.strategy["_target_"], "setting it up"):
            self.strategy.setup(self.model.vector, self.num_clients, cfg.seed, cfg.wire, cfg.limits)
        self.strategy.shape = self.problem.shape
        schedule = Schedule.of(cfg)
        self.strategy.lr_factor = lambda round: schedule(round - 1)
        system, sizes = System.of(self.config.get("system")), [len(client) for client in self.problem.clients]
        if system.active:
            self.strategy.fates = lambda clients, round: system.fates(cfg.seed, clients, round, sizes)
        self.recorder = Recorder(cfg, self.problem, self.strategy, self.model, self.logger)
        self.at_end: dict[str, float] = {}  # what probes asked the clients after the last round
        self.started_with: str | None = None  # digest of the data, where the checkpoint that was taken up has it
        self.reason = ""  # what ended the run early
        self.workers = 1

    @property
    def round(self) -> int:
        """The last finished round."""
        return self.recorder.round

    # -- life cycle ---------------------------------------------------------------------------------------------------

    def open(self, directory: RunDirectory, *, resumed: bool) -> None:
        """Attach the run directory; a resumed run takes up the newest checkpoint that it has all rounds of.

        Raises:
            InputError: the directory is damaged; nothing was written.
        """
        self.directory, self._continued = directory, resumed and not directory.fresh
        self.recorder.directory = directory
        if not self._continued:
            return
        lines = {name: directory.lines(name) for name in LOGS}  # what is damaged is found before any is written
        directory.summary()
        rounds = {line["round"] for line in lines["rounds"]}
        complete = next(r for r in count() if r not in rounds) - 1
        checkpoint = Checkpoint.latest(directory.checkpoints, complete)
        try:
            self.started_with = self.recorder.take_up(checkpoint)
        except InputError:
            raise
        except (KeyError, ValueError, TypeError, AttributeError, RuntimeError) as error:
            reason = f"{type(error).__name__}: {plain_text(error)}"
            fix = f"its checkpoint doesn't fit its config.yaml ({reason}); start a new run"
            raise InputError("resume", directory.path, fix) from error

    def client_app(self):
        """The ClientApp of this run, with its sites in the run directory."""
        return client_app(self.config, self.directory.sites)

    def server_app(self) -> ServerApp:
        """The ServerApp of this run."""
        app = ServerApp()

        @app.main()
        def main(grid: Grid, context: Context) -> None:
            self.serve(grid)

        return app

    def serve(self, grid: Grid) -> None:
        """Run all rounds that are left on ``grid``, and write the results, whatever happens.

        Raises:
            KeyboardInterrupt, Exception: what ended the run early, after the summary was written.
        """
        method = f"{self.cfg.strategy.name} ({self.strategy.family})"
        title = f"{method} · {self.problem_name} · {self.num_parameters:,} parameters"
        status, shown = "failed", _Shown()
        started = time.perf_counter()
        structured = JsonLog(self.directory.path / "log.jsonl")
        log.addHandler(structured)
        profile = RunProfile(self.cfg.engine.name, self.workers)
        with accelerate.running(self.cfg.accelerate), Display(
            rounds=self.cfg.rounds, start_round=self.round, clients=self.num_clients, title=title,
            averaged=not self.strategy.posterior.is_point, enabled=self.cfg.display,
        ) as display:  # fmt: skip
            self.recorder.display, self.recorder.profile = display, profile
            try:
                for name in LOGS:  # what the checkpoint does not know of is done again
                    self.directory.truncate(name, self.round if self._continued else -1)
                if self.cfg.display:
                    shown.display, log.propagate = display, False
                    log.addHandler(shown)
                with span("start-up"), span("logger"):
                    self.logger.begin(self.directory.path, self.config)
                accelerate.prepare(self.model)
                if not self.directory.rounds():
                    self.recorder.end_round(0, {})
                if self.round:  # killed between checkpoint and posterior, the file would stay that of an earlier round
                    self.recorder.save_posterior()
                self.recorder.start_clock()
                self.strategy.start(
                    grid, num_rounds=self.cfg.rounds, first_round=self.round + 1, callbacks=self.recorder
                )
                self.at_end = self.recorder.evaluator.at_end(
                    self.round, self.recorder.posterior,
                    lambda samples: ask(self.strategy, grid, self.round, "personalize", {"samples": samples}),
                )  # fmt: skip
                if worse := worse_than_start(self.directory.rounds()):
                    log.warning(worse)
                status = "finished"
            except BaseException as error:
                status, self.reason = status_after(error), reason_of(error)
                if status == "failed":
                    structured.emit(log.makeRecord(log.name, ERROR, "", 0, f"failed: {self.reason}", (), None))
                if isinstance(error, OSError):
                    raise RunFailed(f"{self.directory.path}: {error}") from error
                raise
            finally:
                log.removeHandler(shown)
                log.removeHandler(structured)
                log.propagate = True
                try:
                    self.end(status, time.perf_counter() - started)
                except OSError as error:  # a full disk must not hide what ended the run
                    log.error("the summary can't be written: %s", error)
                measured = profile.write(self.directory.path)
                if measured is not None and status == "finished" and self.cfg.figures:
                    from bayesfed.runs.icicle import draw

                    draw(measured, self.directory.path / "figures" / "profile.png")

    @timed("records")
    def end(self, status: str, seconds: float) -> None:
        """Summary, figures, logger."""
        summary = self.summary(status, seconds)
        self.directory.close()
        self.directory.write_summary(summary)
        if status == "finished" and self.cfg.figures:
            self._figures()
        self.logger.end(summary)

    @timed("figures")
    def _figures(self) -> None:
        bins = self.recorder.evaluator.reliability(self.round, self.recorder.posterior)
        from bayesfed.runs.figures import make_figures  # a run without pictures needs no matplotlib

        make_figures(
            self.directory.path, label_counts=self.problem.label_counts, reliability=bins,
            classes=self.problem.classes, clients=self.problem.client_names,
        )  # fmt: skip

    @property
    def over(self) -> bool:
        """Whether all rounds were done, and the run ended, before this session."""
        return self.round >= self.cfg.rounds and self.directory.summary().get("status") == "finished"

    # -- results -------------------------------------------------------------------------------------------------------

    @property
    def problem_name(self) -> str:
        """Data set and number of clients, for titles."""
        return f"{self.cfg.data.name}, {self.num_clients} clients"

    def summary(self, status: str, seconds: float) -> dict[str, Any]:
        """What ``summary.json`` holds."""
        rounds = self.directory.rounds()
        summary: dict[str, Any] = {
            "method": self.cfg.strategy.name,
            "family": self.strategy.family,
            "client": self.cfg.client.name,
            "seed": self.cfg.seed,
            "rounds": rounds[-1]["round"] if rounds else self.round,
            "status": status,
            **({"reason": self.reason} if status == "failed" else {}),
            "parameters": self.num_parameters,
            "clients": self.num_clients,
            "evaluated_on": self.problem.evaluated_on,
            "data_xxh3": self.recorder.data_digest,
            "wall_clock": seconds,
            "bytes/total": sum(self.recorder.bytes.values()),
            **provenance(),
        }
        return summary | outcome(rounds) | self.recorder.evaluator.in_summary(rounds) | self.at_end


class _Shown(Handler):
    """Shows log records where they don't tear the live display."""

    display: Display

    def emit(self, record: LogRecord) -> None:
        self.display.message(self.format(record))


def status_after(error: BaseException) -> str:
    """The ``status`` in ``summary.json`` of a run that ``error`` ended."""
    return "interrupted" if isinstance(error, KeyboardInterrupt) else "failed"


def resume_session(path: Path) -> Session:
    """A session that goes on with the run in ``path`` as its ``config.yaml`` says (for child processes of the one that
    locked it)."""
    directory = RunDirectory.open(path)
    session = Session(directory.config())
    session.open(directory, resumed=True)
    return session
