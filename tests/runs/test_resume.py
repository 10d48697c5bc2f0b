"""Resuming: the bits of an uninterrupted run, and only what may change changes."""

from __future__ import annotations

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pytest
from omegaconf import OmegaConf

import bayesfed
from bayesfed.errors import InputError
from bayesfed.runs.directory import read_jsonl

RECORDED = ("round", "mean/nll", "bayes/nll", "dual/norm", "clients/replied", "bytes/up", "posterior/precision_max")


def comparable(rounds):
    return [{key: line.get(key) for key in RECORDED} for line in rounds]


def interrupt(solution):
    raise KeyboardInterrupt


@pytest.fixture(scope="module")
def uninterrupted(tmp_path_factory):
    """Runs of 6 rounds by share of clients sampled."""
    folder = tmp_path_factory.mktemp("uninterrupted")
    base = ["experiment=linreg", "strategy.family=diagonal", "strategy.damping=0.3", "eval.samples=4", "rounds=6"]
    quiet = ["display=false", "figures=false"]
    return {
        fraction: bayesfed.run(
            [*base, *quiet, f"strategy.fraction={fraction}", f"hydra.run.dir={folder / str(fraction)}"]
        )
        for fraction in (1.0, 0.6)
    }


@pytest.mark.parametrize(
    ("every", "at", "fraction"),
    [
        (1, 2, 1.0),
        (1, 5, 1.0),
        (2, 2, 1.0),
        (2, 4, 1.0),
        (2, 5, 1.0),
        (3, 3, 1.0),
        (3, 6, 1.0),
        (1, 3, 0.6),
        (2, 6, 0.6),
        (4, 3, 0.6),
    ],
)
def test_interrupted_anywhere(uninterrupted, run, sabotage, mend, tmp_path, digest, every, at, fraction):
    """Duals and ``checkpoint.every`` > 1: clients must still have the sites of the last checkpoint, not only the
    newest.
    """
    whole = uninterrupted[fraction]
    sabotage(interrupt, client=None if fraction < 1 else 3, round=at)
    with pytest.raises(KeyboardInterrupt):
        run("rounds=6", f"checkpoint.every={every}", f"strategy.fraction={fraction}")
    mend()
    part = bayesfed.run([f"resume={tmp_path / 'run'}"])
    assert digest(part.run_dir) == digest(whole.run_dir)
    assert comparable(part.rounds) == comparable(whole.rounds)
    assert part.summary["bytes/total"] == whole.summary["bytes/total"]
    assert part.summary["status"] == "finished"


def test_interrupted_twice(run, sabotage, mend, digest):
    whole = run("rounds=6", "checkpoint.every=2", to="whole")
    part = whole.run_dir.parent / "part"
    for at, start in (
        (4, lambda: run("rounds=6", "checkpoint.every=2", to="part")),
        (6, lambda: run(f"resume={part}")),
    ):
        sabotage(interrupt, client=3, round=at)
        with pytest.raises(KeyboardInterrupt):
            start()
        mend()
    bayesfed.run([f"resume={part}"])
    assert digest(part) == digest(whole.run_dir)


def test_failures_are_remembered(run, sabotage, mend, digest):
    """A client that failed before the checkpoint goes on from its older site after it."""

    def raises(solution):
        raise RuntimeError

    sabotage(raises, client=1, round=2)
    whole = run("rounds=4", to="whole")
    part = run("rounds=2", to="part")
    mend()
    bayesfed.run([f"resume={part.run_dir}", "rounds=4"])
    assert digest(part.run_dir) == digest(whole.run_dir)


def test_newest_checkpoint_is_torn(run, digest):
    """The older one serves as long as its sites exist; if not, it says so rather than going on with other duals."""
    part = run("rounds=3", to="part")
    (part.run_dir / "checkpoint" / "server-000003.safetensors").write_bytes(b"half")
    resumed = bayesfed.run([f"resume={part.run_dir}", "rounds=4"])
    assert digest(resumed.run_dir) == digest(run("rounds=4", to="whole").run_dir)


def test_more_rounds_keep_the_horizon_of_the_schedule(run, digest):
    settings = ("strategy.family=isotropic", "client=sgd", "client.epochs=1", "client.schedule=cosine")
    whole = run(*settings, "rounds=4", "client.schedule_rounds=3", to="whole")
    part = run(*settings, "rounds=3", to="part")
    resumed = bayesfed.run([f"resume={part.run_dir}", "rounds=4"])
    assert OmegaConf.load(part.run_dir / "config.yaml").client.schedule_rounds == 3
    assert digest(resumed.run_dir) == digest(whole.run_dir)


def test_a_finished_run_resumed_as_it_is_stays_as_it_is(run):
    first = run("rounds=2")
    before = {p: p.read_bytes() for p in first.run_dir.rglob("*") if p.is_file()}
    again = bayesfed.run([f"resume={first.run_dir}"])
    assert again.summary == first.summary
    assert {p: p.read_bytes() for p in first.run_dir.rglob("*") if p.is_file()} == before


def test_what_may_change(run):
    first = run("rounds=1")
    again = bayesfed.run(
        [
            f"resume={first.run_dir}",
            "rounds=3",
            "engine.num_workers=3",
            "eval.samples=3",
            "eval.every=2",
            "logger=none",
            "device=cpu",
            "display=false",
        ]
    )
    assert [("mean/nll" in line) for line in again.rounds] == [True, True, True, True]
    stored = OmegaConf.load(first.run_dir / "config.yaml")
    assert (stored.rounds, stored.eval.samples, stored.engine.num_workers) == (3, 3, 3)
    assert stored.strategy.family == "diagonal"


@pytest.mark.parametrize(
    "override",
    [
        "seed=2",
        "strategy.rho=1",
        "strategy=fedavg",
        "client=ivon",
        "client.schedule_rounds=9",
        "data=digits",
        "model.bias=false",
        "partition=iid",
        "likelihood.precision=2",
        "dtype=float32",
        "wire=float16",
        "checkpoint.every=2",
        "experiment=digits_het10",
        "+new.key=1",
    ],
)
def test_what_may_not(run, override):
    first = run("rounds=1")
    before = {p: p.read_bytes() for p in first.run_dir.rglob("*") if p.is_file()}
    with pytest.raises(InputError) as error:
        bayesfed.run([f"resume={first.run_dir}", "rounds=2", override])
    assert str(error.value).startswith(override.lstrip("+").partition("=")[0].removesuffix(".key"))
    assert {p: p.read_bytes() for p in first.run_dir.rglob("*") if p.is_file()} == before


@pytest.mark.parametrize(
    "bad", ["rounds=1", "rounds=abc", "rounds=-1", "eval.samples=0", "eval.evry=1", "engine.workers=2", "engine=rayy"]
)
def test_bad_values_on_resuming_change_nothing(run, bad):
    first = run("rounds=2")
    before = {p: p.read_bytes() for p in first.run_dir.rglob("*") if p.is_file()}
    with pytest.raises(InputError) as error:
        bayesfed.run([f"resume={first.run_dir}", bad])
    assert len(str(error.value).splitlines()) == 1
    assert {p: p.read_bytes() for p in first.run_dir.rglob("*") if p.is_file()} == before


def test_a_run_from_before_there_were_wire_formats(run, digest):
    whole, part = run("rounds=3", to="whole"), run("rounds=2", to="part")
    path = part.run_dir / "config.yaml"
    path.write_text(path.read_text().replace("wire: full\n", ""))
    assert "wire" not in OmegaConf.load(path)
    bayesfed.run([f"resume={part.run_dir}", "rounds=3"])
    assert digest(part.run_dir) == digest(whole.run_dir)


def test_rounds_only_grow_also_when_fewer_are_done(run, sabotage, mend, tmp_path):
    sabotage(interrupt, round=2)
    with pytest.raises(KeyboardInterrupt):
        run("rounds=6")
    mend()
    with pytest.raises(InputError, match=r"rounds=3: can only grow .* started for 6; leave rounds out, and interrupt"):
        bayesfed.run([f"resume={tmp_path / 'run'}", "rounds=3"])


@pytest.mark.parametrize("path", ["missing", "empty"])
def test_nothing_to_resume(tmp_path, path):
    (tmp_path / "empty").mkdir()
    with pytest.raises(InputError, match="not a run directory"):
        bayesfed.run([f"resume={tmp_path / path}"])


def test_without_checkpoints_there_is_nothing_to_resume(run):
    first = run("rounds=2", "checkpoint.every=0")
    assert first.summary["status"] == "finished"
    with pytest.raises(InputError, match="no readable checkpoint"):
        bayesfed.run([f"resume={first.run_dir}", "rounds=3"])


def test_lines_of_rounds_after_the_checkpoint_are_written_anew(run, sabotage, mend, tmp_path):
    sabotage(interrupt, client=3, round=4)
    with pytest.raises(KeyboardInterrupt):
        run("rounds=5", "checkpoint.every=2")
    mend()
    assert [line["round"] for line in read_jsonl(tmp_path / "run" / "rounds.jsonl")] == [0, 1, 2, 3]
    bayesfed.run([f"resume={tmp_path / 'run'}"])
    assert [line["round"] for line in read_jsonl(tmp_path / "run" / "rounds.jsonl")] == [0, 1, 2, 3, 4, 5]
    lines = [(line["round"], line["client"]) for line in read_jsonl(tmp_path / "run" / "clients.jsonl")]
    assert lines == [(r, c) for r in (1, 2, 3, 4, 5) for c in range(5)]


# -- paths -------------------------------------------------------------------------------------------------------------


@pytest.fixture
def project(tmp_path, monkeypatch):
    """A folder with data and a run of 2 rounds on them, started there with relative paths."""
    folder = tmp_path / "project"
    folder.mkdir()
    monkeypatch.chdir(folder)
    generator = np.random.default_rng(0)
    x = generator.normal(size=(60, 3))
    np.savez("d.npz", x=x, y=(x[:, 0] > 0).astype(int), client=np.arange(60) % 3)
    base = ["data=npz", "data.path=d.npz", "strategy=fedavg", "client.epochs=1", "display=false", "figures=false"]
    for name, rounds in (("run", 2), ("whole", 3)):
        bayesfed.run([*base, f"rounds={rounds}", f"hydra.run.dir={name}"])
    return folder


def test_resumed_from_another_folder(project, monkeypatch, digest):
    monkeypatch.chdir("/")
    bayesfed.run([f"resume={project}/run", "rounds=3"])
    assert digest(project / "run") == digest(project / "whole")
    assert OmegaConf.load(project / "run" / "config.yaml").data.path == str(project / "d.npz")


def test_a_project_that_moved_goes_on_with_the_same_data_only(project, digest):
    moved = project.rename(project.parent / "moved")
    with pytest.raises(InputError) as refused:
        bayesfed.run([f"resume={moved}/run", "rounds=3"])
    assert refused.value.field == "data.path"
    arrays = dict(np.load(moved / "d.npz"))
    np.savez(moved / "other.npz", **arrays | {"y": 1 - arrays["y"]})
    before = {p: p.read_bytes() for p in moved.rglob("*") if p.is_file()}
    with pytest.raises(InputError, match="holds other data than those this run was started with"):
        bayesfed.run([f"resume={moved}/run", "rounds=3", f"data.path={moved}/other.npz"])
    assert {p: p.read_bytes() for p in moved.rglob("*") if p.is_file()} == before
    bayesfed.run([f"resume={moved}/run", "rounds=3", f"data.path={moved}/d.npz"])
    assert digest(moved / "run") == digest(moved / "whole")


def test_data_that_changed_since_the_start_are_refused(project):
    arrays = dict(np.load("d.npz"))
    np.savez("d.npz", **arrays | {"y": 1 - arrays["y"]})
    with pytest.raises(InputError, match="holds other data than those this run was started with"):
        bayesfed.run(["resume=run", "rounds=3"])


def test_tables_in_nested_folders_that_changed_are_refused(tmp_path, monkeypatch):
    """Runs that lie in the data's folder are no data."""
    folder = tmp_path / "nest"
    monkeypatch.chdir(tmp_path)
    for client in range(3):
        (folder / f"client={client}").mkdir(parents=True)
        table = pa.table({"a": np.arange(20.0) - client, "y": np.arange(20) % 2})
        pq.write_table(table, folder / f"client={client}" / "p.parquet")
    data = [
        "data=parquet",
        "data.path=nest",
        "data.target=y",
        "data.client=client",
        "strategy=fedavg",
        "client.epochs=1",
    ]
    bayesfed.run([*data, "rounds=1", "display=false", "figures=false", "hydra.run.dir=nest/runs/r"])
    (folder / ".DS_Store").write_text("no data")
    bayesfed.run(["resume=nest/runs/r", "rounds=2"])
    pq.write_table(table.set_column(1, "y", pa.array(1 - np.arange(20) % 2)), folder / "client=0" / "p.parquet")
    with pytest.raises(InputError, match="holds other data than those this run was started with"):
        bayesfed.run(["resume=nest/runs/r", "rounds=3"])


def test_the_home_folder_is_meant_by_its_sign(project, monkeypatch):
    """Nothing is called ``~``."""
    monkeypatch.setenv("HOME", str(project))
    result = bayesfed.run(
        [
            "data=npz",
            "data.path='~/d.npz'",
            "strategy=fedavg",
            "rounds=0",
            "display=false",
            "figures=false",
            "hydra.run.dir='~/r'",
        ]
    )
    assert result.run_dir == project / "r"
    assert bayesfed.run(["resume='~/r'"]).run_dir == project / "r"
    assert bayesfed.load("~/r").rounds == result.rounds
    assert not (project / "~").exists()
