"""Start or resume a run, from Python or the command line."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from omegaconf import DictConfig, OmegaConf
from omegaconf.errors import OmegaConfBaseException

from bayesfed.config import RESUMABLE, build, compose_config, parse, validate
from bayesfed.errors import InputError
from bayesfed.families import Gaussian, PointMass
from bayesfed.runs.directory import RunDirectory, write_text
from bayesfed.runs.posterior_file import load_posterior
from bayesfed.runs.session import Session


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
    """Run a federated simulation.

    Args:
        overrides: Hydra overrides, as on the command line: ``["experiment=digits_het10", "seed=1"]``.

    Raises:
        InputError: bad configuration or data, before any work.
        RunFailed: the run can't go on; it can be resumed.
        KeyboardInterrupt: interrupted; it can be resumed.
    """
    return run_config(compose_config(overrides), overrides)


def run_config(cfg: DictConfig, overrides: Sequence[str]) -> RunResult:
    """Run a composed configuration; ``overrides`` are what the user gave (a resumed run accepts only some)."""
    if cfg.resume is not None:
        directory = RunDirectory.open(cfg.resume)
        cfg = resumed_config(directory, cfg, overrides)
        session = Session(cfg)
        session.open(directory, resumed=True)
        if session.round >= cfg.rounds:
            if session.round > cfg.rounds:
                raise InputError(
                    "rounds", cfg.rounds, f"this run has finished {session.round} rounds already; ask for more"
                )
            if directory.summary().get("status") == "finished":
                return RunResult.read(directory)
        write_text(directory.config_path, OmegaConf.to_yaml(cfg, resolve=True))
    else:
        session = Session(cfg)
        directory = RunDirectory.create(cfg.hydra.run.dir, cfg)
        session.open(directory, resumed=False)
    build(cfg.engine, "engine").run(session)
    return RunResult.read(directory)


def resumed_config(directory: RunDirectory, cfg: DictConfig, overrides: Sequence[str]) -> DictConfig:
    """The stored configuration with what may change on resuming: rounds, engine, eval, logger, device.

    Raises:
        InputError: another key was overridden.
    """
    stored = directory.config()
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
        if key in ("engine", "logger", "resume") or key.startswith("hydra"):
            continue
        try:
            OmegaConf.update(stored, key, override.value())
        except OmegaConfBaseException as error:
            raise InputError(key, override.value(), str(error).splitlines()[0]) from error
    validate(stored)
    if stored.rounds < before:
        raise InputError("rounds", stored.rounds, f"can only grow when resuming; this run was started for {before}")
    return stored
