"""The profile of a run: where the server's and the workers' time went, as ``profile.json`` and as a table."""

from __future__ import annotations

import json
from collections.abc import Mapping
from copy import deepcopy
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from flwr.app import MessageType
from rich import box
from rich.table import Table
from rich.text import Text

from bayesfed import profiling
from bayesfed.errors import InputError
from bayesfed.profiling import Node
from bayesfed.runs.directory import write_text

FILE_NAME = "profile.json"

# what a span's own time counts as, by its name; other spans count as what they lie in, or as "other"
CATEGORY_OF = {
    **{name: name for name in ("start-up", "data", "sampling", "gradient", "update", "sites", "transport")},
    **{name: name for name in ("waiting", "aggregation", "evaluation", "records", "idle")},
    **dict.fromkeys(("messages", "store", "send", "receive", "read", "pack", "unpack", "hand-over"), "transport"),
    **dict.fromkeys(("accumulate", "combine"), "aggregation"),
    "dual": "sites",
    "optimizer": "start-up",  # the first one in a process makes torch import its compiler, a second or two
    "reply": "records",
}
LABELS = {
    "start-up": "start-up",
    "data": "data: batches",
    "sampling": "sampling",
    "gradient": "forward/backward",
    "update": "update",
    "sites": "sites: dual, client state",
    "transport": "transport",
    "waiting": "waiting for clients",
    "aggregation": "aggregation",
    "evaluation": "evaluation",
    "records": "checkpoint, logs, figures",
    "other": "other",
    "idle": "idle",
}
IDLE = {"training": "while other clients train", "server": "while the server works"}
Occupied = Mapping[tuple[int, str], Node]
DURING_TRAINING = ("waiting", "read", "accumulate", "reply")  # parts of a round in which workers can have work


@dataclass
class Worker:
    """What one worker did: seconds at work (or with a message on its way), and messages served."""

    busy: float = 0.0
    messages: int = 0


def categories(tree: Node) -> dict[str, Node]:
    """Seconds of every category, and how often it was entered, in the order of ``LABELS``.

    A span's own time belongs to the nearest span around it (itself included) that ``CATEGORY_OF`` knows.
    """
    categories: dict[str, Node] = {}

    def visit(node: Node, name: str, around: str) -> None:
        category = CATEGORY_OF.get(name, around)
        entered = 0 if category == around else node.calls
        categories.setdefault(category, Node()).add(node.own, entered)
        for child_name, child in node.children.items():
            visit(child, child_name, category)

    visit(tree, "", "other")
    return {name: categories[name] for name in LABELS if name in categories}


class RunProfile:
    """Collects the profile of a run while it is served, if the process records one; else nothing.

    The server's side is the process's tree of spans; its start-up is all that came before. The clients' side comes with
    their replies, whatever the engine. A client's time counts once its reply was accepted; what a refused or lost reply
    took comes with the next one of the same process, or is idle time if there is none.

    Args:
        engine: name, for the record.
        workers: how many clients can be served at once.
    """

    def __init__(self, engine: str, workers: int):
        self.engine, self.workers = engine, workers
        self.clients = Node()
        self.processes: dict[int, Worker] = {}
        self.profiler = profiling.current()
        if self.profiler is not None:
            self.profiler.settle("start-up", "engine")

    def client_done(self, metrics: Mapping[str, Any]) -> None:
        """Add what a reply says about its process."""
        if self.profiler is None or "worker" not in metrics:
            return
        own = Node()
        own.add_numbers({k: v for k, v in metrics.items() if k.startswith(("time/", "calls/"))})
        worker = self.processes.setdefault(int(metrics["worker"]), Worker())
        worker.busy += sum(child.seconds for child in own.children.values())
        worker.messages += 1
        self.clients.add_numbers(own.numbers())

    def write(self, path: Path) -> dict[str, Any] | None:
        """Write ``profile.json`` into the run directory and return it; None if nothing was recorded."""
        if self.profiler is None:
            return None
        profile = self.plain(self.profiler)
        write_text(path / FILE_NAME, json.dumps(profile, indent=1) + "\n")
        return profile

    def plain(self, profiler: profiling.Profiler) -> dict[str, Any]:
        """The profile up to now, as JSON."""
        wall = profiler.elapsed()
        server = Node(wall, 1, profiler.root.children)
        workers = _workers(profiler.occupied, self.processes, self.workers)
        return {
            "engine": self.engine,
            "wall": wall,
            "workers": [{"busy": w.busy, "idle": wall - w.busy, "messages": w.messages} for w in workers],
            "server": _side(server),
            "clients": _side(_clients(self.clients, profiler.occupied, server, len(workers))),
        }


def _workers(occupied: Occupied, processes: Mapping[int, Worker], declared: int) -> list[Worker]:
    """One entry a worker: as the engine saw them, else the processes that the replies name; then those never heard
    of."""
    seen: dict[int, Worker] = {}
    for (place, kind), node in sorted(occupied.items()):
        worker = seen.setdefault(place, Worker())
        worker.busy += node.seconds
        worker.messages += node.calls if kind == MessageType.TRAIN else 0
    known = list((seen or processes).values())
    return known + [Worker() for _ in range(declared - len(known))]


def _clients(measured: Node, occupied: Occupied, server: Node, workers: int) -> Node:
    """The workers' tree: what clients measured, what only the engine saw, and idle time as the rest."""
    total = Node(workers * server.seconds, 1, deepcopy(measured.children))
    seen = {kind: Node() for kind in (MessageType.QUERY, MessageType.TRAIN)}
    for (_, kind), node in occupied.items():
        seen[kind].add(node.seconds, node.calls)
    train = total.child("train")
    working = train.seconds
    if seen[MessageType.QUERY].calls:  # a worker's first message waits until its process is up
        start_up = total.child("start-up")
        start_up.children["load"] = Node(start_up.seconds, start_up.calls)
        start_up.seconds, start_up.calls = max(seen[MessageType.QUERY].seconds, start_up.seconds), workers
    if seen[MessageType.TRAIN].calls:
        working = max(seen[MessageType.TRAIN].seconds, working)
        total.child("hand-over").add(working - train.seconds, seen[MessageType.TRAIN].calls)

    rounds = server.child("round").children
    training = workers * sum(rounds[name].seconds for name in DURING_TRAINING if name in rounds)
    idle = Node(max(0.0, total.own))
    idle.children = {"training": Node(min(max(0.0, training - working), idle.seconds))}
    idle.children["server"] = Node(idle.own)
    total.children["idle"] = idle
    return total


def _side(tree: Node) -> dict[str, Any]:
    rows = {}
    for name, node in categories(tree).items():
        share = node.seconds / tree.seconds if tree.seconds else 0.0
        mean = node.seconds / node.calls if node.calls else None
        rows[name] = {"seconds": node.seconds, "share": share, "calls": node.calls, "mean": mean}
    return {"seconds": tree.seconds, "categories": rows, "tree": tree.plain()}


def load_profile(run_dir: Path) -> dict[str, Any]:
    """``profile.json`` of a run.

    Raises:
        InputError: the run was not profiled.
    """
    path = Path(run_dir) / FILE_NAME
    if not path.is_file():
        raise InputError("run_dir", run_dir, "holds no profile.json; run it with `bayesfed profile`")
    return json.loads(path.read_text())


# -- the table ---------------------------------------------------------------------------------------------------------


def table(profile: Mapping[str, Any]) -> Table:
    """Server and clients apart, one line a category, and a line a worker."""
    workers, inline = len(profile["workers"]), profile["engine"] == "inline"
    shown = Table(box=box.SIMPLE_HEAD, pad_edge=False, padding=(0, 1))
    for header in ("", "seconds", "share", "calls", "mean"):
        shown.add_column(header, justify="right" if header else "left", no_wrap=True)
    names = LABELS | ({"waiting": "clients, in this process", "idle": "the server's turn"} if inline else {})
    shown.add_row(_bold("server"))
    _rows(shown, profile["server"], names, "wall time")
    shown.add_section()
    place = "in the server's process" if inline else f"{workers} worker{'s' * (workers != 1)}"
    shown.add_row(_bold(f"clients ({place})"))
    _rows(shown, profile["clients"], names, f"{workers} x wall time", split_idle=not inline)
    if workers > 1:
        shown.add_section()
        shown.add_row(_bold("idle by worker"), "", "", _bold("served"))
        for position, worker in enumerate(profile["workers"], start=1):
            cells = (f"{worker['idle']:.2f}", f"{worker['idle'] / profile['wall']:.1%}", str(worker["messages"]))
            shown.add_row(f"  worker {position}", *cells)
    return shown


def _rows(
    shown: Table, side: Mapping[str, Any], names: Mapping[str, str], total: str, *, split_idle: bool = False
) -> None:
    for name, row in side["categories"].items():
        calls = str(row["calls"]) if row["calls"] else ""
        shown.add_row(f"  {names[name]}", f"{row['seconds']:.2f}", f"{row['share']:.1%}", calls, duration(row["mean"]))
    if split_idle:
        for name, node in side["tree"]["children"]["idle"]["children"].items():
            cells = (f"    {IDLE[name]}", f"{node['seconds']:.2f}", f"{node['seconds'] / side['seconds']:.1%}")
            shown.add_row(*(Text(cell, style="dim") for cell in cells))
    shown.add_row(_bold(f"  {total}"), _bold(f"{side['seconds']:.2f}"), _bold("100.0%"))


def _bold(text: str) -> Text:
    return Text(text, style="bold")


def duration(seconds: float | None) -> str:
    """``1.20 s``, ``3.40 ms`` or ``12.0 µs``; nothing for None."""
    if seconds is None:
        return ""
    for unit, size in (("s", 1.0), ("ms", 1e-3)):
        if seconds >= size:
            return f"{seconds / size:.2f} {unit}"
    return f"{seconds * 1e6:.1f} µs"
