"""Partitioners: who holds which training rows."""

from bayesfed.problem.partition.dirichlet import DirichletSizesAndClasses
from bayesfed.problem.partition.flower import Dirichlet, Exponential, Linear, Pathological, Shard, Square
from bayesfed.problem.partition.iid import Iid, NaturalId
from bayesfed.problem.partition.partitioner import Partitioner
from bayesfed.problem.partition.two_classes import TwoClassesPerClient

__all__ = [
    "Dirichlet",
    "DirichletSizesAndClasses",
    "Exponential",
    "Iid",
    "Linear",
    "NaturalId",
    "Partitioner",
    "Pathological",
    "Shard",
    "Square",
    "TwoClassesPerClient",
]
