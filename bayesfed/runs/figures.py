"""Figures of a run, from its files: ``figures/*.png``."""

from __future__ import annotations

import math
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np
from matplotlib import colormaps
from matplotlib.axes import Axes
from matplotlib.backends.backend_agg import FigureCanvasAgg
from matplotlib.colors import LinearSegmentedColormap
from matplotlib.figure import Figure
from matplotlib.ticker import MaxNLocator

from bayesfed.runs.directory import RunDirectory
from bayesfed.runs.labels import name_ticks
from bayesfed.runs.posterior_file import FILE_NAME, load_posterior
from bayesfed.scores import present

# Okabe and Ito's palette, told apart with any colour vision; mean and Bayes also differ in line style
COLOURS = {"mean": "#0072B2", "bayes": "#D55E00"}
NAMES = {"mean": "at the posterior mean", "bayes": "Bayesian model average"}
LINES = {"mean": "--", "bayes": "-"}
GREY = "#555555"
MARKERS_UP_TO = 30  # rounds
DPI = 150


def make_figures(
    run_dir: Path,
    *,
    label_counts: np.ndarray | None,
    reliability: dict[str, Any] | None,
    classes: Sequence[str] | None = None,
    clients: Sequence[str] | None = None,
) -> list[Path]:
    """Write the figures that apply to a run.

    ``learning_curves.png`` (metrics against rounds), ``label_distribution.png`` (who holds which classes),
    ``reliability.png`` (accuracy against confidence) and ``precision.png`` (posterior precision, and how often the
    positivity guard acted). A regression has no labels and a point estimate no precision: those are left out.

    Args:
        run_dir: directory with ``rounds.jsonl`` and ``posterior.safetensors`` (both optional).
        label_counts: (K, C) training examples of each client and class, or None.
        reliability: what ``bayesfed.problem.likelihood.metrics.reliability`` gives, or None.
        classes, clients: their names, where they have some.

    Returns:
        the files written.
    """
    run_dir = Path(run_dir)
    rounds = RunDirectory(run_dir).rounds()
    figures = {
        "learning_curves": learning_curves(rounds),
        "label_distribution": None
        if label_counts is None
        else label_distribution(np.asarray(label_counts), classes, clients),
        "reliability": None if reliability is None else reliability_diagram(reliability),
        "precision": precision_figure(rounds, _final_precision(run_dir / FILE_NAME)),
    }
    written = []
    for name, figure in figures.items():
        if figure is not None:
            path = run_dir / "figures" / f"{name}.png"
            path.parent.mkdir(exist_ok=True)
            figure.savefig(path, dpi=DPI, metadata={"Software": None})  # no version: equal runs, equal files
            written.append(path)
    return written


def learning_curves(rounds: Sequence[dict[str, Any]]) -> Figure | None:
    """Test metrics against rounds, one panel a metric; None if nothing was evaluated."""
    panels = [s for s in present(rounds) if any(len(series(rounds, f"{kind}/{s.name}")[0]) for kind in NAMES)]
    if not panels:
        return None
    curves = {(s.name, kind): series(rounds, f"{kind}/{s.name}") for s in panels for kind in NAMES}
    # under a point mass both predictives are the same: one line says it all
    same = all(np.array_equal(curves[s.name, "mean"], curves[s.name, "bayes"]) for s in panels)
    figure, axes = _figure(len(panels))
    for axis, score in zip(axes, panels, strict=True):
        for kind in ("mean",) if same else NAMES:
            x, y = curves[score.name, kind]
            if len(x):
                marker = "o" if len(x) <= MARKERS_UP_TO else None
                line = "-" if same else LINES[kind]
                axis.plot(x, y, line, color=COLOURS[kind], label=NAMES[kind], marker=marker, markersize=3.5)
        axis.set(xlabel="round", ylabel=score.axis)
        axis.xaxis.set_major_locator(_whole_numbers())
        if score.role == "main" and not score.higher_is_better:
            _log_if_wide(axis)
    if not same:
        _legend_above(figure, axes)
    return figure


def label_distribution(
    counts: np.ndarray, classes_named: Sequence[str] | None = None, clients_named: Sequence[str] | None = None
) -> Figure | None:
    """Clients by classes, the shade giving the number of examples, below the clients' sizes; None without examples.

    Args:
        counts: (K, C).
        classes_named, clients_named: names instead of numbers.
    """
    if counts.size == 0 or counts.max() <= 0:
        return None
    clients, classes = counts.shape
    by_class = counts.T  # clients along the wide side: there can be a hundred
    figure = Figure(figsize=(7.2, float(np.clip(0.28 * classes + 1.9, 2.8, 8.0))), layout="constrained")
    FigureCanvasAgg(figure)
    height = figure.get_figheight()
    sizes, axis = figure.subplots(2, 1, sharex=True, height_ratios=[0.7, height - 1.5])
    sizes.bar(np.arange(clients), counts.sum(1), color=GREY, width=0.8)
    sizes.set_ylabel("examples")
    _plain(sizes)
    sizes.grid(axis="x", visible=False)
    sizes.yaxis.set_major_locator(MaxNLocator(nbins=2, integer=True))
    shades = LinearSegmentedColormap.from_list("shades", colormaps["Blues"](np.linspace(0.18, 1.0, 256)))
    image = axis.imshow(np.ma.masked_equal(by_class, 0), cmap=shades, aspect="auto", vmin=0)
    axis.set(xlabel="client", ylabel="class")
    axis.xaxis.set_major_locator(MaxNLocator(nbins=20, integer=True, min_n_ticks=1))
    axis.yaxis.set_major_locator(MaxNLocator(nbins=20, integer=True, min_n_ticks=1))
    name_ticks(axis.xaxis, clients_named, rotated=True)
    name_ticks(axis.yaxis, classes_named)
    for positions, draw in ((np.arange(0.5, clients - 1), axis.axvline), (np.arange(0.5, classes - 1), axis.axhline)):
        for position in positions:
            draw(position, color="white", linewidth=1.0 if len(positions) <= 40 else 0.4)
    axis.tick_params(length=0)
    axis.spines[:].set_visible(False)
    sizes.tick_params(axis="x", length=0)
    room = 75 // clients  # characters in a cell
    if clients <= 15 and classes <= 20 and len(str(by_class.max())) < room:
        dark = by_class > 0.5 * by_class.max()
        for row, client in np.argwhere(by_class > 0):
            colour = "white" if dark[row, client] else "black"
            axis.text(client, row, str(by_class[row, client]), ha="center", va="center", size=7, color=colour)
    ticks = MaxNLocator(nbins=6, integer=True)
    bar = figure.colorbar(image, ax=[sizes, axis], pad=0.02, aspect=30, ticks=ticks)
    bar.set_label("training examples\nof a class (blank: none)")  # two lines: two classes make a low figure
    bar.outline.set_visible(False)
    return figure


def reliability_diagram(reliability: dict[str, Any]) -> Figure:
    """Accuracy against confidence per bin, over the number of examples in each bin."""
    figure = Figure(figsize=(4.6, 5.2), layout="constrained")
    FigureCanvasAgg(figure)
    upper, lower = figure.subplots(2, 1, sharex=True, height_ratios=[3.2, 1])
    upper.plot([0, 1], [0, 1], color=GREY, linewidth=1, linestyle=":", label="perfectly calibrated")
    bins = reliability["bins"]
    edges = np.linspace(0, 1, bins + 1)
    for kind in NAMES:
        if kind not in reliability:
            continue
        columns = reliability[kind]
        used = [i for i, value in enumerate(columns["confidence"]) if value is not None]
        confidence, accuracy = ([columns[key][i] for i in used] for key in ("confidence", "accuracy"))
        upper.plot(confidence, accuracy, LINES[kind], color=COLOURS[kind], label=NAMES[kind], marker="o", markersize=4)
        lower.stairs(columns["count"], edges, color=COLOURS[kind], linestyle=LINES[kind], linewidth=1.4)
    upper.set(ylabel="accuracy", xlim=(0, 1), ylim=(0, 1))
    upper.legend(frameon=False, loc="upper left", fontsize=9)
    lower.set(xlabel="confidence (probability of the predicted class)", ylabel="examples")
    lower.set_yscale("symlog", linthresh=1)
    lower.set_ylim(bottom=0)
    for axis in (upper, lower):
        _plain(axis)
    return figure


def precision_figure(rounds: Sequence[dict[str, Any]], final: np.ndarray | None) -> Figure | None:
    """Posterior precision over rounds, the final one per parameter, and guard counts if there are any.

    Args:
        rounds: the records; None, NaN and non-positive values are left out.
        final: (P,) marginal precisions at the end (one value if shared), or None.

    Returns:
        None if there is no finite precision.
    """
    curves = {key: series(rounds, f"posterior/precision_{key}", positive=True) for key in ("max", "mean", "min")}
    curves = {key: curve for key, curve in curves.items() if len(curve[0])}
    if not curves:
        return None
    spread = final is not None and final.size > 1 and final.max() > final.min() * (1 + 1e-6)
    guard_x, guard_y = series(rounds, "guard/count")
    guarded = len(guard_y) > 0 and guard_y.max() > 0
    figure, axes = _figure(1 + bool(spread) + bool(guarded))
    lowest, highest = curves.get("min"), curves.get("max")
    if lowest and highest and np.array_equal(lowest[1], highest[1]):  # one precision for all parameters
        curves = {"mean": lowest}
        axes[0].set_ylabel("posterior precision")
    else:
        axes[0].set_ylabel("posterior precision of a parameter")
    names = {"max": ("largest", ":"), "mean": ("mean", "-"), "min": ("smallest", "--")}
    for key, (x, y) in curves.items():
        axes[0].plot(x, y, names[key][1], color=COLOURS["mean"], label=names[key][0])
    _log_if_wide(axes[0], factor=5)
    if len(curves) > 1:
        axes[0].legend(frameon=False, fontsize=9)
    axes[0].set_xlabel("round")
    axes[0].xaxis.set_major_locator(_whole_numbers())
    if final is not None and spread:
        exponents = np.log10(final)
        edges = np.logspace(exponents.min(), exponents.max(), int(np.clip(math.sqrt(final.size), 10, 60)) + 1)
        edges[0], edges[-1] = min(edges[0], final.min()), max(edges[-1], final.max())  # rounding must lose nobody
        axes[1].hist(final, bins=edges.tolist(), color=COLOURS["mean"])
        axes[1].set(yscale="log", xlabel="final precision of a parameter", ylabel="parameters")
        if final.max() > 3 * final.min():  # within a decade a log scale labels its minor ticks, one over the other
            axes[1].set_xscale("log")
        else:
            axes[1].xaxis.set_major_locator(MaxNLocator(nbins=4))
    if guarded:
        axes[-1].bar(guard_x, guard_y, color=COLOURS["bayes"], width=0.8)
        axes[-1].set(xlabel="round", ylabel="entries raised by the guard")
        axes[-1].xaxis.set_major_locator(_whole_numbers())
        axes[-1].yaxis.set_major_locator(_whole_numbers())
    return figure


def series(rounds: Sequence[dict[str, Any]], key: str, positive: bool = False) -> tuple[np.ndarray, np.ndarray]:
    """Rounds and values of ``key`` where it is a finite (and positive) number."""
    points = [
        (record["round"], record[key])
        for record in rounds
        if isinstance(record.get(key), int | float) and math.isfinite(record[key]) and (record[key] > 0 or not positive)
    ]
    table = np.array(points, dtype=np.float64).reshape(-1, 2)
    return table[:, 0], table[:, 1]


def _final_precision(path: Path) -> np.ndarray | None:
    if not path.is_file():
        return None
    precision = load_posterior(path)[0].precision
    values = (precision.diagonal() if precision.dim() == 2 else precision.reshape(-1)).double().numpy()
    return values[np.isfinite(values) & (values > 0)]


def _figure(panels: int) -> tuple[Figure, list[Axes]]:
    figure = Figure(figsize=(3.6 * panels + 0.4, 3.1), layout="constrained")
    FigureCanvasAgg(figure)
    axes = [figure.add_subplot(1, panels, i + 1) for i in range(panels)]
    for axis in axes:
        _plain(axis)
    return figure, axes


def _plain(axis: Axes) -> None:
    axis.spines[["top", "right"]].set_visible(False)
    axis.grid(color="#dddddd", linewidth=0.6)
    axis.set_axisbelow(True)


def _legend_above(figure: Figure, axes: Sequence[Axes]) -> None:
    handles = {label: handle for axis in axes for handle, label in zip(*axis.get_legend_handles_labels(), strict=True)}
    figure.legend(
        list(handles.values()), list(handles), loc="outside upper center", ncols=len(handles), frameon=False, fontsize=9
    )


def _whole_numbers() -> MaxNLocator:
    return MaxNLocator(nbins=7, steps=[1, 2, 5, 10], integer=True)


def _log_if_wide(axis: Axes, factor: float = 30) -> None:
    """A log scale where one early round would flatten all that follows."""
    values = np.concatenate([np.asarray(line.get_ydata(), dtype=np.float64) for line in axis.get_lines()])
    if values.min() > 0 and values.max() > factor * values.min():
        axis.set_yscale("log")
