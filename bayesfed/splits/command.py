"""``bayesfed partition key=value ... [out=DIR]``."""

from __future__ import annotations

import json
from collections.abc import Sequence
from datetime import datetime
from pathlib import Path
from typing import Any

from rich import box
from rich.markup import escape
from rich.table import Table

from bayesfed.app import note_unused_partition, plain, problem_of
from bayesfed.config import compose_config
from bayesfed.errors import InputError
from bayesfed.lock import alone, check_folder, reason
from bayesfed.runs.directory import write_text
from bayesfed.runs.display import Fitted, console
from bayesfed.splits.figures import make_figures
from bayesfed.splits.summary import client_records, overview, to_csv
from bayesfed.system import System

MARK = "partition.json"
SHOWN = 20  # clients in the terminal's table
HEADERS = {
    "client": "client",
    "name": "name",
    "examples": "examples",
    "test_examples": "test",
    "classes": "classes",
    "effective_classes": "eff.",
    "distance": "distance",
    "angle": "angle",
    "contrast": "contrast",
    "arrival": "arrival",
}


def partition(args: Sequence[str]) -> Path:
    """Split the data as ``bayesfed run`` with the same overrides would, and write what that looks like.

    Writes ``clients.csv``, ``partition.json`` and pictures into ``out`` (default: a new folder under
    ``runs/partition``), and prints a summary.

    Raises:
        InputError: bad configuration or data, or a folder with other files.
    """
    for arg in args:
        if arg.startswith("-"):
            raise InputError("option", arg, "partition takes overrides and out= only")
    named = [arg.partition("=")[2] for arg in args if arg.partition("=")[0] == "out"]
    cfg = compose_config([arg for arg in args if arg.partition("=")[0] != "out"])
    folder = Path(named[-1] if named else f"runs/partition/{datetime.now():%Y-%m-%d_%H-%M-%S-%f}").expanduser()
    check_folder(folder, MARK, "a partition")
    config = plain(cfg)
    problem = problem_of(config)
    note_unused_partition(cfg, problem)
    records = client_records(problem, System.of(config.get("system")), cfg.seed)
    summary = overview(records)
    settings = {key: config[key] for key in ("seed", "data", "partition", "shift", "system")}
    counts = None if problem.label_counts is None else problem.label_counts.tolist()
    record = {"summary": summary, "clients": records, "label_counts": counts, "config": settings}
    text = json.dumps(record if problem.classes is None else {**record, "classes": problem.classes}, indent=2)
    with alone(folder, "out"):
        try:
            write_text(folder / MARK, text + "\n")
            write_text(folder / "clients.csv", to_csv(records))
            pictures = make_figures(problem, folder, cfg.seed)
        except OSError as error:
            raise InputError("out", folder, f"can't be written ({reason(error)})") from error
    out = console()
    out.print(_shown(records))
    out.print(_told(summary), markup=False, highlight=False, soft_wrap=True)
    names = ", ".join(path.name for path in pictures)
    out.print(f"{names}, clients.csv in {folder}", markup=False, highlight=False, soft_wrap=True)
    return folder


def _shown(records: Sequence[dict[str, Any]]) -> Fitted:
    table = Table(box=box.SIMPLE, padding=(0, 1, 0, 0))
    columns = [name for name in HEADERS if name in records[0]]
    off = {"angle": 0.0, "contrast": 1.0}  # a column that says nothing is left out
    columns = [name for name in columns if name not in off or any(r[name] != off[name] for r in records)]
    for name in columns:
        table.add_column(HEADERS[name], justify="right")
    for record in records[:SHOWN]:
        table.add_row(*(_text(name, record[name]) for name in columns))
    if len(records) > SHOWN:
        table.add_row("…", *[""] * (len(columns) - 1))
    return Fitted(table)


def _text(name: str, value: Any) -> str:
    if name == "angle":
        return f"{value:+.0f}°"
    if isinstance(value, str):
        return escape(value)
    return f"{value:,}" if isinstance(value, int) else f"{value:.2f}"


def _told(summary: dict[str, float]) -> str:
    lines = [
        f"{summary['clients']:,} clients, {summary['examples']:,} examples: "
        f"{summary['smallest']:,} to {summary['largest']:,} a client, median {summary['median']:,.0f}, "
        f"Gini coefficient of the sizes {summary['size_gini']:.2f}"
    ]
    if "mean_distance" in summary:
        lines.append(
            f"{summary['mean_classes']:.1f} classes a client (effective: {summary['mean_effective_classes']:.1f}); "
            f"mean total variation between a client's labels and all labels {summary['mean_distance']:.2f} (0 = iid)"
        )
    return "\n".join(lines)
