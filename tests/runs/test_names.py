"""Clients and classes keep the names that a user's data give them."""

from __future__ import annotations

import csv
import json

import numpy as np
import pytest

import bayesfed
from bayesfed.runs.directory import read_jsonl
from bayesfed.runs.figures import label_distribution
from bayesfed.splits.command import partition

CITIES, ANIMALS = ["Aachen", "Berlin", "Ulm"], ["ant", "bee", "cat$_x$"]


@pytest.fixture
def overrides(tmp_path) -> list[str]:
    """A CSV file of three animals in three cities; a city's number is not its row's."""
    rng = np.random.default_rng(0)
    kind = np.arange(240) % 3
    x = np.array([[3.0, 0.0], [-3.0, 0.0], [0.0, 4.0]])[kind] + 0.3 * rng.normal(size=(240, 2))
    lines = [f"{a},{b},{ANIMALS[k]},{CITIES[2 - i % 3]}" for i, ((a, b), k) in enumerate(zip(x, kind, strict=True))]
    (tmp_path / "t.csv").write_text("\n".join(["a,b,animal,city", *lines]) + "\n")
    return ["data=csv", f"data.path={tmp_path / 't.csv'}", "data.target=animal", "data.client=city", "model=linear"]


def test_a_run(overrides, tmp_path):
    learning = [
        "strategy=fedavg",
        "client.lr=0.1",
        "rounds=2",
        "eval.clients_every=2",
        "eval.samples=2",
        "display=false",
    ]
    result = bayesfed.run([*overrides, *learning, f"hydra.run.dir={tmp_path / 'run'}"])
    for name in ("clients", "client_tests"):
        lines = read_jsonl(tmp_path / "run" / f"{name}.jsonl")
        assert {(line["client"], line["name"]) for line in lines} == set(enumerate(CITIES))
    trained = bayesfed.load(result.run_dir)
    assert trained.classes == ANIMALS
    points = np.array([[0.0, 4.0], [3.0, 0.0], [-3.0, 0.0]])
    assert [trained.classes[k] for k in trained.predict(points, samples=0).argmax(1)] == ["cat$_x$", "ant", "bee"]


def test_a_partition(overrides, tmp_path):
    folder = partition([*overrides, f"out={tmp_path / 'split'}"])
    with (folder / "clients.csv").open() as file:
        assert [(row["client"], row["name"]) for row in csv.DictReader(file)] == [
            (str(k), city) for k, city in enumerate(CITIES)
        ]
    found = json.loads((folder / "partition.json").read_text())
    assert found["classes"] == ANIMALS
    assert [client["name"] for client in found["clients"]] == CITIES


def test_numbers_have_no_names(run):
    """What the data number 0..K-1 and 0..C-1 is written as before."""
    result = run("rounds=1", "eval.clients_every=1")
    for name in ("clients", "client_tests"):
        assert all("name" not in line for line in read_jsonl(result.run_dir / f"{name}.jsonl"))
    assert "classes" not in bayesfed.load(result.run_dir).model_description
    assert bayesfed.load(result.run_dir).classes is None


def test_the_figure():
    figure = label_distribution(np.array([[3, 0], [1, 2]]), ["a very long name of a class", "b$"], ["Aachen", "Ulm"])
    axis = figure.axes[1]
    assert [tick.get_text() for tick in axis.get_xticklabels()] == ["Aachen", "Ulm"]
    assert [tick.get_text() for tick in axis.get_yticklabels()] == ["a very lon…class", r"b\$"]
