"""A user's own classes and YAML files: what is wrong with them is one line and exit code 2, before a run directory
exists.
"""

from __future__ import annotations

import re
from itertools import count
from typing import Any, Literal

import pytest
from omegaconf import OmegaConf

from bayesfed.cli import main
from bayesfed.config import compose_config
from bayesfed.configured import build, check, fits, resolve
from bayesfed.errors import InputError

GROUPS = ["strategy", "client", "model", "data", "partition", "likelihood", "engine", "logger"]
BASES = {
    "strategy": ("strategies", "FedAvg"),
    "client": ("clients.point", "PointSolver"),
    "model": ("bayesfed.problem.models", "Linear"),
    "data": ("bayesfed.problem.data", "Digits"),
    "partition": ("bayesfed.problem.partition", "Iid"),
    "likelihood": ("bayesfed.problem.likelihood", "Categorical"),
    "engine": ("bayesfed.engine.inline", "InlineEngine"),
    "logger": ("bayesfed.runs.loggers", "NoLogger"),
}
_numbers = count()


@pytest.fixture
def write(tmp_path, monkeypatch):
    """``write("model", "class Mine...", "rate: 1")``: module and YAML file of ``model=mine``; gives the module's
    name.
    """
    monkeypatch.chdir(tmp_path)
    monkeypatch.syspath_prepend(str(tmp_path))

    def files(group: str, source: str, yaml: str = "", target: str = "{module}.Mine") -> str:
        module = f"own_classes_{next(_numbers)}"
        (tmp_path / f"{module}.py").write_text(source)
        path = tmp_path / "conf" / group / "mine.yaml"
        path.parent.mkdir(parents=True)
        path.write_text(f"_target_: {target.format(module=module)}\n{yaml}" if target else yaml)
        return module

    return files


@pytest.fixture
def refused(tmp_path, capfd):
    """The one line on stderr that these overrides end with."""

    def call(*overrides: str) -> str:
        with pytest.raises(SystemExit) as stop:
            main([*overrides, "rounds=1", "display=false", "figures=false", "hydra.run.dir=out"])
        out, err = capfd.readouterr()
        assert (stop.value.code, out) == (2, ""), err
        assert len(err.splitlines()) == 1, err
        assert err.startswith("error: ")
        assert not (tmp_path / "out").exists()
        return err

    return call


def mine(group: str, body: str) -> str:
    module, base = BASES[group]
    return f"from {module} import {base}\n\n\nclass Mine({base}):\n{body}"


SHAPES = {"model": ", input_shape, num_outputs"}
NEEDY = "    def __init__(self{}, *, rate):\n        pass\n"
RAISING = "    def __init__(self{}, rate=1):\n        raise OSError('no\\nluck')\n"


@pytest.mark.parametrize(
    ("source", "target", "part"),
    [
        ("import nothing_of_that_name\n", "{module}.Mine", "No module named 'nothing_of_that_name'"),
        ("def f(:\n", "{module}.Mine", "SyntaxError: invalid syntax (own_classes_"),
        ("raise SystemExit('gone')\n", "{module}.Mine", "cannot be imported (SystemExit: gone (own_classes_"),
        ("1 / 0\n", "{module}.Mine", "ZeroDivisionError: division by zero (own_classes_"),
        ("Yours = 1\n", "{module}.Mine", "no Mine in own_classes_"),
        ("class Yours:\n    pass\n", "{module}.Yours.Mine", "no Mine in Yours"),
        ("Mine = 1\n", "{module}.Mine", "is a int, must be a class"),
        ("", "nowhere.Mine", "No module named 'nowhere'"),
        ("", "Mine", "no module before its name"),
        ("", ".Mine", "cannot be imported (ValueError"),
        ("", "", "must be the dotted path of a class"),
    ],
)
def test_what_can_not_be_imported(write, source, target, part):
    module = write("strategy", source)
    section = OmegaConf.create({"_target_": target.format(module=module) or None, "name": "mine"})
    with pytest.raises(InputError, match=re.escape(part)) as refused:
        resolve(section, "strategy")
    assert refused.value.field == "strategy._target_"
    assert "\n" not in str(refused.value)


@pytest.mark.parametrize(
    ("yaml", "parts"),
    [
        ("- a\n- b\n", ["mine"]),
        ("a: [1\n\nb: 2\n", ["mine.yaml, line ", "is no valid YAML"]),
        ("a: 1\n\tb: 2\n", ["mine.yaml, line 2", "is no valid YAML"]),
        ("rate: 1\n", ["strategy._target_=None: must be the dotted path of a class"]),
    ],
    ids=["a list", "broken", "tab", "no target"],
)
def test_yaml_files(write, refused, yaml, parts):
    write("strategy", "", yaml, "")
    line = refused("strategy=mine")
    for part in parts:
        assert part in line


@pytest.mark.parametrize("group", GROUPS)
def test_every_group_says_why_it_can_not_be_loaded(write, refused, group):
    module = write(group, "import nothing_of_that_name\n")
    assert refused(f"{group}=mine") == (
        f"error: {group}._target_={module}.Mine: cannot be imported "
        f"(ModuleNotFoundError: No module named 'nothing_of_that_name')\n"
    )


@pytest.mark.parametrize("group", GROUPS)
def test_a_class_of_another_kind_is_refused_in_every_group(write, refused, group):
    shapes = "    def __init__(self, input_shape=(), num_outputs=1):\n        pass\n"
    write(group, f"class Mine:\n{shapes}", "")
    assert f"error: {group}._target_=" in refused(f"{group}=mine")


@pytest.mark.parametrize("group", GROUPS)
@pytest.mark.parametrize(
    ("body", "yaml", "parts"),
    [
        (NEEDY, "", ["{group}.rate=None: missing"]),
        (NEEDY, "rate: ???\n", ["{group}.rate=None: missing"]),
        (NEEDY, "rate: 1\nrat: 2\n", ["{group}.rat=2: no such key; did you mean 'rate'?"]),
        (RAISING, "", ["constructor fails: OSError: no luck (own_classes_", ".py, line 6)"]),
    ],
    ids=["argument missing", "argument left open", "unknown key", "constructor raises"],
)
def test_constructors(write, group, body, yaml, parts):
    module = write(group, mine(group, body.format(SHAPES.get(group, ""))), yaml)
    section = OmegaConf.merge({"_target_": f"{module}.Mine", "name": "mine"}, OmegaConf.create(yaml))
    with pytest.raises(InputError) as refused:  # noqa: PT012 - whichever of the two finds it
        check(section, group)
        shapes = {"input_shape": (3,), "num_outputs": 2} if group == "model" else {}
        build(section, group, None, **shapes)
    for part in parts:
        assert part.format(group=group) in str(refused.value)
    assert "\n" not in str(refused.value)


TYPED = """    def __init__(
        self, *, unknown: Array | None = None, several: List = (), numbers: list = (), pair: tuple[int, str] = (1, "a"),
        kind: Literal["a", "b"] = "a", table: dict = None, anything: Any = 1, count: int = None, items: Sequence = (),
        more: Optional[List[int]] = None,
    ):
        super().__init__()
        self.several, self.unknown = several, unknown
"""
TYPING = (
    "from __future__ import annotations\nfrom collections.abc import Sequence\n"
    "from typing import TYPE_CHECKING, Any, List, Literal, Optional\n"
    "if TYPE_CHECKING:\n    from somewhere import Array\n"
)


@pytest.mark.parametrize(
    ("key", "value", "fix"),
    [
        ("several", "1", "a list"),
        ("numbers", "x", "a list"),
        ("pair", "[1,2]", "a list [a whole number, a string]"),
        ("kind", "c", "a or b"),
        ("table", "[1]", "a mapping"),
        ("count", "x", "a whole number"),
        ("items", "1", "a list"),
        ("more", "[a]", "a list of a whole number or null"),
    ],
)
def test_annotations_of_all_kinds(write, key, value, fix):
    module = write("strategy", TYPING + mine("strategy", TYPED))
    section = OmegaConf.create(f"_target_: {module}.Mine\n{key}: {value}")
    with pytest.raises(InputError, match=rf"^strategy\.{key}=.*must be {re.escape(fix)}$"):
        check(section, "strategy")


def test_annotations_that_only_type_checkers_know_check_nothing(write):
    write(
        "strategy", TYPING + mine("strategy", TYPED), "several: [1, a]\nunknown: [1, x]\ncount: null\ntable: {a: 1}\n"
    )
    cfg = compose_config(["strategy=mine"])
    assert cfg.strategy.name == "mine"  # the YAML file's, which names none
    assert (build(cfg.strategy, "strategy").several, build(cfg.strategy, "strategy").unknown) == ([1, "a"], [1, "x"])


@pytest.mark.parametrize(
    ("value", "hint", "fit"),
    [
        ([1, "a"], list, True),
        (1, list, False),
        ([1.5], list[int], False),
        ([], list[int], True),
        ([1, 2], tuple[int, ...], True),
        ([1, "a"], tuple[int, str], True),
        ([1], tuple[int, str], False),
        ({"a": 1}, dict[str, int], True),
        ([1], dict, False),
        ("a", Literal["a", 1], True),
        (True, Literal["a", 1], False),
        (object(), Any, True),
        (None, int | None, True),
        ("x", int | None, False),
        ([1], set[int], True),
    ],
)
def test_values_and_hints(value, hint, fit):
    assert fits(value, hint) is fit


LOSSES = {
    "losses of each example": "outputs.logsumexp(1)",
    "a number": "1.0",
    "no gradient": "outputs.detach().mean()",
    "raises": "outputs / y.missing",
}


@pytest.mark.parametrize("case", LOSSES)
def test_losses_that_can_not_be_differentiated(write, refused, case):
    write("likelihood", mine("likelihood", f"    def loss(self, outputs, y):\n        return {LOSSES[case]}\n"))
    assert refused("likelihood=mine").startswith("error: likelihood=mine: loss ")


def test_a_likelihood_without_a_predictive(write, refused):
    source = "from bayesfed.problem import Likelihood\n\n\nclass Mine(Likelihood):\n    name = 'robust'\n"
    write("likelihood", source)
    line = refused("likelihood=mine")
    assert re.match("error: likelihood._target_=.*answer.*predictive", line)


def test_a_model_that_does_not_fit(write, refused):
    write("model", mine("model", "    def forward(self, x):\n        return super().forward(x)[:, :7]\n"))
    assert refused("model=mine") == "error: model=mine: output (2, 7), needs (2, 10)\n"


def test_a_client_half_named_in_yaml(write, refused):
    write("strategy", mine("strategy", "    pass\n"), "handler: nowhere.Handler\n")
    assert "strategy.handler=nowhere.Handler: name it in the strategy's class" in refused("strategy=mine")


def test_broken_yaml_in_a_sweep(write, monkeypatch, capfd):
    write("strategy", "", "a: [1\n", "")
    monkeypatch.setattr("sys.argv", ["bayesfed"])
    with pytest.raises(SystemExit) as stop:
        main(["-m", "strategy=fedavg,mine", "rounds=0", "display=false", "figures=false", "hydra.sweep.dir=sweep"])
    err = capfd.readouterr().err
    assert stop.value.code == 2
    assert "mine.yaml, line 2" in err
    assert "Traceback" not in err
