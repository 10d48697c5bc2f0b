"""Figures of a comparison: ``figures/*.png`` for papers, ``figures/*.svg`` for the report."""

from __future__ import annotations

import math
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any

import matplotlib
import numpy as np
from matplotlib.axes import Axes
from matplotlib.backends.backend_agg import FigureCanvasAgg
from matplotlib.figure import Figure
from matplotlib.ticker import EngFormatter, MaxNLocator

from bayesfed.compare.picture import Picture, save
from bayesfed.compare.results import Group, ordered
from bayesfed.compare.sensitivity import sensitivities, shade
from bayesfed.compare.table import Row, by_setting
from bayesfed.runs.labels import label
from bayesfed.scores import NLL, OF_TARGET, score

# Okabe and Ito's palette without black and yellow, told apart with any colour vision on light and on dark ground
COLOURS = ("#0072B2", "#D55E00", "#009E73", "#CC79A7", "#E69F00", "#56B4E9", "#8C6BB1", "#7F7F7F")
LINES = ("-", "--", "-.", ":")
MARKERS = "osD^vP*X"
INK, GRID = "#1b1f24", "#d4d8dd"  # text and lines; the report puts its own colours in their place
AXES = {
    "rounds": ("round", "round"),
    "bytes": ("bytes", "MB sent (all clients, both ways)"),
    "gradients": ("gradients", "gradient evaluations"),
}
TARGET = {"rounds": "rounds", "bytes": "MB sent", "gradients": "gradient evaluations", "seconds": "seconds"}
SCALE = {"bytes": 1e-6}  # of the numbers on an axis
Styles = dict[str, dict[str, Any]]


def make_figures(table: Sequence[Row], folder: Path, target: float | None = None) -> list[Picture]:
    """Draw all figures that apply.

    For each setting accuracy and NLL (RMSE where there is no accuracy) against rounds, bytes sent and gradient
    evaluations, the line being the mean over seeds and the band one standard deviation; final ECE; what it took to
    reach ``target``. A heat map of methods and settings if there are several settings.

    Args:
        table: the rows.
        folder: takes the files; figures of an earlier table there are replaced.
        target: accuracy in percent.
    """
    folder.mkdir(parents=True, exist_ok=True)
    for old in [*folder.glob("*.png"), *folder.glob("*.svg")]:
        old.unlink()
    styles = {method: _style(i) for i, method in enumerate(dict.fromkeys(row.group.method for row in table))}
    settings = by_setting(table)
    pictures = []
    with matplotlib.rc_context({"svg.fonttype": "none", "svg.hashsalt": "bayesfed", "font.size": 9.5, **_ink()}):
        for number, (setting, part) in enumerate(settings, start=1):
            prefix = f"{number:02d}_" if len(settings) > 1 else ""
            for name, title, figure in _of_setting(part, styles, target):
                pictures.append(save(figure, folder, prefix + name, setting, title))
        for name, setting, title, figure in sensitivities(table):
            pictures.append(save(figure, folder, name, setting, title))
        if len(settings) > 1:
            for metric in _metrics(table, "main"):
                if score(metric).unit != OF_TARGET:
                    title = f"{_title(metric)} by method and setting"
                    pictures.append(save(heat_map(table, metric), folder, f"heat_map_{metric}", "", title))
    return pictures


def curves(groups: Sequence[Group], metric: str, cost: str, styles: Styles) -> Figure | None:
    """``metric`` against a cost; None if no run has both."""
    figure, axis = _figure()
    drawn: list[str] = []
    for group in groups:
        x, values = band(group, metric, AXES[cost][0])
        if not len(x):
            continue
        drawn.append(group.method)
        style = styles[group.method]
        mean = values.mean(0)
        x = x * SCALE.get(cost, 1.0)
        axis.plot(x, mean, markevery=max(1, len(x) // 8), markersize=4, linewidth=1.6, **style)
        if len(values) > 1:
            std = values.std(0, ddof=1)
            axis.fill_between(x, mean - std, mean + std, color=style["color"], alpha=0.18, linewidth=0)
    if not drawn:
        return None
    axis.set(xlabel=AXES[cost][1], ylabel=score(metric).axis)
    if cost == "rounds":
        axis.xaxis.set_major_locator(MaxNLocator(nbins=7, steps=[1, 2, 5, 10], integer=True))
    else:
        if _wide([line.get_xdata() for line in axis.get_lines()], 30):
            axis.set_xscale("log")
        if cost == "gradients":
            axis.xaxis.set_major_formatter(EngFormatter())
    if not score(metric).higher_is_better and _wide([line.get_ydata() for line in axis.get_lines()], 10):
        axis.set_yscale("log")
    _legend(figure, axis, drawn)
    return figure


def band(group: Group, metric: str, cost: str) -> tuple[np.ndarray, np.ndarray]:
    """Mean cost (R,) and values (seeds, R) in the rounds in which all finished runs were evaluated, training begun."""
    traces = [t for t in group.traces if metric in t.metrics]
    points = [
        {
            int(r): (t.costs[cost][i], t.metrics[metric][i])
            for i, r in enumerate(t.rounds)
            if r > 0 and math.isfinite(t.metrics[metric][i]) and math.isfinite(t.costs[cost][i])
        }
        for t in traces
    ]
    rounds = sorted(set.intersection(*(set(p) for p in points))) if points else []
    if not rounds:
        return np.empty(0), np.empty((0, 0))
    values = np.array([[p[r] for r in rounds] for p in points])
    return values[:, :, 0].mean(0), values[:, :, 1]


def dots(part: Sequence[Row], metric: str, styles: Styles) -> Figure | None:
    """Final ``metric`` of each method: every seed, mean and standard deviation."""
    shown = [row for row in part if metric in row.metrics and math.isfinite(row.metrics[metric].mean)]
    if not shown:
        return None
    figure, axis = _figure(height=1.2 + 0.34 * len(shown))
    for place, row in enumerate(shown):
        style, statistic = styles[row.group.method], row.metrics[metric]
        seeds = list(row.group.finals(metric).values())
        axis.plot(seeds, [place] * len(seeds), "o", color=style["color"], alpha=0.45, markersize=4)
        error = statistic.std if math.isfinite(statistic.std) else 0.0
        axis.errorbar(
            statistic.mean, place, xerr=error, fmt="|", color=style["color"], markersize=15, capsize=4, linewidth=1.6
        )
    _methods(axis, shown)
    axis.set_xlabel(score(metric).axis)
    return figure


def clients_apart(part: Sequence[Row], styles: Styles) -> Figure | None:
    """From the mean over clients to the mean over the worst tenth of them, each on its own test distribution; None
    without."""
    shown = [row for row in part if all(math.isfinite(row.clients.get(key, math.nan)) for key in ("mean", "worst10"))]
    if not shown:
        return None
    figure, axis = _figure(height=1.2 + 0.34 * len(shown))
    for place, row in enumerate(shown):
        colour, mean, worst = styles[row.group.method]["color"], row.clients["mean"], row.clients["worst10"]
        axis.plot([worst, mean], [place, place], color=colour, linewidth=2.2, alpha=0.5, solid_capstyle="butt")
        axis.plot(mean, place, "|", color=colour, markersize=15, markeredgewidth=2)
        axis.plot(worst, place, "o", color=colour, markersize=6)
    _methods(axis, shown)
    metric = next((m for m in _metrics(shown, "main") if m != NLL.name), NLL.name)
    axis.set_xlabel(f"{score(metric).axis}: client mean (bar),\nworst 10 % of clients (dot)")
    return figure


def bars(part: Sequence[Row], cost: str, target: float, styles: Styles) -> Figure | None:
    """What it took each method to reach ``target``; None if no method did."""
    values = [row.to_target.get(cost, math.nan) * SCALE.get(cost, 1.0) for row in part]
    if not any(math.isfinite(value) for value in values):
        return None
    figure, axis = _figure(height=1.2 + 0.34 * len(part))
    finite = [value for value in values if math.isfinite(value)]
    for place, (row, value) in enumerate(zip(part, values, strict=True)):
        if math.isfinite(value):
            axis.barh(place, value, color=styles[row.group.method]["color"], height=0.62)
        axis.annotate(
            f"{value:,.4g}" if math.isfinite(value) else "not reached by all seeds",
            (value if math.isfinite(value) else 0, place), xytext=(4, 0), textcoords="offset points",
            va="center", size=8.5,
        )  # fmt: skip
    axis.set_xlim(0, 1.4 * max(finite))
    axis.xaxis.set_major_locator(MaxNLocator(nbins=5, steps=[1, 2, 5, 10], integer=cost == "rounds"))
    if cost == "gradients":
        axis.xaxis.set_major_formatter(EngFormatter())
    _methods(axis, part)
    axis.set_xlabel(f"{TARGET[cost]}\nto {target:g} % accuracy")
    axis.grid(axis="y", visible=False)
    return figure


def heat_map(table: Sequence[Row], metric: str) -> Figure:
    """Mean of ``metric`` by method and setting; the best of a setting in bold."""
    methods = list(dict.fromkeys(row.group.method for row in table))
    settings = [setting for setting, _ in by_setting(table)]
    statistics = {(row.group.method, row.group.setting): row.metrics.get(metric) for row in table}
    values = np.array(
        [[getattr(statistics.get((m, s)), "mean", math.nan) for s in settings] for m in methods], dtype=np.float64
    )
    figure = Figure(figsize=(2.6 + 1.15 * len(settings), 1.7 + 0.36 * len(methods)), layout="constrained")
    FigureCanvasAgg(figure)
    axis = figure.subplots()
    up = score(metric).higher_is_better
    best = np.array([[getattr(statistics.get((m, s)), "best", False) for s in settings] for m in methods])
    shade(axis, values, up, best)
    axis.set_yticks(range(len(methods)), [label(method, width=18) for method in methods])
    axis.set_xticks(range(len(settings)), [_wrapped(s) for s in settings], size=8)
    axis.tick_params(length=0)
    axis.spines[:].set_visible(False)
    axis.set_title(f"{score(metric).axis},\nbest of a setting in bold", size=9.5)
    return figure


# -- details -----------------------------------------------------------------------------------------------------------


def _metrics(table: Sequence[Row], role: str) -> list[str]:
    return [m for m in ordered(m for row in table for m in row.metrics) if score(m).role == role]


def _title(metric: str) -> str:
    label = score(metric).label
    return label[:1].upper() + label[1:]


def _of_setting(part: Sequence[Row], styles: Styles, target: float | None) -> Iterator[tuple[str, str, Figure]]:
    groups = [row.group for row in part]
    for metric in _metrics(part, "main"):
        for cost in AXES:
            figure = curves(groups, metric, cost, styles)
            if figure is not None:
                yield f"{metric}_{cost}", f"{_title(metric)} against {TARGET[cost]}", figure
    for metric in _metrics(part, "shown"):
        figure = dots(part, metric, styles)
        if figure is not None:
            yield metric, f"{_title(metric)} after the last round, every seed", figure
    figure = clients_apart(part, styles)
    if figure is not None:
        yield "clients", "Fairness: each client on its own test distribution, mean over seeds", figure
    if target is not None:
        for cost in TARGET:
            figure = bars(part, cost, target, styles)
            if figure is not None:
                yield f"{cost}_to_target", f"Mean {TARGET[cost]} to {target:g} % accuracy", figure


def _style(index: int) -> dict[str, Any]:
    """Colour, line and marker of the method number ``index``: no two of the first 32 are the same."""
    around = index // len(COLOURS)
    return {
        "color": COLOURS[index % len(COLOURS)],
        "linestyle": LINES[around % len(LINES)],
        "marker": MARKERS[index % len(MARKERS)],
    }


def _ink() -> dict[Any, str]:
    keys = ("text.color", "axes.labelcolor", "axes.edgecolor", "xtick.color", "ytick.color")
    return {**dict.fromkeys(keys, INK), "grid.color": GRID}


def _figure(height: float = 3.3) -> tuple[Figure, Axes]:
    figure = Figure(figsize=(4.8, height), layout="constrained")
    FigureCanvasAgg(figure)
    axis = figure.subplots()
    axis.spines[["top", "right"]].set_visible(False)
    axis.grid(linewidth=0.6)
    axis.set_axisbelow(True)
    return figure, axis


def _legend(figure: Figure, axis: Axes, names: Sequence[str]) -> None:
    handles, labels = (
        axis.get_lines(),
        [label(name) for name in names],
    )  # given: by itself it leaves out a name such as _mine
    longest = max(len(label) for label in labels)
    columns = max(1, min(len(labels), 52 // (longest + 5)))
    figure.set_figheight(figure.get_figheight() + 0.18 * (math.ceil(len(labels) / columns) - 1))
    figure.legend(handles, labels, loc="outside upper center", ncols=columns, frameon=False, fontsize=8.5)


def _methods(axis: Axes, part: Sequence[Row]) -> None:
    """A row for each method, from above."""
    axis.set_yticks(range(len(part)), [label(row.group.method, width=18) for row in part])
    axis.set_ylim(len(part) - 0.5, -0.5)


def _wide(columns: Sequence[object], factor: float) -> bool:
    values = np.concatenate([np.asarray(column, dtype=np.float64) for column in columns])
    return bool(values.min() > 0 and values.max() > factor * values.min())


def _wrapped(setting: str) -> str:
    experiment, *swept = setting.split(" ")
    pairs = (item.rpartition("=")[0].rpartition(".")[2] + "=" + item.rpartition("=")[2] for item in swept)
    return "\n".join(label(line, 28, width=14) for line in (experiment, *pairs))
