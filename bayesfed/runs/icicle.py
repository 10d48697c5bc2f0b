"""The picture of a profile: nested boxes, as wide as the time they stand for."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from matplotlib.axes import Axes
from matplotlib.backends.backend_agg import FigureCanvasAgg
from matplotlib.colors import to_rgb
from matplotlib.figure import Figure
from matplotlib.patches import Patch, Rectangle

from bayesfed.profiling import Node
from bayesfed.runs.labels import label
from bayesfed.runs.profile import CATEGORY_OF, IDLE, LABELS

# Paul Tol's muted palette, told apart with any colour vision; waiting and what has no category are grey, idle is
# hatched
COLOURS = {
    "start-up": "#777777",
    "data": "#DDCC77",
    "sampling": "#CC6677",
    "gradient": "#332288",
    "update": "#88CCEE",
    "sites": "#AA4499",
    "transport": "#117733",
    "waiting": "#DDDDDD",
    "aggregation": "#882255",
    "evaluation": "#44AA99",
    "records": "#999933",
    "other": "#F2F2F2",
    "idle": "#FFFFFF",
}
EDGE, HATCH = "#666666", "#BBBBBB"
NAMES = {
    "gradient": "forward/backward",
    "waiting": "waiting for clients",
    "read": "check replies",
    "roster": "roster: clients start",
    "train": "clients' work",
    "optimizer": "make the optimizer",
}
FIRST = ("start-up", "round", "train")  # on the left; other spans in the order in which they first came
WIDTH, ROW, AXIS, LEGEND = 10.0, 0.3, 0.45, 0.45  # inches
FONT, DPI = 8, 150


@dataclass
class Panel:
    """One icicle: its root box is labelled ``name``; ``legend`` gives the categories to list below it, if any."""

    name: str
    tree: Node
    legend: Mapping[str, Any] | None
    unit: str = "seconds"

    @property
    def rows(self) -> int:
        """Nesting levels."""
        return 2 + max((path.count("/") for path, _ in self.tree.paths()), default=-1)


def draw(profile: Mapping[str, Any], path: Path) -> None:
    """Write the picture."""
    path.parent.mkdir(exist_ok=True)
    icicle(profile).savefig(path, dpi=DPI, metadata={"Software": None})


def icicle(profile: Mapping[str, Any]) -> Figure:
    """The server's time, that of all workers together, and of the latter the part in which clients train."""
    panels = _panels(profile)
    heights: list[float] = []
    for panel in panels:
        heights += [panel.rows * ROW] if panel.legend is None else [panel.rows * ROW, LEGEND]
    figure = Figure(figsize=(WIDTH, sum(heights) + AXIS * len(panels) + 0.3), layout="constrained")
    FigureCanvasAgg(figure)
    figure.suptitle(
        f"where the time of the server and of its clients went, engine={label(profile['engine'])}", fontsize=10
    )
    axes = iter(figure.subplots(len(heights), 1, height_ratios=heights))
    placed = []
    for panel in panels:
        axis = next(axes)
        placed.append((panel, axis))
        axis.set(xlim=(0, max(panel.tree.seconds, 1e-9)), ylim=(panel.rows, 0), yticks=[])
        axis.set_xlabel(panel.unit, fontsize=FONT, labelpad=1)
        axis.tick_params(labelsize=FONT, pad=2)
        axis.spines[["left", "right", "top"]].set_visible(False)
        if panel.legend is not None:
            _legend(next(axes), panel.legend)
    figure.draw_without_rendering()  # places the axes: whether a label fits depends on it
    for panel, axis in placed:
        _box(axis, panel.tree, panel.name, "other", 0.0, 0)
        _children(axis, panel.tree, "other", 0.0, 1)
    return figure


def _panels(profile: Mapping[str, Any]) -> list[Panel]:
    workers = len(profile["workers"])
    name = f"{workers} worker{'s' * (workers != 1)}"
    if profile["engine"] == "inline":
        name = "clients (in the server's process)"
    unit = "seconds" if workers == 1 else "seconds, all workers added"
    server, clients = profile["server"], profile["clients"]
    tree = Node.from_plain(clients["tree"])
    panels = [
        Panel("server", Node.from_plain(server["tree"]), server["categories"]),
        Panel(name, tree, clients["categories"], unit),
    ]
    if "train" in tree.children:
        panels.append(Panel("clients' work, start-up left out", _started(tree.children["train"]), None, unit))
    return panels


def _started(node: Node) -> Node:
    """A copy of ``node`` without the start-up in it, which would dwarf the rest of a short run."""
    rest = Node(node.seconds, node.calls)
    for name, child in node.children.items():
        if CATEGORY_OF.get(name) == "start-up":
            rest.seconds -= child.seconds
        else:
            rest.children[name] = _started(child)
            rest.seconds -= child.seconds - rest.children[name].seconds
    return rest


def _children(axis: Axes, parent: Node, around: str, left: float, row: int) -> None:
    """Boxes for the spans in ``parent`` side by side from ``left`` on, and theirs below them."""
    for name in sorted(parent.children, key=lambda name: FIRST.index(name) if name in FIRST else len(FIRST)):
        node, category = parent.children[name], CATEGORY_OF.get(name, around)
        known = IDLE if around == "idle" else NAMES  # other names came with the clients' replies
        _box(axis, node, known.get(name) or label(name), category, left, row)
        _children(axis, node, category, left, row + 1)
        left += node.seconds


def _box(axis: Axes, node: Node, name: str, category: str, left: float, row: int) -> None:
    colour, idle = COLOURS[category], category == "idle"
    room = axis.transData.transform((node.seconds, 0))[0] - axis.transData.transform((0, 0))[0]  # pixels
    line = 0.4 if room > 3 else 0.0
    box = Rectangle((left, row + 0.03), node.seconds, 0.94, facecolor=colour, edgecolor=EDGE, linewidth=line)
    if idle:
        box.set(hatch="////", edgecolor=HATCH)
    axis.add_patch(box)
    red, green, blue = to_rgb(colour)
    dark = 0.299 * red + 0.587 * green + 0.114 * blue < 0.5
    text = axis.text(left + node.seconds / 2, row + 0.5, "", ha="center", va="center", fontsize=FONT)
    text.set_color("white" if dark else "black")
    if idle:
        text.set_bbox({"facecolor": "white", "edgecolor": "none", "pad": 1})
    words = (name, f"{node.seconds:.2f} s", f"({node.seconds / axis.get_xlim()[1]:.0%})")
    for count in range(len(words), 0, -1):  # as much as fits
        text.set_text("  ".join(words[:count]))
        if text.get_window_extent().width + 8 < room:
            return
    text.remove()


def _legend(axis: Axes, categories: Mapping[str, Any]) -> None:
    """Every category with its share: boxes can be too narrow for a label."""
    axis.set_axis_off()
    patches = []
    for name, row in categories.items():
        share = f"{LABELS[name]} {row['share']:.1%}"
        patch = Patch(facecolor=COLOURS[name], edgecolor=EDGE, linewidth=0.4, label=share)
        if name == "idle":
            patch.set(hatch="////", edgecolor=HATCH)
        patches.append(patch)
    axis.legend(handles=patches, loc="upper center", ncols=5, frameon=False, fontsize=FONT, borderaxespad=0)
