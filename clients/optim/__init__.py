"""Optimizers that learn a posterior."""

from clients.optim.ivon import IVON
from clients.optim.lmd import LMD
from clients.optim.srvn import SRVN
from clients.optim.srvn_update import srvn_step

__all__ = ["IVON", "LMD", "SRVN", "srvn_step"]
