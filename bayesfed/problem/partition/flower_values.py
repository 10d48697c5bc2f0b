"""flwr-datasets' partitioners that look at a value of each example: a continuous property, or who it is from."""

from __future__ import annotations

from typing import Any, ClassVar

from bayesfed.errors import choice, integer, number
from bayesfed.problem.partition.flower import FlowerPartitioner


class Continuous(FlowerPartitioner):
    """Rows sorted by a property blended with noise, then cut into K parts (flwr-datasets' ContinuousPartitioner).

    Feature skew: with ``by=mean`` client 0 holds the darkest images (smallest mean feature), client K - 1 the
    brightest; with ``by=target`` a regression's targets or the class numbers decide.

    Args:
        num_clients: K; null = 10.
        by: ``mean`` of the inputs as stored, or ``target``.
        strictness: weight of the property in [0, 1]; 0 = iid, 1 = sorted.
    """

    name = "continuous"
    kind = "ContinuousPartitioner"
    options: ClassVar = {"strictness": "strictness"}

    def __init__(self, num_clients: int | None = None, *, by: str = "mean", strictness: float = 0.7):
        super().__init__(num_clients)
        choice("by", by, ("mean", "target"))
        number("strictness", strictness, at_least=0, at_most=1)
        self.by, self.strictness = by, float(strictness)
        self.needs_values = by

    def arguments(self, clients: int, seed: int) -> dict[str, Any]:
        shared = {"num_partitions": clients, "partition_by": "value", "shuffle": True, "seed": seed}
        return shared | super().arguments(clients, seed)


class GroupedNaturalId(FlowerPartitioner):
    """Several ids of the data's client column make one client (flwr-datasets' GroupedNaturalIdPartitioner).

    Args:
        num_clients: null: it follows from the ids.
        group_size: ids per client.
        mode: of the ids left over: ``allow-smaller``, ``allow-bigger``, ``drop-reminder`` or ``strict`` (an error).
    """

    name = "grouped_natural_id"
    kind = "GroupedNaturalIdPartitioner"
    options: ClassVar = {"group_size": "group_size", "mode": "mode"}
    needs_values = "client"

    def __init__(self, num_clients: int | None = None, *, group_size: int = 2, mode: str = "allow-smaller"):
        super().__init__(num_clients)
        integer("group_size", group_size, at_least=1)
        choice("mode", mode, ("allow-smaller", "allow-bigger", "drop-reminder", "strict"))
        self.group_size, self.mode = group_size, mode

    def arguments(self, clients: int, seed: int) -> dict[str, Any]:
        return {"partition_by": "value", "sort_unique_ids": True} | super().arguments(clients, seed)
