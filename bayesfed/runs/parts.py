"""Whether the parts of a run fit together: what doesn't becomes one line, before any work."""

from __future__ import annotations

import inspect
from typing import Any

import psutil
from omegaconf import DictConfig

from bayesfed.configured import own_code
from bayesfed.errors import InputError
from bayesfed.federation.client.handler import Trainer
from bayesfed.foreign import plain_text
from bayesfed.problem import Problem
from bayesfed.system import System

# what `bayesfed.app` gives a client half
GIVEN = ("name", "family", "solver", "problem", "sites", "seed", "dtype", "device", "wire_format")


def look_at_client(strategy: Any) -> None:
    """Raise InputError if a strategy's client half is no ``Trainer``, or takes other arguments."""
    kind = strategy.client
    if not (isinstance(kind, type) and issubclass(kind, Trainer)):
        fix = f"derive it from {Trainer.__module__}.{Trainer.__name__}"
        raise InputError("strategy.client", plain_text(getattr(kind, "__name__", kind)), fix)
    with own_code("strategy", f"{kind.__module__}.{kind.__qualname__}", "the constructor of its client half"):
        signature = inspect.signature(kind)
    try:
        signature.bind(**dict.fromkeys(GIVEN))
    except TypeError as error:
        gives = ", ".join(GIVEN)
        fix = f"its constructor {error}; bayesfed gives {gives}; the method's own values go with local_settings"
        raise InputError("strategy.client", plain_text(kind.__name__), fix) from error
    if kind.settle is not Trainer.settle and not kind.remembers:
        fix = "settle() keeps nothing without remembers = True"
        raise InputError("strategy.client", plain_text(kind.__name__), fix)


def check_fit(cfg: DictConfig, strategy: Any, solver: Any, problem: Problem, num_parameters: int) -> None:
    """Whether strategy, client, model, likelihood and this machine's memory go together.

    Raises:
        InputError: naming the key to change.
    """
    family, client = strategy.family, cfg.client.name
    if family not in solver.families:
        learns = ", ".join(sorted(solver.families))
        fix = f"solves for these families: {learns}; strategy={cfg.strategy.name} has family {family}"
        raise InputError("client", client, fix)
    for ability in sorted(frozenset(strategy.asks) & solver.lacks.keys(), reverse=True):
        raise solver.refusal(ability, client, f"strategy={cfg.strategy.name}")
    with own_code("client", cfg.client["_target_"], "its check"):
        solver.check(cfg.model.name, cfg.likelihood.name)
    stragglers = System.of(cfg.get("system")).stragglers
    if stragglers and not solver.stepwise:
        fix = f"client={client} solves its problem in closed form: there are no steps to leave out; use another client"
        raise InputError("system.stragglers", stragglers, fix)
    matrix, free = 8 * num_parameters**2, psutil.virtual_memory().available
    if family == "full" and 8 * matrix > free:  # server: posterior, prior, sums; client: Hessian, factor, work space
        raise InputError(
            "strategy.family",
            family,
            f"the model has {num_parameters:,} parameters: one precision matrix takes {matrix / 1e9:.1f} GB and a run "
            f"about {8 * matrix / 1e9:.0f} GB, {free / 1e9:.0f} GB are free; use family=diagonal or a smaller model",
        )
