"""Start or resume a run, from Python or the command line."""

from __future__ import annotations

import threading
import time
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from omegaconf import DictConfig, OmegaConf
from omegaconf.errors import OmegaConfBaseException

from bayesfed.app import device_of
from bayesfed.config import RESUMABLE, compose_config, parse, validate
from bayesfed.errors import InputError
from bayesfed.families import Gaussian, PointMass
from bayesfed.groups import build
from bayesfed.profiling import Profiler, recording, span
from bayesfed.runs.directory import RunDirectory, write_text
from bayesfed.runs.posterior_file import load_posterior
from bayesfed.runs.session import Session

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
    posterior: Gaussian | PointMass

    @classmethod
    def read(cls, directory: RunDirectory) -> RunResult:
        """Read the run directory."""
        posterior, _ = load_posterior(directory.posterior_path)
        return cls(directory.path, directory.summary(), directory.rounds(), posterior)


def run(overrides: Sequence[str] = ()) -> RunResult:
    """Run a federated simulation; one at a time in a process: runs in several threads go one after the other, to the same bits.

    Args:
        overrides: Hydra overrides, as on the command line: ``["experiment=digits_het10", "seed=1"]``.

    Raises:
        InputError: bad configuration or data, before any work.
        RunFailed: the run can't go on; it can be resumed.
        KeyboardInterrupt: interrupted; it can be resumed.
    """
    began = time.perf_counter()
    return run_config(compose_config(overrides), overrides, began)


def run_config(cfg: DictConfig, overrides: Sequence[str], began: float) -> RunResult:
    """Run a composed configuration.

    Args:
        cfg: validated configuration.
        overrides: what the user gave (a resumed run accepts only some).
        began: ``time.perf_counter()`` when the command began, for the profile.
    """
    profiler = None
    if cfg.profile:
        profiler = Profiler.on(device_of({"device": cfg.device}), ago=time.perf_counter() - began)
        profiler.settle("start-up", "configuration")
    with _ALONE, recording(profiler):
        with span("start-up"), span("load"):
            session = prepare(cfg, overrides)
        if not session.over:
            build(session.cfg.engine, "engine").run(session)
    return RunResult.read(session.directory)


def prepare(cfg: DictConfig, overrides: Sequence[str]) -> Session:
    """The session of a new run, or of one that goes on (``session.over`` if there is nothing left to do).

    Raises:
        InputError: bad data, a used directory, or a run that has gone further than it is asked to.
    """
    if cfg.resume is None:
        session = Session(cfg)
        session.open(RunDirectory.create(cfg.hydra.run.dir, cfg), resumed=False)
        return session
    directory = RunDirectory.open(cfg.resume)
    cfg = resumed_config(directory, cfg, overrides)
    session = Session(cfg)
    session.open(directory, resumed=True)
    if session.round > cfg.rounds:
        raise InputError("rounds", cfg.rounds, f"this run has finished {session.round} rounds already; ask for more")
    if session.over and cfg.profile:
        raise InputError("resume", directory.path, f"has finished its {cfg.rounds} rounds; ask for more rounds")
    if not session.over:
        write_text(directory.config_path, OmegaConf.to_yaml(cfg, resolve=True))
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
        if key.partition(".")[0] not in RESUMABLE:
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
            OmegaConf.update(stored, key, override.value())
        except OmegaConfBaseException as error:
            raise InputError(key, override.value(), str(error).splitlines()[0]) from error
    validate(stored)
    if stored.rounds < before:
        fix = (
            f"can only grow when resuming, and this run was started for {before}; leave rounds out, and interrupt the run (Ctrl-C) "
            "where it may end: posterior and summary are kept"
        )
        raise InputError("rounds", stored.rounds, fix)
    return stored
