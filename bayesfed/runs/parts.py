"""Whether the parts of a run fit together: what doesn't becomes one line, before any work."""

from __future__ import annotations

import inspect
from typing import Any

import psutil
from omegaconf import DictConfig

from bayesfed.configured import look_at, own_code, resolve
from bayesfed.errors import InputError
from bayesfed.evaluation.predictive import noise_precision
from bayesfed.problem import Problem
from bayesfed.system import System

# what `bayesfed.app` gives a handler
HANDLED = ("name", "family", "solver", "problem", "sites", "seed", "dtype", "device", "wire_format")


def look_at_handler(target: str) -> None:
    """Raise InputError if a handler can't be imported, is something else or takes other arguments than ``Trainer``."""
    kind = resolve({"_target_": target}, "handler")
    look_at(kind, "handler", target)
    with own_code("handler", target, "its constructor"):
        inspect.signature(kind).bind(**dict.fromkeys(HANDLED))


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
    noise_precision(problem.likelihood)  # or there is no way to evaluate
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
