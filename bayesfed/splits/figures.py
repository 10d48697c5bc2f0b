"""Pictures of a split: ``label_distribution``, ``sizes``, ``samples`` and, for regression, ``targets``."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path

import numpy as np
import torch
from matplotlib.axes import Axes
from matplotlib.backends.backend_agg import FigureCanvasAgg
from matplotlib.figure import Figure
from matplotlib.layout_engine import ConstrainedLayoutEngine
from matplotlib.ticker import MaxNLocator

from bayesfed.problem import Examples, Problem
from bayesfed.runs.figures import DPI, label_distribution
from bayesfed.runs.labels import label, name_ticks
from bayesfed.seeding import numpy_generator

BLUE, ORANGE, GREY = "#0072B2", "#D55E00", "#555555"
ROWS, COLUMNS = 10, 12  # clients and images in the picture of samples


def make_figures(problem: Problem, folder: Path, seed: int) -> list[Path]:
    """Draw what applies; returns the files."""
    sizes = np.array([len(client) for client in problem.clients])
    figures: dict[str, Figure | None] = {
        "label_distribution": None
        if problem.label_counts is None
        else label_distribution(problem.label_counts, problem.classes, problem.client_names),
        "sizes": size_bars(sizes, problem.client_names),
        "samples": samples(problem, seed)
        if isinstance(problem.input_shape, tuple) and len(problem.input_shape) == 3
        else None,
        "targets": target_boxes(problem) if problem.num_classes is None else None,
    }
    folder.mkdir(parents=True, exist_ok=True)
    written = []
    for name, figure in figures.items():
        path = folder / f"{name}.png"
        path.unlink(missing_ok=True)
        if figure is not None:
            figure.savefig(path, dpi=DPI, metadata={"Software": None})
            written.append(path)
    return written


def size_bars(sizes: np.ndarray, names: Sequence[str] | None = None) -> Figure:
    """Examples of each client, largest first, with the mean."""
    figure = Figure(figsize=(6.4, 3.0), layout="constrained")
    FigureCanvasAgg(figure)
    axis = figure.subplots()
    order = np.argsort(-sizes, kind="stable")
    axis.bar(np.arange(len(sizes)), sizes[order], color=BLUE, width=0.8 if len(sizes) <= 60 else 1.0)
    axis.axhline(sizes.mean(), color=ORANGE, linewidth=1.2, linestyle="--")
    axis.text(
        len(sizes) - 0.5, sizes.mean(), f"mean {sizes.mean():,.0f}", color=ORANGE, ha="right", va="bottom", size=9
    )
    axis.set(xlabel="client, largest first", ylabel="training examples", xlim=(-0.6, len(sizes) - 0.4))
    if len(sizes) <= 25:
        axis.set_xticks(range(len(sizes)), [str(k) for k in order])
        name_ticks(axis.xaxis, None if names is None else [names[k] for k in order], rotated=True)
    else:
        axis.set_xlabel("rank of the client by size")
        axis.xaxis.set_major_locator(MaxNLocator(nbins=10, integer=True))
    _plain(axis)
    axis.grid(axis="x", visible=False)
    return figure


def samples(problem: Problem, seed: int) -> Figure:
    """Some training images of some clients as these see them, with the labels these see."""
    count = len(problem.clients)
    chosen = np.unique(np.linspace(0, count - 1, min(count, ROWS)).round().astype(int))
    tight = ConstrainedLayoutEngine(w_pad=0.02, h_pad=0.015, wspace=0.0, hspace=0.0, rect=(0.015, 0, 0.985, 1))
    figure = Figure(figsize=(0.62 * COLUMNS + 2.0, 0.74 * len(chosen) + 0.35), layout=tight)
    FigureCanvasAgg(figure)
    axes = figure.subplots(len(chosen), COLUMNS, squeeze=False)
    high = max(
        float(_stored(problem.clients[k], np.arange(min(len(problem.clients[k]), COLUMNS))).max()) for k in chosen
    )
    for row, k in zip(axes, chosen, strict=True):
        client = problem.clients[k]
        size = min(len(client), COLUMNS)
        picked = np.sort(numpy_generator(seed, "picture", int(k)).choice(len(client), size, replace=False))
        images, labels = _stored(client, picked), client.targets()[torch.from_numpy(picked)]
        order = np.argsort(labels.numpy().reshape(size, -1)[:, 0], kind="stable")
        for axis in row:
            axis.set_axis_off()
        for axis, i in zip(row, order, strict=False):
            _image(axis, images[i], high)
            if problem.num_classes is not None:
                code = int(labels[i])
                name = code if problem.classes is None else problem.classes[code]
                axis.set_title(label(name, 8), size=7, pad=1.5, color=GREY)
        row[0].text(
            -0.25, 0.5, _caption(client, problem.named(int(k)).get("name", f"client {k}")),
            transform=row[0].transAxes, ha="right", va="center", size=7.5, linespacing=1.3,
        )  # fmt: skip
    return figure


def target_boxes(problem: Problem) -> Figure:
    """Targets of each client of a regression."""
    figure = Figure(figsize=(6.4, 3.0), layout="constrained")
    FigureCanvasAgg(figure)
    axis = figure.subplots()
    values = [client.targets().reshape(len(client), -1)[:, 0].numpy() for client in problem.clients]
    drawn = axis.boxplot(
        values, positions=range(len(values)), widths=0.6, patch_artist=True, manage_ticks=False,
        flierprops={"markersize": 2.5, "markeredgecolor": GREY}, medianprops={"color": ORANGE},
    )  # fmt: skip
    for box in drawn["boxes"]:
        box.set(facecolor="#cfe3f1", edgecolor=BLUE)
    axis.set(xlabel="client", ylabel="target")
    axis.xaxis.set_major_locator(MaxNLocator(nbins=20, integer=True, min_n_ticks=1))
    name_ticks(axis.xaxis, problem.client_names, rotated=True)
    _plain(axis)
    return figure


def _stored(client: Examples, positions: np.ndarray) -> torch.Tensor:
    """Images in the units they are stored in, shifted as the client sees them."""
    rows = torch.from_numpy(positions) if client.index is None else client.index[torch.from_numpy(positions)]
    x = client.x.index_select(0, rows).to(torch.float32)
    return x if client.shift is None else client.shift.inputs(x)


def _image(axis: Axes, image: torch.Tensor, high: float) -> None:
    pixels = (image / max(high, 1e-12)).clamp(0, 1).numpy()
    if len(pixels) == 3:
        axis.imshow(pixels.transpose(1, 2, 0), interpolation="nearest")
    else:
        axis.imshow(pixels[0], cmap="gray", vmin=0, vmax=1, interpolation="nearest")


def _caption(client: Examples, name: str) -> str:
    lines = [label(name, 20), f"{len(client):,} examples"]
    if client.shift is not None:
        told = [f"{client.shift.angle:+.0f}°"] if client.shift.angle else []
        told += [f"contrast {client.shift.contrast:.2f}"] if client.shift.contrast != 1 else []
        told += [f"light {client.shift.brightness:+.2f}"] if client.shift.brightness else []
        moved = sum(c != other for c, other in enumerate(client.shift.labels))
        lines += [", ".join(told)] if told else []
        lines += [f"{moved} labels moved"] if moved else []
    return "\n".join(lines)


def _plain(axis: Axes) -> None:
    axis.spines[["top", "right"]].set_visible(False)
    axis.grid(color="#dddddd", linewidth=0.6)
    axis.set_axisbelow(True)
