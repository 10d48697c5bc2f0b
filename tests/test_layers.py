"""Dependencies point one way: between the packages, between bayesfed's rooms, and between modules."""

import ast
import re
from collections.abc import Iterator
from graphlib import CycleError, TopologicalSorter
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parents[1]
PACKAGES = ("bayesfed", "strategies", "clients")
MAY_NOT = {"bayesfed": {"strategies", "clients"}, "clients": {"strategies"}}


def imported(source: str) -> set[str]:
    """Top-level packages that a module imports anywhere, also inside functions and by name."""
    found = set()
    for node in ast.walk(ast.parse(source)):
        if isinstance(node, ast.Import):
            found |= {alias.name.partition(".")[0] for alias in node.names}
        elif isinstance(node, ast.ImportFrom):
            assert node.level == 0, "imports are absolute"
            found.add((node.module or "").partition(".")[0])
        elif isinstance(node, ast.Call) and getattr(node.func, "id", getattr(node.func, "attr", "")) in (
            "import_module", "__import__",
        ):  # fmt: skip
            found |= {str(a.value).partition(".")[0] for a in node.args if isinstance(a, ast.Constant)}
    return found


@pytest.mark.parametrize("package", MAY_NOT)
def test_imports_point_one_way(package):
    modules = sorted((ROOT / package).rglob("*.py"))
    assert modules
    wrong = {str(m.relative_to(ROOT)): bad for m in modules if (bad := imported(m.read_text()) & MAY_NOT[package])}
    assert wrong == {}


def test_the_check_sees_hidden_imports():
    source = "def f():\n    from clients.ivon import X\n    import_module('strategies.fedavg')"
    assert imported(source) == {"clients", "strategies"}


def arrows() -> dict[str, set[str]]:
    """Modules of ours and those that they import anywhere: inside functions and for type checkers, too."""
    files = {
        ".".join(path.relative_to(ROOT).with_suffix("").parts).removesuffix(".__init__"): path
        for package in PACKAGES
        for path in (ROOT / package).rglob("*.py")
    }

    def targets(path: Path) -> Iterator[str]:
        for node in ast.walk(ast.parse(path.read_text())):
            if isinstance(node, ast.Import):
                yield from (alias.name for alias in node.names)
            elif isinstance(node, ast.ImportFrom):
                for alias in node.names:
                    module = f"{node.module}.{alias.name}"
                    yield module if module in files else str(node.module)

    return {name: {t for t in targets(path) if t in files and t != name} for name, path in files.items()}


def room(module: str) -> str:
    """``bayesfed.wire.codec`` is in ``wire``; modules directly in bayesfed, and the other packages, are rooms of their
    own.
    """
    package, _, rest = module.partition(".")
    return rest.partition(".")[0] if package == "bayesfed" and rest else package


def circle(graph: dict[str, set[str]]) -> list[str]:
    """A circle of the graph; empty if there is none."""
    try:
        TopologicalSorter(graph).prepare()
    except CycleError as error:
        return error.args[1]
    return []


def test_no_modules_import_each_other():
    assert circle(arrows()) == []


def test_no_rooms_import_each_other():
    rooms: dict[str, set[str]] = {}
    for module, imports in arrows().items():
        rooms.setdefault(room(module), set()).update(room(i) for i in imports if room(i) != room(module))
    assert circle(rooms) == []


def test_rooms_import_those_above_them_in_the_table():
    """Of docs/architecture.md; rooms in one row, and what is in no row, are not compared."""
    table = (ROOT / "docs/architecture.md").read_text().partition("## Rooms")[2].partition("\n## ")[0]
    first = [line.split("|")[1] for line in table.splitlines() if line.startswith("| `")]
    place = {name: row for row, cell in enumerate(first) for name in re.findall(r"`(?:bayesfed/)?(\w+)`", cell)}
    assert len(place) >= 14
    pairs = {(room(module), room(i)) for module, imports in arrows().items() for i in imports}
    assert [(a, b) for a, b in pairs if a in place and b in place and place[b] > place[a]] == []


def test_the_check_sees_circles():
    assert set(circle({"a": {"b"}, "b": {"c"}, "c": {"a"}})) == {"a", "b", "c"}
    assert circle({"a": {"b", "c"}, "b": {"c"}, "c": set()}) == []


def test_flower_is_imported_from_its_stable_modules():
    """Everything else of Flower's lives in the one module that a later release may cost."""
    for package in PACKAGES:
        for module in (ROOT / package).rglob("*.py"):
            if module.name == "flower_version.py":
                continue
            for node in ast.walk(ast.parse(module.read_text())):
                if isinstance(node, ast.ImportFrom) and (node.module or "").partition(".")[0] == "flwr":
                    stable = node.module in ("flwr.app", "flwr.serverapp", "flwr.serverapp.strategy", "flwr.clientapp")
                    assert stable, f"{module.relative_to(ROOT)} imports {node.module}"


def test_no_module_is_a_drawer_for_everything():
    names = {m.stem for package in PACKAGES for m in (ROOT / package).rglob("*.py")}
    assert not names & {"utils", "util", "helpers", "common", "misc"}


def test_no_module_is_longer_than_300_lines():
    lengths = {m: len(m.read_text().splitlines()) for package in PACKAGES for m in (ROOT / package).rglob("*.py")}
    assert {str(m.relative_to(ROOT)): n for m, n in lengths.items() if n > 300} == {}
