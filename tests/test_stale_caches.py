"""Nothing that an earlier run of the process read or built is taken for this run's."""

from __future__ import annotations

import json
import os

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pytest

import bayesfed
from bayesfed.app import client_app, plain, problem_of
from bayesfed.config import compose_config
from bayesfed.problem.data import Source

BASE = [
    "model=linear",
    "strategy=fedavg",
    "rounds=3",
    "client.lr=0.3",
    "engine=inline",
    "display=false",
    "figures=false",
    "eval.samples=2",
]
X = np.random.default_rng(0).normal(size=(200, 3))
Y = (X[:, 0] > 0).astype(int)


def write(path, y, clients: int) -> None:
    np.savez(path, x=X, y=y, client=np.arange(200) % clients)


def problem(*overrides: str):
    return problem_of(plain(compose_config([*BASE, *overrides])))


def labels(found) -> list[int]:
    return found.clients[0].y.tolist()


def test_a_second_run_reads_the_file_that_changed(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    options = ["data=npz", "data.path=m.npz"]
    write("m.npz", Y, 4)
    first = bayesfed.run([*BASE, *options, "hydra.run.dir=a"])
    assert problem(*options) is problem(*options)
    write("m.npz", 1 - Y, 2)
    second = bayesfed.run([*BASE, *options, "hydra.run.dir=b"])
    assert (first.summary["clients"], second.summary["clients"]) == (4, 2)
    assert labels(problem(*options)) == (1 - Y).tolist()
    # the client side read the new labels too: the two posteriors point opposite ways
    assert float(first.posterior.mean @ second.posterior.mean) < 0


def test_the_same_relative_path_from_another_folder(tmp_path, monkeypatch):
    means = []
    for name, y in (("one", Y), ("two", 1 - Y)):
        (tmp_path / name).mkdir()
        monkeypatch.chdir(tmp_path / name)
        write("m.npz", y, 2)
        os.utime("m.npz", ns=(1, 1))  # size and time are those of the other file
        means.append(bayesfed.run([*BASE, "data=npz", "data.path=m.npz", "hydra.run.dir=r"]).posterior.mean)
        assert labels(problem("data=npz", "data.path=m.npz")) == y.tolist()
    assert float(means[0] @ means[1]) < 0


@pytest.mark.parametrize("by", ["path", "BAYESFED_DATA"])
def test_image_folders(tmp_path, monkeypatch, by):
    from io import BytesIO

    from PIL import Image

    monkeypatch.setenv("BAYESFED_CACHE", str(tmp_path / "cache"))

    def save(folder, brightness: int) -> None:
        folder.mkdir(parents=True, exist_ok=True)
        png = BytesIO()
        Image.fromarray(np.full((4, 4), brightness, np.uint8)).save(png, "PNG")
        images = [{"bytes": png.getvalue(), "path": None}] * 20
        for split in ("train", "test"):
            pq.write_table(pa.table({"image": images, "label": list(range(10)) * 2}), folder / f"{split}.parquet")

    found = []
    for number, root in ((10, "a"), (20, "a"), (30, "b")):
        folder = tmp_path / root / "mnist"
        save(folder, number)
        monkeypatch.setenv("BAYESFED_DATA", str(tmp_path / root))
        given = [f"data.path={folder}"] if by == "path" else []
        found.append(int(problem("data=mnist", "partition=iid", "partition.num_clients=2", *given).test.x.max()))
    assert found == [10, 20, 30]


def test_a_source_of_ones_own(tmp_path, monkeypatch):
    """Its files are noticed whatever its options are called, and so is the class itself when it was defined anew."""
    import sys
    from types import ModuleType

    from bayesfed.problem.data import Loaded

    file = tmp_path / "numbers.txt"
    module = ModuleType("own_source_of_a_test")
    monkeypatch.setitem(sys.modules, module.__name__, module)

    def define(factor: int) -> None:
        class Mine(Source):
            def __init__(self, where: str, *, fraction: float = 1.0, scaling: str = "raw"):
                super().__init__(fraction=fraction, scaling=scaling)
                self.where = where

            def load(self, seed: int) -> Loaded:
                x = factor * np.full((20, 1), float(file.read_text()))
                return Loaded(x, np.arange(20) % 2, x, np.arange(20) % 2)

        module.Mine = Mine

    config = plain(compose_config([*BASE, "partition=iid", "partition.num_clients=2"]))
    config["data"] = {"_target_": f"{module.__name__}.Mine", "name": "mine", "where": str(file)}
    found = []
    for factor, text in ((1, "1"), (1, "20"), (3, "20")):
        file.write_text(text)
        define(factor)
        found.append(float(problem_of(config).test.x[0, 0]))
    assert found == [1, 20, 60]


def test_two_client_apps_share_nothing(tmp_path):
    """Equal configurations, equal folders: trainer, strategy and profiler are each app's own."""
    config = plain(compose_config(["experiment=linreg", "profile=true"]))
    one, two = (client_app(config, tmp_path) for _ in range(2))
    for part in ("_trainer", "_strategy"):
        assert getattr(one, part)() is getattr(one, part)()
        assert getattr(one, part)() is not getattr(two, part)()
    assert one._profiler is not two._profiler


def test_a_nodes_file_that_changed(tmp_path):
    """A SuperNode whose process lives on serves a later message with the data of then."""
    from flwr.app import Context, RecordDict

    from bayesfed.deployment.apps import _served, client_config

    def served(y):
        np.savez(tmp_path / "mine.npz", x=X, y=y)
        node = {
            "data-path": str(tmp_path / "mine.npz"),
            "partition-id": 0,
            "device": "cpu",
            "sites": str(tmp_path / "s"),
        }
        run = {"overrides": "data=npz model=linear strategy=fedavg", "run-dir": "r"}
        context = Context(run_id=7, node_id=1, node_config=node, state=RecordDict(), run_config=run)
        assert json.dumps(client_config(context))
        return _served(context)

    one = served(Y)
    assert labels(one._trainer().problem) == Y.tolist()
    assert labels(served(1 - Y)._trainer().problem) == (1 - Y).tolist()
