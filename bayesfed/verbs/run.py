"""Simulate federated training (the verb may be left out).

usage: bayesfed [run] [key=value ...]          bayesfed -m key=a,b ...          bayesfed --cfg job key=value ...

Simulates the federation that the configuration describes; results go to a new folder below runs/ (hydra.run.dir=DIR
names one). resume=DIR goes on with an interrupted run. -m runs all combinations of comma lists one after the other,
--cfg job shows the configuration that would run, with all keys. A folder conf/ here adds to the groups below and goes
before them.
"""

from __future__ import annotations

import logging
import sys
import time
from collections.abc import Sequence

from bayesfed.errors import InputError, RunDiverged, RunFailed


def main(args: list[str]) -> int:
    """Run overrides; dash options go through Hydra's own main function."""
    logging.basicConfig(format="%(message)s", level=logging.WARNING)
    for name in ("flwr", "bayesfed"):  # also where Hydra's sweeps show INFO: the display has said it
        logging.getLogger(name).setLevel(logging.WARNING)
    if any(arg.startswith("-") for arg in args):
        from bayesfed.hydra_app import with_options

        return with_options(args, guarded)
    return guarded(args)


def guarded(overrides: Sequence[str], directory: str | None = None) -> int:
    """Run ``overrides``, turn every outcome into an exit code and a line that says what to do next."""
    began, where = time.perf_counter(), None
    try:
        from bayesfed.config import compose_config

        cfg = compose_config(overrides, directory)

        from bayesfed import accelerate  # these import torch, which a wrong key needn't wait for
        from bayesfed.runs.launch import run_config

        accelerate.start(cfg.accelerate)
        where = cfg.resume or cfg.hydra.run.dir
        result = run_config(cfg, overrides, began)
    except InputError as error:
        print(f"error: {error}", file=sys.stderr)
        return 2
    except KeyboardInterrupt:
        print(f"\ninterrupted; {how_to_resume(where)}", file=sys.stderr)
        return 130
    except RunFailed as error:
        hint = [] if isinstance(error, RunDiverged) else [how_to_resume(where)]
        print(f"failed: {error}", *hint, sep="\n", file=sys.stderr)
        return 1
    print(_outcome(result.summary), f"results in {result.run_dir}", sep="\n")
    if cfg.profile:
        from bayesfed.runs.display import console
        from bayesfed.runs.profile import load_profile, table

        console().print(table(load_profile(result.run_dir)))
    return 0


def how_to_resume(where: str | None) -> str:
    """The command that goes on with the run in ``where``, in words."""
    from bayesfed import commands
    from bayesfed.runs.directory import RunDirectory

    if where is None or not (run := RunDirectory(where)).resumable:
        return "nothing to resume: no checkpoint was written"
    return f"continue with: {commands.command(run.resume)}"


def _outcome(summary: dict) -> str:
    from bayesfed.runs.display import fixed
    from bayesfed.scores import present

    parts = []
    kinds = [("mean", "at the mean"), ("bayes", "model-averaged")]
    for kind, label in kinds if "posterior/precision_mean" in summary else [("mean", "point estimate")]:
        values = [
            f"{score.label} {fixed(value, 2 if score.percent else 4)}{' %' if score.percent else ''}"
            for score in present([summary])
            if (value := summary.get(f"{kind}/{score.name}")) is not None
        ]
        if values:
            parts.append(f"{label}: " + ", ".join(values))
    return f"{summary['method']}, {summary['rounds']} rounds; " + "; ".join(parts)
