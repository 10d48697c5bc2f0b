"""Names and paths of all kinds as values: they mean what they say, without Hydra's quotes."""

from __future__ import annotations

import random
from pathlib import Path

import numpy as np
import pytest

import bayesfed
from bayesfed import cli
from bayesfed.config import compose_config
from bayesfed.errors import InputError
from bayesfed.overrides import parse, readable

NAMES = [
    "größe.npz",
    "a(1).npz",
    "a=b.npz",
    "~x.npz",
    "it's.npz",
    "a&b.npz",
    "a#b.npz",
    "日本.npz",
    "a(1,2).npz",
    "a;b!.npz",
]


@pytest.mark.parametrize("name", NAMES)
def test_awkward_names_come_through(name):
    assert parse([f"data.path={name}"])[0].value() == name
    assert compose_config(["data=npz", f"data.path={name}"]).data.path == str(Path.cwd() / name)


@pytest.mark.parametrize(
    "text", ["seed=1", "a.b='x y'", "m=[1,2]", "s=a,b", "s=interval(0,1)", "~seed", "+x=1", "x=", "s=1,'ö'"]
)
def test_what_hydra_reads_is_left_alone(text):
    assert readable(text) == text


def test_the_values_of_a_sweep_are_quoted_one_by_one():
    (found,) = parse(["data.path=größe.npz,b.npz,c(1,2).npz"])
    assert [str(value).strip("'") for value in found.sweep_string_iterator()] == ["größe.npz", "b.npz", "c(1,2).npz"]


def test_no_characters_make_an_override_mean_something_else():
    generator = random.Random(1)
    for _ in range(300):
        value = "a" + "".join(generator.choices("ab=()~&'\" ö:#*?!<>|;", k=6)).strip()
        found = parse([f"resume={value}"])[0].value()
        read = value if readable(f"resume={value}") != f"resume={value}" else found
        assert found == read


@pytest.mark.parametrize("name", ["größe.npz", "a(1).npz", "a=b.npz"])
@pytest.mark.parametrize("way", ["run", "command", "sweep"])
def test_such_a_file_is_trained_on(tmp_path, monkeypatch, name, way):
    rng = np.random.default_rng(0)
    monkeypatch.chdir(tmp_path)
    arrays = {"x": rng.normal(size=(30, 3)), "y": np.arange(30) % 2, "client": np.arange(30) % 3}
    np.savez(tmp_path / name, **arrays, x_test=arrays["x"], y_test=arrays["y"])
    quick = ["rounds=1", "strategy=fedavg", "figures=false", "display=false", "data=npz", f"data.path={name}"]
    if way == "run":
        found = bayesfed.run([*quick, "hydra.run.dir=out"]).summary
        assert found["clients"] == 3
        return
    with pytest.raises(SystemExit) as stop:
        cli.main([*(["-m", "hydra.sweep.dir=out"] if way == "sweep" else ["hydra.run.dir=out"]), *quick])
    assert stop.value.code == 0
    assert (tmp_path / ("out/0" if way == "sweep" else "out") / "summary.json").is_file()


@pytest.mark.parametrize(
    ("overrides", "field", "value"),
    [
        (["seed=2", "rounds=${foo}"], "rounds", "${foo}"),
        (["data=npz", "data.path='ref${x}.npz'"], "data.path", "'ref${x}.npz'"),
        (["data=npz", "data.path=${hydra:runtime.cwd}/a"], "data.path", "${hydra:runtime.cwd}/a"),
        (["hydra.run.dir=${foo}/b"], "hydra.run.dir", "${foo}/b"),
        (["seed=2", "rounds"], "override", "rounds"),
        (["seed=2", "größe=3", "rounds=1"], "override", "größe=3"),
        (["rounds=1", "seed=1,2"], "override", "seed=1,2"),
        (["rounds=1", "client.lr=interval(0,1)"], "override", "client.lr=interval(0,1)"),
        (["rounds=1", "+seed=3"], "override", "+seed=3"),
        (["hydra.job.chdir=true"], "hydra.job.chdir", True),
    ],
)
def test_an_error_names_the_one_override(overrides, field, value):
    with pytest.raises(InputError) as error:
        compose_config(overrides)
    assert (error.value.field, error.value.value) == (field, value)
    assert "\n" not in str(error.value)


def test_a_literal_reference_can_be_written():
    assert compose_config(["data=npz", r"data.path='ref\${x}.npz'"]).data.path == str(Path.cwd() / "ref${x}.npz")


def test_the_hint_on_sweeps_is_whole():
    with pytest.raises(InputError, match=r"key=\[value1,value2\].*quote the value.*add --multirun"):
        compose_config(["seed=1,2"])
