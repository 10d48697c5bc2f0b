"""The same as run, and say where the time went.

usage: bayesfed profile [key=value ...]

Takes the overrides of `bayesfed run`, and says at the end where the time went.
"""

from __future__ import annotations

from bayesfed.errors import InputError


def main(args: list[str]) -> int:
    """``bayesfed run`` with ``profile=true``.

    Raises:
        InputError: this is not one run.
    """
    from bayesfed.verbs import run

    for arg in args:
        if arg.startswith("-"):
            fix = "profile measures one run and takes overrides only; sweeps and Hydra's options go with `bayesfed run`"
            raise InputError("option", arg, fix)
        if arg.lstrip("+~").partition("=")[0] == "profile":
            raise InputError("profile", arg.partition("=")[2], "leave it out: `bayesfed profile` sets it")
    return run.main([*args, "profile=true"])
