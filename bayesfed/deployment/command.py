"""``bayesfed deploy SUPERLINK key=value ...``: ``flwr run`` with checked overrides, its log, and an exit code.

SUPERLINK names a connection in ``$FLWR_HOME/config.toml``. The same as

    flwr run APP SUPERLINK --run-config 'overrides="..." run-dir="..."' && flwr log RUN_ID SUPERLINK

``hydra.run.dir=DIR`` (or ``resume=DIR``) is the run directory on the server, relative to its ``$BAYESFED_RUNS``.
"""

from __future__ import annotations

import json
import shlex
import subprocess
import sys
import tempfile
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from bayesfed.config import compose_config, parse
from bayesfed.deployment.received import for_client
from bayesfed.errors import InputError
from bayesfed.foreign import plain_text

LINES = 50  # of what Flower says
APP = Path(__file__).resolve().parents[2]


def deploy(args: Sequence[str]) -> int:
    """Submit a run, follow its log, return 0 if it finished, 1 if it failed, 130 if following was interrupted.

    Raises:
        InputError: no SuperLink named, no app to submit, or bad overrides.
    """
    if option := next((arg for arg in args if arg.startswith("-")), None):
        raise InputError(
            "option", option, "deploy takes no options, only a SuperLink and key=value; see bayesfed deploy --help"
        )
    if not args or "=" in args[0]:
        raise InputError("superlink", args[0] if args else "", "name a connection of $FLWR_HOME/config.toml first")
    if not (APP / "pyproject.toml").is_file():
        raise InputError(
            "app", APP, "holds no pyproject.toml: deploy from a checkout (pip install -e), or use flwr run"
        )
    superlink, *overrides = args
    config = run_config(overrides)
    with tempfile.NamedTemporaryFile("w", suffix=".toml") as file:
        file.write("".join(f"{key} = {json.dumps(value)}\n" for key, value in config.items()))
        file.flush()
        try:
            done = _flwr("run", str(APP), superlink, "--run-config", file.name, "--format", "json")
        except KeyboardInterrupt:
            print(f"\ninterrupted; whether the SuperLink took the run, says: flwr list {superlink}", file=sys.stderr)
            return 130
    run = _answer(done).get("run-id")
    if run is None:
        reason = str(_answer(done).get("error-message") or done.stdout + done.stderr).strip()
        said = "\n".join(plain_text(line) for line in reason.splitlines()[-LINES:])
        print(f"failed: the SuperLink took no run\n{said}", file=sys.stderr)
        return 1
    try:
        _flwr("log", str(run), superlink, "--stream", shown=True)
        status = str(
            (_answer(_flwr("list", superlink, "--run-id", str(run), "--format", "json")).get("runs") or [{}])[0].get(
                "status"
            )
        )
    except KeyboardInterrupt:
        print(f"\nthe run goes on; stop it with: flwr stop {run} {superlink}", file=sys.stderr)
        return 130
    where = config["run-dir"] or run
    print(f"run {plain_text(run)}: {plain_text(status)}; results on the server in {where}")
    return 0 if status == "finished:completed" else 1


def run_config(overrides: Sequence[str]) -> dict[str, Any]:
    """What goes into ``Context.run_config``, after checking that both sides can compose it.

    Raises:
        InputError: bad overrides.
    """
    parsed = parse(overrides)
    keys = [override.key_or_group for override in parsed]
    folders = [str(o.value()) for o, key in zip(parsed, keys, strict=True) if key in ("hydra.run.dir", "resume")]
    if len(folders) > 1:
        raise InputError("resume", folders[1], "give either hydra.run.dir (a new run) or resume (one that goes on)")
    rest = [o for o, key in zip(overrides, keys, strict=True) if key not in ("hydra.run.dir", "resume")]
    compose_config(rest)
    compose_config(for_client(rest))
    return {"overrides": shlex.join(rest), "run-dir": folders[0] if folders else "", "resume": "resume" in keys}


def _flwr(*args: str, shown: bool = False) -> subprocess.CompletedProcess[str]:
    command = [str(Path(sys.executable).with_name("flwr")), *args]
    return subprocess.run(command, text=True, capture_output=not shown, check=False)


def _answer(done: subprocess.CompletedProcess[str]) -> dict[str, Any]:
    """The JSON object among the lines a command printed; {} if there is none."""
    start = done.stdout.find("{")
    try:
        answer = json.loads(done.stdout[start:]) if start >= 0 else {}
    except json.JSONDecodeError:
        return {}
    return answer if isinstance(answer, dict) else {}
