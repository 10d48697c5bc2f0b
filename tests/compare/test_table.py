"""Statistics over seeds and the three tables."""

from __future__ import annotations

import csv
import io
import math
import statistics

import pytest
from rich.console import Console
from scipy import stats

from bayesfed.compare.formats import to_csv, to_latex, to_markdown
from bayesfed.compare.results import Group, Trace
from bayesfed.compare.table import Statistic, paired_p, rows, short_p, spread

COLUMNS = [
    "experiment", "method", "seeds", "accuracy_mean", "accuracy_std", "nll_mean", "nll_std", "ece_mean", "ece_std",
    "bytes_total", "gradient_evaluations", "seconds_mean",
]  # fmt: skip


def read(text: str) -> list[dict[str, str]]:
    return list(csv.DictReader(io.StringIO(text)))


def test_mean_and_standard_deviation(groups):
    first, second = rows(groups, "fedavg")
    assert first.metrics["accuracy"].mean == pytest.approx(statistics.mean([80, 81, 84]))
    assert first.metrics["accuracy"].std == pytest.approx(statistics.stdev([80, 81, 84]))
    assert second.costs == {"bytes": 4e6, "gradients": 1000, "seconds": 1.0}
    assert [r.metrics["accuracy"].best for r in (first, second)] == [False, True]
    assert [r.metrics["nll"].best for r in (first, second)] == [False, True]


def test_paired_test_is_scipys(groups):
    first, second = rows(groups, "fedavg")
    assert math.isnan(first.metrics["accuracy"].p)
    assert second.metrics["accuracy"].p == pytest.approx(stats.ttest_rel([85, 86, 91], [80, 81, 84]).pvalue)
    assert second.metrics["accuracy"].p != pytest.approx(stats.ttest_ind([85, 86, 91], [80, 81, 84]).pvalue)


def test_pairs_are_of_the_same_seed():
    ours, theirs = {1: 3.0, 2: 5.0, 7: 9.0}, {2: 4.0, 1: 2.5, 3: 0.0}
    assert paired_p(ours, theirs) == pytest.approx(stats.ttest_rel([3, 5], [2.5, 4]).pvalue)
    assert math.isnan(paired_p({1: 3.0}, {1: 2.0}))
    assert math.isnan(paired_p({1: 3.0, 2: 4.0}, {1: 2.0, 2: 3.0}))  # equal differences: t is not defined


def test_csv(groups):
    text = to_csv(rows(groups, "fedavg", 75.0), 75.0)
    assert text.splitlines()[0].split(",")[: len(COLUMNS)] == COLUMNS
    first, second = read(text)
    assert (first["experiment"], first["method"], first["seeds"]) == ("one & only", "fedavg", "3")
    assert float(second["accuracy_mean"]) == pytest.approx(262 / 3)
    assert (second["bytes_total"], second["gradient_evaluations"], second["seed_list"]) == ("4000000", "1000", "1 2 3")
    assert float(first["rounds_to_target"]) == 2
    assert float(second["rounds_to_target"]) == pytest.approx((2 + 1 + 2) / 3)
    assert float(second["bytes_to_target"]) == pytest.approx(2e6 * 5 / 3)
    assert float(second["gradients_to_target"]) == pytest.approx(500 * 5 / 3)


def test_a_target_that_one_seed_misses_is_not_reached(groups):
    first, second = read(to_csv(rows(groups, "fedavg", 82.0), 82.0))
    assert first["rounds_to_target"] == ""
    assert float(second["rounds_to_target"]) == 2
    assert "not reached" in to_markdown(rows(groups, "fedavg", 82.0), "fedavg")


def test_failed_runs_are_in_the_table(groups):
    groups[1].failed[4] = "no power"
    groups.append(Group("one & only", "fedprox", [], {1: "worse"}))
    table = rows(groups, "fedavg")
    found = read(to_csv(table))
    assert found[1]["status"] == "failed 1 of 4: seed 4: no power"
    assert (found[2]["seeds"], found[2]["accuracy_mean"], found[2]["status"]) == (
        "0",
        "",
        "failed 1 of 1: seed 1: worse",
    )
    assert "fedprox (one & only) failed 1 of 1: seed 1: worse" in to_markdown(table, "fedavg")


def test_the_best_is_bold_and_names_are_escaped(groups):
    table = rows(groups, "fedavg")
    assert "| **87.33 ± 3.21** |" in to_markdown(table, "fedavg")
    latex = to_latex(table, "fedavg")
    assert r"bayes\_admm/$<$diagonal$>$ & \textbf{87.33 $\pm$ 3.21} & " in latex
    assert r"\caption{one \& only." in latex
    assert r"\toprule" in latex
    assert all(line.count("&") == latex.count("r", latex.index("{l"), latex.index("}", latex.index("{l")))
               for line in latex.splitlines() if line.startswith("    fedavg"))  # fmt: skip


def test_one_seed_has_no_spread(groups):
    one = groups[0].traces[0]
    (row,) = rows([Group("s", "m", [one])], "m")
    assert math.isnan(row.metrics["accuracy"].std)


def test_fairness_columns_come_last_and_only_where_clients_were_tested(groups):
    assert "client_mean" not in to_csv(rows(groups, "fedavg"))
    for i, one in enumerate(groups[0].traces):
        one.clients.update(mean=80.0 + i, worst10=50.0 + 2 * i, spread=9.0)
    table = rows(groups, "fedavg", 75.0)
    text = to_csv(table, 75.0)
    assert text.splitlines()[0].split(",")[: len(COLUMNS)] == COLUMNS
    assert text.splitlines()[0].endswith("seconds_to_target,client_mean,client_worst10,client_spread")
    first, second = read(text)
    assert [float(first[f"client_{part}"]) for part in ("mean", "worst10", "spread")] == [81.0, 52.0, 9.0]
    assert second["client_mean"] == ""
    markdown = to_markdown(table, "fedavg")
    assert "| client mean | worst 10 % | client spread |" in markdown
    assert "| 81 | 52 | 9 |" in markdown
    assert "| – | – | – |" in markdown


@pytest.mark.parametrize(
    ("precisions", "expected"), [((2.0, 2.0, 2.0), 70.0), ((2.0, 3.0, 4.0), 30.0), ((None,) * 3, 70.0)]
)
def test_precision_that_nobody_learned_is_not_averaged_over(precisions, expected):
    class Directory:
        def summary(self):
            return {}

        def rounds(self):
            clients = {"clients/accuracy_mean": 25.0, "clients/accuracy_worst10": 20.0}
            at_mean = {"clients/at_mean/accuracy_mean": 65.0, "clients/at_mean/accuracy_worst10": 60.0}
            if precisions[0] is None:  # a point estimate is tested in one way
                clients, at_mean = {"clients/accuracy_mean": 65.0, "clients/accuracy_worst10": 60.0}, {}
            scores = {"mean/accuracy": 70.0, "bayes/accuracy": 30.0, **clients, **at_mean}
            return [{"round": i, "posterior/precision_mean": p, **scores} for i, p in enumerate(precisions)]

    trace = Trace.read(Directory(), 1)
    assert trace.final("accuracy") == expected
    assert trace.at_mean["accuracy"] == 70.0
    assert trace.clients == {"mean": expected - 5, "worst10": expected - 10}


def test_the_terminal_shows_the_tests_below_the_metrics(groups):
    from bayesfed.compare.command import _shown

    table = rows(groups, "fedavg")
    console = Console(file=io.StringIO(), width=80)
    console.print(_shown("one & only", table, "fedavg"))
    text = console.file.getvalue()
    p = short_p(table[1].metrics["accuracy"].p)
    assert f"p {p}" in text
    assert text.count("p 0.") == text.count(" p ") == 3  # accuracy, NLL, ECE of the second method
    assert "p: two-sided paired t-test over seeds against fedavg" in text
    assert "…" not in text


@pytest.mark.parametrize(
    ("mean", "std", "text"),
    [
        (0.3119, 0.0142, "0.312 ± 0.014"),
        (0.3119, 1e-9, "0.312 ± 0.000"),
        (84997.1234, math.nan, "84997.123"),
        (1.71664760381e11, 2.34e10, "1.717e+11 ± 2.3e+10"),
        (4.2e-6, 1.25e-7, "4.2e-06 ± 1.2e-07"),
        (0.0, 0.0, "0.000 ± 0.000"),
        (-2.5e7, 1.0, "-2.5e+07 ± 1"),
    ],
)
def test_numbers_of_any_size(mean, std, text):
    assert spread("nll", Statistic(mean, std, math.nan, False)) == text
