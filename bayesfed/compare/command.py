"""``bayesfed compare key=a,b ...``: from the command line to ``table.*``, ``figures/`` and ``report.html``."""

from __future__ import annotations

import json
import logging
import shlex
from collections.abc import Sequence
from dataclasses import asdict
from datetime import datetime
from pathlib import Path

from rich import box
from rich.table import Table

from bayesfed.compare import grid as grids
from bayesfed.compare import table as tables
from bayesfed.compare import tune as tuning
from bayesfed.compare.figures import make_figures
from bayesfed.compare.formats import to_csv, to_latex, to_markdown
from bayesfed.compare.grid import Run
from bayesfed.compare.options import Options, split_options
from bayesfed.compare.report import About, report
from bayesfed.compare.results import Group, collect
from bayesfed.compare.runner import Runner, default_jobs
from bayesfed.foreign import plain_text
from bayesfed.lock import alone, check_folder
from bayesfed.runs.directory import provenance, write_text
from bayesfed.runs.display import Fitted, console
from bayesfed.scores import score

TERMINAL = {"method", "MB sent", "seeds"}
MARK = "compare.json"  # says that a folder is a comparison's


def compare(args: Sequence[str]) -> int:
    """Run a comparison, or go on with one, and write its table, figures and report.

    Args:
        args: of the command line, see docs/compare.md.

    Returns:
        exit code: 0, or 1 if a run failed (the others are in the table all the same).

    Raises:
        InputError: bad input, before any run starts.
        KeyboardInterrupt: interrupted; the same call goes on.
    """
    logging.getLogger("flwr").setLevel(logging.WARNING)
    options, overrides = split_options(args)
    keys = {override.key_or_group for override in overrides}
    extra = {"figures": "false", "eval.clients_every": "null"}  # a picture of each run is not needed, fairness is
    runs = grids.grid(overrides, [f"{key}={value}" for key, value in extra.items() if key not in keys])
    notes = _budget(options, runs)
    baseline = grids.baseline_of(options, runs)
    spaces = tuning.check_tuning(options, runs) if options.tune else {}
    folder = Path(options.out or f"runs/compare/{datetime.now():%Y-%m-%d_%H-%M-%S-%f}").expanduser()
    check_folder(folder, MARK, "a comparison")
    grids.check_fit(runs)

    with alone(folder, "out"):
        write_text(folder / MARK, json.dumps({"command": list(args), **asdict(options)}, indent=2) + "\n")
        jobs = options.jobs or default_jobs(runs)
        searches: dict[tuple[str, str], tuning.Tuned] = {}
        if options.tune:
            notes += tuning.missing_spaces(runs)
            searches = tuning.tune(options, runs, spaces, Runner(folder / "tuning", jobs))
            write_text(folder / "tuning.json", json.dumps(_searched(searches), indent=2) + "\n")
        asked = tuning.apply(runs, searches) if options.tune else runs
        groups = collect(Runner(folder / "runs", jobs).run(asked))
        groups = _with_untuned(groups, runs, searches)
        return _write(folder, groups, baseline, options, notes, searches, args)


def _budget(options: Options, runs: Sequence[Run]) -> list[str]:
    if options.budget == "epochs":
        return grids.check_budget(runs)
    return ["Budgets were not held equal (budget=none): see gradients and MB."]


def _searched(searches: dict[tuple[str, str], tuning.Tuned]) -> list[dict[str, object]]:
    return [
        {
            "experiment": search.setting,
            "method": search.method,
            "chosen": search.best[0] if search.best else None,
            "trials": [
                {"values": values, "score": score if score == score else None} for values, score in search.trials
            ],
        }
        for search in searches.values()
    ]


def _with_untuned(
    groups: list[Group], runs: Sequence[Run], searches: dict[tuple[str, str], tuning.Tuned]
) -> list[Group]:
    """All groups in the order of the runs: what tuning chose, and as failed those that it could not tune."""
    by_key = {(group.setting, group.method): group for group in groups}
    for run in runs:
        key = run.setting, run.method
        group = by_key.setdefault(key, Group(*key))
        if key in searches:
            best = searches[key].best
            if best is None:
                group.failed[run.seed] = "no tuning trial finished"
            else:
                group.chosen = best[0]
    settings = dict.fromkeys(run.setting for run in runs)
    methods = dict.fromkeys(run.method for run in runs)
    return [by_key[s, m] for s in settings for m in methods if (s, m) in by_key]


def _write(
    folder: Path,
    groups: Sequence[Group],
    baseline: str,
    options: Options,
    notes: list[str],
    searches: dict[tuple[str, str], tuning.Tuned],
    args: Sequence[str],
) -> int:
    rows = tables.rows(groups, baseline, options.target)
    write_text(folder / "table.csv", to_csv(rows, options.target))
    write_text(folder / "table.md", to_markdown(rows, baseline))
    write_text(folder / "table.tex", to_latex(rows, baseline))
    pictures = make_figures(rows, folder / "figures", options.target)
    origin = provenance()
    about = About(
        command=shlex.join(["bayesfed", "compare", *args]),
        baseline=baseline,
        notes=notes,
        tuning=[
            (s.setting, s.method, *((_values(s.best[0]), s.best[1]) if s.best else ("failed", float("nan"))))
            for s in searches.values()
        ],
        versions={**origin["versions"], "commit": origin["git_commit"]},
    )  # fmt: skip
    write_text(folder / "report.html", report(rows, pictures, about))

    out = console()
    for setting, part in tables.by_setting(rows):
        out.print(_shown(setting, part, baseline))
    for note in notes:
        out.print(f"note: {note}", markup=False)
    failed = [group for group in groups if group.failed]
    for group in failed:
        out.print(plain_text(f"{group.method} ({group.setting}): {group.status}", 1000), markup=False, style="red")
    out.print(f"report in {folder / 'report.html'}", markup=False, highlight=False, soft_wrap=True)
    return 1 if failed else 0


def _values(chosen: dict[str, str]) -> str:
    return ", ".join(f"{key}={value}" for key, value in chosen.items()) or "the configuration's own values"


def _shown(setting: str, part: Sequence[tables.Row], baseline: str) -> Fitted:
    header, body = tables.cells(
        part, baseline, bold=lambda text: f"[bold]{text}[/bold]", escape=lambda text: _plain(plain_text(text))
    )
    narrow = TERMINAL | {score(metric).header for row in part for metric in row.metrics}
    wanted = [i for i, name in enumerate(header) if name in narrow]  # what fits 80 columns; the files have the rest
    tests = tables.below(header)
    caption = f"p: {tables.test_of(baseline)}" if tests else None
    shown = Table(
        title=_plain(plain_text(setting)), title_justify="left", box=box.SIMPLE, padding=(0, 1, 0, 0),
        caption=caption and _plain(caption), caption_justify="left",
    )  # fmt: skip
    for i in wanted:
        shown.add_column(header[i], justify="left" if i == 0 else "right", overflow="fold" if i == 0 else "ellipsis")
    for row, line in zip(part, body, strict=True):
        tested = {} if row.group.method == baseline else tests
        shown.add_row(*(line[i] + (f"\n[dim]p {line[tested[i]]}[/dim]" if i in tested else "") for i in wanted))
    return Fitted(shown)


def _plain(text: str) -> str:
    from rich.markup import escape

    return escape(text)
