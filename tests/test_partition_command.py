"""``bayesfed partition``: what it writes is what a run with the same overrides would train on."""

from __future__ import annotations

import csv
import json

import numpy as np
import pytest
from matplotlib.image import imread

from bayesfed import cli
from bayesfed.app import plain, problem_of
from bayesfed.config import compose_config
from bayesfed.splits.command import partition
from bayesfed.splits.summary import overview


def code(arguments: list[str]) -> int:
    with pytest.raises(SystemExit) as stop:
        cli.main(["partition", *arguments])
    return stop.value.code


def read(folder) -> tuple[dict, list[dict[str, str]]]:
    with (folder / "clients.csv").open() as file:
        return json.loads((folder / "partition.json").read_text()), list(csv.DictReader(file))


def test_it_shows_what_a_run_would_use(tmp_path, capsys):
    overrides = ["partition=dirichlet", "partition.alpha=0.3", "seed=4", "shift.rotation=30", "shift.labels=0.3"]
    assert code([*overrides, f"out={tmp_path}/p"]) == 0
    problem = problem_of(plain(compose_config(overrides)))
    found, rows = read(tmp_path / "p")
    assert found["label_counts"] == problem.label_counts.tolist()
    assert [int(row["examples"]) for row in rows] == [len(client) for client in problem.clients]
    assert [int(row["test_examples"]) for row in rows] == [len(tests) for tests in problem.client_tests]
    assert [float(row["angle"]) for row in rows] == pytest.approx([c.shift.angle for c in problem.clients], rel=1e-5)
    assert all(len(row["permuted"].split()) == 3 for row in rows)
    shares = problem.label_counts / problem.label_counts.sum(1, keepdims=True)
    entropies = [-(p[p > 0] * np.log(p[p > 0])).sum() for p in shares]
    assert [float(row["effective_classes"]) for row in rows] == pytest.approx(np.exp(entropies), rel=1e-5)
    assert found["config"]["partition"]["alpha"] == 0.3
    out = capsys.readouterr().out
    assert "10 clients, 1,438 examples" in out
    assert "label_distribution.png, sizes.png, samples.png, clients.csv in" in out
    assert "°" in out


def test_pictures(tmp_path):
    folder = partition([f"out={tmp_path}/p", "partition=iid", "partition.num_clients=3"])
    for name in ("label_distribution", "sizes", "samples"):
        pixels = imread(folder / f"{name}.png")[..., :3]
        assert min(pixels.shape[:2]) > 200
        assert pixels.std() > 0.05, f"{name} is empty"
    assert not (folder / "targets.png").exists()


def test_a_regression_has_targets_and_no_classes(tmp_path):
    folder = partition(["experiment=linreg", f"out={tmp_path}/p"])
    assert sorted(path.name for path in folder.glob("*.png")) == ["sizes.png", "targets.png"]
    found, rows = read(folder)
    assert found["label_counts"] is None
    assert "classes" not in rows[0]


def test_simulated_arrivals_are_listed(tmp_path, capsys):
    partition([f"out={tmp_path}/p", "system.deadline=1", "system.stragglers=0.5", "system.dropout=0.2"])
    _, rows = read(tmp_path / "p")
    assert any(row["lost"] for row in rows)
    assert any(float(row["work"]) < 1 for row in rows)
    assert "arrival" in capsys.readouterr().out


def test_the_same_folder_again_other_files_stay(tmp_path, capsys):
    folder = tmp_path / "p"
    partition([f"out={folder}", "partition=iid"])
    partition([f"out={folder}", "experiment=linreg"])
    assert not (folder / "samples.png").exists()  # of the split before
    (tmp_path / "mine").mkdir()
    (tmp_path / "mine" / "thesis.tex").write_text("x")
    assert code([f"out={tmp_path}/mine"]) == 2
    assert "holds other files" in capsys.readouterr().err
    assert [p.name for p in (tmp_path / "mine").iterdir()] == ["thesis.tex"]


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["partition=dirichlett"], "partition=dirichlett: no such option; did you mean 'dirichlet'"),
        (["--cfg"], "option=--cfg: partition takes overrides and out= only"),
        (["shift.rotation=200"], "shift.rotation=200: must be a finite number >= 0 and <= 180"),
        (["partition.num_clients=0"], "partition.num_clients=0"),
    ],
)
def test_errors_are_one_line_and_write_nothing(tmp_path, monkeypatch, capfd, arguments, message):
    monkeypatch.chdir(tmp_path)
    assert code(arguments) == 2
    err = capfd.readouterr().err
    assert err.startswith("error: ")
    assert message in err
    assert len(err.splitlines()) == 1
    assert not list(tmp_path.iterdir())


def test_gini_coefficient():
    def gini(*sizes: int) -> float:
        return overview([{"examples": size} for size in sizes])["size_gini"]

    assert gini(5, 5, 5) == 0
    assert gini(1, 3) == pytest.approx(0.25)
    assert gini(0, 0, 0, 10) == pytest.approx(0.75)
    sizes = [3, 1, 4, 1, 5, 9]
    pairs = sum(abs(a - b) for a in sizes for b in sizes)
    assert gini(*sizes) == pytest.approx(pairs / (2 * len(sizes) * sum(sizes)))
