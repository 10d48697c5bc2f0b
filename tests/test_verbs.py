"""A verb is one module: found by its docstring, imported when it is called."""

import subprocess
import sys
from importlib.metadata import EntryPoint

import pytest

from bayesfed import cli
from bayesfed import verbs as package

SOURCE = '"""Greet.\n\nusage: bayesfed greet NAME\n"""\n\n\ndef main(args):\n    print("hello", *args)\n    return 3\n'


def test_a_verb_of_another_package(tmp_path, monkeypatch, capsys):
    (tmp_path / "own_verb.py").write_text(SOURCE)
    monkeypatch.syspath_prepend(str(tmp_path))
    points = [EntryPoint(name, value, "bayesfed.verbs") for name, value in (("greet", "own_verb"), ("run", "own_verb"))]
    monkeypatch.setattr(package, "entry_points", lambda group: points)
    package.verbs.cache_clear()
    try:
        assert package.verbs()["run"].module == "bayesfed.verbs.run"  # ours can't be replaced
        for args, code, said in (
            (["greet", "you"], 3, "hello you"),
            (["greet", "-h"], 0, "usage: bayesfed greet NAME"),
        ):
            with pytest.raises(SystemExit) as stop:
                cli.main(args)
            assert (stop.value.code, capsys.readouterr().out.strip()) == (code, said)
    finally:
        package.verbs.cache_clear()


@pytest.mark.parametrize("source", [b"def main(:\n", b"\xff", b"a\0b", b""], ids=["syntax", "bytes", "null", "empty"])
def test_a_broken_module_of_another_package_is_no_verb_and_breaks_none(tmp_path, monkeypatch, source):
    (tmp_path / "broken_verb.py").write_bytes(source)
    monkeypatch.syspath_prepend(str(tmp_path))
    point = EntryPoint("greet", "broken_verb", "bayesfed.verbs")
    monkeypatch.setattr(package, "entry_points", lambda group: [point])
    package.verbs.cache_clear()
    try:
        assert "greet" not in package.verbs()
        assert "compare" in package.verbs()
    finally:
        package.verbs.cache_clear()


@pytest.mark.parametrize("args", [["--help"], ["compare", "--help"], ["no_such_verb"]])
def test_what_only_answers_imports_neither_torch_nor_hydra(args):
    code = "import sys; from bayesfed.cli import main\ntry: main(sys.argv[1:])\nexcept SystemExit: pass\n"
    code += "print(*({'torch', 'hydra', 'flwr', 'ray'} & sys.modules.keys()))"
    done = subprocess.run([sys.executable, "-c", code, *args], capture_output=True, text=True, check=True)
    assert done.stdout.splitlines()[-1] == ""


def test_a_wrong_key_is_answered_without_torch():
    code = "import sys; from bayesfed.cli import main\ntry: main(['strategi=fedavg'])\nexcept SystemExit: pass\n"
    code += "print(*({'torch', 'flwr', 'ray'} & sys.modules.keys()))"
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert (done.stdout, "did you mean 'strategy'" in done.stderr) == ("\n", True)
