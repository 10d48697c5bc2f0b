"""Every figure can be read, from the smallest case to the largest: no text is cut off, and none lies on another."""

from __future__ import annotations

import warnings
from types import SimpleNamespace
from unittest import mock

import numpy as np
import pytest
import torch
from matplotlib.figure import Figure
from matplotlib.text import Text
from matplotlib.transforms import Bbox

from bayesfed.compare import figures as compared
from bayesfed.compare.results import Group, Trace
from bayesfed.compare.sensitivity import sensitivities
from bayesfed.compare.table import rows
from bayesfed.problem import Examples
from bayesfed.runs.figures import label_distribution, learning_curves, precision_figure, reliability_diagram
from bayesfed.runs.icicle import icicle
from bayesfed.runs.labels import label
from bayesfed.splits.figures import samples, size_bars, target_boxes

STRANGE = [
    "<script>alert(1)</script>",
    "$\\frac{",
    "_mine & \"theirs\"",
    "$a$ $b$",
    "\x1b[31mred",
    "\u65b9\u6cd5",  # no glyphs in matplotlib's font
    "W" * 300,
    "m rho=0.1 temperature=" + "0" * 300,
]  # fmt: skip
SLACK = 1.0  # pixels
SHAPES = [(1, 1), (1, 2), (2, 2), (5, 2), (15, 3), (200, 2), (200, 100), (1, 30)]


@pytest.fixture(autouse=True)
def no_warnings():
    """A missing glyph or axes without room are warnings."""
    with warnings.catch_warnings():
        warnings.simplefilter("error", UserWarning)
        yield


def texts(figure: Figure) -> list[tuple[str, Bbox]]:
    """Every text that is drawn, with its place in pixels (tick labels outside of the limits exist, but are not
    drawn).
    """
    found: list[Text] = []
    draw = Text.draw

    def noted(self, renderer):
        if self.get_visible() and self.get_text().strip():
            found.append(self)
        draw(self, renderer)

    with mock.patch.object(Text, "draw", noted):
        figure.canvas.draw()
    return [(text.get_text(), text.get_window_extent(figure.canvas.get_renderer())) for text in found]


def unreadable(figure: Figure) -> list[str]:
    """Texts that reach beyond the edge of the figure or lie on another."""
    page = figure.bbox.padded(SLACK)
    shown = texts(figure)
    found = [
        f"cut off: {text}"
        for text, box in shown
        if box.x0 < page.x0 or box.y0 < page.y0 or box.x1 > page.x1 or box.y1 > page.y1
    ]
    inner = [(text, box.padded(-SLACK)) for text, box in shown]
    return found + [f"{a} on {b}" for i, (a, one) in enumerate(inner) for b, other in inner[:i] if one.overlaps(other)]


def history(rounds: int, nll: float = 0.3, guard: int = 0, regression: bool = False) -> list[dict]:
    metrics = {"rmse": 5.8e5} if regression else {"accuracy": 90.0, "ece": 2.0}
    return [
        {f"{kind}/{name}": value for kind in ("mean", "bayes") for name, value in (metrics | {"nll": nll + t}).items()}
        | {
            "round": t,
            "bayes/nll": nll,
            "posterior/precision_min": 1.0 + t,
            "posterior/precision_max": 1e9,
            "guard/count": guard * t,
        }
        for t in range(rounds)
    ]


@pytest.mark.parametrize("shape", SHAPES)
@pytest.mark.parametrize("count", [1, 1_234_567])
def test_label_distribution(shape, count):
    figure = label_distribution(np.full(shape, count))
    assert unreadable(figure) == []
    ticks = figure.axes[-1].get_yticks()
    np.testing.assert_array_equal(ticks, np.round(ticks))  # examples are whole


@pytest.mark.parametrize("rounds", [1, 2, 200])
@pytest.mark.parametrize(("nll", "regression"), [(0.3, False), (1.7e11, True)])
def test_learning_curves(rounds, nll, regression):
    assert unreadable(learning_curves(history(rounds, nll, regression=regression))) == []


@pytest.mark.parametrize("final", [None, np.array([1.0, 1.001]), np.linspace(1, 4, 50), np.logspace(-9, 9, 500)])
@pytest.mark.parametrize(("rounds", "guard"), [(1, 0), (2, 1), (200, 1000)])
def test_precision(final, rounds, guard):
    assert unreadable(precision_figure(history(rounds, guard=guard), final)) == []


def test_reliability():
    columns = {"confidence": [None, 0.8], "accuracy": [None, 0.7], "count": [0, 1_000_000]}
    assert unreadable(reliability_diagram({"bins": 2, "mean": columns, "bayes": columns})) == []


@pytest.mark.parametrize("clients", [1, 2, 25, 200])
@pytest.mark.parametrize("size", [1, 1_234_567])
def test_client_sizes(clients, size):
    assert unreadable(size_bars(np.full(clients, size))) == []
    assert unreadable(size_bars(np.array([10 * size] + [size] * (clients - 1)))) == []


@pytest.mark.parametrize("clients", [1, 2, 200])
def test_samples_and_targets(clients):
    images = Examples(torch.rand(3, 1, 4, 4), torch.tensor([0, 1, 1]))
    names = {
        "classes": ["$a$", "b" * 300],
        "client_names": None,
        "named": lambda k: {"name": STRANGE[k % len(STRANGE)]},
    }
    problem = SimpleNamespace(clients=[images] * clients, num_classes=2, input_shape=(1, 4, 4), **names)
    assert unreadable(samples(problem, 1)) == []
    numbers = Examples(torch.rand(3, 1), 1e6 * torch.rand(3, 1))
    assert unreadable(target_boxes(SimpleNamespace(clients=[numbers] * clients, num_classes=None, **names))) == []


def test_a_profile_whose_clients_name_their_own_spans():
    spans = {name: {"seconds": 1.0, "calls": 1} for name in STRANGE}
    tree = {"seconds": 8.0, "calls": 1, "children": {"train": {"seconds": 8.0, "calls": 1, "children": spans}}}
    side = {
        "seconds": 8.0,
        "tree": tree,
        "categories": {"other": {"seconds": 8.0, "share": 1.0, "calls": 1, "mean": 8.0}},
    }
    figure = icicle({"engine": "$x$ $", "workers": [{}], "server": side, "clients": side})
    assert unreadable(figure) == []


# -- compare -----------------------------------------------------------------------------------------------------------


def trace(seed: int, scale: float) -> Trace:
    rounds = np.arange(3.0)
    accuracy = np.array([10.0, 60.0, 80.0]) + seed
    return Trace(
        seed, rounds, {"round": rounds, "bytes": 1e9 * rounds, "gradients": 5e6 * rounds, "seconds": 1234.5 * rounds},
        {"accuracy": accuracy, "nll": scale * (100 - accuracy), "ece": (100 - accuracy) / 10}, {},
        {"mean": 80.0, "worst10": 55.0, "spread": 9.0},
    )  # fmt: skip


def drawn(monkeypatch, folder, methods: list[str], settings: list[str], seeds: int, scale: float = 0.02) -> dict:
    """The figures that a comparison draws, by name."""
    found = {}

    def noted(figure, folder, name, setting, title):
        found[name] = figure
        return compared.Picture(name, setting, title, "")

    monkeypatch.setattr(compared, "save", noted)
    groups = [
        Group(s, m, [trace(seed + k, scale) for seed in range(seeds)]) for s in settings for k, m in enumerate(methods)
    ]
    compared.make_figures(rows(groups, methods[0], 75.0), folder, 75.0)
    return found


@pytest.mark.parametrize(
    ("methods", "settings", "seeds", "scale"),
    [
        (["fedavg"], ["s"], 1, 0.02),
        ([f"bayes_admm/diagonal damping=0.{k}" for k in range(11)], ["s"], 2, 1e11),
        (STRANGE, ["s", "<img src=x> data.path=" + "$x$_" * 90], 2, 1e-9),
    ],
)
def test_a_comparisons_figures(monkeypatch, tmp_path, methods, settings, seeds, scale):
    figures = drawn(monkeypatch, tmp_path, methods, settings, seeds, scale)
    assert len(figures) >= 12
    assert {name: found for name, figure in figures.items() if (found := unreadable(figure))} == {}
    accuracy = next(figure for name, figure in figures.items() if name.endswith("accuracy_rounds"))
    assert [text.get_text() for text in accuracy.legends[0].get_texts()] == [
        label(m) for m in methods
    ]  # none is dropped


def test_a_map_of_strange_values_has_a_file_name(tmp_path):
    table = rows(
        [Group("s", f"{'x' * 300}/$ r$={a} q={b}", [trace(1, 0.02)]) for a in ("$1$", "y" * 90) for b in "12"], "m"
    )
    ((name, _, _, figure), *_) = sensitivities(table)
    (tmp_path / f"{name}.png").touch()
    assert unreadable(figure) == []


def test_labels():
    assert label("a$b$ $c$") == "a\\$b\\$ \\$c\\$"
    assert label("x" * 20 + "y" * 20, 9) == "xxxxxx…yy"
    assert label("one two three", width=8) == "one two\nthree"
    assert label("\u65b9\x1b") == "\\u65b9\\x1b"
