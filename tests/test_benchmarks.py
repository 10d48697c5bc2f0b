"""Benchmarks are scripts nobody calls between measurements; mypy reads them, and here their engine rounds run once."""

from __future__ import annotations

import importlib.util
from pathlib import Path
from types import ModuleType

from bayesfed.engine.inline import InlineGrid

FOLDER = Path(__file__).parents[1] / "benchmarks"


def load(name: str) -> ModuleType:
    """A script as a module."""
    spec = importlib.util.spec_from_file_location(name, FOLDER / f"{name}.py")
    assert spec is not None
    assert spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


def test_engine_overhead_counts_rounds_after_warming_up() -> None:
    script = load("engine_overhead")
    timing = script.Rounds(clients=3, params=5)
    grid = InlineGrid(script.echo_app(), 3)
    for _ in range(script.WARM_UP + 2):
        timing.run(grid)
    assert len(timing.milliseconds) == 2
    assert timing.median > 0


def test_the_check_for_gpus_runs_where_there_is_none() -> None:
    result = load("gpu_check").measure("cpu", tiny=True)
    assert {row["learner"] for row in result["learners"]} >= {"ivon", "srvn", "lmd", "sgd", "adam", "adamw"}
    assert all(row["error"] < 1e-4 for row in result["learners"])
    assert all(row["waits"] is None for row in result["learners"])
