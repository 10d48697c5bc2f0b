"""What README shows is what works."""

from __future__ import annotations

import re
import sys
from pathlib import Path

import pytest

from bayesfed import cli

README = (Path(__file__).parent.parent / "README.md").read_text()


def block(start: str) -> str:
    """The fenced code block of README that begins with ``start``."""
    blocks = re.findall(r"```\w+\n(.*?)```", README, flags=re.DOTALL)
    (found,) = [text for text in blocks if text.startswith(start)]
    return found


def command(line: str) -> list[str]:
    """The arguments of a ``bayesfed`` line of README."""
    return [*line.removeprefix("bayesfed ").split(), "figures=false", "eval.samples=2"]


@pytest.fixture
def folder(tmp_path, monkeypatch) -> Path:
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr(sys, "path", list(sys.path))
    return tmp_path


def ends_well(arguments: list[str]) -> bool:
    with pytest.raises(SystemExit) as stop:
        cli.main(arguments)
    return stop.value.code == 0


def test_tour(folder, capsys):
    exec(compile(block("import bayesfed"), "README", "exec"), names := {})
    assert names["probabilities"].shape == (3, 10)
    assert names["probabilities"].sum(1).tolist() == pytest.approx([1, 1, 1], abs=1e-5)
    assert len(names["networks"]) == 4


def test_own_data(folder):
    exec(compile(block("import numpy"), "README", "exec"), {})
    assert ends_well(command(block("bayesfed data=npz").strip()))


def test_profile(folder, capsys):
    assert ends_well(command(block("bayesfed profile").strip()))
    assert "forward/backward" in capsys.readouterr().out


def test_compare(folder):
    assert ends_well(command(block("bayesfed compare").strip()))
    assert len((folder / "comparison" / "table.csv").read_text().splitlines()) == 3


def test_own_strategy_and_solver(folder):
    for name, start in (
        ("my_strategy.py", "import torch\nfrom bayesfed"),
        ("my_solver.py", "from bayesfed.families"),
    ):
        text = block(start)
        assert len(text.strip().splitlines()) <= (40 if name == "my_strategy.py" else 30)
        (folder / name).write_text(text)
    for path, start in (
        ("strategy/server_momentum", "_target_: my_strategy"),
        ("client/signsgd", "_target_: my_solver"),
    ):
        target = folder / "conf" / f"{path}.yaml"
        target.parent.mkdir(parents=True, exist_ok=True)
        target.write_text(block(start))
    assert ends_well(command(block("bayesfed strategy=server_momentum").strip()))


def test_the_choices_named_in_the_table_exist():
    conf = Path(__file__).parent.parent / "conf"
    for group in ("strategy", "client", "data", "partition", "model", "engine", "logger", "experiment"):
        for path in (conf / group).glob("*.yaml"):
            assert f"`{path.stem}`" in README, f"README does not name {group}={path.stem}"
