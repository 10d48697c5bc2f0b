"""Start or resume a run, from Python or the command line."""

from __future__ import annotations

import threading
import time
from collections.abc import Iterator, Sequence
from contextlib import ExitStack, contextmanager, suppress
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from omegaconf import DictConfig, OmegaConf
from omegaconf.errors import OmegaConfBaseException

from bayesfed.app import device_of
from bayesfed.config import RESUMABLE, compose_config, parse, validate, whole_path
from bayesfed.configured import build
from bayesfed.errors import InputError, reason_of
from bayesfed.families import ExponentialFamily, PointMass
from bayesfed.foreign import plain_text
from bayesfed.lock import alone
from bayesfed.profiling import Profiler, recording, span
from bayesfed.runs.directory import RunDirectory
from bayesfed.runs.posterior_file import load_posterior
from bayesfed.runs.reading import MALFORMED, damaged
from bayesfed.runs.session import Session, status_after
from bayesfed.tensors import ordinary_tensors

_ALONE = threading.RLock()  # torch has one dropout generator and one stack of forward-mode levels for all threads


@dataclass(frozen=True)
class RunResult:
    """What a run left in its directory.

    Attributes:
        run_dir: the run directory.
        summary: ``summary.json``.
        rounds: ``rounds.jsonl``.
        posterior: the final posterior, a ``bayesfed.families`` object.
    """

    run_dir: Path
    summary: dict[str, Any]
    rounds: list[dict[str, Any]]
    posterior: ExponentialFamily | PointMass

    @classmethod
    def read(cls, directory: RunDirectory) -> RunResult:
        """Read the run directory."""
        posterior, _ = load_posterior(directory.posterior_path)
        return cls(directory.path, directory.summary(), directory.rounds(), posterior)


def run(overrides: Sequence[str] = ()) -> RunResult:
    """Run a federated simulation; one at a time in a process: runs in several threads go one after the other, to the
    same bits.

    Args:
        overrides: Hydra overrides, as on the command line: ``["experiment=digits_het10", "seed=1"]``.

    Raises:
        InputError: bad configuration or data, before any work.
        RunFailed: the run can't go on; it can be resumed.
        KeyboardInterrupt: interrupted; it can be resumed.
    """
    began = time.perf_counter()
    return run_config(compose_config(overrides), overrides, began)


@ordinary_tensors()
def run_config(cfg: DictConfig, overrides: Sequence[str], began: float, patience: float = 0.0) -> RunResult:
    """Run a composed configuration.

    Args:
        cfg: validated configuration.
        overrides: what the user gave (a resumed run accepts only some).
        began: ``time.perf_counter()`` when the command began, for the profile.
        patience: seconds to wait for another process that works on the run.
    """
    profiler = None
    if cfg.profile:
        profiler = Profiler.on(device_of({"device": cfg.device}), ago=time.perf_counter() - began)
        profiler.settle("start-up", "configuration")
    with _ALONE, recording(profiler), ExitStack() as stack:
        with span("start-up"), span("load"):
            session = stack.enter_context(prepare(cfg, overrides, patience))
        if not session.over:
            build(session.cfg.engine, "engine").run(session)
    return RunResult.read(session.directory)


@contextmanager
def prepare(cfg: DictConfig, overrides: Sequence[str], patience: float = 0.0) -> Iterator[Session]:
    """The session of a new run, or of one that goes on (``session.over`` if there is nothing left to do), alone in its
    directory until the context ends; an error in it is the ``reason`` in ``summary.json``.

    Raises:
        InputError: bad data, a used directory, one where another process is at work, or a run that has gone further
            than it is asked to.
    """
    new = cfg.resume is None
    fresh = Session(cfg) if new else None  # bad data leaves no directory
    directory = RunDirectory(cfg.hydra.run.dir) if new else RunDirectory.open(cfg.resume)
    with alone(directory.path, "hydra.run.dir" if new else "resume", patience) as directory.lock:
        if fresh is None:
            session = _resumed(directory, cfg, overrides)
        else:
            directory.create(cfg)
            session = fresh
            session.open(directory, resumed=False)
        before = directory.summary()
        try:
            yield session
        except BaseException as error:
            if directory.summary() == before:  # it ended before, or beside, the session's own rounds
                session.reason = reason_of(error)
                with suppress(OSError):
                    directory.write_summary(session.summary(status_after(error), 0.0))
            raise


def _resumed(directory: RunDirectory, cfg: DictConfig, overrides: Sequence[str]) -> Session:
    """The session that goes on with the run in ``directory``; nothing is written before all of it was read."""
    cfg = resumed_config(directory, cfg, overrides)
    session = Session(cfg)
    session.open(directory, resumed=True)
    if session.round and session.started_with is None and any(text.startswith("data.path=") for text in overrides):
        fix = "this run has not recorded what its data were; leave them where they were"
        raise InputError("data.path", cfg.data.get("path"), fix)
    if session.round > cfg.rounds:
        raise InputError("rounds", cfg.rounds, f"this run has finished {session.round} rounds already; ask for more")
    if session.over and cfg.profile:
        raise InputError("resume", directory.path, f"has finished its {cfg.rounds} rounds; ask for more rounds")
    if not session.over:
        directory.write_config(cfg, "resume")
    return session


def resumed_config(directory: RunDirectory, cfg: DictConfig, overrides: Sequence[str]) -> DictConfig:
    """The stored configuration with what may change on resuming: see ``RESUMABLE``.

    Raises:
        InputError: another key was overridden.
    """
    stored = directory.config()
    stored.profile = cfg.profile  # of this start, not of the run
    OmegaConf.set_struct(stored, True)
    before = stored.rounds
    parsed = parse(overrides)
    for override in parsed:
        key = override.key_or_group
        if key.partition(".")[0] not in RESUMABLE and key != "data.path":  # the data may have moved
            may = ", ".join(k for k in RESUMABLE if k not in ("resume", "hydra"))
            raise InputError(key, override.value(), f"can't change when resuming (only {may} can); start a new run")
        if key in ("engine", "logger"):
            with_group = OmegaConf.create({key: cfg[key]})
            stored[key] = with_group[key]
    for override in parsed:
        key = override.key_or_group
        if key in ("engine", "logger", "resume", "profile") or key.startswith("hydra"):
            continue
        try:
            value = override.value()
            OmegaConf.update(stored, key, whole_path(value) if key == "data.path" and isinstance(value, str) else value)
        except OmegaConfBaseException as error:
            raise InputError(key, override.value(), str(error).splitlines()[0]) from error
    try:
        validate(stored)
    except InputError as error:  # what it quotes comes from a file
        raise InputError(plain_text(error.field), plain_text(error.value), plain_text(error.fix, 2000)) from error
    except (OmegaConfBaseException, *MALFORMED) as error:
        raise damaged(directory.config_path, reason_of(error)) from error
    if stored.rounds < before:
        fix = (
            f"can only grow when resuming, and this run was started for {before}; leave rounds out, and "
            "interrupt the run (Ctrl-C) where it may end: posterior and summary are kept"
        )
        raise InputError("rounds", stored.rounds, fix)
    return stored
