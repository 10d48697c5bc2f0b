"""``report.html``: the whole comparison in one file that needs nothing else."""

from __future__ import annotations

import html
import math
import re
from collections.abc import Sequence
from dataclasses import dataclass

from bayesfed.compare.figures import GRID, INK
from bayesfed.compare.picture import Picture
from bayesfed.compare.table import Row, below, by_setting, caption, cells
from bayesfed.foreign import plain_text

STYLE = """
:root { color-scheme: light dark; --ground: #fbfbfa; --card: #ffffff; --ink: #1b1f24; --soft: #5c6570; --line: #dfe3e8;
  --mark: #e8f1f8; --bad: #a33a00; }
@media (max-width: 40rem) { th, td { padding: .4rem .4rem; } table { font-size: .84rem; }
  th:first-child, td:first-child { min-width: 6.2rem; max-width: 7rem; } }
@media (prefers-color-scheme: dark) { :root { --ground: #14171a; --card: #1c2024; --ink: #e8eaed; --soft: #a4adb6;
  --line: #343a41; --mark: #1f3342; --bad: #ff9a66; } }
* { box-sizing: border-box; }
body { margin: 0 auto; max-width: 86rem; padding: 1.25rem clamp(.75rem, 2.5vw, 2rem) 4rem; background: var(--ground);
  color: var(--ink); font: 16px/1.5 system-ui, -apple-system, "Segoe UI", Roboto, sans-serif; }
h1 { font-size: clamp(1.5rem, 4vw, 2.1rem); line-height: 1.2; margin: .5rem 0 .25rem; }
h2 { font-size: 1.3rem; margin: 2.5rem 0 .5rem; overflow-wrap: anywhere; }
p, figcaption { color: var(--soft); margin: .4rem 0; max-width: 64rem; overflow-wrap: anywhere; }
.scroll { overflow-x: auto; background: var(--card); border: 1px solid var(--line); border-radius: 10px; }
table { border-collapse: collapse; width: 100%; font-size: .9rem; font-variant-numeric: tabular-nums; }
th, td { padding: .45rem .55rem; text-align: right; vertical-align: top; border-bottom: 1px solid var(--line); }
td { white-space: nowrap; }
tr:last-child td { border-bottom: 0; }
th { color: var(--soft); font-weight: 600; font-size: .82rem; line-height: 1.25; vertical-align: bottom; }
th:first-child, td:first-child { text-align: left; position: sticky; left: 0; background: var(--card);
  white-space: normal; overflow-wrap: anywhere; min-width: 8.5rem; max-width: 18rem; }
td small { display: block; color: var(--soft); font-size: .8rem; }
.words td { white-space: normal; overflow-wrap: anywhere; text-align: left; } .words th { text-align: left; }
td b { background: var(--mark); border-radius: 5px; padding: .1rem .35rem; margin: 0 -.35rem; }
.small { font-size: .88rem; }
.figures { display: grid; gap: 1rem; grid-template-columns: repeat(auto-fit, minmax(min(100%, 21rem), 1fr));
  margin-top: 1rem; }
figure { margin: 0; padding: .7rem .9rem; background: var(--card); border: 1px solid var(--line); border-radius: 10px; }
figure svg { display: block; width: 100%; height: auto; max-height: 30rem; fill: var(--ink); }
figure.wide { grid-column: 1 / -1; }
figcaption { font-size: .88rem; }
.bad { color: var(--bad); }
details { margin-top: 1rem; } summary { cursor: pointer; color: var(--soft); }
pre { white-space: pre-wrap; overflow-wrap: anywhere; background: var(--card);
  border: 1px solid var(--line); border-radius: 10px; padding: .8rem; }
"""


@dataclass(frozen=True)
class About:
    """What a reader must know to trust the numbers.

    Attributes:
        command: that makes this report.
        baseline: method of the paired tests.
        notes: budget, failures, anything unusual; one sentence each.
        tuning: (setting, method, chosen values, validation score) of each tuned method.
        versions: packages.
    """

    command: str
    baseline: str
    notes: Sequence[str]
    tuning: Sequence[tuple[str, str, str, float]]
    versions: dict[str, str | None]


def report(table: Sequence[Row], pictures: Sequence[Picture], about: About) -> str:
    """The page: a table and figures for each setting, then how it was made.

    Inline CSS and SVG only: no script, no link, nothing loaded. Follows the reader's light or dark preference.
    """
    settings = by_setting(table)
    methods = dict.fromkeys(row.group.method for row in table)
    seeds = sorted({trace.seed for row in table for trace in row.group.traces})
    title = f"Comparison of {len(methods)} method{'s' * (len(methods) != 1)}"
    where = settings[0][0] if len(settings) == 1 else f"{len(settings)} settings"
    parts = [
        f"<h1>{title}</h1>",
        f"<p>{_text(where)} · {'seed' if len(seeds) == 1 else 'seeds'} {', '.join(map(str, seeds)) or '–'}"
        f" · baseline {_text(about.baseline)}</p>",
        *(f"<p class=bad>{_text(note)}</p>" for note in about.notes),
    ]
    whole = [p for p in pictures if not p.setting]
    if whole:
        parts += ["<h2>Methods and settings</h2>", _gallery(whole, wide=True)]
    for setting, part in settings:
        parts += [f"<h2>{_text(setting)}</h2>", _table(part, about.baseline)]
        parts.append(f"<p class=small>{_text(caption(part, about.baseline))}</p>")
        parts.append(_gallery([p for p in pictures if p.setting == setting]))
    parts += ["<h2>How it was made</h2>", *_tuning(about.tuning), f"<pre>{_text(about.command, 10_000)}</pre>"]
    versions = ", ".join(f"{name} {version}" for name, version in about.versions.items() if version)
    parts.append(f"<p class=small>{_text(versions)}</p>")
    return (
        "<!doctype html>\n<html lang=en>\n<head>\n<meta charset=utf-8>\n"
        '<meta name=viewport content="width=device-width, initial-scale=1">\n'
        f"<title>{title}</title>\n<style>{STYLE}</style>\n</head>\n<body>\n" + "\n".join(parts) + "\n</body>\n</html>\n"
    )


def inline_svg(picture: Picture) -> str:
    """A picture's SVG for HTML: no XML head, no addresses, names of its own, the page's colours for text and grid."""
    text = picture.svg[picture.svg.index("<svg") :]
    text = re.sub(r"<metadata>.*?</metadata>", "", text, flags=re.DOTALL)
    text = re.sub(r'\sxmlns(:\w+)?="[^"]*"', "", text).replace("xlink:href", "href")
    text = re.sub(r'(<svg[^>]*?)\swidth="[^"]*"', r"\1", text, count=1)
    text = re.sub(r'(<svg[^>]*?)\sheight="[^"]*"', r"\1", text, count=1)
    prefix = re.sub(r"\W", "-", picture.name)
    text = re.sub(r'\bid="', f'id="{prefix}-', text)
    text = re.sub(r'(href="#|url\(#)', rf"\1{prefix}-", text)
    text = re.sub(r"font: ([\d.]+px) [^;\"]*", r"font: \1 system-ui, sans-serif", text)
    text = text.replace(INK, "var(--ink)").replace(GRID, "var(--line)")
    text = text.replace("<svg", f'<svg role="img" aria-label="{_text(picture.title)}"', 1)
    return text.strip()


def _table(part: Sequence[Row], baseline: str) -> str:
    header, body = cells(part, baseline, bold=lambda text: f"<b>{text}</b>", escape=lambda text: _text(text, 100))
    tests = below(header)
    shown = [i for i in range(len(header)) if i not in tests.values()]
    lines = ["<tr>" + "".join(f"<th>{_text(header[i])}</th>" for i in shown) + "</tr>"]
    for row, line in zip(part, body, strict=True):
        tested = {} if row.group.method == baseline else tests
        cell = (line[i] + (f"<small>p {line[tested[i]]}</small>" if i in tested else "") for i in shown)
        lines.append("<tr>" + "".join(f"<td>{text}</td>" for text in cell) + "</tr>")
    return f"<div class=scroll><table>{''.join(lines)}</table></div>"


def _gallery(pictures: Sequence[Picture], wide: bool = False) -> str:
    figures = [
        f"<figure{' class=wide' if wide else ''}>{inline_svg(p)}<figcaption>{_text(p.title)}</figcaption></figure>"
        for p in pictures
    ]
    return f"<div class=figures>{''.join(figures)}</div>"


def _tuning(chosen: Sequence[tuple[str, str, str, float]]) -> list[str]:
    if not chosen:
        return []
    lines = "".join(
        f"<tr><td>{_text(method)}</td><td>{_text(setting)}</td><td>{_text(values)}</td>"
        f"<td>{f'{score:.4g}' if math.isfinite(score) else '–'}</td></tr>"
        for setting, method, values, score in chosen
    )
    head = "<tr><th>method</th><th>setting</th><th>chosen on the validation split</th><th>score there</th></tr>"
    return [f"<div class='scroll words'><table>{head}{lines}</table></div>"]


def _text(text: str, limit: int = 2000) -> str:
    return html.escape(plain_text(text, limit))
