"""What docs/architecture.md shows to add is what works."""

from __future__ import annotations

import re
import tomllib
from importlib.metadata import EntryPoint
from pathlib import Path

import bayesfed
from bayesfed import verbs as package

DOCUMENT = (Path(__file__).parent.parent / "docs" / "architecture.md").read_text()
QUICK = ["model=linear", "partition.num_clients=3", "client.epochs=1", "display=false", "figures=false"]


def block(holds: str) -> str:
    """The fenced code block that holds a text."""
    (found,) = [text for text in re.findall(r"```\w+\n(.*?)```", DOCUMENT, flags=re.DOTALL) if holds in text]
    return found


def test_clients_with_a_memory(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    monkeypatch.syspath_prepend(str(tmp_path))
    (tmp_path / "client_momentum.py").write_text(block("class ClientMomentum"))
    conf = tmp_path / "conf" / "strategy"
    conf.mkdir(parents=True)
    (conf / "client_momentum.yaml").write_text(
        "_target_: client_momentum.ClientMomentum\nname: client_momentum\nbeta: 0.7\n"
    )

    def norm(rounds: int, *more: str) -> float:
        where = f"hydra.run.dir={tmp_path}/{rounds}{''.join(more)}"
        result = bayesfed.run([*QUICK, "strategy=client_momentum", f"rounds={rounds}", *more, where])
        return float(result.posterior.mean.norm())

    assert norm(1) == norm(1, "strategy.beta=0")  # nothing kept yet
    assert norm(2) != norm(2, "strategy.beta=0")


def test_a_verb(tmp_path, monkeypatch, capsys):
    (tmp_path / "my_package").mkdir()
    (tmp_path / "my_package" / "__init__.py").touch()
    (tmp_path / "my_package" / "greet.py").write_text(block("usage: bayesfed greet"))
    monkeypatch.syspath_prepend(str(tmp_path))
    ((name, value),) = tomllib.loads(block("entry-points"))["project"]["entry-points"]["bayesfed.verbs"].items()
    monkeypatch.setattr(package, "entry_points", lambda group: [EntryPoint(name, value, group)])
    package.verbs.cache_clear()
    try:
        verb = package.verbs()["greet"]
        assert (verb.summary, verb.usage, verb.main(["you"])) == (
            "Say hello to a run",
            "usage: bayesfed greet RUN_DIR",
            0,
        )
    finally:
        package.verbs.cache_clear()
    assert capsys.readouterr().out == "hello you\n"
