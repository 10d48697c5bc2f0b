"""How runs stand, read from their directories alone: ``bayesfed status`` and ``bayesfed list``."""

from __future__ import annotations

from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from rich.table import Table

from bayesfed.errors import InputError
from bayesfed.runs.directory import RunDirectory, read_jsonl


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
        round, rounds: last recorded round and how many there are to be.
        checkpoint: round of the newest checkpoint file; None = none.
        latest: the last line of ``rounds.jsonl``.
        clients: by id.
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
        for line in read_jsonl(path / "clients.jsonl"):
            client = clients.setdefault(int(line["client"]), ClientRecord())
            if line["accepted"]:
                client.accepted, client.last = client.accepted + 1, int(line["round"])
                client.seconds += line.get("seconds") or 0.0
            else:
                client.refused, client.reason = client.refused + 1, str(line.get("reason", ""))
        return cls(
            path, str(cfg.strategy.name), str(cfg.data.name), ended or "unfinished", current, int(cfg.rounds),
            max(saved, default=None), latest, dict(sorted(clients.items())),
        )  # fmt: skip


def status(path: Path) -> list[Table]:
    """A run's state and its clients, as two tables.

    Raises:
        InputError: ``path`` is no run directory.
    """
    run = RunState.read(path)
    facts = Table(show_header=False, box=None)
    facts.add_row("run", str(run.path))
    facts.add_row("method", f"{run.method} on {run.data}")
    facts.add_row("status", run.status)
    facts.add_row("round", f"{run.round} of {run.rounds}")
    facts.add_row("checkpoint", "none" if run.checkpoint is None else f"round {run.checkpoint}")
    for key in (
        "mean/accuracy",
        "mean/rmse",
        "mean/nll",
        "bayes/nll",
        "clients/replied",
        "clients/failed",
        "seconds/total",
    ):
        if run.latest.get(key) is not None:
            facts.add_row(key, f"{run.latest[key]:.6g}")
    if run.status != "finished" and run.checkpoint is not None:
        facts.add_row("go on with", f"bayesfed resume={run.path}")
    clients = Table("client", "accepted", "refused", "last round", "seconds", "latest refusal")
    for number, client in run.clients.items():
        counts = (str(number), str(client.accepted), str(client.refused), str(client.last or "-"))
        clients.add_row(*counts, f"{client.seconds:.1f}", client.reason)
    return [facts, clients]


def listing(folder: Path) -> Table:
    """All runs in ``folder`` and below, by path.

    Raises:
        InputError: ``folder`` does not exist.
    """
    if not folder.is_dir():
        raise InputError("folder", folder, "does not exist; name the folder that holds run directories")
    table = Table("run", "method", "data", "status", "round", "checkpoint")
    for config in sorted(folder.rglob("config.yaml")):
        if not (config.parent / "rounds.jsonl").is_file():
            continue
        run = RunState.read(config.parent)
        saved = "-" if run.checkpoint is None else str(run.checkpoint)
        name = str(run.path.relative_to(folder))
        table.add_row(name, run.method, run.data, run.status, f"{run.round}/{run.rounds}", saved)
    return table
