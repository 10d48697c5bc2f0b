"""IVON: a diagonal Gaussian learned by an Adam-like optimizer (Shen et al. 2024)."""

from clients.ivon.solver import IVONSolver

__all__ = ["IVONSolver"]
