"""The exact solution of quadratic problems."""

from clients.exact.solver import ExactSolver

__all__ = ["ExactSolver"]
