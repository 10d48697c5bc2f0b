"""What a solver returned, anybody's: checked where it was made, so that the reason names it."""

from __future__ import annotations

from dataclasses import replace

import torch

from bayesfed.federation.local import LocalProblem, LocalSolution, Solver
from bayesfed.metrics import plain_numbers


def checked(solution: object, problem: LocalProblem, solver: Solver) -> LocalSolution:
    """``solution`` with Python's numbers as metrics. Whether its values are finite is for the server to say.

    Raises:
        ValueError: it is no :class:`LocalSolution`, its posterior is of another family or shape, it has another
            precision than the server's where ``learn_precision`` is off, or a metric is no number.
    """
    source, server = f"{type(solver).__name__}.solve", problem.server
    if not isinstance(solution, LocalSolution):
        raise ValueError(f"{source} must return a LocalSolution, not {type(solution).__name__}")
    posterior = solution.posterior
    if type(posterior) is not type(server):
        raise ValueError(f"{source} returned a {type(posterior).__name__}, the server's is a {type(server).__name__}")
    own, given = posterior.arrays(), server.arrays()
    for name, value in given.items():
        if own[name].shape != value.shape:
            raise ValueError(
                f"{source} returned {name} of shape {tuple(own[name].shape)}, expected {tuple(value.shape)}"
            )
    if "fixed" in problem.asks and not torch.equal(own["precision"].to(given["precision"]), given["precision"]):
        raise ValueError(f"{source} changed the precision, which is fixed")
    return replace(solution, metrics=plain_numbers(solution.metrics, source))
