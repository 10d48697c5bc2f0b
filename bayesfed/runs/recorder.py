"""What a run writes down, and shows, while a strategy works."""

from __future__ import annotations

import math
import time
from functools import cached_property
from logging import getLogger
from typing import Any

from omegaconf import DictConfig

from bayesfed.checksum import data_digest
from bayesfed.errors import InputError
from bayesfed.evaluation.probes import Subject
from bayesfed.problem import Problem
from bayesfed.problem.flat import FlatModel
from bayesfed.profiling import timed
from bayesfed.runs.checkpoint import Checkpoint
from bayesfed.runs.directory import RunDirectory
from bayesfed.runs.display import Display
from bayesfed.runs.evaluator import Evaluator
from bayesfed.runs.loggers import Guarded
from bayesfed.runs.posterior_file import save_posterior
from bayesfed.runs.profile import RunProfile

log = getLogger("bayesfed")


class Recorder:
    """The callbacks of a strategy's loop: lines in the logs, evaluations, checkpoints, display.

    Attributes:
        round: the last finished one.
        seconds: all rounds took.
        bytes: sent so far.
        gradients: evaluated by accepted clients; nan if one of them did not count.
        directory, display, profile: where it writes; set when the run begins.

    Args:
        cfg: validated configuration.
        problem, strategy, model, logger: of the run; the model's parameters are overwritten.
    """

    def __init__(self, cfg: DictConfig, problem: Problem, strategy: Any, model: FlatModel, logger: Guarded):
        self.cfg, self.problem, self.strategy, self.model, self.logger = cfg, problem, strategy, model, logger
        self.directory: RunDirectory
        self.display: Display
        self.profile: RunProfile
        self.evaluator = Evaluator(cfg.eval, Subject(
            problem, cfg.data.name, model, cfg.seed, cfg.rounds,
            lambda line: self.directory.append("client_tests", line),
            lambda draw, draws: self.display.evaluating(draw, draws),
        ))  # fmt: skip
        self.round = 0
        self.seconds = 0.0
        self.bytes = {"bytes/down": 0.0, "bytes/up": 0.0}
        self.gradients = 0.0
        self._clock = 0.0  # when the last round ended

    @property
    def posterior(self) -> Any:
        """The server's posterior where the model lives."""
        return self.strategy.posterior.to(device=self.model.vector.device)

    @cached_property
    def data_digest(self) -> str | None:
        """Of the file or folder that ``data.path`` names; None if it names none."""
        return data_digest(self.cfg.data.get("path"))

    # -- callbacks -----------------------------------------------------------------------------------------------------

    def start_clock(self) -> None:
        """The next round's time counts from here."""
        self._clock = time.perf_counter()

    def begin_round(self, round: int, sampled: list[int]) -> None:
        """Show it."""
        self.display.begin_round(round, len(sampled))

    @timed("reply")
    def client_done(self, round: int, client: int, metrics: dict[str, float] | None, reason: str) -> None:
        """A line in ``clients.jsonl``."""
        accepted = metrics is not None
        self.display.client_done(round, client, accepted)
        who = {"round": round, "client": client, **self.problem.named(client), "accepted": accepted}
        record: dict[str, Any] = who | (metrics if metrics is not None else {"reason": reason})
        self.directory.append("clients", record)
        self.profile.client_done(record)
        if metrics is not None:
            self.gradients += metrics.get("gradient-evaluations", math.nan)

    def end_round(self, round: int, metrics: dict[str, float]) -> None:
        """Evaluate, record, checkpoint, show; round 0 is what training starts from."""
        trained = time.perf_counter()
        evaluation = self.evaluator.after_round(round, self.posterior)
        record: dict[str, Any] = {"round": round, **evaluation, **metrics}
        if not self.strategy.posterior.is_point:
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
        self._write(record)

    @timed("records")
    def _write(self, record: dict[str, Any]) -> None:
        """Append the round's line, write the checkpoint and the posterior, show and log it."""
        round = self.round
        # the line comes first: a checkpoint without its line would leave a gap that no resume fills
        self.directory.append("rounds", record)
        every = self.cfg.checkpoint.every
        last = round == self.cfg.rounds
        if last or (every and round % every == 0):
            if every:
                self.checkpoint()
            self.save_posterior()
        self.logger.log(record)
        self.display.end_round(record)
        if round:  # what a deployed run, which has no display, says of itself
            replied, sampled, seconds = (record[key] for key in ("clients/replied", "clients/sampled", "seconds/round"))
            log.info(
                "round %d of %d: %d of %d clients replied, %.1f s", round, self.cfg.rounds, replied, sampled, seconds
            )

    # -- what is kept --------------------------------------------------------------------------------------------------

    def save_posterior(self) -> None:
        """Write ``posterior.safetensors``."""
        path, description = self.directory.posterior_path, self.problem.description()
        save_posterior(path, self.strategy.posterior, description, self.model.fixed)

    @timed("checkpoint")
    def checkpoint(self) -> None:
        """Write the server's state as of the last round."""
        tensors, values = self.strategy.state()
        totals = {"seconds": self.seconds, "bytes": self.bytes, "gradients": self.gradients, "data": self.data_digest}
        Checkpoint(self.round, tensors, values | totals).save(self.directory.checkpoints)
        self.strategy.saved()

    def take_up(self, checkpoint: Checkpoint) -> str | None:
        """Go on from ``checkpoint``; gives the digest of the data that the run was started with, if it is recorded.

        Raises:
            InputError: ``data.path`` holds other data now.
            KeyError, ValueError, TypeError, AttributeError, RuntimeError: it doesn't fit the configuration.
        """
        digest = checkpoint.state.get("data")
        if digest not in (None, self.data_digest):
            raise InputError("data.path", self.cfg.data.path, "holds other data than those this run was started with")
        self.strategy.load_state(checkpoint.tensors, checkpoint.state)
        self.round, self.seconds = checkpoint.round, checkpoint.state["seconds"]
        self.bytes = checkpoint.state["bytes"]
        self.gradients = checkpoint.state.get("gradients", math.nan)
        return digest
