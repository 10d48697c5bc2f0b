"""The verbs of ``bayesfed``: one module each, here or in ``bayesfed/uses``, whose docstring is its help.

A module with a docstring ``What it does.``, a blank line, ``usage: bayesfed NAME ...`` and a function
``main(args) -> int`` (the exit code) is a verb; no other file knows of it. Other packages add theirs by the entry-point
group ``bayesfed.verbs`` (name = module).
"""

from __future__ import annotations

import ast
from contextlib import suppress
from dataclasses import dataclass
from functools import cache
from importlib import import_module
from importlib.metadata import entry_points
from importlib.util import find_spec
from pathlib import Path
from typing import Any

HERE = Path(__file__).parent


@dataclass(frozen=True)
class Verb:
    """A verb, known without importing its module.

    Attributes:
        summary: what it does, one line.
        usage: its help, from ``usage:`` on.
        module: dotted name of what has its ``main``.
    """

    summary: str
    usage: str
    module: str

    def main(self, args: list[str]) -> int:
        """Do it; the exit code."""
        run: Any = import_module(self.module).main
        return run(args)


@cache
def verbs() -> dict[str, Verb]:
    """All verbs by name; the built-in ones come first and can't be replaced."""
    files: dict[str, tuple[Path, str]] = {}
    for entry in entry_points(group="bayesfed.verbs"):
        with suppress(ImportError):  # of a package that is broken, or half removed
            if (spec := find_spec(entry.value)) is not None and spec.origin is not None:
                files[entry.name] = Path(spec.origin), entry.value
    for package in ("uses", "verbs"):
        for path in (HERE.parent / package).glob("[!_]*.py"):
            files[path.stem] = path, f"bayesfed.{package}.{path.stem}"
    known = {}
    for name, (path, module) in sorted(files.items()):
        try:
            text = ast.get_docstring(ast.parse(path.read_bytes())) or ""
        except (OSError, SyntaxError, ValueError):  # a package that is broken takes only its own verb with it
            continue
        summary, _, usage = text.partition("\n\nusage: ")
        if usage:
            known[name] = Verb(summary.removesuffix("."), f"usage: {usage}", module)
    return known
