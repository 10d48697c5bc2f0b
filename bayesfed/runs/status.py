"""How runs stand, read from their directories alone: ``bayesfed status`` and ``bayesfed list``."""

from __future__ import annotations

import json
import shlex
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from rich.table import Column, Table
from rich.text import Text

from bayesfed.errors import InputError
from bayesfed.runs.directory import RunDirectory, read_jsonl

METRICS = {  # of rounds.jsonl, as shown for posteriors; point estimates have those at the mean only
    "mean/accuracy": ("accuracy at the mean", "{:.2f} %"),
    "mean/rmse": ("RMSE at the mean", "{:.4g}"),
    "mean/nll": ("NLL at the mean", "{:.4g} nats per example"),
    "bayes/accuracy": ("accuracy, model-averaged", "{:.2f} %"),
    "bayes/rmse": ("RMSE, model-averaged", "{:.4g}"),
    "bayes/nll": ("NLL, model-averaged", "{:.4g} nats per example"),
}


@dataclass
class ClientRecord:
    """What ``clients.jsonl`` says of one client.

    Attributes:
        accepted, refused: replies.
        last: last round with an accepted reply; 0 = none.
        seconds: spent training, all rounds.
        reason: of the latest refusal; "" = none.
    """

    accepted: int = 0
    refused: int = 0
    last: int = 0
    seconds: float = 0.0
    reason: str = ""


@dataclass
class RunState:
    """A run as its directory shows it.

    Attributes:
        path: the directory.
        method, data: strategy and data set.
        status: ``finished``, ``interrupted``, ``failed``, or ``unfinished`` (running, or killed).
        round, rounds: last finished round and how many there are to be.
        begun: replies to a round that is not finished.
        checkpoint: round of the newest checkpoint file; None = none.
        latest: the last line of ``rounds.jsonl``.
        clients: by id.
        deployed: ``deployment.json`` of a run that ``bayesfed deploy`` started.
    """

    path: Path
    method: str
    data: str
    status: str
    round: int
    rounds: int
    checkpoint: int | None
    latest: dict[str, Any] = field(default_factory=dict)
    clients: dict[int, ClientRecord] = field(default_factory=dict)
    begun: int = 0
    deployed: dict[str, Any] | None = None

    @property
    def command(self) -> str:
        """What goes on with the run; for a deployed one on the machine that submitted it."""
        if self.deployed is None:
            return f"bayesfed {shlex.quote(f'resume={self.path}')}"
        return f"bayesfed deploy SUPERLINK {shlex.join([*self.deployed['overrides'], 'resume=' + self.deployed['run_dir']])}"

    @classmethod
    def read(cls, path: Path) -> RunState:
        """Read a run directory.

        Raises:
            InputError: it is none.
        """
        if not (path / "config.yaml").is_file():
            raise InputError("run_dir", path, "is not a run directory (no config.yaml)")
        directory = RunDirectory(path)
        cfg, lines, summary = directory.config(), directory.rounds(), directory.summary()
        latest = lines[-1] if lines else {}
        saved = [int(p.stem.removeprefix("server-")) for p in directory.checkpoints.glob("server-*.safetensors")]
        current = int(latest.get("round", 0))
        # a summary of an earlier end does not count once the run went on
        ended = summary.get("status") if summary.get("rounds") == current else None
        if ended == "finished" and current < cfg.rounds:  # resumed for more rounds, the first of which is not over
            ended = None
        clients: dict[int, ClientRecord] = {}
        begun = 0
        for line in read_jsonl(path / "clients.jsonl"):
            client = clients.setdefault(int(line["client"]), ClientRecord())
            begun += line["round"] > current
            if line["accepted"]:
                client.accepted, client.last = client.accepted + 1, int(line["round"])
                client.seconds += line.get("seconds") or 0.0
            else:
                client.refused, client.reason = client.refused + 1, str(line.get("reason", ""))
        return cls(
            path, str(cfg.strategy.name), str(cfg.data.name), ended or "unfinished", current, int(cfg.rounds),
            max(saved, default=None), latest, dict(sorted(clients.items())), begun,
            json.loads(deployment.read_text()) if (deployment := directory.deployment_path).is_file() else None,
        )  # fmt: skip


def status(path: Path) -> list[Table]:
    """A run's state and its clients, as two tables.

    Raises:
        InputError: ``path`` is no run directory.
    """
    run = RunState.read(path)
    facts = Table(show_header=False, box=None)
    for name, value in _facts(run):
        facts.add_row(name, Text(value))
    clients = Table("client", "accepted", "refused", "last round", "seconds", "latest refusal")
    for number, client in run.clients.items():
        counts = (str(number), str(client.accepted), str(client.refused), str(client.last or "-"))
        clients.add_row(*counts, f"{client.seconds:.1f}", Text(client.reason))
    return [facts, clients]


def _facts(run: RunState) -> list[tuple[str, str]]:
    """What the upper table of :func:`status` says, line by line."""
    facts = [("run", str(run.path)), ("method", f"{run.method} on {run.data}")]
    facts.append(("status", run.status + " (running, or killed)" * (run.status == "unfinished")))
    done = f"{run.round} of {run.rounds}"
    facts.append(("rounds finished", done + f"; {run.begun} replies of round {run.round + 1} so far" * bool(run.begun)))
    facts.append(("checkpoint", "none" if run.checkpoint is None else f"after round {run.checkpoint}"))
    averaged = "posterior/precision_mean" in run.latest
    for key, (name, text) in METRICS.items():
        if run.latest.get(key) is not None and (averaged or not key.startswith("bayes/")):
            facts.append((name if averaged else name.removesuffix(" at the mean"), text.format(run.latest[key])))
    if run.latest.get("clients/sampled"):
        replied, sampled, failed = (
            int(run.latest.get(f"clients/{key}") or 0) for key in ("replied", "sampled", "failed")
        )
        facts.append(
            ("clients", f"{replied} of {sampled} replied in round {run.round}" + f", {failed} failed" * bool(failed))
        )
    if run.latest.get("seconds/total") is not None:
        facts.append(("time in rounds", f"{run.latest['seconds/total']:.1f} s"))
    if run.status != "finished" and run.checkpoint is not None:
        facts.append(("go on with", run.command))
    return facts


def listing(folder: Path) -> Table:
    """All runs in ``folder`` and below, by path.

    Raises:
        InputError: ``folder`` does not exist.
    """
    if not folder.is_dir():
        raise InputError("folder", folder, "does not exist; name the folder that holds run directories")
    table = Table(Column("run", overflow="fold"), "method", "data", "status", "rounds", "checkpoint")
    for config in sorted(folder.rglob("config.yaml")):
        if not (config.parent / "rounds.jsonl").is_file():
            continue
        run = RunState.read(config.parent)
        saved = "-" if run.checkpoint is None else str(run.checkpoint)
        name = str(run.path.relative_to(folder))
        table.add_row(Text(name), run.method, run.data, run.status, f"{run.round}/{run.rounds}", saved)
    return table
