"""How runs stand, read from their directories alone: ``bayesfed status`` and ``bayesfed list``."""

from __future__ import annotations

from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from rich.table import Column, Table
from rich.text import Text

from bayesfed import commands
from bayesfed.errors import InputError
from bayesfed.foreign import plain_text
from bayesfed.lock import NAME, holder, reason
from bayesfed.runs.directory import RunDirectory
from bayesfed.scores import OF_TARGET, present

MARKS = {
    "config.yaml",
    "rounds.jsonl",
    "summary.json",
    "posterior.safetensors",
    "checkpoint",
    NAME,
}  # two make a run directory
LONG = 8192  # characters of a path or command that are shown: it is to be used as it stands


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
        status: ``running``, ``finished``, ``interrupted``, ``failed``, or ``unfinished`` (killed).
        round, rounds: last finished round and how many there are to be.
        begun: replies to a round that is not finished.
        checkpoint: round of the newest checkpoint file; None = none.
        latest: the last line of ``rounds.jsonl``.
        clients: by id.
        deployed: ``deployment.json`` of a run that ``bayesfed deploy`` started.
        reason: why it failed.
        holder: the process that works on it, or was killed there; "" = none.
        resumable: whether there is something to go on with.
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
    reason: str = ""
    holder: str = ""
    resumable: bool = False

    @property
    def command(self) -> str:
        """What goes on with the run; for a deployed one on the machine that submitted it."""
        if self.deployed is None:
            return commands.command(RunDirectory(self.path).resume)
        resume = commands.override("resume", self.deployed["run_dir"])
        return commands.command("deploy", "SUPERLINK", *self.deployed["overrides"], resume)

    @classmethod
    def read(cls, path: Path) -> RunState:
        """Read a run directory.

        Raises:
            InputError: it is none, or damaged.
        """
        directory = RunDirectory.open(path, "run_dir")
        cfg, lines, summary = directory.stored(), directory.rounds(), directory.summary()
        latest = lines[-1] if lines else {}
        names = (p.stem.removeprefix("server-") for p in directory.checkpoints.glob("server-*.safetensors"))
        saved = [int(name) for name in names if name.isdecimal()]
        current = int(latest.get("round", 0))
        # a summary of an earlier end does not count once the run went on
        ended = summary.get("status") if summary.get("rounds") == current else None
        if ended == "finished" and current < cfg.rounds:  # resumed for more rounds, the first of which is not over
            ended = None
        who, running = holder(path / NAME) or ("", False)
        clients: dict[int, ClientRecord] = {}
        begun = 0
        for line in directory.lines("clients"):
            client = clients.setdefault(line["client"], ClientRecord())
            begun += line["round"] > current
            if line["accepted"]:
                client.accepted, client.last = client.accepted + 1, line["round"]
                client.seconds += line.get("seconds") or 0.0
            else:
                client.refused, client.reason = client.refused + 1, plain_text(line.get("reason", ""))
        return cls(
            path, plain_text(cfg.strategy.name), plain_text(cfg.data.name),
            "running" if running else plain_text(ended or "unfinished"), current, cfg.rounds,
            max(saved, default=None), latest, dict(sorted(clients.items())), begun, directory.deployment(),
            plain_text(summary.get("reason", "")) * (ended == "failed"), who, directory.resumable,
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
    facts = [("run", plain_text(run.path, LONG)), ("method", f"{run.method} on {run.data}")]
    left = f"; it was {run.holder}" * bool(run.holder)
    note = {"unfinished": f" (killed{left})", "running": f" ({run.holder})"}
    facts.append(("status", run.status + note.get(run.status, "")))
    if run.reason:
        facts.append(("reason", run.reason))
    done = f"{run.round} of {run.rounds}"
    facts.append(("rounds finished", done + f"; {run.begun} replies of round {run.round + 1} so far" * bool(run.begun)))
    facts.append(("checkpoint", "none" if run.checkpoint is None else f"after round {run.checkpoint}"))
    averaged = "posterior/precision_mean" in run.latest
    for kind, where in {"mean": " at the mean", "bayes": ", model-averaged"}.items() if averaged else [("mean", "")]:
        for score in present([run.latest]):
            value = run.latest.get(f"{kind}/{score.name}")
            unit = f" {score.unit}" if score.unit != OF_TARGET else ""
            if value is not None and score.role == "main":
                facts.append((score.label + where, f"{value:.2f} %" if score.percent else f"{value:.4g}{unit}"))
    if run.latest.get("clients/sampled"):
        replied, sampled, failed = (
            int(run.latest.get(f"clients/{key}") or 0) for key in ("replied", "sampled", "failed")
        )
        facts.append(
            ("clients", f"{replied} of {sampled} replied in round {run.round}" + f", {failed} failed" * bool(failed))
        )
    if run.latest.get("seconds/total") is not None:
        facts.append(("time in rounds", f"{run.latest['seconds/total']:.1f} s"))
    diverged = run.reason.startswith("diverged: ")  # as RunDiverged says
    if run.status not in ("finished", "running") and run.resumable and not diverged:
        facts.append(("go on with", plain_text(run.command, LONG)))
    return facts


def listing(folder: Path) -> Table:
    """All runs in ``folder`` and below, by path.

    Raises:
        InputError: ``folder`` does not exist. (A damaged run is a line of the table.)
    """
    try:
        next(iter(folder.iterdir()), None)
    except (OSError, ValueError) as error:
        fix = "does not exist" if isinstance(error, FileNotFoundError) else f"can't be read ({reason(error)})"
        raise InputError("folder", folder, f"{fix}; name the folder that holds run directories") from error
    table = Table(Column("run", overflow="fold"), "method", "data", "status", "rounds", "checkpoint")
    folders = {entry.parent for name in ("config.yaml", "rounds.jsonl") for entry in folder.rglob(name)}
    for path in sorted(folders):
        if len(MARKS.intersection(entry.name for entry in path.iterdir())) < 2:  # somebody else's config.yaml
            continue
        name = Text(plain_text(path.relative_to(folder), LONG))
        try:
            run = RunState.read(path)
        except InputError as error:
            table.add_row(name, "-", "-", Text(error.fix), "-", "-")
            continue
        saved = "-" if run.checkpoint is None else str(run.checkpoint)
        table.add_row(name, Text(run.method), Text(run.data), Text(run.status), f"{run.round}/{run.rounds}", saved)
    return table
