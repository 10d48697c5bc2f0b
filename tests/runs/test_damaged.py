"""Torn and foreign run directories: one line for what can't be read, nothing overwritten, the other runs as before."""

from __future__ import annotations

import hashlib
import json
import shutil
from collections.abc import Callable
from pathlib import Path

import pytest
import yaml

import bayesfed
from bayesfed.compare.results import Trace
from bayesfed.config import compose_config
from bayesfed.errors import InputError
from bayesfed.lock import NAME
from bayesfed.runs.directory import RunDirectory
from bayesfed.runs.launch import prepare
from bayesfed.runs.status import RunState, listing, status

SITE = "checkpoint/sites/client-00000/round-000002.safetensors"
FILES = [
    "config.yaml",
    "rounds.jsonl",
    "clients.jsonl",
    "client_tests.jsonl",
    "summary.json",
    "posterior.safetensors",
    "log.jsonl",
    "checkpoint/server-000001.safetensors",
    "checkpoint/server-000002.safetensors",
    SITE,
    "deployment.json",
    "profile.json",
]
OVERRIDES = [
    "experiment=linreg",
    "strategy.family=diagonal",
    "strategy.damping=0.3",
    "eval.samples=2",
    "rounds=2",
    "eval.clients_every=1",
    "display=false",
    "figures=false",
]


@pytest.fixture(scope="module")
def whole(tmp_path_factory) -> Path:
    """A finished run with every file that a run directory can have."""
    path = tmp_path_factory.mktemp("whole") / "run"
    bayesfed.run([*OVERRIDES, f"hydra.run.dir={path}"])
    (path / "deployment.json").write_text(json.dumps({"run_dir": "first", "overrides": ["rounds=2"]}))
    (path / "profile.json").write_text("{}")
    (path / "log.jsonl").touch()
    return path


@pytest.fixture(scope="module")
def asked():
    """What ``resume=...`` composes; the tests set it."""
    return compose_config([])


def contents(path: Path) -> dict[str, str]:
    """Every file's digest, links and folders by kind."""
    found = {}
    for entry in sorted(path.rglob("*")):
        name = str(entry.relative_to(path))
        kind = "link" if entry.is_symlink() else "folder" if entry.is_dir() else ""
        found[name] = kind or hashlib.sha256(entry.read_bytes()).hexdigest()
    return found


def uses(path: Path, asked) -> dict[str, Callable[[], object]]:
    """All that reads a run directory; resuming stops before the first round."""

    def resume() -> None:
        asked.resume = str(path)
        with prepare(asked, []):
            pass

    def load() -> None:
        run = bayesfed.load(path)
        run.predict([[0.0] * 5], samples=0)
        assert run.rounds is not None
        assert run.summary is not None

    return {
        "status": lambda: status(path),
        "load": load,
        "compare": lambda: Trace.read(RunDirectory(path), 1),
        "resume": resume,
    }


def refusals(path: Path, asked) -> dict[str, str]:
    """What each use says against the directory; it may only be an InputError of one line, and nothing is written."""
    found = {}
    for name, use in uses(path, asked).items():
        if name == "resume" and asked is None:
            continue
        before, error = contents(path), None
        try:
            use()
        except InputError as refusal:
            error = str(refusal)
        if error is not None:
            found[name] = error
            assert error.isprintable()  # so it is one line
            assert contents(path) == before
    return found


def replaced(file: Path, make: Callable[[Path], object]) -> None:
    file.unlink()
    make(file)


DAMAGES: dict[str, Callable[[Path], object]] = {
    "missing": lambda f: f.unlink(),
    "empty": lambda f: f.write_bytes(b""),
    "half": lambda f: f.write_bytes(f.read_bytes()[: f.stat().st_size // 2]),
    "not UTF-8": lambda f: f.write_bytes(b"\xff\xfe" + f.read_bytes()),
    "zeros": lambda f: f.write_bytes(bytes(f.stat().st_size)),
    "a folder": lambda f: replaced(f, Path.mkdir),
    "a dangling link": lambda f: replaced(f, lambda p: p.symlink_to("nowhere")),
    "another's": lambda f: f.write_text("[1, 2]\n" * 3),
    "deep": lambda f: f.write_text("[" * 100_000),
}


@pytest.mark.parametrize("file", FILES)
def test_damaged_files(whole, asked, tmp_path, file) -> None:
    for name, damage in DAMAGES.items():
        path = tmp_path / name
        shutil.copytree(whole, path, symlinks=True)
        damage(path / file)
        refused = refusals(path, asked)
        assert listing(tmp_path).row_count == 1
        if file == "config.yaml":
            assert {"status", "resume"} <= refused.keys(), name
        if file == "posterior.safetensors":
            assert refused.keys() == {"load"}, name
        if file == "rounds.jsonl":
            assert {"compare", "resume"} <= refused.keys(), name
        if file.startswith("checkpoint/server"):
            assert not refused, name  # the other one serves
        shutil.rmtree(path)


@pytest.mark.parametrize("file", ["posterior.safetensors", "checkpoint/server-000002.safetensors"])
def test_flipped_bits_of_tensors_are_noticed(whole, asked, tmp_path, file) -> None:
    """Wherever they are; a flipped mean would be believed otherwise."""
    shutil.copytree(whole, tmp_path / "run")
    path, content = tmp_path / "run" / file, (whole / file).read_bytes()
    (tmp_path / "run" / "checkpoint/server-000001.safetensors").unlink()
    for position in (*range(0, 64, 16), len(content) // 2, len(content) - 9, len(content) - 1):
        flipped = bytearray(content)
        flipped[position] ^= 4
        path.write_bytes(flipped)
        assert refusals(tmp_path / "run", asked).keys() == {"load" if "posterior" in file else "resume"}, position


def records(file: Path) -> list:
    text = file.read_text()
    return [json.loads(line) for line in text.splitlines()] if file.suffix == ".jsonl" else [yaml.safe_load(text)]


def write(file: Path, found: list) -> None:
    lines = [yaml.safe_dump(r) if file.suffix == ".yaml" else json.dumps(r) for r in found]
    file.write_text("\n".join(lines) + "\n")


@pytest.mark.parametrize(
    "file", ["config.yaml", "rounds.jsonl", "clients.jsonl", "client_tests.jsonl", "summary.json", "deployment.json"]
)
def test_missing_keys_and_other_types(whole, asked, tmp_path, file) -> None:
    """Each key away, and as another type: an answer or one line, never a traceback."""
    path = tmp_path / "run"
    shutil.copytree(whole, path)
    before = (whole / file).read_text()
    values = ("text\x1b[31m", [1], {"a": {}}, True, None, 1e400)
    for number, key in enumerate(records(whole / file)[0]):
        if file == "summary.json" and "/" in key and number % 8:  # metrics are alike
            continue
        for value in (..., values[number % 6]):
            found = records(whole / file)
            found[0][key] = value
            if value is ...:
                del found[0][key]
            write(path / file, found)
            refusals(path, asked if file == "config.yaml" else None)
        (path / file).write_text(before)


def test_keys_that_are_needed(whole, asked, tmp_path) -> None:
    for file, key in (("rounds.jsonl", "round"), ("clients.jsonl", "client"), ("client_tests.jsonl", "round")):
        path = tmp_path / file
        shutil.copytree(whole, path)
        found = records(path / file)
        del found[1][key]
        write(path / file, found)
        assert f"{file} is damaged: line 2 has no '{key}'" in refusals(path, asked)["resume"]


def test_one_damaged_run_is_a_line_of_the_list(whole, tmp_path) -> None:
    """Also with names that are markup or terminal control; foreign configurations are no runs."""
    names = ["[red]torn[/wrong]", "whole", "esc\x1b[31mape"]
    for name in names:
        shutil.copytree(whole, tmp_path / name)
    (tmp_path / names[0] / "config.yaml").write_text("seed: [1")
    (tmp_path / "project").mkdir()
    (tmp_path / "project" / "config.yaml").write_text("a: 1")
    table = listing(tmp_path)
    runs, states = ([cell.plain for cell in table.columns[i].cells if cell != "-"] for i in (0, 3))
    assert runs == ["[red]torn[/wrong]", "esc\\x1b[31mape", "whole"]
    assert states[1:] == ["finished", "finished"]
    assert states[0].startswith("config.yaml is damaged: ")
    assert "bayesfed.load needs posterior.safetensors only" in states[0]
    assert bayesfed.load(tmp_path / names[0]).predict([[0.0] * 5], samples=0)[0].shape == (1,)


def test_reasons_and_names_from_files_are_no_terminal_control(whole, tmp_path) -> None:
    shutil.copytree(whole, tmp_path / "run")
    for file, key, at in (("clients.jsonl", "accepted", False), ("config.yaml", "strategy", None)):
        found = records(tmp_path / "run" / file)
        if at is None:
            found[0][key]["name"] = "\x1b]0;title\x07[bold]"
        else:
            found[0] |= {key: at, "reason": "\x1b[2J" + "x" * 1_000_000}
        write(tmp_path / "run" / file, found)
    state = RunState.read(tmp_path / "run")
    assert state.method == "\\x1b]0;title\\x07[bold]"
    assert len(state.clients[0].reason) < 400
    assert state.clients[0].reason.isprintable()


def test_a_run_of_the_first_version_goes_on(whole, tmp_path, digest) -> None:
    """Its configuration had none of the keys that came later; the bits are those of a run that has them."""
    expected = bayesfed.run([*OVERRIDES, "rounds=3", f"hydra.run.dir={tmp_path / 'expected'}"])
    shutil.copytree(whole, tmp_path / "first")
    (tmp_path / "first" / "deployment.json").unlink()
    found = records(whole / "config.yaml")[0]
    first = {
        "seed", "rounds", "dtype", "device", "display", "figures", "handler", "eval", "checkpoint", "tuned",
        "data", "partition", "model", "likelihood", "strategy", "client", "engine", "logger",
    }  # fmt: skip
    kept = {key: value for key, value in found.items() if key in first}
    kept["eval"] = {key: found["eval"][key] for key in ("every", "bayes_every", "samples", "validation", "batch_size")}
    del kept["engine"]["clients_per_batch"]
    write(tmp_path / "first" / "config.yaml", [kept])
    bayesfed.run([f"resume={tmp_path / 'first'}", "rounds=3"])
    assert digest(tmp_path / "first") == digest(expected.run_dir)


@pytest.mark.parametrize("lost", [1, 2])
def test_rounds_that_were_lost_are_done_again(whole, tmp_path, digest, lost) -> None:
    """After a power failure: a checkpoint is synced to the disk, the lines may lack."""
    path = tmp_path / "run"
    shutil.copytree(whole, path)
    (path / "deployment.json").unlink()
    lines = (path / "rounds.jsonl").read_text().splitlines(keepends=True)
    (path / "rounds.jsonl").write_text("".join(lines[:-lost]))
    if lost == 2:  # neither checkpoint will do
        before = contents(path)
        with pytest.raises(InputError, match="lacks round 1"):
            bayesfed.run([f"resume={path}"])
        assert contents(path) == before
        return
    result = bayesfed.run([f"resume={path}"])
    assert [line["round"] for line in result.rounds] == [0, 1, 2]
    assert digest(path) == digest(whole)
    assert not (path / NAME).exists()
