"""Profiles of runs: what becomes of the spans, and that measuring changes nothing."""

from __future__ import annotations

import itertools
import math
import time
from pathlib import Path

import numpy as np
import pytest
from matplotlib.image import imread
from rich.console import Console

import bayesfed
from bayesfed import cli
from bayesfed.errors import InputError
from bayesfed.profiling import Node, Profiler, occupied, recording, span
from bayesfed.runs.directory import read_jsonl
from bayesfed.runs.icicle import icicle
from bayesfed.runs.profile import LABELS, RunProfile, categories, duration, load_profile, table
from clients.exact import ExactSolver

DIGITS = ["rounds=2", "client.epochs=1", "eval.samples=2", "display=false", "figures=false"]


# -- categories --------------------------------------------------------------------------------------------------------


def test_own_time_belongs_to_the_nearest_known_span():
    tree = Node(100.0, 1)
    tree.add_numbers({
        "time/train": 60, "calls/train": 2, "time/train/unpack": 5, "calls/train/unpack": 2,
        "time/train/solve": 50, "calls/train/solve": 2, "time/train/solve/update": 30, "calls/train/solve/update": 20,
        "time/records": 20, "calls/records": 1, "time/records/figures": 15, "calls/records/figures": 1,
        "time/records/figures/evaluation": 9, "calls/records/figures/evaluation": 1,
    })  # fmt: skip
    found = categories(tree)
    assert {name: (node.seconds, node.calls) for name, node in found.items()} == {
        "update": (30, 20),
        "transport": (5, 2),
        "evaluation": (9, 1),
        "records": (11, 1),
        "other": (20 + 5 + 20, 0),
    }
    assert sum(node.seconds for node in found.values()) == tree.seconds


def test_what_workers_did_is_split_into_work_hand_over_and_idle(clock, tmp_path):
    """Two workers over 20 s: start-up 2 x 3 s, clients of 2, 2 and 3 s that took a second longer on their way."""
    with recording(Profiler()):
        clock.sleep(5)
        run = RunProfile("ray", workers=2)
        with span("round"):
            with span("waiting"):
                clock.sleep(8)
            clock.sleep(7)
        for worker, took in ((11, 2.0), (12, 2.0), (11, 3.0)):
            run.client_done({"worker": worker, "time/train": took, "calls/train": 1, "loss": 1.0})
        run.client_done({"reason": "it failed"})
        for place, took in ((0, 3.0), (0, 4.0), (1, 3.0)):
            occupied(place, "train", took, 1)
        for place in (0, 1):
            occupied(place, "query", 3.0, 5)
        profile = run.write(tmp_path)
    assert profile == load_profile(tmp_path)
    assert profile["wall"] == profile["server"]["seconds"] == 20
    assert profile["workers"] == [
        {"busy": 10.0, "idle": 10.0, "messages": 2}, {"busy": 6.0, "idle": 14.0, "messages": 1},
    ]  # fmt: skip
    clients = {name: row["seconds"] for name, row in profile["clients"]["categories"].items()}
    assert clients == {"start-up": 6, "transport": 3, "other": 7, "idle": 24}
    parts = profile["clients"]["tree"]["children"]["idle"]["children"]
    assert parts["training"]["seconds"] == 2 * 8 - 10
    assert parts["server"]["seconds"] == 24 - 6
    server = {name: row["seconds"] for name, row in profile["server"]["categories"].items()}
    assert server == {"start-up": 5, "waiting": 8, "other": 7}
    assert profile["server"]["categories"]["waiting"] == {"seconds": 8, "share": 0.4, "calls": 1, "mean": 8}


def test_without_a_recorder_there_is_no_profile(tmp_path):
    run = RunProfile("inline", 1)
    run.client_done({"worker": 1, "time/train": 1.0})
    assert run.write(tmp_path) is None
    assert list(tmp_path.iterdir()) == []
    with pytest.raises(InputError, match="bayesfed profile"):
        load_profile(tmp_path)


@pytest.mark.parametrize(
    ("value", "text"),
    [(None, ""), (2.5, "2.50 s"), (1.0, "1.00 s"), (0.0123, "12.30 ms"), (4.2e-6, "4.2 µs"), (0, "0.0 µs")],
)
def test_durations(value, text):
    assert duration(value) == text


# -- runs --------------------------------------------------------------------------------------------------------------


def shares(side: dict) -> dict[str, float]:
    return {name: row["seconds"] for name, row in side["categories"].items()}


def text_of(profile: dict) -> str:
    console = Console(width=80, record=True, file=open("/dev/null", "w"))  # noqa: SIM115
    console.print(table(profile))
    return console.export_text()


@pytest.fixture(scope="module")
def inline(tmp_path_factory) -> tuple[Path, float]:
    """A profiled inline run, and the seconds from the call to its ``profile.json``."""
    run_dir = tmp_path_factory.mktemp("profile") / "inline"
    options = [o for o in DIGITS if o != "figures=false"]
    bayesfed.run([*DIGITS, "rounds=1", f"hydra.run.dir={run_dir}-warm"])  # imports
    began = time.time()
    bayesfed.run([*options, "profile=true", f"hydra.run.dir={run_dir}"])
    return run_dir, (run_dir / "profile.json").stat().st_mtime - began


def test_an_inline_run_is_accounted_for(inline):
    run_dir, took = inline
    profile = load_profile(run_dir)
    assert profile["wall"] == pytest.approx(took, rel=0.1)
    server, clients = shares(profile["server"]), shares(profile["clients"])
    assert sum(server.values()) == pytest.approx(profile["wall"])
    assert sum(clients.values()) == pytest.approx(profile["wall"])  # one worker
    assert sum(server.values()) - server["other"] > 0.9 * profile["wall"]  # spans, not the remainder
    train = profile["clients"]["tree"]["children"]["train"]
    assert train["calls"] == 20
    assert train["seconds"] <= server["waiting"] <= 1.5 * train["seconds"]
    assert {"data", "sampling", "gradient", "update", "sites", "transport", "idle"} <= set(clients)
    assert {"start-up", "transport", "aggregation", "evaluation", "records"} <= set(server)


def test_every_step_is_counted(inline):
    run_dir, _ = inline
    rows = load_profile(run_dir)["clients"]["categories"]
    steps = sum(2 * math.ceil(line["num-examples"] / 32) for line in read_jsonl(run_dir / "clients.jsonl")[:10])
    assert rows["update"]["calls"] == rows["gradient"]["calls"] == rows["data"]["calls"] == steps
    assert rows["sampling"]["calls"] == 2 * steps  # in and out
    line = read_jsonl(run_dir / "clients.jsonl")[-1]
    assert 0 < line["time/train/solve/update"] < line["time/train/solve"] < line["time/train"]


def test_the_table_says_it(inline):
    profile = load_profile(inline[0])
    shown = text_of(profile)
    for name in profile["server"]["categories"].keys() - {"waiting"}:
        assert LABELS[name] in shown
    assert "clients (in the server's process)" in shown
    assert "…" not in shown  # an ordinary terminal is wide enough
    assert "the server's turn" in shown
    assert f"{profile['wall']:.2f}" in shown
    assert "idle by worker" not in shown


def test_the_picture_shows_the_shares(inline):
    run_dir, _ = inline
    picture = imread(run_dir / "figures" / "profile.png")[..., :3]
    assert picture.shape[1] == 1500
    rows = load_profile(run_dir)["clients"]["categories"]
    for name, colour in (("gradient", (0x33, 0x22, 0x88)), ("update", (0x88, 0xCC, 0xEE))):
        part = np.abs(picture - np.array(colour) / 255).max(-1) < 0.02
        widest = part.sum(1).max() / picture.shape[1]
        assert widest >= 0.5 * rows[name]["share"], name  # at least as wide as in the panel of the whole run
        assert widest < 0.9


def test_boxes_lie_side_by_side_below_what_they_are_part_of(inline):
    profile = load_profile(inline[0])
    server, _, clients, _, work = icicle(profile).axes
    for axis in (server, clients, work):
        rows: dict[int, list] = {}
        for box in axis.patches:
            rows.setdefault(round(box.get_y() - 0.03), []).append((box.get_x(), box.get_x() + box.get_width()))
        assert len(rows[0]) == 1
        assert min(rows) == 0
        assert max(rows) >= 2
        for row, boxes in rows.items():
            boxes.sort()
            assert all(right <= left + 1e-9 for (_, right), (left, _) in itertools.pairwise(boxes))
            for left, right in boxes if row else ():
                assert any(a - 1e-9 <= left and right <= b + 1e-9 for a, b in rows[row - 1])
    (whole,) = [box for box in work.patches if box.get_y() < 1]
    train = Node.from_plain(profile["clients"]["tree"]["children"]["train"])
    without = train.seconds - train.children["solve"].children["optimizer"].seconds
    assert whole.get_width() == pytest.approx(without)
    assert 0 < without < train.seconds
    assert "solve" in " ".join(text.get_text() for text in work.texts)


def test_measuring_changes_no_bit(inline, tmp_path, digest):
    plain = bayesfed.run([*DIGITS, f"hydra.run.dir={tmp_path}/plain"])
    assert digest(plain.run_dir) == digest(inline[0])
    assert not (plain.run_dir / "profile.json").exists()
    lines = [read_jsonl(path / "clients.jsonl") for path in (plain.run_dir, inline[0])]
    assert not [key for line in lines[0] for key in line if key.startswith("time/") or key == "worker"]
    for without, profiled in zip(*lines, strict=True):
        assert {k: v for k, v in without.items() if k != "seconds"}.items() <= profiled.items()


@pytest.mark.parametrize("options", [["strategy=fedavg"], ["experiment=linreg"], ["experiment=linreg", "client=von"]])
def test_every_solver_says_what_it_does(options, tmp_path):
    run = bayesfed.run([*options, *DIGITS[:1], *DIGITS[2:], "profile=true", f"hydra.run.dir={tmp_path}/r"])
    assert {"data", "gradient", "update"} <= set(load_profile(run.run_dir)["clients"]["categories"])


def test_no_round_no_clients(tmp_path):
    run = bayesfed.run([*DIGITS[1:4], "rounds=0", "profile=true", f"hydra.run.dir={tmp_path}/r"])
    profile = load_profile(run.run_dir)
    assert "100.0%" in text_of(profile)
    assert (run.run_dir / "figures" / "profile.png").is_file()


def test_a_resumed_part_has_a_profile_of_its_own(run):
    whole = run("rounds=2", "profile=true")
    with pytest.raises(InputError, match="more rounds"):
        bayesfed.run([f"resume={whole.run_dir}", "profile=true"])
    before = (whole.run_dir / "profile.json").read_text()
    bayesfed.run([f"resume={whole.run_dir}", "rounds=3"])
    assert (whole.run_dir / "profile.json").read_text() == before
    bayesfed.run([f"resume={whole.run_dir}", "rounds=4", "profile=true"])
    tree = load_profile(whole.run_dir)["server"]["tree"]
    assert tree["children"]["round"]["calls"] == 1


def test_time_of_a_failed_client_comes_with_the_next_reply(run, sabotage):
    def slow_failure(solution):
        time.sleep(0.2)
        raise RuntimeError("no power")

    sabotage(slow_failure, client=2, round=1)
    result = run("rounds=1", "profile=true")
    times = {line["client"]: line.get("time/train", 0) for line in read_jsonl(result.run_dir / "clients.jsonl")}
    assert times[2] == 0
    assert times[3] > 0.2 > times[4]
    assert load_profile(result.run_dir)["clients"]["tree"]["children"]["train"]["calls"] == 5


@pytest.mark.engines
@pytest.mark.parametrize("engine", ["ray", "flower"])
def test_other_processes_report_what_they_do_and_that_they_wait(inline, tmp_path, digest, engine, ray_with_three_slots):
    options = [*DIGITS, f"engine={engine}", "engine.num_workers=2", "profile=true", f"hydra.run.dir={tmp_path}/r"]
    run = bayesfed.run(options)
    assert digest(run.run_dir) == digest(inline[0])
    profile = load_profile(run.run_dir)
    assert profile["engine"] == engine
    workers = profile["workers"]
    assert sum(worker["messages"] for worker in workers) == 20
    clients, server = shares(profile["clients"]), shares(profile["server"])
    assert profile["clients"]["seconds"] == pytest.approx(len(workers) * profile["wall"])
    assert sum(clients.values()) == pytest.approx(profile["clients"]["seconds"])
    assert sum(server.values()) == pytest.approx(profile["wall"])
    assert clients["idle"] == pytest.approx(sum(worker["idle"] for worker in workers), rel=1e-6)
    assert server["start-up"] < clients["idle"] + clients["start-up"]
    assert all(worker["idle"] > server["evaluation"] for worker in workers)
    rows = profile["clients"]["categories"]
    assert rows["update"]["calls"] == load_profile(inline[0])["clients"]["categories"]["update"]["calls"]
    shown = text_of(profile)
    assert f"{len(workers)} worker" in shown
    assert "while the server works" in shown


# -- the command -------------------------------------------------------------------------------------------------------


def code(arguments: list[str]) -> int:
    with pytest.raises(SystemExit) as stop:
        cli.main(arguments)
    return stop.value.code


LINREG = ["experiment=linreg", "rounds=1", "figures=false", "eval.samples=2"]


def test_command(tmp_path, capsys):
    assert code(["profile", *LINREG, f"hydra.run.dir={tmp_path}/r"]) == 0
    out = capsys.readouterr().out
    assert f"results in {tmp_path}/r" in out
    for word in ("server", "aggregation", "forward/backward", "wall time", "share"):
        assert word in out
    assert (tmp_path / "r" / "profile.json").is_file()


@pytest.mark.parametrize(
    "arguments", [["-m", "seed=1,2"], ["--multirun", "seed=1,2"], ["--cfg", "job"], ["profile=false"], ["seed=1,2"]]
)
def test_what_makes_no_sense_is_refused(arguments, tmp_path, monkeypatch, capsys):
    monkeypatch.chdir(tmp_path)
    assert code(["profile", *LINREG, *arguments]) == 2
    err = capsys.readouterr().err
    assert err.startswith("error: ")
    assert len(err.splitlines()) == 1
    assert list(tmp_path.iterdir()) == []


def test_a_failed_run_exits_as_any_other(tmp_path, monkeypatch, capsys):
    def solve(self, problem):
        raise RuntimeError("no power")

    monkeypatch.setattr(ExactSolver, "solve", solve)
    assert code(["profile", *LINREG, f"hydra.run.dir={tmp_path}/r"]) == 1
    assert "no power" in capsys.readouterr().err
    assert load_profile(tmp_path / "r")["wall"] > 0
