"""Progress of a run: a live table on a terminal, one plain line a round elsewhere."""

from __future__ import annotations

import math
import os
import sys
import time
from collections.abc import Callable, Sequence
from copy import copy
from dataclasses import replace
from types import TracebackType
from typing import Any, Self

from rich import box
from rich.console import Console, ConsoleOptions, Group, RenderableType, RenderResult
from rich.live import Live
from rich.measure import Measurement
from rich.progress_bar import ProgressBar
from rich.table import Table
from rich.text import Text

from bayesfed.output import Output
from bayesfed.scores import NLL, Score, present

VISIBLE_ROUNDS = 10
UNLIMITED = 10_000  # columns
SILENCE = 15.0  # seconds without a line after which an evaluation says that it goes on, where there is no live table
LARGE = 1e5  # from here on decimals of a number say nothing
SMOOTHING = 0.2  # weight of the newest round in the estimate of the time left


DECIMALS = {"%": 1}  # by unit; else those of a table


class Display:
    """Shows rounds as they come; use it as a context manager, so that the terminal is restored whatever happens.

    Args:
        rounds: rounds the run will have in the end.
        start_round: rounds that were done before (0, or where a resumed run goes on).
        clients: how many clients there are.
        title: one line above the table.
        averaged: False for point estimates, whose model average is the prediction itself and is not shown.
        enabled: False shows nothing at all.
        clock: seconds, monotonic.
    """

    def __init__(
        self,
        *,
        rounds: int,
        start_round: int,
        clients: int,
        title: str,
        averaged: bool = True,
        enabled: bool = True,
        clock: Callable[[], float] = time.monotonic,
    ):
        self._rounds, self._title, self._enabled, self._clock = rounds, title, enabled, clock
        self._kinds = ("mean", "bayes") if averaged else ("mean",)
        self._finished = start_round
        self._evaluating = ""
        self._round, self._sampled, self._done, self._failed = start_round, clients, 0, 0
        self._records: tuple[dict[str, Any], ...] = ()  # replaced, never changed: another thread draws them
        self._keys: set[str] = set()  # of all records
        self._scores: tuple[Score, ...] = ()
        self._seconds: float | None = None
        self._since = self._spoke = clock()
        self._live: Live | None = None
        self._out: Any = Output(sys.stdout)  # a pipe that closes ends the display, not the run

    def __enter__(self) -> Self:
        self._since = self._spoke = self._clock()
        if self._enabled and is_interactive():
            self._live = Live(
                console=Console(file=self._out), get_renderable=self.render, refresh_per_second=4, transient=False
            )
            self._live.start()
        elif self._enabled and self._title:
            self._print(self._title)
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, traceback: TracebackType | None
    ) -> None:
        self._evaluating = ""
        if self._live is not None:
            live, self._live = self._live, None
            live.stop()

    def begin_round(self, round: int, sampled: int) -> None:
        """Round ``round`` was sent to ``sampled`` clients."""
        self._round, self._sampled, self._done, self._failed, self._evaluating = round, sampled, 0, 0, ""

    def evaluating(self, draw: int, draws: int) -> None:
        """The ``draw``-th of ``draws`` networks from the posterior is about to be evaluated."""
        if not self._evaluating:  # silence counts from here: training may have taken long
            self._spoke = self._clock()
        self._evaluating = f"evaluating: draw {draw} of {draws}"
        if self._live is None and self._enabled and self._clock() - self._spoke >= SILENCE:
            self._print(f"{self._position()}  {self._evaluating}")

    def client_done(self, round: int, client: int, ok: bool) -> None:
        """A client replied (``ok``) or failed."""
        if round == self._round:  # a late reply of an earlier round says nothing about this one
            self._done += 1
            self._failed += not ok

    def end_round(self, record: dict[str, Any]) -> None:
        """A round is over.

        Args:
            record: its ``rounds.jsonl`` object; keys may be missing and values None or NaN (no evaluation this round).
        """
        now = self._clock()
        if record.get("round", 0) > 0:
            took = now - self._since
            self._seconds = took if self._seconds is None else self._seconds + SMOOTHING * (took - self._seconds)
        self._since = now
        self._finished = record.get("round", self._finished)
        self._done, self._failed, self._evaluating = 0, 0, ""
        self._round = self._finished + 1
        self._keys |= record.keys()
        self._scores = tuple(present([dict.fromkeys(sorted(self._keys))]))
        self._records = (*self._records, record)[-VISIBLE_ROUNDS:]
        if self._live is None and self._enabled:  # the live table draws itself
            self._print(plain_line(record, self._rounds, self._kinds))

    def message(self, text: str) -> None:
        """Show a warning or note above the table, or as a line of its own."""
        if self._live is not None:
            self._live.console.print(text, markup=False, highlight=False)
        elif self._enabled:
            self._print(text)

    def _print(self, line: str) -> None:
        self._spoke = self._clock()
        self._out.write(f"{line}\n")
        self._out.flush()

    def render(self) -> RenderableType:
        """The table of the last rounds and the progress bar."""
        parts: list[RenderableType] = [Text(self._title, style="bold")] if self._title else []
        records, scores = self._records, self._scores
        if records:
            table = Table(box=box.SIMPLE, pad_edge=False, padding=(0, 1))
            table.add_column("round", justify="right")
            for score in scores:
                averaged = "bayes" in self._kinds
                header = f"{score.short} %" if score.percent else score.short
                table.add_column(header + averaged * "\nmean", justify="right", no_wrap=True)
                if averaged:
                    table.add_column("\nBayes", justify="right", no_wrap=True, style="cyan")
            table.add_column("clients", justify="right", no_wrap=True)
            table.add_column("time", justify="right", style="dim", no_wrap=True)
            for record in records:
                cells = [_cell(record, f"{kind}/{s.name}", s) for s in scores for kind in self._kinds]
                replies, _, failed = _clients(record).partition(" ")
                clients = Text(replies, style="yellow" if failed else "")
                table.add_row(str(record.get("round", "")), *cells, clients, _seconds(record.get("seconds/round")))
            parts.append(Fitted(table))
        parts.append(self._progress())
        return Group(*parts)

    def time_left(self) -> float | None:
        """Estimated seconds to the end of the run; None before the first round is over."""
        if self._seconds is None:
            return None
        return max((self._rounds - self._finished) * self._seconds - (self._clock() - self._since), 0.0)

    def _position(self) -> str:
        return f"round {min(self._round, self._rounds)}/{self._rounds}"

    def _progress(self) -> Fitted:
        running = self._finished < self._rounds
        part = min(self._done / max(self._sampled, 1), 1.0) if running else 0.0
        left = self.time_left()
        line = Table.grid(padding=(0, 2))
        cells: list[RenderableType] = [
            self._position(),
            ProgressBar(total=max(self._rounds, 1), completed=self._finished + part, width=20),
        ]
        if self._evaluating:
            cells.append(self._evaluating)
        elif running:
            cells.append(
                f"clients {self._done}/{self._sampled}" + (f" ({self._failed} failed)" if self._failed else "")
            )
        if self._seconds is not None:
            cells.append(f"{_seconds(self._seconds)} a round")
        if running and left is not None:
            cells.append(f"{duration(left)} left")
        line.add_row(*cells)
        return Fitted(line, [1, *range(len(cells) - 1, 1, -1)])  # the bar first


class Fitted:
    """A table without the columns that are too many for the terminal.

    Args:
        table: all of it.
        order: positions of the columns in the order in which they go; by default from the right, and two stay.
    """

    def __init__(self, table: Table, order: Sequence[int] | None = None):
        self.table, self.order = table, range(len(table.columns) - 1, 1, -1) if order is None else order

    def __rich_console__(self, console: Console, options: ConsoleOptions) -> RenderResult:
        shown, gone = copy(self.table), set[int]()
        room = options.update(max_width=UNLIMITED)
        for position in self.order:
            if Measurement.get(console, room, shown).maximum <= options.max_width:
                break
            gone.add(position)
            left = [column for i, column in enumerate(self.table.columns) if i not in gone]
            shown.columns = [replace(column, _index=i) for i, column in enumerate(left)]
        yield shown


def fixed(value: float, digits: int) -> str:
    """``value`` with ``digits`` decimals; with four significant digits where that gave a long row of them, or zeros
    only."""
    size = abs(value)
    return f"{value:.4g}" if size >= LARGE or 0 < size < 0.5 * 10.0**-digits else f"{value:.{digits}f}"


def console() -> Console:
    """Standard output for tables: as wide as a terminal, or as wide as the tables where nobody looks at one."""
    output = Console()
    return output if output.is_terminal else Console(width=UNLIMITED)


def is_interactive() -> bool:
    """Whether standard output is a terminal that can redraw (and nobody is logging it, as in CI)."""
    if os.environ.get("CI", "").lower() not in ("", "0", "false") or os.environ.get("TERM") in ("dumb", "unknown"):
        return False
    try:
        return sys.stdout.isatty()
    except (AttributeError, ValueError):  # no stdout, or a closed one
        return False


def plain_line(record: dict[str, Any], rounds: int, kinds: Sequence[str] = ("mean", "bayes")) -> str:
    """``round 3/20  accuracy 91.2 %  nll 0.312  ece 2.1 %  bayes nll 0.301  clients 10/10  0.41 s``."""
    parts = [f"round {record.get('round', '?')}/{rounds}"]
    shown = [(f"mean/{score.name}", score.name, score) for score in present([record])]
    shown += [("bayes/nll", "bayes nll", NLL)] if "bayes" in kinds else []
    for key, name, score in shown:
        if record.get(key) is not None:
            parts.append(f"{name} {_number(record[key], score)}{' %' if score.percent else ''}")
    if _clients(record):
        parts.append(f"clients {_clients(record)}")
    if record.get("seconds/round") is not None:
        parts.append(_seconds(record["seconds/round"]))
    return "  ".join(parts)


def duration(seconds: float) -> str:
    """``0:05``, ``12:30`` or ``1:02:03``."""
    minutes, rest = divmod(math.ceil(seconds), 60)
    hours, minutes = divmod(minutes, 60)
    return f"{hours}:{minutes:02d}:{rest:02d}" if hours else f"{minutes}:{rest:02d}"


def _seconds(value: float | None) -> str:
    if value is None or math.isnan(value):
        return ""
    if value < 10:
        return f"{value:.2f} s"
    return f"{value:.1f} s" if value < 120 else duration(value)


def _number(value: float, score: Score) -> str:
    """``value`` without its unit."""
    digits = DECIMALS.get(score.unit, score.digits)
    return f"{value:.4g}" if digits is None else fixed(value, digits)


def _cell(record: dict[str, Any], key: str, score: Score) -> str:
    value = record.get(key)
    return "" if value is None else _number(value, score)


def _clients(record: dict[str, Any]) -> str:
    if not record.get("clients/sampled"):
        return ""
    failed = record.get("clients/failed")
    return f"{record.get('clients/replied', 0)}/{record['clients/sampled']}" + (f" ({failed} failed)" if failed else "")
