"""Federated strategies on Flower's message API, one file per method."""

from strategies.base import FederatedStrategy
from strategies.bayes_admm import BayesADMM
from strategies.fedavg import FedAvg
from strategies.fedprox import FedProx

__all__ = ["BayesADMM", "FedAvg", "FedProx", "FederatedStrategy"]
