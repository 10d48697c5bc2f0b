"""Partitioners: who holds which training rows."""

from bayesfed.problem.partition.dirichlet import DirichletSizesAndClasses
from bayesfed.problem.partition.flower import Dirichlet, Distribution, InnerDirichlet, Pathological, Shard
from bayesfed.problem.partition.flower_sizes import Exponential, IdToSize, Linear, Size, Square
from bayesfed.problem.partition.flower_values import Continuous, GroupedNaturalId
from bayesfed.problem.partition.iid import Iid, NaturalId
from bayesfed.problem.partition.partitioner import Partitioner
from bayesfed.problem.partition.two_classes import TwoClassesPerClient

__all__ = [
    "Continuous",
    "Dirichlet",
    "DirichletSizesAndClasses",
    "Distribution",
    "Exponential",
    "GroupedNaturalId",
    "IdToSize",
    "Iid",
    "InnerDirichlet",
    "Linear",
    "NaturalId",
    "Partitioner",
    "Pathological",
    "Shard",
    "Size",
    "Square",
    "TwoClassesPerClient",
]
