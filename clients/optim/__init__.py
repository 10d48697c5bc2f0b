"""Optimizers that learn a posterior."""

from clients.optim.ivon import IVON
from clients.optim.srvn import SRVN
from clients.optim.srvn_update import srvn_step

__all__ = ["IVON", "SRVN", "srvn_step"]
