"""Dependencies point one way: strategies and clients build on bayesfed, strategies on clients, never the reverse."""

import ast
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
