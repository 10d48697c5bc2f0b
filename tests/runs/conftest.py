"""Ways for clients to go wrong, from inside."""

from __future__ import annotations

from collections.abc import Callable

import pytest

from bayesfed.federation.local import LocalProblem, LocalSolution
from clients.exact import ExactSolver


@pytest.fixture
def patches():
    with pytest.MonkeyPatch.context() as patches:
        yield patches


@pytest.fixture
def sabotage(patches) -> Callable[..., None]:
    """``sabotage(act, client=2, round=3)``: ``act(solution)`` replaces the solution of these clients in these rounds
    (None: any).
    """
    solve = ExactSolver.solve

    def install(act: Callable[[LocalSolution], LocalSolution], *, client: int | None = None, round: int | None = None):
        def sabotaged(self, problem: LocalProblem) -> LocalSolution:
            solution = solve(self, problem)
            here = client in (None, problem.client) and round in (None, problem.round)
            return act(solution) if here else solution

        patches.setattr(ExactSolver, "solve", sabotaged)

    return install


@pytest.fixture
def mend(patches) -> Callable[[], None]:
    """Take the sabotage back before the test ends."""
    return patches.undo
