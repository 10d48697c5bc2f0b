"""Optimizers that learn a posterior, for training loops of one's own."""

from clients import nva
from clients.ivon.optimizer import IVON
from clients.lmd.optimizer import LMD
from clients.srvn.optimizer import SRVN
from clients.srvn.step import srvn_step

__all__ = ["IVON", "LMD", "SRVN", "nva", "srvn_step"]
