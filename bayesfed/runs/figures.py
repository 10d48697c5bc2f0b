"""Figures of a run, from its files: ``figures/*.png``."""

from __future__ import annotations

import math
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np
from matplotlib.axes import Axes
from matplotlib.backends.backend_agg import FigureCanvasAgg
from matplotlib.figure import Figure
from matplotlib.ticker import MaxNLocator

from bayesfed.runs.posterior_file import FILE_NAME, load_posterior
from bayesfed.runs.trained import read_rounds

# Okabe and Ito's palette, told apart with any colour vision; mean and Bayes also differ in line style
COLOURS = {"mean": "#0072B2", "bayes": "#D55E00"}
NAMES = {"mean": "at the posterior mean", "bayes": "Bayesian model average"}
LINES = {"mean": "--", "bayes": "-"}
GREY = "#555555"
MARKERS_UP_TO = 30  # rounds
DPI = 150


def make_figures(run_dir: Path, *, label_counts: np.ndarray | None, reliability: dict[str, Any] | None) -> list[Path]:
    """Write the figures that apply to a run.

    ``learning_curves.png`` (metrics against rounds), ``label_distribution.png`` (who holds which classes),
    ``reliability.png`` (accuracy against confidence) and ``precision.png`` (posterior precision, and how often the
    positivity guard acted). A regression has no labels and a point estimate no precision: those are left out.

    Args:
        run_dir: directory with ``rounds.jsonl`` and ``posterior.safetensors`` (both optional).
        label_counts: (K, C) training examples of each client and class, or None.
        reliability: what ``bayesfed.evaluation.reliability`` gives, or None.

    Returns:
        the files written.
    """
    run_dir = Path(run_dir)
    rounds = read_rounds(run_dir)
    figures = {
        "learning_curves": learning_curves(rounds),
        "label_distribution": None if label_counts is None else label_distribution(np.asarray(label_counts)),
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
    panels = [
        ("accuracy", "accuracy (%)"),
        ("rmse", "RMSE (units of the target)"),
        ("nll", "NLL (nats per example)"),
        ("ece", "ECE (%)"),
    ]
    panels = [(key, label) for key, label in panels if any(len(series(rounds, f"{k}/{key}")[0]) for k in NAMES)]
    if not panels:
        return None
    figure, axes = _figure(len(panels))
    for axis, (key, label) in zip(axes, panels, strict=True):
        for kind in NAMES:
            x, y = series(rounds, f"{kind}/{key}")
            if len(x):
                marker = "o" if len(x) <= MARKERS_UP_TO else None
                axis.plot(x, y, LINES[kind], color=COLOURS[kind], label=NAMES[kind], marker=marker, markersize=3.5)
        axis.set(xlabel="round", ylabel=label)
        axis.xaxis.set_major_locator(MaxNLocator(integer=True))
        if key != "accuracy":
            _log_if_wide(axis)
    _legend_above(figure, axes[0])
    return figure


def label_distribution(counts: np.ndarray) -> Figure | None:
    """Clients by classes, the shade giving the number of examples; None without examples.

    Args:
        counts: (K, C).
    """
    if counts.size == 0 or counts.max() <= 0:
        return None
    clients, classes = counts.shape
    by_class = counts.T  # clients along the wide side: there can be a hundred
    figure = Figure(figsize=(7.2, float(np.clip(0.30 * classes + 1.1, 2.2, 9.0))), layout="constrained")
    FigureCanvasAgg(figure)
    axis = figure.add_subplot()
    image = axis.imshow(np.ma.masked_equal(by_class, 0), cmap="viridis_r", aspect="auto", vmin=0)
    axis.set(xlabel="client", ylabel="class")
    axis.xaxis.set_major_locator(MaxNLocator(nbins=20, integer=True, min_n_ticks=1))
    axis.yaxis.set_major_locator(MaxNLocator(nbins=20, integer=True, min_n_ticks=1))
    axis.set_xticks(np.arange(-0.5, clients), minor=True)
    axis.set_yticks(np.arange(-0.5, classes), minor=True)
    axis.grid(which="minor", color="white", linewidth=1.0 if clients <= 40 else 0.4)
    axis.tick_params(which="both", length=0)
    axis.spines[:].set_visible(False)
    if clients <= 15 and classes <= 20:
        dark = by_class > 0.5 * by_class.max()
        for label, client in np.argwhere(by_class > 0):
            colour = "white" if dark[label, client] else "black"
            axis.text(client, label, f"{by_class[label, client]:g}", ha="center", va="center", size=7, color=colour)
    bar = figure.colorbar(image, ax=axis, pad=0.02)
    bar.set_label("training examples (blank: none)")
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
        used = [i for i, count in enumerate(columns["count"]) if count]
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
    curves = [
        (label, style, *series(rounds, f"posterior/precision_{key}", positive=True))
        for key, label, style in (("max", "largest", ":"), ("mean", "mean", "-"), ("min", "smallest", "--"))
    ]
    curves = [curve for curve in curves if len(curve[2])]
    if not curves:
        return None
    spread = final is not None and final.size > 1 and final.max() > final.min() * (1 + 1e-6)
    guard_x, guard_y = series(rounds, "guard/count")
    guarded = len(guard_y) > 0 and guard_y.max() > 0
    figure, axes = _figure(1 + bool(spread) + bool(guarded))
    constant = all(np.array_equal(curve[3], curves[0][3]) for curve in curves)
    for label, style, x, y in curves[:1] if constant else curves:
        marker = "o" if len(x) <= MARKERS_UP_TO else None
        axes[0].plot(x, y, style, color=COLOURS["mean"], label=label, marker=marker, markersize=3.5)
    axes[0].set_yscale("log")
    if not constant:
        axes[0].legend(frameon=False, fontsize=9)
    axes[0].set(xlabel="round", ylabel="posterior precision" + (" (one for all parameters)" if constant else ""))
    axes[0].xaxis.set_major_locator(MaxNLocator(integer=True))
    if final is not None and spread:
        exponents = np.log10(final)
        edges = np.logspace(exponents.min(), exponents.max(), int(np.clip(math.sqrt(final.size), 10, 60)) + 1)
        edges[0], edges[-1] = min(edges[0], final.min()), max(edges[-1], final.max())  # rounding must lose nobody
        axes[1].hist(final, bins=edges, color=COLOURS["mean"])
        axes[1].set(xscale="log", yscale="log", xlabel="final precision of a parameter", ylabel="parameters")
    if guarded:
        axes[-1].bar(guard_x, guard_y, color=COLOURS["bayes"], width=0.8)
        axes[-1].set(xlabel="round", ylabel="precisions raised by the guard")
        axes[-1].xaxis.set_major_locator(MaxNLocator(integer=True))
        axes[-1].yaxis.set_major_locator(MaxNLocator(integer=True))
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


def _legend_above(figure: Figure, axis: Axes) -> None:
    handles, labels = axis.get_legend_handles_labels()
    figure.legend(handles, labels, loc="outside upper center", ncols=len(labels), frameon=False, fontsize=9)


def _log_if_wide(axis: Axes) -> None:
    """A log scale where one early round would flatten all that follows."""
    values = np.concatenate([np.asarray(line.get_ydata(), dtype=np.float64) for line in axis.get_lines()])
    if values.min() > 0 and values.max() > 30 * values.min():
        axis.set_yscale("log")
