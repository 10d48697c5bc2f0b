"""Figures and the page."""

from __future__ import annotations

import re
from dataclasses import replace
from html.parser import HTMLParser

import numpy as np
import pytest

from bayesfed.compare.figures import band, make_figures
from bayesfed.compare.formats import to_csv, to_latex, to_markdown
from bayesfed.compare.picture import Picture
from bayesfed.compare.report import About, report
from bayesfed.compare.results import Group
from bayesfed.compare.sensitivity import sensitivities
from bayesfed.compare.table import rows

ABOUT = About("bayesfed compare a=<b>", "fedavg", ["a & b"], [("s", "m", "client.lr=0.1", 80.0)], {"torch": "2"})


class Tags(HTMLParser):
    """Every tag with its attributes."""

    def __init__(self, text: str):
        super().__init__()
        self.found: list[tuple[str, dict[str, str | None]]] = []
        self.feed(text)

    def handle_starttag(self, tag, attributes):
        self.found.append((tag, dict(attributes)))

    handle_startendtag = handle_starttag


@pytest.fixture
def page(groups, tmp_path) -> str:
    other = [replace_setting(group) for group in groups]
    table = rows([*groups, *other], "fedavg", 75.0)
    return report(table, make_figures(table, tmp_path / "figures", 75.0), ABOUT)


def replace_setting(group: Group) -> Group:
    return replace(group, setting="another")


def test_nothing_is_loaded_from_elsewhere(page):
    assert "http" not in page
    tags = Tags(page).found
    assert {tag for tag, _ in tags} & {"script", "link", "iframe", "img", "object"} == set()
    for _, attributes in tags:
        for name in ("src", "href", "xlink:href"):
            assert (attributes.get(name) or "#").startswith(("#", "data:"))
    assert not re.search(r"url\((?!#)|@import", page)


def test_identifiers_are_unique_and_references_resolve(page):
    tags = Tags(page).found
    names = [attributes["id"] for _, attributes in tags if "id" in attributes]
    assert len(names) == len(set(names))
    used = {a["href"].removeprefix("#") for _, a in tags if (a.get("href") or "").startswith("#")}
    used |= set(re.findall(r"url\(#([^)]*)\)", page))
    assert used
    assert used <= set(names)


def test_names_are_escaped(page):
    assert "bayes_admm/&lt;diagonal&gt;" in page
    assert "<diagonal>" not in page
    assert "a=&lt;b&gt;" in page


def test_the_page_fits_phones_and_dark_screens(page):
    assert "width=device-width" in page
    assert "prefers-color-scheme: dark" in page
    assert "#1b1f24" not in page.split("</style>", 1)[1]  # no ink of its own in any figure


@pytest.mark.parametrize("seeds", [1, 3])
def test_the_table_fits_a_desktop(groups, seeds):
    """All columns there can be, in characters: at 7.5 pixels each and 18 of padding they must fit 1400 pixels less the
    margins.
    """
    for group in groups:
        del group.traces[seeds:]
        for one in group.traces:
            one.clients.update(mean=80.123, worst10=55.123, spread=9.123)
    page = report(rows(groups, "fedavg", 75.0), [], ABOUT)
    lines = [
        re.findall(r"<t[hd]>(.*?)</t[hd]>", line)
        for line in page.split("<table>")[1].split("</table>")[0].split("</tr>")
    ]
    header, *body = filter(None, lines)
    assert header[:4] == ["method", "accuracy (%)", "NLL", "ECE (%)"]  # what a phone shows
    assert all(len(line) == len(header) for line in body)
    words = [max(map(len, name.split())) for name in header]  # a header wraps, a number doesn't
    parts = [[max(map(len, re.sub(r"</?b>|</small>", "", cell).split("<small>"))) for cell in line] for line in body]
    widest = [max(column) for column in zip(words[1:], *(line[1:] for line in parts), strict=True)]
    assert sum(7.5 * size + 18 for size in widest) + 18 * 16 * 0.9 < 1400 - 64
    assert ("<small>p " in page) == (seeds > 1)
    assert not any(name.startswith("p ") for name in header)


def test_strange_names_are_text_wherever_they_stand(groups):
    strange = "<img src=x onerror=alert(1)>\x1b[31m\u202e&\"'</title><script>" + "x" * 300
    group = Group(strange, strange, groups[0].traces, {3: strange})
    table = rows([group, replace(group, method="b")], strange, 75.0)
    svg = '<svg width="1pt" height="1pt" xmlns="http://www.w3.org/2000/svg"><g id="a"/></svg>'
    about = About(strange, strange, [strange], [(strange, strange, strange, 1.0)], {strange: strange})
    page = report(table, [Picture(strange, strange, strange, svg)], about)
    assert {"script", "img"} & {tag for tag, _ in Tags(page).found} == set()
    assert all(not name.startswith("on") for _, attributes in Tags(page).found for name in attributes)
    for text in (page, to_markdown(table, strange), to_csv(table, 75.0), to_latex(table, strange)):
        assert "\x1b" not in text
        assert "\u202e" not in text
    assert "<img" not in to_markdown(table, strange)
    cells = re.findall(r"<td>([^<]*)</td>", page.split("<table>")[1])
    assert max(map(len, cells)) < 200  # 100 characters, escapes and how many more


def test_figures(groups, tmp_path):
    figures = make_figures(rows(groups, "fedavg", 75.0), tmp_path, 75.0)
    names = {figure.name for figure in figures}
    assert {f"{m}_{c}" for m in ("accuracy", "nll") for c in ("rounds", "bytes", "gradients")} < names
    assert {"ece", "rounds_to_target", "bytes_to_target", "gradients_to_target", "seconds_to_target"} < names
    assert {path.stem for path in tmp_path.glob("*.png")} == names
    again = make_figures(rows(groups, "fedavg"), tmp_path)
    assert {path.stem for path in tmp_path.glob("*.svg")} == {figure.name for figure in again}
    assert {figure.name: figure.svg for figure in again}["ece"] == {f.name: f.svg for f in figures}["ece"]


def test_heat_maps_need_several_settings(groups, tmp_path):
    table = rows([*groups, *map(replace_setting, groups)], "fedavg")
    assert {"heat_map_accuracy", "heat_map_nll"} <= {figure.name for figure in make_figures(table, tmp_path)}


def test_a_band_holds_the_rounds_that_all_runs_evaluated(groups):
    groups[0].traces[1].metrics["accuracy"][1] = np.nan
    x, values = band(groups[0], "accuracy", "bytes")
    assert x.tolist() == [2e6]
    assert values.tolist() == [[80], [81], [84]]


def test_failed_everywhere_still_makes_a_page(tmp_path):
    table = rows([Group("s", "m", [], {1: "no power"})], "m")
    assert "no power" in report(table, make_figures(table, tmp_path), ABOUT)


def test_fairness_is_drawn_where_clients_were_tested(groups, tmp_path):
    assert "clients" not in {figure.name for figure in make_figures(rows(groups, "fedavg"), tmp_path)}
    for group in groups:
        for one in group.traces:
            one.clients.update(mean=80.0, worst10=55.0, spread=9.0)
    assert "clients" in {figure.name for figure in make_figures(rows(groups, "fedavg"), tmp_path)}


# -- sensitivity -------------------------------------------------------------------------------------------------------


def swept(groups: list[Group], labels: list[str]) -> list:
    return rows([replace(groups[i % 2], method=label) for i, label in enumerate(labels)], labels[0])


def test_two_swept_values_of_a_method_make_a_map(groups, tmp_path):
    grid = [f"m rho={rho} temperature={tau}" for rho in ("0.5", "0.1", "2") for tau in ("0.01", "0.1")]
    names = {figure.name: figure for figure in make_figures(swept(groups, [*grid, "fedavg"]), tmp_path)}
    assert {"sensitivity_m_accuracy", "sensitivity_m_nll"} <= set(names)
    text = names["sensitivity_m_accuracy"].svg
    assert text.count(">81.7<") == 3  # fedavg's mean over seeds, at temperature=0.01
    assert text.count(">87.3<") == 3


@pytest.mark.parametrize(
    "labels",
    [
        ["m", "n"],
        ["m rho=1", "m rho=2"],
        ["m rho=1 lr=1 mu=1", "m rho=2 lr=2 mu=2"],
        ["m rho=1", "m lr=2"],
        ["m rho=1 lr=1", "n rho=2 lr=2"],
    ],
)
def test_no_map_without_two_axes(groups, tmp_path, labels):
    assert not [figure for figure in make_figures(swept(groups, labels), tmp_path) if "sensitivity" in figure.name]


def test_values_stand_at_their_coordinates(groups):
    """Rows are the first key, columns the second, both by size, whatever the order of the runs."""
    grid = [(rho, lr) for lr in ("0.1", "0.01") for rho in ("2", "0.5", "10")]
    table = [
        replace(row, metrics={"accuracy": replace(row.metrics["accuracy"], mean=float(rho) * 100 + float(lr))})
        for row, (rho, lr) in zip(swept(groups, [f"m rho={rho} lr={lr}" for rho, lr in grid]), grid, strict=True)
    ]
    ((name, _, _, figure),) = sensitivities(table)
    (axis,) = figure.axes
    expected = [[100 * rho + lr for lr in (0.01, 0.1)] for rho in (0.5, 2, 10)]
    np.testing.assert_allclose(axis.images[0].get_array(), expected)
    assert name == "sensitivity_m_accuracy"
    assert (axis.get_ylabel(), axis.get_xlabel()) == ("rho", "lr")
    assert [tick.get_text() for tick in axis.get_yticklabels()] == ["0.5", "2", "10"]
    assert [text.get_text() for text in axis.texts if text.get_weight() == "bold"] == ["1000.1"]


def test_a_cell_whose_runs_failed_is_blank(groups, tmp_path):
    table = swept(groups, [f"m rho={rho} lr={lr}" for rho in (1, 2) for lr in (1, 2)])
    table += rows([Group("one & only", "m rho=3 lr=1", [], {1: "diverged"})], "m")
    figures = {figure.name: figure.svg for figure in make_figures(table, tmp_path)}
    assert "blank: failed" in figures["sensitivity_m_accuracy"]
