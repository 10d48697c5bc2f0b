"""Configurations as the command line would compose them, without Hydra."""

from pathlib import Path
from typing import Any

import pytest
import yaml

from bayesfed.problem import Problem
from bayesfed.problem.build import build_problem

CONF = Path(__file__).resolve().parents[2] / "conf"


def group(kind: str, chosen: str | dict[str, Any]) -> dict[str, Any]:
    options = {"name": chosen} if isinstance(chosen, str) else chosen
    return {**yaml.safe_load((CONF / kind / f"{options['name']}.yaml").read_text()), **options}


@pytest.fixture
def config():
    """``config(data="digits", partition={"name": "iid", "num_clients": 3})``: plain dicts from the YAML files."""

    def compose(**groups: Any) -> dict[str, Any]:
        chosen = {"data": "digits", "partition": "iid", "model": "linear", "likelihood": "categorical", **groups}
        return {kind: group(kind, value) for kind, value in chosen.items()}

    return compose


@pytest.fixture
def problem(config):
    """Build a ``Problem`` with some groups changed."""

    def build(seed: int = 1, validation: float = 0.0, **groups: Any) -> Problem:
        return build_problem(config(**groups), seed, validation)

    return build


@pytest.fixture(autouse=True)
def private_cache(tmp_path_factory, monkeypatch):
    """Keep the user's cache out of the tests; those on real images share one cache a session."""
    monkeypatch.setenv("BAYESFED_CACHE", str(tmp_path_factory.getbasetemp() / "images"))
