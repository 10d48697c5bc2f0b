"""Optimizers that learn a posterior."""

from clients.optim.ivon import IVON
from clients.optim.srvn import srvn_step

__all__ = ["IVON", "srvn_step"]
