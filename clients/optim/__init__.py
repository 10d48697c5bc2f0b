"""Optimizers that learn a posterior."""

from clients.optim.ivon import IVON
from clients.optim.lmd import LMD
from clients.optim.srvn import srvn_step

__all__ = ["IVON", "LMD", "srvn_step"]
