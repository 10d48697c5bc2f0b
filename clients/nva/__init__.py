"""NVA: deterministic search for the modes of a function, alone or of a sum that clients hold the terms of."""

from clients.nva.search import maximize, maximize_federated, modes
from clients.nva.settings import Annealing
from clients.nva.state import Mixture
from clients.nva.step import ESTIMATORS, LogDensity, rank_weights, reply, stein

__all__ = [
    "ESTIMATORS",
    "Annealing",
    "LogDensity",
    "Mixture",
    "maximize",
    "maximize_federated",
    "modes",
    "rank_weights",
    "reply",
    "stein",
]
