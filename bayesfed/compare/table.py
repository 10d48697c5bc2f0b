"""The table of a comparison: statistics over seeds, and its cells as text."""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass

import numpy as np
from scipy import stats

from bayesfed.compare.results import CLIENTS, COSTS, Group, ordered
from bayesfed.runs.display import fixed
from bayesfed.scores import score

CLIENT_HEADERS = {"mean": "client mean", "worst10": "worst 10 %", "spread": "client spread"}
DIGITS = 4  # of a score that has no number of its own


@dataclass(frozen=True)
class Statistic:
    """A metric of a method over its seeds.

    Attributes:
        mean: over seeds; nan without values.
        std: sample standard deviation (divisor n - 1); nan for fewer than two values.
        p: of the two-sided paired t-test against the baseline on the seeds both have; nan for the baseline itself,
            fewer than two pairs, or equal differences.
        best: whether no method of the setting has a better mean.
    """

    mean: float
    std: float
    p: float
    best: bool


@dataclass(frozen=True)
class Row:
    """A method in a setting.

    Attributes:
        group: where the numbers come from.
        metrics: by name, those that any run of the comparison has.
        at_mean: mean over seeds of the final metrics at the posterior mean.
        costs: mean over seeds of ``bytes``, ``gradients`` and ``seconds`` of a run.
        to_target: mean over seeds of what it took to reach the target; nan unless every finished run reached it.
        clients: mean over seeds of :attr:`bayesfed.compare.results.Trace.clients`.
    """

    group: Group
    metrics: dict[str, Statistic]
    at_mean: dict[str, float]
    costs: dict[str, float]
    to_target: dict[str, float]
    clients: dict[str, float]


def rows(groups: Sequence[Group], baseline: str, target: float | None = None) -> list[Row]:
    """The rows of the table, in the order of ``groups``.

    Args:
        groups: of all settings.
        baseline: method of the paired tests.
        target: accuracy in percent.
    """
    names = ordered(m for group in groups for trace in group.traces for m in trace.metrics)
    metrics = [m for m in names if any(group.finals(m) for group in groups)]
    table = []
    for group in groups:
        peers = [other for other in groups if other.setting == group.setting]
        reference = next((other for other in peers if other.method == baseline), None)
        values = {}
        for metric in metrics:
            own = group.finals(metric)
            mean, std = _mean_std(list(own.values()))
            p = math.nan
            if reference is not None and reference is not group:
                p = paired_p(own, reference.finals(metric))
            values[metric] = Statistic(mean, std, p, _is_best(metric, mean, peers))
        at_mean = {m: _mean_std([t.at_mean.get(m, math.nan) for t in group.traces])[0] for m in metrics}
        costs = {name: _mean_std([t.cost(name) for t in group.traces])[0] for name in ("bytes", "gradients", "seconds")}
        reached: dict[str, float] = {}
        if target is not None:
            traces = [trace.to_target(target) for trace in group.traces]
            reached = {name: _mean_std([trace[key] for trace in traces])[0] for name, key in COSTS.items()}
        tested = [part for part in CLIENTS if any(part in t.clients for t in group.traces)]
        clients = {part: _mean_std([t.clients.get(part, math.nan) for t in group.traces])[0] for part in tested}
        table.append(Row(group, values, at_mean, costs, reached, clients))
    return table


def paired_p(ours: dict[int, float], theirs: dict[int, float]) -> float:
    """Two-sided p of the paired t-test over the seeds both have; nan for fewer than two, or equal differences."""
    seeds = sorted(ours.keys() & theirs.keys())
    if len(seeds) < 2:
        return math.nan
    mine, other = np.array([ours[s] for s in seeds]), np.array([theirs[s] for s in seeds])
    if np.ptp(mine - other) == 0:
        return math.nan
    return float(stats.ttest_rel(mine, other).pvalue)


def by_setting(table: Sequence[Row]) -> list[tuple[str, list[Row]]]:
    """The rows of each setting."""
    settings = dict.fromkeys(row.group.setting for row in table)
    return [(setting, [row for row in table if row.group.setting == setting]) for setting in settings]


def cells(
    part: Sequence[Row],
    baseline: str,
    *,
    bold: Callable[[str], str],
    plus_minus: str = " ± ",
    escape: Callable[[str], str] = str,
) -> tuple[list[str], list[list[str]]]:
    """Header and body of a setting's table as text.

    Args:
        part: rows of one setting.
        baseline: method of the tests.
        bold: marks the best mean.
        plus_minus: between mean and standard deviation.
        escape: for all other text.
    """
    metrics = ordered(m for row in part for m in row.metrics)
    tested = [m for m in metrics if any(math.isfinite(row.metrics[m].p) for row in part)]
    costs = [name for name in COSTS if any(name in row.to_target for row in part)]
    clients = [name for name in CLIENTS if any(math.isfinite(row.clients.get(name, math.nan)) for row in part)]
    header = ["method", *(score(m).header for m in metrics), *(p_header(score(m).header) for m in tested)]
    header += [CLIENT_HEADERS[name] for name in clients]
    header += ["MB sent", "gradients", "seconds", *(f"{_unit(name)} to target" for name in costs), "seeds"]
    body = []
    for row in part:
        line = [escape(row.group.method)]
        for metric in metrics:
            statistic = row.metrics[metric]
            text = spread(metric, statistic, plus_minus) if math.isfinite(statistic.mean) else escape("–")
            line.append(bold(text) if statistic.best and len(part) > 1 else text)
        rest = ["baseline" if row.group.method == baseline else short_p(row.metrics[m].p) for m in tested]
        rest += [decimal(row.clients.get(name, math.nan), 4) or "–" for name in clients]
        rest += [
            megabytes(row.costs["bytes"]),
            thousands(row.costs["gradients"]),
            decimal(row.costs["seconds"], 3) or "–",
        ]
        rest += [_cost(name, row.to_target[name]) for name in costs]
        failed = f" ({len(row.group.failed)} failed)" if row.group.failed else ""
        body.append([*line, *(escape(text) for text in [*rest, f"{len(row.group.traces)}{failed}"])])
    return header, body


def caption(table: Sequence[Row], baseline: str) -> str:
    """What the numbers are."""
    tested = f" p: {test_of(baseline)}." if _tested(table) else ""
    fair = " Client mean, worst 10 % and spread: over clients, each on its own test distribution."
    fair = fair if any(row.clients for row in table) else ""
    failed = [f"{row.group.method} ({row.group.setting}) {row.group.status}" for row in table if row.group.failed]
    return (
        "Mean ± standard deviation over seeds after the last round, best mean in bold; model-averaged where the method "
        f"has a posterior.{tested}{fair} MB and gradients (examples × posterior samples) are totals of one run."
        + (f" Failed: {'. '.join(failed)}." if failed else "")
    )


def below(header: Sequence[str]) -> dict[int, int]:
    """Position of each metric's p by the metric's, where columns are few: the one stands below the other."""
    return {i: header.index(p) for i, name in enumerate(header) if (p := p_header(name)) in header}


def p_header(header: str) -> str:
    """The column of the test that belongs to a metric's."""
    return f"p {header.split()[0]}"


def test_of(baseline: str) -> str:
    """Which test p is of."""
    return f"two-sided paired t-test over seeds against {baseline}"


def spread(metric: str, statistic: Statistic, plus_minus: str = " ± ") -> str:
    """``91.20 ± 0.31``; ``1.717e+11 ± 2.3e+10`` where decimals say nothing."""
    if not math.isfinite(statistic.mean):
        return "–"
    digits = score(metric).digits or DIGITS
    text = fixed(statistic.mean, digits)
    if not math.isfinite(statistic.std):
        return text
    plain = text == f"{statistic.mean:.{digits}f}"
    return text + plus_minus + (f"{statistic.std:.{digits}f}" if plain else f"{statistic.std:.2g}")


def short_p(p: float) -> str:
    """``0.031``, ``<0.001``."""
    if not math.isfinite(p):
        return "–"
    return "<0.001" if p < 0.001 else f"{p:.3f}"


def megabytes(size: float) -> str:
    """Bytes as MB with three digits."""
    return f"{size / 1e6:.3g}" if math.isfinite(size) and size < 1e9 else thousands(size / 1e6)


def thousands(value: float) -> str:
    """A whole number with separators."""
    return f"{round(value):,}" if math.isfinite(value) else "–"


def _tested(table: Sequence[Row]) -> bool:
    return any(math.isfinite(statistic.p) for row in table for statistic in row.metrics.values())


def _unit(name: str) -> str:
    return "MB" if name == "bytes" else name


def _cost(name: str, value: float) -> str:
    if not math.isfinite(value):
        return "not reached"
    return {"bytes": megabytes, "gradients": thousands}.get(name, lambda v: f"{v:.3g}")(value)


def _mean_std(values: list[float]) -> tuple[float, float]:
    mean = float(np.mean(values)) if values else math.nan
    return mean, float(np.std(values, ddof=1)) if len(values) > 1 else math.nan


def _is_best(metric: str, mean: float, peers: Sequence[Group]) -> bool:
    means = [_mean_std(list(peer.finals(metric).values()))[0] for peer in peers]
    means = [value for value in means if math.isfinite(value)]
    return bool(means) and mean == (max if score(metric).higher_is_better else min)(means)


def decimal(value: float, digits: int = 8) -> str:
    """A number with significant digits; nothing where there is none."""
    return f"{value:.{digits}g}" if math.isfinite(value) else ""
