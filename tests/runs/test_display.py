"""What a user sees while a run is going on."""

import io
import math

import pytest
from rich.console import Console

from bayesfed.runs import display
from bayesfed.runs.display import Display, duration, is_interactive

RECORD = {
    "round": 3,
    "mean/accuracy": 91.23,
    "mean/nll": 0.3119,
    "mean/ece": 2.13,
    "mean/brier": 0.1,
    "bayes/accuracy": 91.5,
    "bayes/nll": 0.3012,
    "bayes/ece": 1.2,
    "clients/sampled": 10,
    "clients/replied": 10,
    "clients/failed": 0,
    "seconds/round": 0.412,
}


class Clock:
    """Time that a test moves."""

    def __init__(self):
        self.now = 0.0

    def __call__(self):
        return self.now


class Terminal(io.StringIO):
    def isatty(self):
        return True


def terminal(monkeypatch):
    """Makes standard output a terminal of 100 columns (in the test: pytest exchanges it between its phases)."""
    stream = Terminal()
    monkeypatch.setattr("sys.stdout", stream)
    for name, value in {"TERM": "xterm", "COLUMNS": "100", "LINES": "40"}.items():
        monkeypatch.setenv(name, value)
    for name in ("CI", "NO_COLOR"):
        monkeypatch.delenv(name, raising=False)
    return stream


def show(shown):
    console = Console(file=io.StringIO(), width=100)
    console.print(shown.render())
    return console.file.getvalue()


def test_one_plain_line_a_round(capsys):
    with Display(rounds=20, start_round=0, clients=10, title="bayes_admm on digits") as shown:
        shown.begin_round(3, 10)
        shown.client_done(3, 0, True)
        shown.message("client 4 failed: [nan] loss")
        shown.end_round(RECORD)
    assert capsys.readouterr().out.splitlines() == [
        "bayes_admm on digits",
        "client 4 failed: [nan] loss",
        "round 3/20  accuracy 91.2 %  nll 0.312  ece 2.1 %  bayes nll 0.301  clients 10/10  0.41 s",
    ]


@pytest.mark.parametrize(
    ("record", "line"),
    [
        ({"round": 0}, "round 0/9"),
        ({"round": 1, "mean/nll": math.nan, "seconds/round": 12.34}, "round 1/9  nll nan  12.3 s"),
        ({"round": 1, "mean/nll": None, "clients/sampled": 0}, "round 1/9"),
        (
            {"round": 2, "clients/sampled": 10, "clients/replied": 8, "clients/failed": 2, "seconds/round": 150},
            "round 2/9  clients 8/10 (2 failed)  2:30",
        ),
        ({"round": 1, "mean/nll": 171664760381.3322}, "round 1/9  nll 1.717e+11"),
        ({"round": 1, "mean/nll": 0.00004}, "round 1/9  nll 4e-05"),
        (
            {"round": 2, "mean/rmse": 0.51234, "mean/nll": 0.8, "bayes/rmse": 0.5, "bayes/nll": 0.79},
            "round 2/9  rmse 0.5123  nll 0.800  bayes nll 0.790",
        ),
    ],
)
def test_lines_of_rounds_with_missing_values(capsys, record, line):
    with Display(rounds=9, start_round=0, clients=10, title="") as shown:
        shown.end_round(record)
    assert capsys.readouterr().out == line + "\n"


def test_point_estimates_have_no_model_average(capsys):
    same = {f"{kind}/{key}": RECORD[f"mean/{key}"] for kind in ("mean", "bayes") for key in ("accuracy", "nll", "ece")}
    with Display(rounds=20, start_round=0, clients=10, title="", averaged=False) as shown:
        shown.end_round(RECORD | same)
    assert capsys.readouterr().out == "round 3/20  accuracy 91.2 %  nll 0.312  ece 2.1 %  clients 10/10  0.41 s\n"
    text = show(shown)
    assert text.count("91.2") == text.count("0.312") == 1
    assert "Bayes" not in text
    assert "mean" not in text


def test_a_long_evaluation_says_how_far_it_is(capsys):
    clock = Clock()
    with Display(rounds=20, start_round=0, clients=10, title="", clock=clock) as shown:
        for draw in range(1, 33):
            shown.evaluating(draw, 32)
            clock.now += 4.0
        assert "round 0/20" in show(shown)
        assert "evaluating: draw 32 of 32" in show(shown)
        assert "clients" not in show(shown)
        shown.end_round({"round": 0})
        assert "evaluating" not in show(shown)
        shown.evaluating(1, 32)
        shown.begin_round(1, 10)
        assert "clients 0/10" in show(shown)
    draws = range(5, 33, 4)  # every 16 seconds
    lines = [f"round 0/20  evaluating: draw {draw} of 32" for draw in draws]
    assert capsys.readouterr().out.splitlines() == [*lines, "round 0/20"]


def test_disabled_shows_nothing(capsys):
    with Display(rounds=9, start_round=0, clients=10, title="t", enabled=False) as shown:
        shown.begin_round(1, 10)
        shown.end_round(RECORD)
        shown.message("m")
    assert capsys.readouterr().out == ""


def test_table_shows_the_last_rounds_and_the_progress():
    shown = Display(rounds=20, start_round=0, clients=10, title="title", clock=Clock())
    for round in range(13):
        shown.begin_round(round, 10)
        shown.end_round(RECORD | {"round": round, "mean/accuracy": 50.0 + round})
    shown.begin_round(13, 10)
    shown.client_done(13, 0, True)
    shown.client_done(13, 5, False)
    shown.client_done(12, 6, True)
    text = show(shown)
    assert "52.0" not in text
    assert "53.0" in text
    assert "62.0" in text
    assert "acc. %" in text
    assert "ECE %" in text
    assert "Bayes" in text
    assert "RMSE" not in text
    assert "round 13/20" in text
    assert "clients 2/10 (1 failed)" in text
    assert max(map(len, text.splitlines())) <= 100


def test_regression_has_its_own_columns():
    shown = Display(rounds=2, start_round=0, clients=10, title="")
    assert "round 0/2" in show(shown)
    shown.end_round({"round": 1, "clients/sampled": 10, "clients/replied": 10})  # evaluation skipped
    assert "RMSE" not in show(shown)
    shown.end_round({"round": 2, "mean/rmse": 0.5, "mean/nll": math.nan, "bayes/nll": None})
    text = show(shown)
    assert "RMSE" in text
    assert "acc." not in text
    assert "nan" in text
    assert "left" not in text


def test_a_table_fits_80_columns():
    shown = Display(rounds=20, start_round=0, clients=100, title="")
    shown.end_round(RECORD | {"clients/sampled": 100, "clients/replied": 98, "clients/failed": 2})
    console = Console(file=io.StringIO(), width=80)
    console.print(shown.render())
    text = console.file.getvalue()
    assert "98/100" in text
    assert "0.41 s" in text
    assert "…" not in text
    assert len(text.splitlines()) == 7  # nothing wraps


@pytest.mark.parametrize(("width", "columns"), [(40, 5), (30, 3), (20, 2)])
def test_a_narrow_terminal_shows_fewer_numbers_whole(width, columns):
    shown = Display(rounds=20, start_round=0, clients=10, title="", clock=Clock())
    shown.end_round(RECORD)
    console = Console(file=io.StringIO(), width=width)
    console.print(shown.render())
    lines = console.file.getvalue().splitlines()
    assert any(line.split() == ["3", "91.2", "91.5", "0.312", "0.301"][:columns] for line in lines)
    assert "…" not in console.file.getvalue()
    assert lines[-1].startswith("round 4/20")


def test_time_left_is_smoothed_and_ignores_the_start():
    clock = Clock()
    shown = Display(rounds=10, start_round=0, clients=1, title="", clock=clock)
    clock.now = 100.0  # start-up and the evaluation of round 0
    shown.end_round({"round": 0})
    assert shown.time_left() is None
    clock.now += 2.0
    shown.end_round({"round": 1})
    assert shown.time_left() == pytest.approx(9 * 2.0)
    clock.now += 12.0
    shown.end_round({"round": 2})
    assert shown.time_left() == pytest.approx(8 * (2.0 + 0.2 * 10.0))
    clock.now += 3.0
    assert shown.time_left() == pytest.approx(8 * 4.0 - 3.0)


def test_live_display_restores_the_terminal_on_an_interrupt(monkeypatch):
    output = terminal(monkeypatch)

    def interrupted_run():
        with Display(rounds=5, start_round=2, clients=3, title="t") as shown:
            shown.begin_round(3, 3)
            shown.end_round(RECORD)
            shown.message("[bold]as it is[/bold]")
            raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        interrupted_run()
    text = output.getvalue()
    assert text.rindex("\x1b[?25h") > text.rindex("\x1b[?25l")  # the cursor is back
    assert "[bold]as it is[/bold]" in text
    assert "91.2" in text


@pytest.mark.parametrize(("name", "value"), [("TERM", "dumb"), ("CI", "true"), ("CI", "1")])
def test_dumb_terminals_and_ci_get_plain_lines(monkeypatch, name, value):
    output = terminal(monkeypatch)
    assert is_interactive()
    monkeypatch.setenv(name, value)
    assert not is_interactive()
    with Display(rounds=20, start_round=0, clients=10, title="") as shown:
        shown.end_round(RECORD)
    assert output.getvalue() == display.plain_line(RECORD, 20) + "\n"


@pytest.mark.parametrize(("seconds", "text"), [(4.2, "0:05"), (59.5, "1:00"), (750, "12:30"), (3723, "1:02:03")])
def test_durations(seconds, text):
    assert duration(seconds) == text
