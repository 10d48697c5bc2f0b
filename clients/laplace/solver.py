"""Laplace's approximation: the mode by Adam, the precision by the diagonal Gauss-Newton matrix there."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import replace
from typing import ClassVar

from bayesfed.families import DiagonalGaussian
from bayesfed.federation.local import LocalProblem, LocalSolution
from bayesfed.problem.curvature import ggn_diagonal
from bayesfed.profiling import span
from clients.point.solver import PointSolver


class LaplaceSolver(PointSolver):
    """Minimise as :class:`PointSolver` does, then set ``S_k = S_g + (H_k/tau - V_k)/rho``, ``H_k`` the GGN diagonal of
    ``l_k`` at the mode.

    That is the stationarity condition of the client's problem with its expectations taken at the mode (delta method).
    With ``learn_precision`` off the precision stays the server's. Uploads mean and precision. Costs one gradient per
    output and example more than the steps.

    Args and errors are those of :class:`PointSolver`.
    """

    families: ClassVar[frozenset[str]] = frozenset({"diagonal"})
    learns_precision: ClassVar[bool] = True

    def solve(self, problem: LocalProblem) -> LocalSolution:
        """The mode, then the curvature there."""
        return self._with_curvature(problem, super().solve(problem))

    def solve_together(self, problems: Sequence[LocalProblem]) -> list[LocalSolution]:
        """:meth:`solve` with the modes of all clients found side by side."""
        return [self._with_curvature(p, s) for p, s in zip(problems, super().solve_together(problems), strict=True)]

    @staticmethod
    def _with_curvature(problem: LocalProblem, solution: LocalSolution) -> LocalSolution:
        server = problem.server
        if not problem.learn_precision or not isinstance(server, DiagonalGaussian):
            return solution
        with span("curvature"):
            curvature, gradients = ggn_diagonal(
                problem.model, problem.likelihood, problem.data, solution.posterior.mean
            )
            excess = curvature / problem.temperature
            site = problem.site_terms()
            if site is not None:
                excess = excess - site[1]
            precision = server.precision + excess / problem.rho
        metrics = dict(solution.metrics)
        metrics["gradient-evaluations"] += gradients
        posterior = DiagonalGaussian.from_mean_precision(solution.posterior.mean, precision)
        return replace(solution, posterior=posterior, metrics=metrics)
