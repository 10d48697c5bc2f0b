"""What steers a comparison besides the configuration of its runs."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

from hydra.core.override_parser.types import Override

from bayesfed.errors import InputError, choice, integer, number
from bayesfed.overrides import parse

OPTIONS = ("out", "jobs", "baseline", "target", "budget", "tune", "tune_seed", "tune_for")
REFUSED = {
    "resume": "compare resumes by itself: start the same command again",
    "hydra.run.dir": "runs go under out=; leave it out",
    "display": "compare shows its own progress",
    "profile": "profile one run with `bayesfed profile`",
}


@dataclass(frozen=True)
class Options:
    """What steers a comparison besides the configuration of its runs.

    Attributes:
        out: folder of the comparison; None = a new one under ``runs/compare``.
        jobs: runs at once; None = one a core (one at a time on engines that use all cores themselves).
        baseline: method the others are tested against; None = the first.
        target: accuracy in percent for which rounds, bytes, gradients and seconds are given.
        budget: ``epochs`` refuses methods with different local epochs or rounds, ``none`` compares them anyway.
        tune: trials per method and setting on a validation split; 0 = none.
        tune_seed: seed of the trials.
        tune_for: ``accuracy`` or ``nll``, what the trials are judged by.
    """

    out: str | None = None
    jobs: int | None = None
    baseline: str | None = None
    target: float | None = None
    budget: str = "epochs"
    tune: int = 0
    tune_seed: int = 1001
    tune_for: str = "accuracy"

    def __post_init__(self) -> None:
        integer("jobs", self.jobs, at_least=1, optional=True)
        number("target", self.target, above=0, at_most=100, optional=True)
        integer("tune", self.tune, at_least=0)
        integer("tune_seed", self.tune_seed, at_least=0)
        choice("budget", self.budget, ("epochs", "none"))
        choice("tune_for", self.tune_for, ("accuracy", "nll"))


def split_options(args: Sequence[str]) -> tuple[Options, list[Override]]:
    """Compare's own keys, and the overrides of the configuration.

    Raises:
        InputError: a dash option, bad syntax, or a key that compare sets itself.
    """
    for arg in args:
        if arg.startswith("-"):
            raise InputError("option", arg, "compare takes key=value only; see docs/compare.md")
    own: dict[str, Any] = {}
    rest: list[Override] = []
    for override in parse(args):
        key = override.key_or_group
        if key in REFUSED:
            raise InputError(key, override.value(), REFUSED[key])
        if key in OPTIONS:
            if override.is_sweep_override():
                raise InputError(key, override.value(), "takes one value, not a list")
            value = override.value()
            own[key] = str(value) if key in ("out", "baseline") and value is not None else value
        else:
            rest.append(override)
    return Options(**own), rest
