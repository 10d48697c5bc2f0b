"""What a figure shows: the texts that are really drawn, where, and which of them nobody can read."""

from __future__ import annotations

from unittest import mock

from matplotlib.figure import Figure
from matplotlib.text import Text
from matplotlib.transforms import Bbox

SLACK = 1.0  # pixels


def texts(figure: Figure) -> list[tuple[str, Bbox]]:
    """Every text that is drawn, with its place in pixels (tick labels outside of the limits exist, but are not drawn)."""
    found: list[Text] = []
    draw = Text.draw

    def noted(self, renderer):
        if self.get_visible() and self.get_text().strip():
            found.append(self)
        draw(self, renderer)

    figure.canvas.draw()
    with mock.patch.object(Text, "draw", noted):
        figure.canvas.draw()
    return [(text.get_text(), text.get_window_extent(figure.canvas.get_renderer())) for text in found]


def cut_off(figure: Figure) -> list[str]:
    """Texts that reach beyond the edge of the figure."""
    page = figure.bbox.padded(SLACK)
    return [
        text
        for text, box in texts(figure)
        if box.x0 < page.x0 or box.y0 < page.y0 or box.x1 > page.x1 or box.y1 > page.y1
    ]


def overlapping(figure: Figure) -> list[tuple[str, str]]:
    """Pairs of texts that lie on each other."""
    shown = [(text, box.padded(-SLACK)) for text, box in texts(figure)]
    return [(a, b) for i, (a, one) in enumerate(shown) for b, other in shown[:i] if one.overlaps(other)]
