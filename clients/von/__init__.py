"""VON: the variational online Newton method."""

from clients.von.solver import VONSolver

__all__ = ["VONSolver"]
