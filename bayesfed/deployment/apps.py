"""``ServerApp`` and ``ClientApp`` as ``flwr run`` finds them (``[tool.flwr.app]`` in ``pyproject.toml``).

They read ``Context.run_config``:

    overrides   Hydra overrides as one string, e.g. "experiment=digits_het10 rounds=5"
    run-dir     run directory on the server; relative to $BAYESFED_RUNS (~/.bayesfed/runs); "" = the Flower run id
    resume      true: go on with the run in run-dir, which must have been started with the same overrides

and each SuperNode's ``--node-config``:

    partition-id   the client this node is, from 0
    data-path      its own file or folder (any data group that reads one), all of it this client's; without it, the node
    loads the
                   run's data and takes its part of the run's partition
    device         auto, cpu or cuda
    sites          folder for the client's sites; default $BAYESFED_SITES (~/.bayesfed/sites)
"""

from __future__ import annotations

import json
import logging
import os
import sys
from collections.abc import Iterator
from contextlib import contextmanager
from functools import lru_cache
from pathlib import Path
from typing import TYPE_CHECKING

from flwr.app import Context, Message
from flwr.clientapp import ClientApp
from flwr.serverapp import Grid, ServerApp
from omegaconf import open_dict

from bayesfed.app import Plain, SimulationApp, client_app, plain
from bayesfed.config import RESUMABLE, compose_config, parse
from bayesfed.deployment.received import experiment_key, for_client, split
from bayesfed.deployment.told import log_whole, told
from bayesfed.errors import InputError, RunFailed
from bayesfed.problem.build import origins
from bayesfed.problem.own_client import WHOLE
from bayesfed.runs.directory import RunDirectory, write_text
from bayesfed.wire.flower_version import error_reply

if TYPE_CHECKING:  # a client, started anew for each message, has no use for what these import
    from bayesfed.runs.session import Session

server = ServerApp()
client = ClientApp()


@server.main()
def main(grid: Grid, context: Context) -> None:
    """Serve one run on the SuperLink's grid.

    Raises:
        InputError: bad configuration, before any message is sent.
        RunFailed: the run can't go on; it can be resumed.
    """
    logging.basicConfig(format="%(message)s")
    logging.getLogger("bayesfed").setLevel(logging.INFO)  # not the HTTP requests of Flower's grid
    try:
        with session_of(context) as session:
            session.serve(grid)
    except (InputError, RunFailed):
        sys.tracebacklimit = 0  # the user's to mend: let Flower print the reason, not how it came up
        raise


@contextmanager
def session_of(context: Context) -> Iterator[Session]:
    """The run that a server's context asks for, alone in its directory until the context manager ends.

    Raises:
        InputError: bad configuration, a used run directory, or a resumed run with other settings.
    """
    from bayesfed.runs.launch import prepare

    folder = _root("BAYESFED_RUNS", "runs") / Path(_run(context)).expanduser()
    texts = split(str(context.run_config.get("overrides", "")))
    keys = [override.key_or_group for override in parse(texts)]
    overrides = [text for text, key in zip(texts, keys, strict=True) if key not in ("resume", "hydra.run.dir")]
    cfg = compose_config([*overrides, "display=false"], str(folder))
    changed = overrides
    if context.run_config.get("resume", False):
        stored = RunDirectory.open(folder).config()
        if "schedule_rounds" in cfg.client and not any("schedule_rounds" in text for text in overrides):
            cfg.client.schedule_rounds = stored.client.get("schedule_rounds")  # the first start's horizon
        for key, value in stored.items():
            if str(key) not in RESUMABLE and cfg.get(str(key)) != value:
                fix = "resume a run with the overrides it was started with; only rounds, eval, logger may change"
                raise InputError(str(key), cfg.get(str(key)), f"the run in {folder} has {value}; {fix}")
        with open_dict(cfg):
            cfg.resume = str(folder)
        changed = [o for o in overrides if o.lstrip("+~").partition("=")[0].partition(".")[0] in RESUMABLE]
    with prepare(cfg, changed) as session:
        # what `bayesfed status` needs to say how the run is resumed
        record = {"run_dir": _run(context), "overrides": list(overrides)}
        write_text(session.directory.deployment_path, json.dumps(record) + "\n")
        yield session


@client.train()
def train(message: Message, context: Context) -> Message:
    """Solve the local problem; what the client may use comes from its own machine."""
    return _answered(message, context)


@client.query()
def query(message: Message, context: Context) -> Message:
    """Say which client this node is."""
    return _answered(message, context)


def _answered(message: Message, context: Context) -> Message:
    """The reply; what the client raises goes to this node's log, and the server gets no more than :func:`told` says."""
    try:
        return _served(context).serve(message, context)
    except Exception as error:
        if isinstance(error, InputError) and error.field == "data.path" and error.value is None:
            example = "'partition-id=0 data-path=\"/data/mine.npz\"'"
            fix = f"the run's data are each node's own file: name it in --node-config {example}"
            error = InputError("data-path", None, fix)
        log_whole(message.metadata.message_type, error)
        return error_reply(message, told(error))


def client_config(context: Context) -> Plain:
    """A node's configuration of a run.

    Raises:
        InputError: the run asks for something that only the node decides.
    """
    node = context.node_config
    overrides = for_client(split(str(context.run_config.get("overrides", ""))))
    config = plain(compose_config([*overrides, f"device={node.get('device', 'auto')}"]))
    if "data-path" in node:
        config["data"]["path"] = str(node["data-path"])
        config["partition"] = dict(WHOLE)
        config["own_client"] = node.get("partition-id")
    return config


def _served(context: Context) -> SimulationApp:
    config = client_config(context)
    folder = context.node_config.get("sites")
    root = Path(str(folder)).expanduser() if folder else _root("BAYESFED_SITES", "sites")
    return _app(json.dumps(config), str(root / experiment_key(config, _run(context))), origins(config))


@lru_cache(maxsize=2)
def _app(config: str, sites: str, made_of: tuple[object, ...]) -> SimulationApp:
    return client_app(json.loads(config), sites)


def _run(context: Context) -> str:
    """The run directory's name, which stays when a run is resumed; the Flower run id does not."""
    return str(context.run_config.get("run-dir", "")) or str(context.run_id)


def _root(variable: str, name: str) -> Path:
    try:
        return Path(os.environ.get(variable) or f"~/.bayesfed/{name}").expanduser()
    except RuntimeError as error:
        raise InputError(variable, "", "set it to a folder: there is no home folder") from error
