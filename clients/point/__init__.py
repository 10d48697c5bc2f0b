"""Point estimates by torch's optimizers."""

from clients.point.solver import PointSolver

__all__ = ["PointSolver"]
