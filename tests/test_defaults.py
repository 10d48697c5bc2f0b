"""Whoever builds a strategy or a learner in Python gets what the command line gives: one set of defaults."""

from __future__ import annotations

import inspect
from dataclasses import fields
from pathlib import Path
from typing import Any

import pytest
from omegaconf import OmegaConf

from bayesfed.configured import resolve
from bayesfed.errors import InputError
from bayesfed.federation.server.limits import Limits
from bayesfed.settings import check_settings
from strategies import BayesADMM, FedAvg, FedLap

CONF = Path(__file__).resolve().parents[1] / "conf"
NOT_SETTINGS = {"_target_", "name", "default_client"}
# keys of the run, and what distinguishes YAML files that share a class
OTHERWISE = {
    ("adamw", "weight_decay"),
    ("client", "schedule"),
    ("client", "schedule_rounds"),
    ("client", "schedule_decay"),
}


def values_of(path: Path) -> dict[str, Any]:
    values = OmegaConf.to_container(OmegaConf.load(path))
    assert isinstance(values, dict)
    return {str(key): value for key, value in values.items()}


@pytest.mark.parametrize(
    "path", sorted(CONF.glob("strategy/*.yaml")) + sorted(CONF.glob("client/*.yaml")), ids=lambda p: p.stem
)
def test_class_and_yaml_agree(path: Path) -> None:
    """Every key of the YAML is an argument with that default (or without one), and every argument is in the YAML."""
    values, group = values_of(path), path.parent.name
    parameters = inspect.signature(resolve(values, group)).parameters
    keys = values.keys() - NOT_SETTINGS
    run = {key for name, key in OTHERWISE if name == group}
    assert keys - run == parameters.keys() - run
    for key in keys & parameters.keys():
        default = parameters[key].default
        same = default is inspect.Parameter.empty or (default == values[key] and type(default) is type(values[key]))
        assert same != ((path.stem, key) in OTHERWISE), (key, values[key], default)


def test_limits() -> None:
    section = values_of(CONF / "bayesfed.yaml")["limits"]
    assert section == {entry.name: entry.default for entry in fields(Limits)}


def test_settings_are_keywords_and_constants_are_not_settings() -> None:
    with pytest.raises(TypeError):
        BayesADMM("diagonal")  # type: ignore[call-arg, misc]
    with pytest.raises(TypeError):
        FedLap(rho=2.0)  # type: ignore[call-arg]
    assert (FedLap().rho, FedLap().family, FedLap(fraction=1).fraction) == (1.0, "isotropic", 1.0)


def test_a_strategy_of_ones_own_has_the_shared_settings_either_way() -> None:
    class WithConstructor(FedAvg):
        def __init__(self, step: float = 0.5, **options: Any):
            super().__init__(**options)
            self.step = step

    class Without(FedAvg):
        pass

    assert WithConstructor(step=0.1, fraction=0.5).fraction == Without(fraction=0.5).fraction == 0.5
    for kind in (WithConstructor, Without):
        with pytest.raises(InputError, match=r"min_replies=0: must be a whole number >= 1"):
            kind(min_replies=0)


def test_checks_name_the_group() -> None:
    with pytest.raises(InputError, match=r"limits\.precision=0"):
        Limits(precision=0)
    check_settings(Limits())
