"""Say how a run stands.

usage: bayesfed status RUN_DIR

Says how far a run is, how it does, and how to go on with it.
"""

from __future__ import annotations

from pathlib import Path

from bayesfed.errors import InputError


def main(args: list[str]) -> int:
    """Print the state of a run."""
    from bayesfed.runs.display import console
    from bayesfed.runs.status import status

    if len(args) != 1:
        raise InputError("status", " ".join(args), "takes one folder: a run directory")
    for part in status(Path(args[0]).expanduser()):
        console().print(part)
    return 0
