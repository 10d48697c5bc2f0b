"""Laplace's approximation at the mode."""

from clients.laplace.solver import LaplaceSolver

__all__ = ["LaplaceSolver"]
