"""flwr-datasets' partitioners, fed with labels only: no download, no image passes through them."""

from __future__ import annotations

import warnings
from abc import abstractmethod
from collections.abc import Sequence
from typing import Any

import numpy as np

from bayesfed.errors import InputError, choice, integer, number
from bayesfed.problem.partition.partitioner import Partitioner
from bayesfed.seeding import derive, numpy_generator


class FlowerPartitioner(Partitioner):
    """Runs a partitioner of ``flwr_datasets.partitioner`` on a table of row numbers and labels."""

    def assign(self, labels: np.ndarray | None, num_examples: int, clients: int, seed: int) -> Sequence[np.ndarray]:
        import datasets  # these two take seconds to import
        from flwr_datasets import partitioner as flower

        stream = derive(seed, "partition", type(self).__name__) % 2**32  # NumPy's legacy seeding takes 32 bits
        columns: dict[str, Any] = {"index": np.arange(num_examples)}
        if labels is not None:
            columns["label"] = labels
        try:
            with warnings.catch_warnings():
                warnings.simplefilter("ignore", FutureWarning)  # from inside datasets; nothing a user can do
                partitioner = self.build(flower, clients, stream)
                partitioner.dataset = datasets.Dataset.from_dict(columns)
                return [np.sort(np.asarray(partitioner.load_partition(k)["index"])) for k in range(clients)]
        except (ValueError, IndexError) as error:  # e.g. Dirichlet gives up after ten draws
            lines = " ".join(str(error).split())
            raise InputError("partition", self.name, f"flwr-datasets cannot split the data: {lines}") from error

    @abstractmethod
    def build(self, flower: Any, clients: int, seed: int) -> Any:
        """The partitioner, from the module ``flower`` = flwr_datasets.partitioner."""


class Dirichlet(FlowerPartitioner):
    """Class shares of each client ~ Dir(alpha) (flwr-datasets' DirichletPartitioner).

    Args:
        num_clients: K; null = 10.
        alpha: concentration, > 0; small = few classes per client.
        min_partition_size: smallest client allowed; the draw is repeated up to ten times, then it is an error.
        self_balancing: whether clients above the average size stop receiving examples.
    """

    name = "dirichlet"
    needs_labels = True

    def __init__(
        self,
        num_clients: int | None = None,
        *,
        alpha: float = 0.5,
        min_partition_size: int = 10,
        self_balancing: bool = False,
    ):
        super().__init__(num_clients)
        number("alpha", alpha, above=0)
        integer("min_partition_size", min_partition_size, at_least=0)
        self.alpha, self.min_partition_size, self.self_balancing = float(alpha), min_partition_size, self_balancing

    def build(self, flower: Any, clients: int, seed: int) -> Any:
        return flower.DirichletPartitioner(
            num_partitions=clients,
            partition_by="label",
            alpha=self.alpha,
            min_partition_size=self.min_partition_size,
            self_balancing=self.self_balancing,
            shuffle=True,
            seed=seed,
        )


class Pathological(FlowerPartitioner):
    """A fixed number of classes per client (flwr-datasets' PathologicalPartitioner).

    Args:
        num_clients: K; null = 10.
        num_classes_per_client: classes each client holds.
        class_assignment: ``random``, ``deterministic`` or ``first-deterministic``.
    """

    name = "pathological"
    needs_labels = True

    def __init__(
        self, num_clients: int | None = None, *, num_classes_per_client: int = 2, class_assignment: str = "random"
    ):
        super().__init__(num_clients)
        integer("num_classes_per_client", num_classes_per_client, at_least=1)
        choice("class_assignment", class_assignment, ("random", "deterministic", "first-deterministic"))
        self.num_classes_per_client, self.class_assignment = num_classes_per_client, class_assignment

    def build(self, flower: Any, clients: int, seed: int) -> Any:
        return flower.PathologicalPartitioner(
            num_partitions=clients,
            partition_by="label",
            num_classes_per_partition=self.num_classes_per_client,
            class_assignment_mode=self.class_assignment,
            shuffle=True,
            seed=seed,
        )


class Shard(FlowerPartitioner):
    """Label-sorted rows cut into shards, a few per client (flwr-datasets' ShardPartitioner; McMahan et al., 2017).

    Args:
        num_clients: K; null = 10.
        num_shards_per_client: shards each client draws.
    """

    name = "shard"
    needs_labels = True

    def __init__(self, num_clients: int | None = None, *, num_shards_per_client: int = 2):
        super().__init__(num_clients)
        integer("num_shards_per_client", num_shards_per_client, at_least=1)
        self.num_shards_per_client = num_shards_per_client

    def build(self, flower: Any, clients: int, seed: int) -> Any:
        return flower.ShardPartitioner(
            num_partitions=clients,
            partition_by="label",
            num_shards_per_partition=self.num_shards_per_client,
            shuffle=True,
            seed=seed,
        )


class _BySize(FlowerPartitioner):
    """Sizes that grow with the client id. flwr-datasets cuts the rows in order, so they are shuffled first."""

    kind: str

    def assign(self, labels: np.ndarray | None, num_examples: int, clients: int, seed: int) -> Sequence[np.ndarray]:
        order = numpy_generator(seed, "partition", "order").permutation(num_examples)
        return [np.sort(order[part]) for part in super().assign(None, num_examples, clients, seed)]

    def build(self, flower: Any, clients: int, seed: int) -> Any:
        return getattr(flower, self.kind)(num_partitions=clients)


class Linear(_BySize):
    """Client k's size is proportional to k + 1."""

    name = "linear"
    kind = "LinearPartitioner"


class Square(_BySize):
    """Client k's size is proportional to (k + 1)^2."""

    name = "square"
    kind = "SquarePartitioner"


class Exponential(_BySize):
    """Client k's size is proportional to exp(k + 1)."""

    name = "exponential"
    kind = "ExponentialPartitioner"
