"""Federated strategies on Flower's message API, one file per method."""

from bayesfed.federation.server.strategy import FederatedStrategy
from strategies.bayes_admm import BayesADMM
from strategies.bregman_admm import BregmanADMM
from strategies.fedadagrad import FedAdagrad
from strategies.fedadam import FedAdam
from strategies.fedadmm import FedADMM
from strategies.fedavg import FedAvg
from strategies.fedavgm import FedAvgM
from strategies.feddyn import FedDyn
from strategies.fedlap import FedLap
from strategies.fedlap_cov import FedLapCov
from strategies.fedmedian import FedMedian
from strategies.fednova import FedNova
from strategies.fedpa import FedPA
from strategies.fedprox import FedProx
from strategies.fedtrimmedavg import FedTrimmedAvg
from strategies.fedyogi import FedYogi
from strategies.krum import Krum
from strategies.natural_averaging import NaturalAveraging
from strategies.pvi import PVI
from strategies.scaffold import Scaffold

__all__ = [
    "PVI",
    "BayesADMM",
    "BregmanADMM",
    "FedADMM",
    "FedAdagrad",
    "FedAdam",
    "FedAvg",
    "FedAvgM",
    "FedDyn",
    "FedLap",
    "FedLapCov",
    "FedMedian",
    "FedNova",
    "FedPA",
    "FedProx",
    "FedTrimmedAvg",
    "FedYogi",
    "FederatedStrategy",
    "Krum",
    "NaturalAveraging",
    "Scaffold",
]
