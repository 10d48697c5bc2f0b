"""Named questions: a message names one, the client answers in numbers and keeps nothing of it."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from typing import Any

from flwr.app import ConfigRecord

from bayesfed import wire
from bayesfed.evaluation import evaluate
from bayesfed.federation.client.assignment import Assignment
from bayesfed.federation.local import LocalSolution
from bayesfed.problem import Problem

# (the client's data and model, what the message poses, its solution on demand, the question's parameters) -> numbers
Question = Callable[[Problem, Assignment, Callable[[], LocalSolution], Mapping[str, Any]], dict[str, float]]


def personalize(
    problem: Problem, assignment: Assignment, solve: Callable[[], LocalSolution], parameters: Mapping[str, Any]
) -> dict[str, float]:
    """Solve the local problem as in training, and test the local posterior with ``samples`` posterior samples.

    Returns:
        ``num-examples`` (of the client's own test distribution), ``gradient-evaluations``, and the scores of
        :func:`bayesfed.evaluation.evaluate` as ``mean/...`` and ``bayes/...``.

    Raises:
        ValueError: the client has no tests.
    """
    local = assignment.problem
    tests = problem.client_tests[local.client]
    if len(tests) == 0:
        raise ValueError("the test set has no example of this client's classes")
    solution = solve()
    scores = evaluate(
        local.model, solution.posterior.to(dtype=local.dtype, device=local.device), tests, problem.likelihood,
        samples=wire.value(parameters, "samples", int), generator=local.generator("personalized", local.device),
    )  # fmt: skip
    spent = {k: v for k, v in solution.metrics.items() if k == "gradient-evaluations"}
    return {**scores, **spent, "num-examples": len(tests)}


QUESTIONS: dict[str, Question] = {"personalize": personalize}


def asked(record: object, known: Mapping[str, Question]) -> tuple[Question, ConfigRecord]:
    """The question of a message, and its parameters.

    Raises:
        wire.BadMessage: there is none, or this client doesn't know it; names those it knows.
    """
    name = wire.value(record, "name", str)
    if name not in known:
        raise wire.BadMessage(f"unknown question '{name}'; this client answers: {', '.join(sorted(known))}")
    assert isinstance(record, ConfigRecord)
    return known[name], record
