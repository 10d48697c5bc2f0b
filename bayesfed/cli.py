"""The ``bayesfed`` command: ``bayesfed [VERB] ...``; a verb is a module of ``bayesfed/verbs``, and ``run`` may be left
out.

Exit codes: 0 done, 1 failed, 2 bad configuration or input, 130 interrupted (resumable).
"""

from __future__ import annotations

import os
import signal
import sys
from collections.abc import Sequence

from bayesfed import __version__
from bayesfed.errors import InputError, choice
from bayesfed.output import steady
from bayesfed.verbs import verbs

HELP = {"-h", "--help"}


def main(argv: Sequence[str] | None = None) -> None:
    """Entry point; exits with the codes above."""
    for library in ("FLWR_TELEMETRY", "RAY_USAGE_STATS"):  # a process of its own, which tells nobody what it does
        os.environ.setdefault(f"{library}_ENABLED", "0")
    args = list(sys.argv[1:] if argv is None else argv)
    if "accelerate=off" not in args:  # torch looks at its first tensor, which comes with the check of a configuration
        os.environ.setdefault("THP_MEM_ALLOC_ENABLE", "1")  # see `use_large_pages` of bayesfed.accelerate
    with steady():
        try:
            code = _main(args)
        except InputError as error:
            print(f"error: {error}", file=sys.stderr)
            code = 2
        except KeyboardInterrupt:
            print("\ninterrupted", file=sys.stderr)
            code = 130
        sys.exit(code)


def _main(args: list[str]) -> int:
    known = verbs()
    named = bool(args) and "=" not in args[0] and not args[0].startswith(("-", "+", "~"))
    verb = args.pop(0) if named else "run"
    choice("command", verb, ["help", *known])
    if verb == "help" or HELP.intersection(args):
        about = next(iter(args), None) if verb == "help" else verb if named or any("=" in a for a in args) else None
        choice("command", about or "help", ["help", *known])
        print(_overview() if about in (None, "help") else _help(about))
        return 0
    if not named and args[:1] == ["--version"]:
        print(f"bayesfed {__version__}")
        return 0
    signal.signal(signal.SIGTERM, _interrupt)
    return known[verb].main(args)


def _overview() -> str:
    lines = "\n".join(f"  {name:<11}{verb.summary[0].lower() + verb.summary[1:]}" for name, verb in verbs().items())
    return (
        f"usage: bayesfed [VERB] [key=value ...]\n\n{lines}\n\n"
        "`bayesfed VERB --help` says more, `bayesfed run --help` lists the choices.\n"
        "Keys and values are Hydra's: bayesfed --cfg job shows them all, bayesfed --hydra-help explains its options.\n"
        "Exit codes: 0 done, 1 failed, 2 bad configuration or input, 130 interrupted (resumable)."
    )


def _help(verb: str) -> str:
    usage = verbs()[verb].usage
    if verb != "run":
        return usage
    from bayesfed.composing import conf_dirs, options

    groups = sorted({path.name for folder in conf_dirs() for path in folder.iterdir() if path.is_dir()})
    choices = "\n".join(f"  {group}: {', '.join(options(group))}" for group in groups if options(group))
    return f"{usage}\n\nGroups, chosen by name (group=name):\n{choices}\n\nHydra's options: bayesfed --hydra-help"


def _interrupt(signum: int, frame: object) -> None:
    raise KeyboardInterrupt
