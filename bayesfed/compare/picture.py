"""A figure of a comparison, as files and in the report."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path

from matplotlib.figure import Figure

DPI = 160


@dataclass(frozen=True)
class Picture:
    """A figure as it goes into the report.

    Attributes:
        name: of its files, without ending.
        setting: it belongs to; empty for all.
        title: what it shows.
        svg: the file's text.
    """

    name: str
    setting: str
    title: str
    svg: str


def save(figure: Figure, folder: Path, name: str, setting: str, title: str) -> Picture:
    """Write ``name``.png and ``name``.svg."""
    figure.savefig(folder / f"{name}.png", dpi=DPI, metadata={"Software": None})  # no version: equal runs, equal files
    path = folder / f"{name}.svg"
    figure.savefig(path, metadata={"Date": None, "Creator": None}, transparent=True)
    return Picture(name, setting, title, path.read_text())
