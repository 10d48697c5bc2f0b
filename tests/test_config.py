"""From overrides to a checked configuration: tuned values, fitting clients, types."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path

import pytest
from omegaconf import OmegaConf

from bayesfed.composing import conf_dir
from bayesfed.config import compose_config, validate
from bayesfed.configured import build, fits
from bayesfed.errors import InputError, choice, integer, number
from bayesfed.schedule import Schedule

EXPERIMENTS = sorted(path.stem for path in (conf_dir() / "experiment").glob("*.yaml"))


def test_the_default_is_the_digits_experiment_with_its_tuned_values():
    cfg = compose_config([])
    assert (cfg.data.name, cfg.data.scaling, cfg.model.hidden) == ("digits", "unit", [64])
    assert (cfg.strategy.name, cfg.strategy.family, cfg.client.name) == ("bayes_admm", "diagonal", "ivon")
    assert (cfg.client.lr, cfg.client.beta2, cfg.client.hess_init) == (0.02, 0.999, 0.02)
    assert cfg.client.schedule_rounds == cfg.rounds == 20


def test_another_method_does_not_inherit_the_tuned_values():
    cfg = compose_config(["strategy=fedavg"])
    assert cfg.client.name == "adam"
    assert cfg.client.lr == cfg.tuned.adam.lr != cfg.tuned.ivon.lr


def test_the_command_line_wins_over_tuned_values():
    cfg = compose_config(["client.lr=0.5", "strategy.rho=0.7", "partition.num_clients=3", "model.hidden=[5,6]"])
    assert (cfg.client.lr, cfg.strategy.rho, cfg.partition.num_clients) == (0.5, 0.7, 3)
    assert cfg.model.hidden == [5, 6]


@pytest.mark.parametrize(
    ("overrides", "client"),
    [
        (["strategy=fedavg"], "adam"),
        (["strategy=fedprox"], "adam"),
        (["strategy.family=isotropic"], "adam"),
        (["strategy.family=diagonal"], "ivon"),
        (["strategy.family=full"], "von"),
        (["strategy.covariance=fixed"], "adam"),
        (["strategy.family=isotropic", "strategy.covariance=learned"], "ivon"),
        (["strategy=pvi", "strategy.family=isotropic", "strategy.covariance=learned"], "ivon"),
        (["strategy.family=isotropic", "strategy.covariance=fixed"], "adam"),
        (["strategy=fedavg", "client=sgd"], "sgd"),
        (["experiment=linreg"], "exact"),
        (["experiment=linreg", "strategy=fedavg"], "exact"),
        (["experiment=linreg", "client=von"], "von"),
    ],
)
def test_a_strategy_picks_its_client(overrides, client):
    assert compose_config(overrides).client.name == client


def test_a_client_that_keeps_the_precision_cant_be_asked_to_learn_it():
    asked = ["strategy.family=isotropic", "strategy.covariance=learned"]
    with pytest.raises(
        InputError, match=r"strategy\.covariance=learned: client=sgd keeps the server's precision; use .*ivon"
    ):
        compose_config([*asked, "client=sgd"])
    assert compose_config([asked[0], "client=sgd"]).client.name == "sgd"  # not asked for
    assert compose_config([asked[1], "client=laplace"]).client.name == "laplace"
    assert compose_config([*asked, "strategy.covariance=fixed", "client=sgd"]).strategy.covariance == "fixed"


@pytest.mark.parametrize("experiment", EXPERIMENTS)
@pytest.mark.parametrize("strategy", ["bayes_admm", "fedavg", "fedprox"])
def test_every_strategy_composes_on_every_experiment(experiment, strategy):
    cfg = compose_config([f"experiment={experiment}", f"strategy={strategy}"])
    assert cfg.strategy.name == strategy
    for group in ("strategy", "client", "engine", "logger"):
        build(cfg[group], group)


def test_every_configuration_file_names_its_keyword_defaults():
    """A group's file lists every keyword of its class, so that ``--cfg job`` hides nothing, and no other."""
    import inspect

    from hydra.utils import get_class

    groups = ("data", "partition", "model", "likelihood", "strategy", "client", "engine", "logger")
    for path in sorted(p for group in groups for p in (conf_dir() / group).glob("*.yaml")):
        section = OmegaConf.load(path)
        assert section.name == path.stem, path
        parameters = inspect.signature(get_class(section["_target_"]).__init__).parameters
        takes = {n for n, p in parameters.items() if n != "self" and p.kind not in (p.VAR_KEYWORD, p.VAR_POSITIONAL)}
        of_run = set(Schedule.KEYS) if path.parent.name == "client" else set()
        given = set(section) - {"_target_", "name", "default_client"} - of_run
        open_ended = any(p.kind is p.VAR_KEYWORD for p in parameters.values())
        assert given <= takes or open_ended, path
        assert takes - given <= {"name", "input_shape", "num_outputs"} | of_run, path  # what the problem supplies


def test_run_directory_is_resolved_and_by_experiment():
    assert compose_config([]).hydra.run.dir.startswith("runs/digits_het10/")
    assert compose_config(["seed=2", "client.lr=0.1", "engine=ray"]).hydra.run.dir.startswith("runs/digits_het10/")
    chosen = [
        "experiment=fmnist_het10",
        "strategy=fedavg",
        "data=cifar10",
        "client=sgd",
        "data=mnist",
        "model.hidden=[8]",
    ]
    assert compose_config(chosen).hydra.run.dir.startswith("runs/fmnist_het10+fedavg+mnist+sgd/")
    assert compose_config(["hydra.run.dir=here"]).hydra.run.dir == "here"
    assert compose_config(["hydra.run.dir=here"], "there").hydra.run.dir == "there"


def test_a_conf_folder_in_the_working_directory_adds_options(tmp_path, monkeypatch):
    """A strategy of the user's own: a class in the working directory and a file that names it."""
    (tmp_path / "conf" / "strategy").mkdir(parents=True)
    (tmp_path / "mymethod.py").write_text("from strategies import FedAvg\nclass Mine(FedAvg):\n    name = 'mine'\n")
    text = "_target_: mymethod.Mine\nname: mine\ndefault_client: sgd\nfraction: 0.5\nmin_replies: 1\ntimeout: 60.0\n"
    (tmp_path / "conf" / "strategy" / "mine.yaml").write_text(text)
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr("sys.path", [*__import__("sys").path])
    cfg = compose_config(["strategy=mine"])
    assert (cfg.strategy.name, cfg.client.name) == ("mine", "sgd")
    with pytest.raises(InputError, match=r"did you mean 'mine'"):
        compose_config(["strategy=minee"])
    with pytest.raises(InputError, match=r"client\.momentumm=1: no such key; did you mean 'momentum'"):
        compose_config(["strategy=mine", "client=sgd", "client.momentumm=1"])


def test_composing_inside_another_hydra_application(tmp_path):
    from hydra import compose, initialize_config_dir

    (tmp_path / "other.yaml").write_text("a: 1\n")
    with initialize_config_dir(config_dir=str(tmp_path), version_base="1.3"):
        assert compose_config(["seed=3"]).seed == 3
        assert compose("other").a == 1


def test_a_bad_value_in_a_stored_configuration_is_found():
    cfg = compose_config([])
    cfg.strategy.rho = -1
    with pytest.raises(InputError, match=r"strategy.rho=-1"):
        validate(cfg)


def test_a_target_that_does_not_exist():
    with pytest.raises(InputError, match=r"strategy._target_=strategies.Nothing"):
        compose_config(["strategy._target_=strategies.Nothing"])


@pytest.mark.parametrize(
    ("value", "hint", "good"),
    [
        (1, float, True),
        (1.5, float, True),
        (True, float, False),
        ("1", float, False),
        ([1], float, False),
        (None, float, False),
        (1, int, True),
        (1.0, int, False),
        (True, int, False),
        (True, bool, True),
        (1, bool, False),
        ("a", str, True),
        (1, str, False),
        (None, float | None, True),
        (1, float | None, True),
        ("x", float | None, False),
        ([1, 2], Sequence[int], True),
        ([], list[int], True),
        ([1, "a"], Sequence[int], False),
        (3, Sequence[int], False),
        ([1], Sequence[int] | None, True),
        (None, Sequence[int] | None, True),
        ({}, object, True),
    ],
)
def test_types(value, hint, good):
    assert fits(value, hint) is good


@pytest.mark.parametrize(
    ("check", "text"),
    [
        (lambda: number("a", float("nan"), above=0), "a=nan: must be a finite number > 0"),
        (lambda: number("a", None), "a=None: must be a finite number"),
        (lambda: number("a", True), "a=True: must be a finite number"),
        (
            lambda: number("a", 2, at_least=0, at_most=1, optional=True),
            "a=2: must be a finite number >= 0 and <= 1 (or null for the default)",
        ),
        (lambda: integer("n", 0, at_least=1), "n=0: must be a whole number >= 1"),
        (lambda: integer("n", 1.0, at_least=1), "n=1.0: must be a whole number >= 1"),
        (lambda: choice("c", "blu", ("red", "blue")), "c=blu: did you mean 'blue'? valid: blue, red"),
        (lambda: choice("c", "zzz", ("red", "blue")), "c=zzz: valid: blue, red"),
    ],
)
def test_errors_name_field_value_and_fix(check, text):
    with pytest.raises(InputError) as error:
        check()
    assert str(error.value) == text


def test_infinity_is_a_number_where_it_is_allowed():
    number("clip", float("inf"), above=0, finite=False)
    number("alpha", None, optional=True)


def test_an_error_survives_pickling():
    import pickle

    error = pickle.loads(pickle.dumps(InputError("rho", -1, "must be > 0").within("strategy")))
    assert (error.field, error.value, error.fix) == ("strategy.rho", -1, "must be > 0")


def test_the_folder_of_a_checkout():
    assert (conf_dir() / "bayesfed.yaml").is_file()
    assert Path(conf_dir()).name == "conf"
