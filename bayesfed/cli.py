"""The ``bayesfed`` command.

``bayesfed [run] key=value ...`` composes the configuration and runs it. Anything with a dash option (``-m``, ``--cfg job``,
``--hydra-help``, shell completion) goes through ``hydra.main`` and behaves as Hydra documents. ``bayesfed profile key=value ...`` runs
and says where the time went. ``bayesfed compare key=a,b ...`` runs all combinations and compares the methods.
``bayesfed partition key=value ...`` shows who would hold what. ``bayesfed deploy SUPERLINK key=value ...`` runs on real clients.
``bayesfed status RUN_DIR`` and ``bayesfed list [FOLDER]`` say how runs stand.

Exit codes: 0 done, 1 failed, 2 bad configuration or input, 130 interrupted (resumable).
"""

from __future__ import annotations

import logging
import math
import os
import signal
import sys
import time
import traceback
from collections.abc import Sequence
from pathlib import Path

from bayesfed import __version__
from bayesfed.errors import InputError, RunDiverged, RunFailed, choice
from bayesfed.foreign import plain_text
from bayesfed.help import VERBS, help_text
from bayesfed.output import steady

HELP = {"-h", "--help"}


def main(argv: Sequence[str] | None = None) -> None:
    """Entry point; exits with the codes above."""
    with steady():
        _main(list(sys.argv[1:] if argv is None else argv))


def _main(args: list[str]) -> None:
    if args and "=" not in args[0] and not args[0].startswith(("-", "+", "~")):
        verb = args.pop(0)
        try:
            choice("command", verb, ["help", *VERBS])
            if verb == "help" or HELP.intersection(args):
                named = verb if verb != "help" else next(iter(args), None)
                choice("command", named or "help", ["help", *VERBS])
                sys.exit(_say(help_text(named if named != "help" else None)))
            if verb == "compare":
                sys.exit(_compared(args))
            if verb == "partition":
                from bayesfed.splits.command import partition

                partition(args)
                return
            if verb == "deploy":
                sys.exit(_deployed(args))
            if verb in ("status", "list"):
                sys.exit(_shown(verb, args))
            if verb == "profile":
                args = _profiled(args)
        except InputError as error:
            sys.exit(_report(error))
    if HELP.intersection(args):
        sys.exit(_say(help_text("run" if any("=" in arg for arg in args) else None)))
    if args[:1] == ["--version"]:
        print(f"bayesfed {__version__}")
        return
    logging.basicConfig(format="%(message)s", level=logging.WARNING)
    for name in ("flwr", "bayesfed"):  # also where Hydra's sweeps show INFO: the display has said it
        logging.getLogger(name).setLevel(logging.WARNING)
    signal.signal(signal.SIGTERM, _interrupt)
    if any(arg.startswith("-") for arg in args):
        sys.exit(_hydra(args))
    sys.exit(guarded(args))


def guarded(overrides: Sequence[str], directory: str | None = None) -> int:
    """Run ``overrides``, turn every outcome into an exit code and a line that says what to do next."""
    began, where = time.perf_counter(), None
    try:
        from bayesfed.config import compose_config
        from bayesfed.runs.launch import run_config

        cfg = compose_config(overrides, directory)
        where = cfg.resume or cfg.hydra.run.dir
        result = run_config(cfg, overrides, began)
    except InputError as error:
        return _report(error)
    except KeyboardInterrupt:
        print(f"\ninterrupted; {_resume(where)}", file=sys.stderr)
        return 130
    except RunFailed as error:
        hint = [] if isinstance(error, RunDiverged) else [_resume(where)]
        print(f"failed: {error}", *hint, sep="\n", file=sys.stderr)
        return 1
    print(_outcome(result.summary), f"results in {result.run_dir}", sep="\n")
    if cfg.profile:
        from bayesfed.runs.display import console
        from bayesfed.runs.profile import load_profile, table

        console().print(table(load_profile(result.run_dir)))
    return 0


def _compared(args: Sequence[str]) -> int:
    """``bayesfed compare``: its outcome as an exit code."""
    from bayesfed.compare.command import compare

    signal.signal(signal.SIGTERM, _interrupt)
    try:
        return compare(args)
    except InputError as error:
        return _report(error)
    except KeyboardInterrupt:
        print("\ninterrupted; start the same command again to go on", file=sys.stderr)
        return 130
    except OSError as error:  # the disk is full, or the folder went away
        print(f"failed: {error}; start the same command again to go on", file=sys.stderr)
        return 1


def _deployed(args: Sequence[str]) -> int:
    """``bayesfed deploy``: its outcome as an exit code."""
    from bayesfed.deployment.command import deploy

    return deploy(args)


def _shown(verb: str, args: Sequence[str]) -> int:
    """``bayesfed status`` and ``bayesfed list``."""
    from bayesfed.runs.display import console
    from bayesfed.runs.status import listing, status

    if len(args) != 1 and (verb, len(args)) != ("list", 0):
        raise InputError(verb, " ".join(args), "takes one folder: a run directory for status, one of runs for list")
    folder = Path(args[0] if args else "runs").expanduser()
    for part in status(folder) if verb == "status" else [listing(folder)]:
        console().print(part)
    return 0


def _profiled(args: Sequence[str]) -> list[str]:
    """The overrides of a run that is to be profiled.

    Raises:
        InputError: this is not one run.
    """
    for arg in args:
        if arg.startswith("-"):
            fix = "profile measures one run and takes overrides only; sweeps and Hydra's options go with `bayesfed run`"
            raise InputError("option", arg, fix)
        if arg.lstrip("+~").partition("=")[0] == "profile":
            raise InputError("profile", arg.partition("=")[2], "leave it out: `bayesfed profile` sets it")
    return [*args, "profile=true"]


def _resume(where: str | None) -> str:
    from bayesfed import commands
    from bayesfed.runs.directory import RunDirectory

    if where is None or not (run := RunDirectory(where)).resumable:
        return "nothing to resume: no checkpoint was written"
    return f"continue with: {commands.command(run.resume)}"


def _outcome(summary: dict) -> str:
    from bayesfed.runs.display import fixed

    names = {"accuracy": ("accuracy", 2, " %"), "rmse": ("RMSE", 4, ""), "nll": ("NLL", 4, ""), "ece": ("ECE", 2, " %")}
    parts = []
    kinds = [("mean", "at the mean"), ("bayes", "model-averaged")]
    for kind, label in [("mean", "point estimate")] if summary.get("family") == "point" else kinds:
        found = [
            f"{name} {fixed(summary[f'{kind}/{k}'], digits)}{unit}"
            for k, (name, digits, unit) in names.items()
            if summary.get(f"{kind}/{k}") is not None
        ]
        if found:
            parts.append(f"{label}: " + ", ".join(found))
    return f"{summary['method']}, {summary['rounds']} rounds; " + "; ".join(parts)


def _report(error: InputError) -> int:
    print(f"error: {error}", file=sys.stderr)
    return 2


def _interrupt(signum: int, frame: object) -> None:
    raise KeyboardInterrupt


def _say(text: str) -> int:
    print(text)
    return 0


def _hydra(args: list[str]) -> int:
    """Dash options: sweeps, printing the configuration, completion."""
    import hydra
    from hydra.core.hydra_config import HydraConfig
    from hydra.errors import HydraException
    from omegaconf import DictConfig
    from omegaconf.errors import OmegaConfBaseException
    from yaml import YAMLError

    from bayesfed.composing import ROOT, conf_dir, explain, unreadable
    from bayesfed.config import compose_config, refuse_chdir, with_tuned
    from bayesfed.overrides import parse, readable

    codes: list[int] = []

    @hydra.main(config_path=str(conf_dir()), config_name=ROOT, version_base="1.3")
    def job(cfg: DictConfig) -> float:
        settings = HydraConfig.get()
        codes.append(_job(list(settings.overrides.task), settings.runtime.output_dir))
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
    except InputError as error:
        return _report(error)
    except (HydraException, OmegaConfBaseException) as error:
        return _report(explain(error, overrides))
    except YAMLError as error:
        return _report(unreadable(error))
    except OSError as error:  # Hydra can't make the sweep's folder
        return _report(InputError("hydra.sweep.dir", error.filename, f"can't be written ({error.strerror})"))
    except KeyboardInterrupt:
        return 130
    finally:
        sys.argv = argv
        os.environ.pop("HYDRA_FULL_ERROR")
        if full is not None:
            os.environ["HYDRA_FULL_ERROR"] = full
    return max(codes, default=0)


def _job(overrides: Sequence[str], directory: str) -> int:
    """A job of a sweep: one that crashes leaves its traceback in its folder, and the others go on."""
    try:
        return guarded(overrides, directory)
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
