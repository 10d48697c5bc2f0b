"""A split in numbers: one record a client, and how different the clients are."""

from __future__ import annotations

import csv
import io
import math
from collections.abc import Sequence
from typing import Any

import numpy as np

from bayesfed.problem import Problem
from bayesfed.system import System


def client_records(problem: Problem, system: System, seed: int) -> list[dict[str, Any]]:
    """What sets each client apart.

    Returns:
        per client ``client``, ``name`` (where the data give one), ``examples``, ``test_examples`` (its own test
        distribution); with classes ``classes``, ``effective_classes`` (e to the entropy of its labels) and ``distance``
        (total variation between its labels and all labels, 0 to 1); with a shift what :meth:`ClientShift.description`
        says; with a deadline the simulated ``arrival`` in round 1.
    """
    records: list[dict[str, Any]] = []
    counts = problem.label_counts
    sizes = [len(client) for client in problem.clients]
    fates = system.fates(seed, range(len(sizes)), 1, sizes) if system.active else {}
    for k, client in enumerate(problem.clients):
        record: dict[str, Any] = {"client": k, **problem.named(k), "examples": sizes[k]}
        record["test_examples"] = len(problem.client_tests[k])
        if counts is not None:
            shares = counts[k] / counts[k].sum()
            held = shares[shares > 0]
            record |= {
                "classes": len(held),
                "effective_classes": math.exp(-float((held * np.log(held)).sum())),
                "distance": 0.5 * float(np.abs(shares - counts.sum(0) / counts.sum()).sum()),
            }
        if client.shift is not None:
            shift = client.shift.description()
            record |= {key: shift[key] for key in ("variant", "angle", "contrast", "brightness")}
            record |= {
                "gains": list(shift["gains"]),
                "permuted": [c for c, label in enumerate(shift["labels"]) if c != label],
            }
        if k in fates:
            record |= {"work": fates[k].work, "arrival": fates[k].arrival, "lost": fates[k].lost}
        records.append(record)
    return records


def overview(records: Sequence[dict[str, Any]]) -> dict[str, float]:
    """Smallest, median and largest client, how unequal sizes are, and means of the other numbers over clients.

    ``size_gini`` is the Gini coefficient of the sizes: 0 = all equal, towards 1 = one client holds everything.
    """
    sizes = np.sort([record["examples"] for record in records]).astype(np.float64)
    count = len(sizes)
    gini = float((2 * np.arange(1, count + 1) - count - 1) @ sizes / (count * sizes.sum()))
    summary = {
        "clients": count,
        "examples": int(sizes.sum()),
        "smallest": int(sizes[0]),
        "median": float(np.median(sizes)),
        "largest": int(sizes[-1]),
        "size_gini": gini,
    }
    for name in ("classes", "effective_classes", "distance"):
        if name in records[0]:
            summary[f"mean_{name}"] = float(np.mean([record[name] for record in records]))
    return summary


def to_csv(records: Sequence[dict[str, Any]]) -> str:
    """``clients.csv``; lists are joined by blanks."""
    out = io.StringIO()
    writer = csv.DictWriter(out, list(records[0]), lineterminator="\n")
    writer.writeheader()
    for record in records:
        writer.writerow({key: _cell(value) for key, value in record.items()})
    return out.getvalue()


def _cell(value: Any) -> Any:
    if isinstance(value, list):
        return " ".join(str(_cell(item)) for item in value)
    return f"{value:.6g}" if isinstance(value, float) else value
