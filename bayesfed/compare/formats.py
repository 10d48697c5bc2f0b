"""The table of a comparison as CSV, Markdown and LaTeX (booktabs)."""

from __future__ import annotations

import csv
import io
import math
from collections.abc import Sequence

from bayesfed.compare.results import CLIENTS, COLUMNS, COSTS, ordered
from bayesfed.compare.table import Row, Statistic, by_setting, caption, cells, decimal
from bayesfed.foreign import plain_text


def to_csv(table: Sequence[Row], target: float | None = None) -> str:
    """``table.csv``; an empty cell is a number there is not. Byte-identical for equal results but for seconds."""
    extra = [m for m in ordered(m for row in table for m in row.metrics) if m not in COLUMNS]
    header = [
        "experiment", "method", "seeds", "accuracy_mean", "accuracy_std", "nll_mean", "nll_std", "ece_mean", "ece_std",
        "bytes_total", "gradient_evaluations", "seconds_mean", "accuracy_p", "nll_p", "ece_p",
        *(f"{m}_{part}" for m in extra for part in ("mean", "std", "p")),
        "accuracy_at_mean", "nll_at_mean", "ece_at_mean", "seed_list", "status",
    ]  # fmt: skip
    if target is not None:
        header += [f"{name}_to_target" for name in COSTS]
    if any(row.clients for row in table):
        header += [f"client_{part}" for part in CLIENTS]
    out = io.StringIO()
    writer = csv.DictWriter(out, header, lineterminator="\n")
    writer.writeheader()
    for row in table:
        group = row.group
        cells: dict[str, str | int] = {
            "experiment": plain_text(group.setting, 2000),
            "method": plain_text(group.method, 2000),
            "seeds": len(group.traces),
            "bytes_total": _whole(row.costs["bytes"]),
            "gradient_evaluations": _whole(row.costs["gradients"]),
            "seconds_mean": decimal(row.costs["seconds"], 4),
            "seed_list": " ".join(str(trace.seed) for trace in group.traces),
            "status": plain_text(group.status, 2000),
        }
        for metric in (*COLUMNS, *extra):
            statistic = row.metrics.get(metric, Statistic(math.nan, math.nan, math.nan, False))
            for part in ("mean", "std", "p"):
                cells[f"{metric}_{part}"] = decimal(getattr(statistic, part))
            if metric not in extra:
                cells[f"{metric}_at_mean"] = decimal(row.at_mean.get(metric, math.nan))
        cells |= {f"{name}_to_target": decimal(value) for name, value in row.to_target.items()}
        cells |= {f"client_{part}": decimal(value) for part, value in row.clients.items()}
        writer.writerow(cells)
    return out.getvalue()


def to_markdown(table: Sequence[Row], baseline: str) -> str:
    """``table.md``: a table for each setting, best means in bold."""
    text = ""
    for setting, part in by_setting(table):
        header, body = cells(part, baseline, bold=lambda s: f"**{s}**", escape=_markdown)
        lines = [header, ["---", *("---:" for _ in header[1:])], *body]
        text += (
            f"### {_markdown(setting)}\n\n"
            + "".join(f"| {' | '.join(_bar(c) for c in line)} |\n" for line in lines)
            + "\n"
        )
    return text + _markdown(caption(table, baseline)) + "\n"


def to_latex(table: Sequence[Row], baseline: str) -> str:
    r"""``table.tex``: a table for each setting; needs ``\usepackage{booktabs}``."""
    text = "% needs \\usepackage{booktabs}\n"
    for setting, part in by_setting(table):
        header, body = cells(
            part, baseline, bold=lambda s: f"\\textbf{{{s}}}", plus_minus=" $\\pm$ ", escape=_tex
        )  # fmt: skip
        lines = "".join(f"    {' & '.join(line)} \\\\\n" for line in body)
        text += (
            "\\begin{table}\n  \\centering\n"
            f"  \\caption{{{_tex(setting)}. {_tex(caption(part, baseline))}}}\n"
            f"  \\begin{{tabular}}{{l{'r' * (len(header) - 1)}}}\n    \\toprule\n"
            f"    {' & '.join(_tex(name) for name in header)} \\\\\n    \\midrule\n{lines}"
            "    \\bottomrule\n  \\end{tabular}\n\\end{table}\n"
        )
    return text


def _whole(value: float) -> str:
    return str(round(value)) if math.isfinite(value) else ""


def _markdown(text: str) -> str:
    """Markdown may hold HTML."""
    return plain_text(text, 2000).replace("<", "&lt;")


def _bar(text: str) -> str:
    return text.replace("|", "\\|")


def _tex(text: str) -> str:
    special = {"\\": r"\textbackslash{}", "±": r"$\pm$", "×": r"$\times$", "–": "--", "<": "$<$", ">": "$>$"}
    special |= {c: f"\\{c}" for c in "&%$#_{}"} | {"^": r"\textasciicircum{}", "~": r"\textasciitilde{}"}
    return "".join(special.get(c, c) for c in plain_text(text, 2000))
