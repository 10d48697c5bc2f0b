"""Optimizers that learn a posterior."""

from clients.optim.ivon import IVON

__all__ = ["IVON"]
