"""Dash options (``-m``, ``--cfg job``, ``--hydra-help``, shell completion): they go through ``hydra.main``, as Hydra
documents."""

from __future__ import annotations

import math
import os
import sys
import traceback
from collections.abc import Callable
from pathlib import Path

import hydra
from hydra.core.hydra_config import HydraConfig
from hydra.errors import HydraException
from omegaconf import DictConfig
from omegaconf.errors import OmegaConfBaseException
from yaml import YAMLError

from bayesfed.composing import ROOT, conf_dir, explain, unreadable
from bayesfed.errors import InputError
from bayesfed.foreign import plain_text
from bayesfed.overrides import parse, readable

Run = Callable[[list[str], str], int]  # overrides and the run directory that Hydra chose; gives an exit code


def with_options(args: list[str], run: Run) -> int:
    """Let Hydra do what ``args`` ask for; each job is a ``run``. The exit code.

    Raises:
        InputError: an option, override or folder that can't be used.
    """
    from bayesfed.config import compose_config, refuse_chdir, with_tuned

    codes: list[int] = []

    @hydra.main(config_path=str(conf_dir()), config_name=ROOT, version_base="1.3")
    def job(cfg: DictConfig) -> float:
        settings = HydraConfig.get()
        codes.append(_job(list(settings.overrides.task), settings.runtime.output_dir, run))
        if codes[-1] == 130:
            raise KeyboardInterrupt
        return math.inf if codes[-1] else _nll(settings.runtime.output_dir)

    overrides = [arg for arg in args if not arg.startswith("-") and "=" in arg]
    sweep = any(arg in ("-m", "--multirun") for arg in args)
    shown = any(arg in ("--cfg", "-c") or arg.startswith("--cfg=") for arg in args)
    argv, full = sys.argv, os.environ.get("HYDRA_FULL_ERROR")
    os.environ["HYDRA_FULL_ERROR"] = "1"  # Hydra's errors come here
    try:
        for override in parse(overrides):
            if override.key_or_group == "hydra.job.chdir":
                refuse_chdir(override.value())
            if override.key_or_group == "hydra.sweeper.direction" and override.value() != "minimize":
                fix = "a job's value is its NLL, which is minimised; leave it out"
                raise InputError("hydra.sweeper.direction", override.value(), fix)
        if shown and not sweep:  # show what would run, tuned values included
            compose_config(overrides)  # or why it would not
            args = [*[a for a in args if a not in overrides], *with_tuned(overrides)]
        sys.argv = [sys.argv[0], *(arg if arg.startswith("-") else readable(arg) for arg in args)]
        job()
    except (HydraException, OmegaConfBaseException) as error:
        raise explain(error, overrides) from error
    except YAMLError as error:
        raise unreadable(error) from error
    except OSError as error:  # Hydra can't make the sweep's folder
        raise InputError("hydra.sweep.dir", error.filename, f"can't be written ({error.strerror})") from error
    except KeyboardInterrupt:
        return 130
    finally:
        sys.argv = argv
        os.environ.pop("HYDRA_FULL_ERROR")
        if full is not None:
            os.environ["HYDRA_FULL_ERROR"] = full
    return max(codes, default=0)


def _job(overrides: list[str], directory: str, run: Run) -> int:
    """A job of a sweep: one that crashes leaves its traceback in its folder, and the others go on."""
    try:
        return run(overrides, directory)
    except Exception as error:
        file = Path(directory) / "traceback.txt"
        file.write_text(traceback.format_exc())
        reason = plain_text(f"{type(error).__name__}: {error}")
        print(f"failed: {' '.join(overrides)}: {reason} (traceback in {file})", file=sys.stderr)
        return 1


def _nll(directory: str) -> float:
    """What a sweeper that searches minimises; infinite where a run has none."""
    from bayesfed.runs.directory import RunDirectory
    from bayesfed.scores import prediction

    rounds = RunDirectory(Path(directory)).rounds()
    value = rounds[-1].get(f"{prediction(rounds, 'nll')}/nll") if rounds else None
    return value if value is not None and math.isfinite(value) else math.inf
