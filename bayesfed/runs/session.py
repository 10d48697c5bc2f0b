"""One run from checked configuration to summary: what happens around a strategy's rounds."""

from __future__ import annotations

import math
import time
from functools import cached_property
from itertools import count
from logging import ERROR, Handler, LogRecord, getLogger
from pathlib import Path
from typing import Any

import psutil
from flwr.app import Context
from flwr.serverapp import Grid, ServerApp
from omegaconf import DictConfig

from bayesfed.accelerate.arithmetic import arithmetic
from bayesfed.app import Plain, client_app, device_of, note_unused_partition, plain, problem_of
from bayesfed.checksum import data_digest
from bayesfed.errors import InputError, RunFailed, reason_of
from bayesfed.evaluation.predictive import noise_precision
from bayesfed.federation.server.personalize import personalize
from bayesfed.foreign import plain_text
from bayesfed.groups import build
from bayesfed.problem.flat import FlatModel
from bayesfed.problem.model_check import check_forward
from bayesfed.profiling import span, timed
from bayesfed.runs.checkpoint import Checkpoint
from bayesfed.runs.directory import LOGS, RunDirectory, provenance
from bayesfed.runs.display import Display
from bayesfed.runs.evaluator import Evaluator
from bayesfed.runs.figures import make_figures
from bayesfed.runs.icicle import draw
from bayesfed.runs.json_log import JsonLog
from bayesfed.runs.loggers import Guarded
from bayesfed.runs.parts import look_at_client, own_code
from bayesfed.runs.posterior_file import save_posterior
from bayesfed.runs.profile import RunProfile
from bayesfed.runs.targets import to_targets, worse_than_start
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
        self._check()
        check_forward(self.problem, cfg.seed, DTYPES[cfg.dtype], device_of(self.config))
        self.model = FlatModel(module, DTYPES[cfg.dtype], device_of(self.config))
        with own_code("strategy", cfg.strategy["_target_"], "setting it up"):
            self.strategy.setup(self.model.vector, self.num_clients, cfg.seed, cfg.wire, cfg.limits)
        self.strategy.shape = self.problem.shape
        schedule = Schedule.of(cfg)
        self.strategy.lr_factor = lambda round: schedule(round - 1)
        system, sizes = System.of(self.config.get("system")), [len(client) for client in self.problem.clients]
        if system.active:
            self.strategy.fates = lambda clients, round: system.fates(cfg.seed, clients, round, sizes)
        self.directory: RunDirectory
        self.evaluator = Evaluator(
            cfg, self.problem, self.model, lambda line: self.directory.append("client_tests", line),
            lambda draw, draws: self.display.evaluating(draw, draws),
        )  # fmt: skip
        self.personalized: dict[str, float] = {}
        self.started_with: str | None = None  # digest of the data, where the checkpoint that was taken up has it
        self.reason = ""  # what ended the run early
        self.workers = 1
        self.round = 0
        self.seconds = 0.0
        self.bytes = {"bytes/down": 0.0, "bytes/up": 0.0}
        self.gradients = 0.0  # evaluated by accepted clients; nan if one of them did not count

    def _check(self) -> None:
        family, client = self.strategy.family, self.cfg.client.name
        if family not in self.solver.families:
            learns = ", ".join(sorted(self.solver.families))
            fix = f"solves for these families: {learns}; strategy={self.cfg.strategy.name} has family {family}"
            raise InputError("client", client, fix)
        for ability in sorted(frozenset(self.strategy.asks) & self.solver.lacks.keys(), reverse=True):
            raise self.solver.refusal(ability, client, f"strategy={self.cfg.strategy.name}")
        with own_code("client", self.cfg.client["_target_"], "its check"):
            self.solver.check(self.cfg.model.name, self.cfg.likelihood.name)
        noise_precision(self.problem.likelihood)  # or there is no way to evaluate
        stragglers = System.of(self.config.get("system")).stragglers
        if stragglers and not self.solver.stepwise:
            fix = f"client={client} solves its problem in closed form: there are no steps to leave out; use another client"
            raise InputError("system.stragglers", stragglers, fix)
        if family == "full":
            matrix = 8 * self.num_parameters**2
            free = psutil.virtual_memory().available
            if 8 * matrix > free:  # server: posterior, prior, sums; client: Hessian, factor, work space
                raise InputError(
                    "strategy.family",
                    family,
                    f"the model has {self.num_parameters:,} parameters: one precision matrix takes {matrix / 1e9:.1f} GB and a run "
                    f"about {8 * matrix / 1e9:.0f} GB, {free / 1e9:.0f} GB are free; use family=diagonal or a smaller model",
                )

    # -- life cycle ---------------------------------------------------------------------------------------------------

    def open(self, directory: RunDirectory, *, resumed: bool) -> None:
        """Attach the run directory; a resumed run takes up the newest checkpoint that it has all rounds of.

        Raises:
            InputError: the directory is damaged; nothing was written.
        """
        self.directory, self._continued = directory, resumed and not directory.fresh
        if not self._continued:
            return
        lines = {name: directory.lines(name) for name in LOGS}  # what is damaged is found before any is written
        directory.summary()
        rounds = {line["round"] for line in lines["rounds"]}
        complete = next(r for r in count() if r not in rounds) - 1
        checkpoint = Checkpoint.latest(directory.checkpoints, complete)
        try:
            self._take_up(checkpoint)
        except InputError:
            raise
        except (KeyError, ValueError, TypeError, AttributeError, RuntimeError) as error:
            fix = f"its checkpoint doesn't fit its config.yaml ({type(error).__name__}: {plain_text(error)}); start a new run"
            raise InputError("resume", directory.path, fix) from error

    def _take_up(self, checkpoint: Checkpoint) -> None:
        self.started_with = checkpoint.state.get("data")
        if self.started_with not in (None, self.data_digest):
            raise InputError("data.path", self.cfg.data.path, "holds other data than those this run was started with")
        self.strategy.load_state(checkpoint.tensors, checkpoint.state)
        self.round, self.seconds = checkpoint.round, checkpoint.state["seconds"]
        self.bytes = checkpoint.state["bytes"]
        self.gradients = checkpoint.state.get("gradients", math.nan)

    @cached_property
    def data_digest(self) -> str | None:
        """Of the file or folder that ``data.path`` names; None if it names none."""
        return data_digest(self.cfg.data.get("path"))

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
        title = f"{self.cfg.strategy.name} ({self.strategy.family}) · {self.problem_name} · {self.num_parameters:,} parameters"
        status, shown = "failed", _Shown()
        started = time.perf_counter()
        structured = JsonLog(self.directory.path / "log.jsonl")
        log.addHandler(structured)
        self.profile = RunProfile(self.cfg.engine.name, self.workers)
        with arithmetic(), Display(
            rounds=self.cfg.rounds, start_round=self.round, clients=self.num_clients, title=title,
            averaged=self.strategy.family != "point", enabled=self.cfg.display,
        ) as self.display:  # fmt: skip
            try:
                for name in LOGS:  # what the checkpoint does not know of is done again
                    self.directory.truncate(name, self.round if self._continued else -1)
                if self.cfg.display:
                    shown.display, log.propagate = self.display, False
                    log.addHandler(shown)
                with span("start-up"), span("logger"):
                    self.logger.begin(self.directory.path, self.config)
                if not self.directory.rounds():
                    self._finish_round(0, {})
                if self.round:  # killed between checkpoint and posterior, the file would stay that of an earlier round
                    self._save_posterior()
                self._clock = time.perf_counter()
                self.strategy.start(grid, num_rounds=self.cfg.rounds, first_round=self.round + 1, callbacks=self)
                if self.cfg.eval.get("personalized"):
                    answers = personalize(self.strategy, grid, self.round, self.cfg.eval.samples)
                    kind = "mean" if self.strategy.family == "point" else "bayes"
                    self.personalized = self.evaluator.personalized(self.round, answers, kind)
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
                profile = self.profile.write(self.directory.path)
                if profile is not None and status == "finished" and self.cfg.figures:
                    draw(profile, self.directory.path / "figures" / "profile.png")

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
        bins = None
        if self.problem.num_classes:
            bins = self.evaluator.reliability(self.round, self._posterior)
        make_figures(
            self.directory.path, label_counts=self.problem.label_counts, reliability=bins,
            classes=self.problem.classes, clients=self.problem.client_names,
        )  # fmt: skip

    # -- callbacks of the strategy --------------------------------------------------------------------------------------

    def begin_round(self, round: int, sampled: list[int]) -> None:
        """Show it."""
        self.display.begin_round(round, len(sampled))

    @timed("reply")
    def client_done(self, round: int, client: int, metrics: dict[str, float] | None, reason: str) -> None:
        """A line in ``clients.jsonl``."""
        self.display.client_done(round, client, metrics is not None)
        record: dict[str, Any] = {
            "round": round,
            "client": client,
            **self.problem.named(client),
            "accepted": metrics is not None,
        }
        record.update(metrics if metrics is not None else {"reason": reason})
        self.directory.append("clients", record)
        self.profile.client_done(record)
        if metrics is not None:
            self.gradients += metrics.get("gradient-evaluations", math.nan)

    def end_round(self, round: int, metrics: dict[str, float]) -> None:
        """Evaluate, record, checkpoint, show."""
        self._finish_round(round, metrics)

    def _finish_round(self, round: int, metrics: dict[str, float]) -> None:
        trained = time.perf_counter()
        evaluation = self.evaluator.after_round(round, self._posterior)
        record: dict[str, Any] = {"round": round, **evaluation, **metrics}
        if self.strategy.family != "point":
            low, mean, high = self.strategy.posterior.precision_summary()
            record |= {
                "posterior/precision_min": low, "posterior/precision_mean": mean, "posterior/precision_max": high,
            }  # fmt: skip
        if round > 0:
            now = time.perf_counter()
            record["seconds/round"] = now - self._clock
            record["seconds/train"] = trained - self._clock
            self.seconds += now - self._clock
            self._clock = now
        record["seconds/total"] = self.seconds
        record["gradients/total"] = self.gradients
        for key in self.bytes:
            self.bytes[key] += metrics.get(key, 0)
        self.round = round
        self._record(record)

    @timed("records")
    def _record(self, record: dict[str, Any]) -> None:
        """Append the round's line, write the checkpoint and the posterior, show and log it."""
        round = self.round
        # the line comes first: a checkpoint without its line would leave a gap that no resume fills
        self.directory.append("rounds", record)
        every = self.cfg.checkpoint.every
        last = round == self.cfg.rounds
        if last or (every and round % every == 0):
            if every:
                self._checkpoint()
            self._save_posterior()
        self.logger.log(record)
        self.display.end_round(record)
        if round:  # what a deployed run, which has no display, says of itself
            replied, sampled, seconds = (record[key] for key in ("clients/replied", "clients/sampled", "seconds/round"))
            log.info(
                "round %d of %d: %d of %d clients replied, %.1f s", round, self.cfg.rounds, replied, sampled, seconds
            )

    def _save_posterior(self) -> None:
        path, description = self.directory.posterior_path, self.problem.description()
        save_posterior(path, self.strategy.posterior, description, self.model.fixed)

    @property
    def _posterior(self) -> Any:
        """The server's posterior where the model lives."""
        return self.strategy.posterior.to(device=self.model.vector.device)

    @timed("checkpoint")
    def _checkpoint(self) -> None:
        tensors, values = self.strategy.state()
        totals = {"seconds": self.seconds, "bytes": self.bytes, "gradients": self.gradients, "data": self.data_digest}
        Checkpoint(self.round, tensors, values | totals).save(self.directory.checkpoints)
        self.strategy.saved()

    @property
    def over(self) -> bool:
        """Whether all rounds were done, and the run ended, before this session."""
        return self.round >= self.cfg.rounds and self.directory.summary().get("status") == "finished"

    # -- results ------------------------------------------------------------------------------------------------------------

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
            "data_xxh3": self.data_digest,
            "wall_clock": seconds,
            "bytes/total": sum(self.bytes.values()),
            **provenance(),
        }
        keys = [k for k in (rounds[-1] if rounds else {}) if k.startswith(("mean/", "bayes/"))]
        for key in keys:
            values = [r[key] for r in rounds if r.get(key) is not None and r["round"] > 0]
            if values:
                best = max(values) if key.endswith("accuracy") else min(values)
                summary |= {f"last3/{key}": sum(values[-3:]) / len(values[-3:]), f"best/{key}": best}
        if rounds:
            summary |= {key: value for key, value in rounds[-1].items() if key != "round"}
        summary |= to_targets(rounds, self.cfg.eval.get("target_accuracy", ())) | self.personalized
        for key in ("guard/count", "guard/clients"):
            summary[f"total/{key}"] = sum(r.get(key) or 0 for r in rounds)
        return summary


class _Shown(Handler):
    """Shows log records where they don't tear the live display."""

    display: Display

    def emit(self, record: LogRecord) -> None:
        self.display.message(self.format(record))


def status_after(error: BaseException) -> str:
    """The ``status`` in ``summary.json`` of a run that ``error`` ended."""
    return "interrupted" if isinstance(error, KeyboardInterrupt) else "failed"


def resume_session(path: Path) -> Session:
    """A session that goes on with the run in ``path`` as its ``config.yaml`` says (for child processes of the one that locked it)."""
    directory = RunDirectory.open(path)
    session = Session(directory.config())
    session.open(directory, resumed=True)
    return session
