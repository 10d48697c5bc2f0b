"""The ``bayesfed`` command.

``bayesfed [run] key=value ...`` composes the configuration and runs it. Anything with a dash option (``-m``, ``--cfg job``,
``--help``, shell completion) goes through ``hydra.main`` and behaves as Hydra documents. ``bayesfed profile key=value ...`` runs
and says where the time went. ``bayesfed compare key=a,b ...`` runs all combinations and compares the methods.
``bayesfed partition key=value ...`` shows who would hold what. ``bayesfed deploy SUPERLINK key=value ...`` runs on real clients.
``bayesfed status RUN_DIR`` and ``bayesfed list [FOLDER]`` say how runs stand.

Exit codes: 0 done, 1 failed, 2 bad configuration or input, 130 interrupted (resumable).
"""

from __future__ import annotations

import logging
import os
import signal
import sys
import time
from collections.abc import Sequence
from pathlib import Path

from bayesfed import __version__
from bayesfed.errors import InputError, RunFailed, choice

VERBS = ("run", "profile", "compare", "partition", "deploy", "status", "list")


def main(argv: Sequence[str] | None = None) -> None:
    """Entry point; exits with the codes above."""
    args = list(sys.argv[1:] if argv is None else argv)
    if args and "=" not in args[0] and not args[0].startswith(("-", "+", "~")):
        verb = args.pop(0)
        try:
            choice("command", verb, VERBS)
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
    if args[:1] == ["--version"]:
        print(f"bayesfed {__version__}")
        return
    logging.basicConfig(format="%(message)s", level=logging.WARNING)
    logging.getLogger("flwr").setLevel(logging.WARNING)
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
        print(f"failed: {error}", _resume(where), sep="\n", file=sys.stderr)
        return 1
    print(_outcome(result.summary), f"results in {result.run_dir}", sep="\n")
    if cfg.profile:
        from rich.console import Console

        from bayesfed.runs.profile import load_profile, table

        Console().print(table(load_profile(result.run_dir)))
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
    folder = Path(args[0] if args else "runs")
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
    if where is None or not any((Path(where) / "checkpoint").glob("server-*.safetensors")):
        return "nothing to resume: no checkpoint was written"
    return f"continue with: bayesfed resume={where}"


def _outcome(summary: dict) -> str:
    names = {"accuracy": "accuracy {:.2f} %", "rmse": "RMSE {:.4f}", "nll": "NLL {:.4f}", "ece": "ECE {:.2f} %"}
    parts = []
    kinds = [("mean", "at the mean"), ("bayes", "model-averaged")]
    for kind, label in [("mean", "point estimate")] if summary.get("family") == "point" else kinds:
        found = [
            text.format(summary[f"{kind}/{k}"]) for k, text in names.items() if summary.get(f"{kind}/{k}") is not None
        ]
        if found:
            parts.append(f"{label}: " + ", ".join(found))
    return f"{summary['method']}, {summary['rounds']} rounds; " + "; ".join(parts)


def _report(error: InputError) -> int:
    print(f"error: {error}", file=sys.stderr)
    return 2


def _interrupt(signum: int, frame: object) -> None:
    raise KeyboardInterrupt


def _hydra(args: list[str]) -> int:
    """Dash options: sweeps, printing the configuration, help, completion."""
    import hydra
    from hydra.core.hydra_config import HydraConfig
    from hydra.errors import HydraException
    from omegaconf import DictConfig
    from omegaconf.errors import OmegaConfBaseException
    from yaml import YAMLError

    from bayesfed.config import compose_config, conf_dir, search_path, unreadable, with_tuned

    os.environ["HYDRA_FULL_ERROR"] = "1"
    codes: list[int] = []

    @hydra.main(config_path=str(conf_dir()), config_name="config", version_base="1.3")
    def job(cfg: DictConfig) -> None:
        settings = HydraConfig.get()
        codes.append(guarded(list(settings.overrides.task), settings.runtime.output_dir))
        if codes[-1] == 130:
            raise KeyboardInterrupt

    overrides = [arg for arg in args if not arg.startswith("-") and "=" in arg]
    sweep = any(arg in ("-m", "--multirun") for arg in args)
    shown = any(arg in ("--cfg", "-c") or arg.startswith("--cfg=") for arg in args)
    try:
        if shown and not sweep:  # show what would run, tuned values included
            compose_config(overrides)  # or why it would not
            args = [*[a for a in args if a not in overrides], *with_tuned(overrides)]
        local = search_path()
        sys.argv = [sys.argv[0], *args, *([f"hydra.searchpath={local}"] if local else [])]
        job()
    except InputError as error:
        return _report(error)
    except (HydraException, OmegaConfBaseException) as error:
        return _report(InputError("override", " ".join(overrides), str(error).splitlines()[0]))
    except YAMLError as error:
        return _report(unreadable(error))
    except KeyboardInterrupt:
        return 130
    return max(codes, default=0)
