"""Where configuration comes from: a local ``conf`` folder, other Hydra applications, threads."""

from __future__ import annotations

from concurrent.futures import ThreadPoolExecutor

import pytest
import yaml
from hydra.core.hydra_config import HydraConfig
from hydra.core.utils import JobRuntime
from hydra.version import getbase
from omegaconf import OmegaConf

from bayesfed import cli
from bayesfed.composing import conf_dir, without_values
from bayesfed.config import compose_config


@pytest.fixture
def local(tmp_path, monkeypatch):
    """``local("strategy/fedavg", fraction=0.25)``: the built-in file with other values, in ``conf`` of the working
    directory.
    """
    monkeypatch.chdir(tmp_path)

    def write(name: str, **changes: object) -> None:
        built_in = conf_dir() / f"{name}.yaml"
        settings = yaml.safe_load(built_in.read_text()) if built_in.is_file() else {}
        file = tmp_path / "conf" / f"{name}.yaml"
        file.parent.mkdir(parents=True, exist_ok=True)
        head = "# @package _global_\n" if name.startswith("experiment/") else ""
        file.write_text(head + yaml.safe_dump(settings | changes))

    return write


def test_a_local_file_goes_before_the_built_in_one(local):
    local("strategy/fedavg", fraction=0.25)
    cfg = compose_config(["strategy=fedavg"])
    assert (cfg.strategy.fraction, cfg.client.name, cfg.client.lr) == (0.25, "adam", 0.01)  # tuned values still hold
    assert compose_config(["strategy=fedavg", "strategy.fraction=0.75"]).strategy.fraction == 0.75
    assert compose_config(["strategy=fedprox"]).strategy.fraction == 1.0
    assert without_values(["strategy=fedavg"], ["strategy"]).strategy.fraction == 0.25


@pytest.mark.parametrize("option", [["--cfg", "job"], ["-c", "job"]])
def test_hydras_own_main_function_finds_the_local_file_first(local, capfd, option):
    local("strategy/fedavg", fraction=0.25)
    with pytest.raises(SystemExit) as stop:
        cli.main([*option, "strategy=fedavg"])
    assert stop.value.code == 0
    assert yaml.safe_load(capfd.readouterr().out)["strategy"]["fraction"] == 0.25


def test_a_sweep_finds_the_local_file_first(local, tmp_path, capfd):
    local("experiment/linreg", rounds=3)
    with pytest.raises(SystemExit) as stop:
        cli.main(["-m", "experiment=linreg", "seed=1,2", "figures=false", "eval.samples=1", "hydra.sweep.dir=s"])
    assert stop.value.code == 0, capfd.readouterr().err
    assert [OmegaConf.load(tmp_path / "s" / job / "config.yaml").rounds for job in "01"] == [3, 3]


def test_a_root_configuration_of_the_users_own_application_hides_nothing(local):
    local("config", seed=7, mine=3)
    cfg = compose_config([])
    assert (cfg.seed, cfg.rounds, cfg.strategy.name) == (1, 20, "bayes_admm")


def test_a_folder_that_the_user_names_is_searched_too(local, tmp_path):
    local("strategy/fedavg", fraction=0.25)
    (tmp_path / "more" / "model").mkdir(parents=True)
    file = tmp_path / "more" / "model" / "small.yaml"
    file.write_text((conf_dir() / "model" / "linear.yaml").read_text())
    cfg = compose_config([f"hydra.searchpath=[file://{tmp_path / 'more'}]", "strategy=fedavg", "model=small"])
    assert (cfg.strategy.fraction, cfg.model.name) == (0.25, "linear")


def test_another_hydra_application_is_left_as_it_was(tmp_path, monkeypatch):
    """Its jobs keep their name (and so their log files), its search path has no folder of ours, its version base
    stays.
    """
    from hydra import compose, initialize_config_dir

    (tmp_path / "app").mkdir()
    (tmp_path / "app" / "app.yaml").write_text("a: 1\n")
    (tmp_path / "conf").mkdir()
    monkeypatch.chdir(tmp_path)
    with initialize_config_dir(config_dir=str(tmp_path / "app"), version_base="1.2", job_name="mine"):
        before = HydraConfig.instance().cfg
        compose_config(["seed=3"])
        assert (JobRuntime.instance().get("name"), str(getbase())) == ("mine", "1.2")
        assert HydraConfig.instance().cfg is before
        composed = compose("app", return_hydra_config=True)
        assert composed.hydra.job.name == "mine"
        assert [source.path for source in composed.hydra.runtime.config_sources if source.provider == "bayesfed"] == []


def test_threads_compose_what_they_asked_for():
    seeds = list(range(1, 9))
    with ThreadPoolExecutor(4) as pool:
        composed = list(pool.map(lambda seed: compose_config([f"seed={seed}", "strategy=fedavg"]), seeds))
    assert [(cfg.seed, cfg.hydra.overrides.task[0]) for cfg in composed] == [(s, f"seed={s}") for s in seeds]


def test_runs_in_threads_give_the_results_of_runs_alone(run, digest):
    alone = [digest(run("rounds=2", f"seed={seed}", to=f"alone{seed}").run_dir) for seed in (1, 2, 3, 4)]
    with ThreadPoolExecutor(4) as pool:
        together = list(pool.map(lambda s: digest(run("rounds=2", f"seed={s}", to=f"thread{s}").run_dir), (1, 2, 3, 4)))
    assert together == alone
