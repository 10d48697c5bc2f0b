"""List the runs below a folder.

usage: bayesfed list [FOLDER]

One line for each run below FOLDER (runs if left out).
"""

from __future__ import annotations

from pathlib import Path

from bayesfed.errors import InputError


def main(args: list[str]) -> int:
    """Print the table of runs."""
    from bayesfed.runs.display import console
    from bayesfed.runs.status import listing

    if len(args) > 1:
        raise InputError("list", " ".join(args), "takes one folder: that of runs")
    console().print(listing(Path(*args or ["runs"]).expanduser()))
    return 0
