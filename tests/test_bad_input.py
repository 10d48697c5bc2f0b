"""Bad input ends with exit code 2 and one line that names field, value and fix, before a run directory exists."""

from __future__ import annotations

import math
from collections.abc import Callable

import numpy as np
import pytest

from bayesfed.cli import main


@pytest.fixture
def refused(tmp_path, capfd, monkeypatch) -> Callable[..., str]:
    """Call the command with these overrides; returns its one line on stderr."""
    monkeypatch.chdir(tmp_path)

    def call(*overrides: str) -> str:
        before = sorted(tmp_path.rglob("*"))
        with pytest.raises(SystemExit) as stop:
            main([*overrides, "display=false", "hydra.run.dir=out"])
        out, err = capfd.readouterr()
        assert stop.value.code == 2, err
        assert out == ""
        assert len(err.splitlines()) == 1, err
        assert err.startswith("error: ")
        assert sorted(tmp_path.rglob("*")) == before, "something was written"
        return err

    return call


@pytest.mark.parametrize(
    ("override", "parts"),
    [
        ("strategi=bayes_admm", ["strategi=bayes_admm", "did you mean 'strategy'", " eval, experiment, figures, "]),
        ("experimet=linreg", ["experimet=linreg", "did you mean 'experiment'"]),
        ("+experimet=linreg", ["experimet=linreg", "did you mean 'experiment'"]),
        ("strategy.rh=1", ["strategy.rh=1", "did you mean 'rho'"]),
        ("client.learning_rat=1", ["client.learning_rat=1", "valid:", "lr"]),
        ("eval.evry=2", ["eval.evry=2", "did you mean 'every'"]),
        ("+new.key=1", ["new", "no such key"]),
        ("eval.own=1", ["eval.own=1", "no such key", "valid: at_once"]),
        ("+strategy.gamma=1", ["strategy.gamma=1", "no such key", "damping"]),
        ("strategy=bayes_adm", ["strategy=bayes_adm", "did you mean 'bayes_admm'"]),
        ("strategy=unknown", ["strategy=unknown", "valid: bayes_admm, bregman_admm"]),
        ("client=ivvon", ["client=ivvon", "did you mean 'ivon'"]),
        ("experiment=digits", ["experiment=digits", "did you mean 'digits_het10'"]),
        ("strategy.rho=-1", ["strategy.rho=-1", "> 0"]),
        ("strategy.rho=0", ["strategy.rho=0", "> 0"]),
        ("strategy.rho=nan", ["strategy.rho=nan", "finite number > 0"]),
        ("strategy.rho=inf", ["strategy.rho=inf", "finite number > 0"]),
        ("strategy.rho=[1,2]", ["strategy.rho=[1, 2]", "must be a number"]),
        ("strategy.rho=big", ["strategy.rho=big", "must be a number"]),
        ("strategy.rho=true", ["strategy.rho=True", "must be a number"]),
        ("strategy.alpha=0", ["strategy.alpha=0", "> 0 and <= 1"]),
        ("strategy.alpha=1.5", ["strategy.alpha=1.5", "> 0 and <= 1"]),
        ("strategy.alpha=nan", ["strategy.alpha=nan", "> 0 and <= 1"]),
        ("strategy.damping=1.01", ["strategy.damping=1.01", ">= 0 and <= 1"]),
        ("strategy.fraction=0", ["strategy.fraction=0", "> 0 and <= 1"]),
        ("strategy.min_replies=0", ["strategy.min_replies=0", ">= 1"]),
        ("strategy.family=diag", ["strategy.family=diag", "did you mean 'diagonal'"]),
        ("strategy.prior_precision=0", ["strategy.prior_precision=0", "> 0"]),
        ("strategy.temperature=-1", ["strategy.temperature=-1", "> 0"]),
        ("rounds=-1", ["rounds=-1", ">= 0"]),
        ("rounds=2.5", ["rounds=2.5"]),
        ("rounds=null", ["rounds=None"]),
        ("seed=abc", ["seed=abc"]),
        ("seed=-1", ["seed=-1", ">= 0"]),
        ("dtype=float16", ["dtype=float16", "float32, float64"]),
        ("wire=float61", ["wire=float61", "did you mean 'float16'"]),
        ("wire=16", ["wire=16", "valid: bfloat16, float16, full"]),
        ("wire=null", ["wire=None"]),
        ("device=tpu", ["device=tpu", "cpu"]),
        ("device=cuda:x", ["device=cuda:x", "auto"]),
        ("device=cuda:77", ["device=cuda:77", "device=cpu or device=auto"]),
        ("eval.samples=0", ["eval.samples=0", ">= 1"]),
        ("eval.validation=1", ["eval.validation=1", "<= 0.9"]),
        ("eval=5", ["eval"]),
        ("checkpoint.every=-1", ["checkpoint.every=-1", ">= 0"]),
        ("client.lr=0", ["client.lr=0", "> 0"]),
        ("client.epochs=0", ["client.epochs=0", ">= 1"]),
        ("client.epochs=1.5", ["client.epochs=1.5", "a whole number"]),
        ("client.schedule=cosin", ["client.schedule=cosin", "did you mean 'cosine'"]),
        ("engine.num_workers=0", ["engine.num_workers=0", ">= 1"]),
        ("engine.clients_per_batch=0", ["engine.clients_per_batch=0", ">= 1"]),
        ("engine.clients_per_batch=many", ["engine.clients_per_batch=many", "a whole number or null"]),
        ("logger=wandbb", ["logger=wandbb", "did you mean 'wandb'"]),
        ("partition.num_clients=0", ["partition.num_clients=0", ">= 1"]),
        ("partition.alpha_classes=-1", ["partition.alpha_classes=-1", "> 0"]),
        ("data.fraction=0", ["data.fraction=0", "> 0"]),
        ("model.hidden=64", ["model.hidden=64", "a list of a whole number"]),
        ("model.hidden=[0]", ["model.hidden"]),
        ("likelihood=gaussian", ["likelihood"]),
        ("client=exact", ["client=exact", "model=linear"]),
        ("client=von", ["client=von", "full", "diagonal"]),
        ("resume=nowhere", ["resume=nowhere", "not a run directory"]),
        ("rounds", ["rounds"]),
        ("rounds=[1", ["rounds=[1"]),
    ],
)  # fmt: skip
def test_bad_setting(refused, override, parts):
    # engine=ray checks its keys; inline takes any
    line = refused(override, *(["engine=ray"] if override.startswith("engine.") else []))
    for part in parts:
        assert part in line


def test_client_that_lacks_what_the_strategy_asks_for(refused):
    line = refused("experiment=linreg", "strategy=scaffold", "client=exact")
    asked = "client=exact: takes no gradient steps, which strategy=scaffold needs; use client=sgd or client=adam"
    assert line == f"error: {asked}\n"


@pytest.mark.parametrize(
    "asked",
    [
        ("strategy=fedlap", "client=ivon"),
        ("strategy.family=diagonal", "strategy.covariance=fixed", "client=ivon"),
        (
            "strategy=pvi",
            "strategy.family=full",
            "strategy.covariance=fixed",
            "client=srvon",
            "client.curvature=stein",
            "client.mc_samples=1",
        ),
        ("strategy=natural_averaging", "strategy.covariance=fixed", "client=ivon"),
    ],
)
def test_client_that_would_ignore_a_fixed_precision(refused, asked):
    assert "can't keep the server's, a fixed covariance" in refused("experiment=linreg", *asked)


def test_full_covariance_of_a_large_model_says_what_memory_it_takes(refused):
    line = refused("strategy.family=full", "model.hidden=[2300]")  # 172,510 parameters
    assert "strategy.family=full" in line
    assert "172,510 parameters" in line
    assert "238.1 GB" in line
    assert "family=diagonal" in line


@pytest.mark.parametrize("wire", ["float16", "bfloat16"])
def test_full_covariance_in_16_bits(refused, wire):
    line = refused("experiment=linreg", "strategy.family=full", f"wire={wire}")
    assert f"wire={wire}" in line
    assert "full covariance" in line
    assert "use wire=full" in line


def test_large_fmnist_model_is_refused_the_same_way(refused, tmp_path):
    x = np.random.default_rng(0).random((40, 784), dtype=np.float32)
    path = save(tmp_path, x=x, y=np.arange(40) % 10, x_test=x[:10], y_test=np.arange(10))
    line = refused(
        "data=npz",
        f"data.path={path}",
        "partition=iid",
        "partition.num_clients=2",
        "strategy.family=full",
        "model.hidden=[200,100]",
    )
    assert "178,110 parameters" in line
    assert "253.8 GB" in line


def test_missing_data_folder(refused):
    line = refused("experiment=fmnist_het10", "data.path=/no/such/folder")
    assert "data.path=/no/such/folder" in line


def test_used_run_directory(refused, tmp_path):
    (tmp_path / "out").mkdir()
    (tmp_path / "out" / "config.yaml").write_text("seed: 1\n")
    line = refused("rounds=1")
    assert "hydra.run.dir" in line
    assert "resume=" in line


# -- the user's own arrays ---------------------------------------------------------------------------------------------


def save(tmp_path, **arrays) -> str:
    np.savez(tmp_path / "data.npz", **arrays)
    return str(tmp_path / "data.npz")


def good(**changes) -> dict[str, np.ndarray]:
    rng = np.random.default_rng(0)
    arrays = {
        "x": rng.normal(size=(40, 3)).astype(np.float32), "y": np.arange(40) % 2,
        "x_test": rng.normal(size=(10, 3)).astype(np.float32), "y_test": np.arange(10) % 2,
    }  # fmt: skip
    return {name: value for name, value in (arrays | changes).items() if value is not None}


def with_value(array: np.ndarray, value: float) -> np.ndarray:
    array = array.copy()
    array[3] = value
    return array


@pytest.mark.parametrize(
    ("arrays", "parts"),
    [
        (good(x=with_value(good()["x"], math.nan)), ["x", "finite"]),
        (good(x_test=with_value(good()["x_test"], math.inf)), ["x_test", "finite"]),
        (good(y=with_value(good()["y"].astype(float), math.nan)), ["y"]),
        (good(y=np.arange(39) % 2), ["y", "39", "40"]),
        (good(x_test=np.zeros((10, 4), np.float32)), ["x_test", "3"]),
        (good(x=np.float32(1.0)), ["x"]),
        (good(y=None), ["y"]),
        (good(x_test=None), ["test"]),
        (good(y=with_value(good()["y"], -1)), ["y", "-1"]),
        (good(y_test=with_value(good()["y_test"], 700)), ["700"]),
        (good(client=np.zeros(39, int)), ["client"]),
    ],
    ids=[
        "nan in x",
        "inf in x_test",
        "nan in y",
        "too few labels",
        "shape of x_test",
        "scalar x",
        "no y",
        "x_test missing",
        "negative label",
        "label far out of range",
        "client column",
    ],
)
def test_bad_arrays(refused, tmp_path, arrays, parts):
    path = save(tmp_path, **arrays)
    settings = [] if "client" in arrays else ["partition=iid", "partition.num_clients=2"]
    line = refused("data=npz", f"data.path={path}", *settings)
    for part in parts:
        assert part in line


def test_data_path_is_missing_or_no_archive(refused, tmp_path):
    assert "data.path" in refused("data=npz", "data.path=none.npz")
    (tmp_path / "text.npz").write_text("hello")
    assert "data.path" in refused("data=npz", f"data.path={tmp_path / 'text.npz'}")
    assert "data.path" in refused("data=npz")


def test_another_number_of_clients_than_the_client_column(refused, tmp_path):
    path = save(tmp_path, **good(client=np.arange(40) % 4))
    line = refused("data=npz", f"data.path={path}", "partition.num_clients=3")
    assert "num_clients" in line
    assert "4" in line


# -- other ways in -----------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("verb", ["frobnicate", "runn"])
def test_unknown_command(capfd, verb):
    with pytest.raises(SystemExit) as stop:
        main([verb, "rounds=1"])
    err = capfd.readouterr().err
    assert stop.value.code == 2
    assert len(err.splitlines()) == 1
    assert f"command={verb}" in err


@pytest.mark.parametrize(
    ("overrides", "part"),
    [
        (["strategy.rho=-1,-2"], "strategy.rho=-1"),
        (["strategi=a,b"], "strategi"),
        (["strategy=fedavg,nothing"], "nothing"),
        (["seed=1,x"], "seed=x"),
    ],
)
def test_sweeps(tmp_path, monkeypatch, capfd, overrides, part):
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr("sys.argv", ["bayesfed"])
    quick = ["experiment=linreg", "rounds=0", "eval.samples=1", "figures=false", "display=false"]
    with pytest.raises(SystemExit) as stop:
        main(["-m", *quick, *overrides, "hydra.sweep.dir=sweep"])
    err = capfd.readouterr().err
    assert stop.value.code == 2
    assert part in err
    assert "Traceback" not in err


@pytest.mark.parametrize("override", ["strategy.rho=-1", "strategi=x", "strategy=x", "seed=abc"])
def test_showing_a_bad_configuration(tmp_path, monkeypatch, capfd, override):
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr("sys.argv", ["bayesfed"])
    with pytest.raises(SystemExit) as stop:
        main(["--cfg", "job", override])
    err = capfd.readouterr().err
    assert stop.value.code == 2
    assert len(err.splitlines()) == 1
    assert override.partition("=")[0] in err
