"""How much a method depends on two of its settings: a heat map over the values that were swept."""

from __future__ import annotations

import math
import re
from collections.abc import Iterator, Sequence

import numpy as np
from matplotlib.axes import Axes
from matplotlib.backends.backend_agg import FigureCanvasAgg
from matplotlib.figure import Figure

from bayesfed.compare.results import ordered
from bayesfed.compare.table import Row, by_setting
from bayesfed.runs.display import fixed
from bayesfed.runs.labels import label
from bayesfed.scores import score


def sensitivities(table: Sequence[Row]) -> Iterator[tuple[str, str, str, Figure]]:
    """File name, setting, title and figure of each metric, for every method of which two keys were swept, each over
    several values.

    Rows are told apart by their names as :mod:`bayesfed.compare.grid` makes them: ``bayes_admm rho=0.1
    temperature=0.01``.
    """
    settings = by_setting(table)
    for number, (setting, part) in enumerate(settings, start=1):
        methods: dict[str, list[tuple[dict[str, str], Row]]] = {}
        for row in part:
            name, *pairs = row.group.method.split(" ")
            methods.setdefault(name, []).append((dict(pair.split("=", 1) for pair in pairs if "=" in pair), row))
        for name, rows in methods.items():
            axes = _axes([values for values, _ in rows])
            if axes is None:
                continue
            for metric in ordered(m for _, row in rows for m in row.metrics if score(m).role == "main"):
                if any(metric in row.metrics and math.isfinite(row.metrics[metric].mean) for _, row in rows):
                    stem = "_".join(["sensitivity", re.sub(r"[^\w.=-]+", "_", name)[:60], metric])
                    stem = f"{number:02d}_{stem}" if len(settings) > 1 else stem
                    title = f"{name}: {score(metric).header} by {' and '.join(axes)}"
                    yield stem, setting, title, _map(rows, axes, metric)


def shade(axis: Axes, values: np.ndarray, up: bool, best: np.ndarray) -> None:
    """Cells coloured by their values, which stand in them; bold where ``best``. nan stays blank; ``up``: larger is
    better."""
    image = axis.imshow(np.ma.masked_invalid(values), cmap="cividis" if up else "cividis_r", aspect="auto")
    for i, j in np.argwhere(np.isfinite(values)):
        red, green, blue, _ = image.to_rgba(values[i, j])
        bright = 0.3 * red + 0.59 * green + 0.11 * blue > 0.5
        axis.text(
            j, i, fixed(values[i, j], 1 if up else 3), ha="center", va="center",
            color="#010101" if bright else "#ffffff", weight="bold" if best[i, j] else "normal",
        )  # fmt: skip


def _axes(found: Sequence[dict[str, str]]) -> tuple[str, str] | None:
    """The two keys that vary; None if it is not exactly two."""
    values: dict[str, set[str]] = {}
    for pairs in found:
        for key, value in pairs.items():
            values.setdefault(key, set()).add(value)
    varied = [key for key, given in values.items() if len(given) > 1]
    return (
        (varied[0], varied[1]) if len(varied) == 2 and all(key in pairs for pairs in found for key in varied) else None
    )


def _map(rows: Sequence[tuple[dict[str, str], Row]], axes: tuple[str, str], metric: str) -> Figure:
    down, across = (_ordered({pairs[key] for pairs, _ in rows}) for key in axes)
    values = np.full((len(down), len(across)), math.nan)
    for pairs, row in rows:
        if metric in row.metrics:
            values[down.index(pairs[axes[0]]), across.index(pairs[axes[1]])] = row.metrics[metric].mean
    up = score(metric).higher_is_better
    best = values == (np.nanmax(values) if up else np.nanmin(values))
    figure = Figure(figsize=(max(1.9 + 0.85 * len(across), 4.0), 1.5 + 0.42 * len(down)), layout="constrained")
    FigureCanvasAgg(figure)
    axis = figure.subplots()
    shade(axis, values, up, best)
    axis.set_yticks(range(len(down)), [label(value, 20) for value in down])
    axis.set_xticks(range(len(across)), [label(value, 20, width=10) for value in across])
    axis.set(xlabel=label(axes[1]), ylabel=label(axes[0], 20))
    axis.tick_params(length=0)
    axis.spines[:].set_visible(False)
    failed = any(not row.group.traces for _, row in rows)
    axis.set_title(f"{score(metric).header}, best in bold" + (", blank: failed" if failed else ""), size=9.5)
    return figure


def _ordered(values: set[str]) -> list[str]:
    """By size where all are numbers, else by name."""
    try:
        return sorted(values, key=float)
    except ValueError:
        return sorted(values)
