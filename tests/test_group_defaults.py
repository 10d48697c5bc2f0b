"""Users of the library and of the command line get the same method: the defaults of classes are those of the YAML
files.
"""

from __future__ import annotations

import inspect

import pytest
from omegaconf import OmegaConf

from bayesfed.composing import conf_dir
from bayesfed.configured import GROUPS, plain_section, resolve
from bayesfed.problem.shift import Shift
from bayesfed.system import System

GROUPS = [group for group in GROUPS if group not in ("strategy", "client")]  # tests/test_defaults.py
FILES = sorted((path.parent.name, path.stem) for group in GROUPS for path in (conf_dir() / group).glob("*.yaml"))


def defaults(function: object) -> dict[str, object]:
    parameters = inspect.signature(function).parameters.items()
    values = {key: p.default for key, p in parameters if p.default is not p.empty}
    return {key: list(value) if isinstance(value, tuple) else value for key, value in values.items()}


@pytest.mark.parametrize(("group", "name"), FILES)
def test_groups(group, name):
    section = OmegaConf.load(conf_dir() / group / f"{name}.yaml")
    known = defaults(resolve(section, group))
    for key, value in plain_section(section).items():
        if key in known:
            assert value == known[key], key


@pytest.mark.parametrize(("name", "kind"), [("shift", Shift), ("system", System)])
def test_sections(name, kind):
    assert plain_section(OmegaConf.load(conf_dir() / "bayesfed.yaml")[name]) == defaults(kind)
