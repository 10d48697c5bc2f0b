"""LMD: mirror descent with multiplicative updates."""

from clients.lmd.solver import LMDSolver

__all__ = ["LMDSolver"]
