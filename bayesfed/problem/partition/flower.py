"""flwr-datasets' partitioners, fed with labels only: no download, no image passes through them."""

from __future__ import annotations

import re
import warnings
from collections.abc import Mapping, Sequence
from types import MappingProxyType
from typing import Any, ClassVar

import numpy as np

from bayesfed.errors import InputError, choice, integer, number
from bayesfed.foreign import plain_text
from bayesfed.problem.partition.partitioner import Partitioner
from bayesfed.seeding import derive

WORDS = {"num_partitions": "num_clients", "partition_sizes": "sizes", "partitions": "clients", "partition": "client"}


class FlowerPartitioner(Partitioner):
    """Runs a partitioner of ``flwr_datasets.partitioner`` on a table of row numbers and labels.

    Attributes:
        kind: name of its class there.
        options: that class's arguments and the attributes here that hold their values.
    """

    kind: ClassVar[str]
    options: ClassVar[Mapping[str, str]] = MappingProxyType({})

    def assign(self, labels: np.ndarray | None, num_examples: int, clients: int, seed: int) -> Sequence[np.ndarray]:
        import datasets  # these two take seconds to import
        from flwr_datasets import partitioner as flower

        stream = derive(seed, "partition", type(self).__name__) % 2**32  # NumPy's legacy seeding takes 32 bits
        columns: dict[str, Any] = {"index": np.arange(num_examples)}
        if labels is not None:
            columns["label"] = labels
        if self.values is not None:
            columns["value"] = self.values
        try:
            with warnings.catch_warnings():
                warnings.simplefilter("ignore")  # on code that isn't the user's, in names that aren't ours
                partitioner = getattr(flower, self.kind)(**self.arguments(clients, stream))
                partitioner.dataset = datasets.Dataset.from_dict(columns)
                # ids make their own number of groups
                count = clients if self.values is None else partitioner.num_partitions
                parts = (partitioner.load_partition(k)["index"] for k in range(count))
                return [np.sort(np.asarray(part, dtype=np.int64)) for part in parts]
        except Exception as error:  # the library lets errors of many kinds through
            fix = f"flwr-datasets cannot split the data: {plain_text(self.reason(error))}"
            raise InputError("partition", self.name, fix) from error

    def reason(self, error: Exception) -> str:
        """What flwr-datasets says, in the names of this configuration."""
        text = " ".join(str(error).split()) if isinstance(error, ValueError) else f"{type(error).__name__}: {error}"
        for theirs, ours in {**self.options, **WORDS}.items():
            text = re.sub(rf"\b{theirs}\b", ours, text)
        return text

    def arguments(self, clients: int, seed: int) -> dict[str, Any]:
        """Of flwr-datasets' constructor."""
        return {theirs: getattr(self, ours) for theirs, ours in self.options.items()}


class ByLabel(FlowerPartitioner):
    """One that looks at class labels."""

    needs_labels = True

    def arguments(self, clients: int, seed: int) -> dict[str, Any]:
        shared = {"num_partitions": clients, "partition_by": "label", "shuffle": True, "seed": seed}
        return shared | super().arguments(clients, seed)


class Dirichlet(ByLabel):
    """Class shares of each client ~ Dir(alpha) (flwr-datasets' DirichletPartitioner).

    Args:
        num_clients: K; null = 10.
        alpha: concentration, > 0; small = few classes per client.
        min_partition_size: smallest client allowed; the draw is repeated up to ten times, then it is an error.
        self_balancing: whether clients above the average size stop receiving examples.
    """

    name = "dirichlet"
    kind = "DirichletPartitioner"
    options: ClassVar = {name: name for name in ("alpha", "min_partition_size", "self_balancing")}

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

    def reason(self, error: Exception) -> str:
        if "number of attempts" not in str(error):
            return super().reason(error)
        least = f"min_partition_size={self.min_partition_size}"
        found = f"in each of ten draws a client got fewer than {least} examples"
        return f"{found}; use a smaller one, fewer clients or a larger alpha"


class Pathological(ByLabel):
    """A fixed number of classes per client (flwr-datasets' PathologicalPartitioner).

    Args:
        num_clients: K; null = 10.
        num_classes_per_client: classes each client holds.
        class_assignment: ``random``, ``deterministic`` or ``first-deterministic``.
    """

    name = "pathological"
    kind = "PathologicalPartitioner"
    options: ClassVar = {
        "num_classes_per_partition": "num_classes_per_client",
        "class_assignment_mode": "class_assignment",
    }

    def __init__(
        self, num_clients: int | None = None, *, num_classes_per_client: int = 2, class_assignment: str = "random"
    ):
        super().__init__(num_clients)
        integer("num_classes_per_client", num_classes_per_client, at_least=1)
        choice("class_assignment", class_assignment, ("random", "deterministic", "first-deterministic"))
        self.num_classes_per_client, self.class_assignment = num_classes_per_client, class_assignment


class Shard(ByLabel):
    """Label-sorted rows cut into shards, a few per client (flwr-datasets' ShardPartitioner; McMahan et al., 2017).

    Args:
        num_clients: K; null = 10.
        num_shards_per_client: shards each client draws.
    """

    name = "shard"
    kind = "ShardPartitioner"
    options: ClassVar = {"num_shards_per_partition": "num_shards_per_client"}

    def __init__(self, num_clients: int | None = None, *, num_shards_per_client: int = 2):
        super().__init__(num_clients)
        integer("num_shards_per_client", num_shards_per_client, at_least=1)
        self.num_shards_per_client = num_shards_per_client

    def assign(self, labels: np.ndarray | None, num_examples: int, clients: int, seed: int) -> Sequence[np.ndarray]:
        shards = clients * self.num_shards_per_client
        if shards > num_examples:
            fix = f"{clients} clients need {shards} shards, there are only {num_examples} training examples"
            raise InputError("num_shards_per_client", self.num_shards_per_client, fix)
        return super().assign(labels, num_examples, clients, seed)


class InnerDirichlet(ByLabel):
    """Clients of given sizes, each drawing its classes from its own Dir(alpha) (flwr-datasets'
    InnerDirichletPartitioner).

    Args:
        num_clients: K; null = the number of ``sizes``, or 10.
        sizes: examples of each client; null = equal ones.
        alpha: concentration, > 0; small = few classes per client.
    """

    name = "inner_dirichlet"
    kind = "InnerDirichletPartitioner"
    options: ClassVar = {"alpha": "alpha"}

    def __init__(self, num_clients: int | None = None, *, sizes: Sequence[int] | None = None, alpha: float = 0.5):
        super().__init__(clients_of(num_clients, sizes))
        number("alpha", alpha, above=0)
        self.sizes, self.alpha = None if sizes is None else list(sizes), float(alpha)

    def assign(self, labels: np.ndarray | None, num_examples: int, clients: int, seed: int) -> Sequence[np.ndarray]:
        check_sum(self.sizes, num_examples)
        self._equal = [len(part) for part in np.array_split(np.arange(num_examples), clients)]
        # flwr-datasets counts classes from 0 without gaps
        _, codes = np.unique(np.asarray(labels), return_inverse=True)
        return super().assign(codes, num_examples, clients, seed)

    def arguments(self, clients: int, seed: int) -> dict[str, Any]:
        own = super().arguments(clients, seed) | {"partition_sizes": self.sizes or self._equal}
        return {name: value for name, value in own.items() if name != "num_partitions"}


class Distribution(ByLabel):
    """A few classes a client with log-normal counts (flwr-datasets' DistributionPartitioner; FedProx, Li et al. 2020).

    Args:
        num_clients: K, a multiple of the number of classes; null = 10.
        num_classes_per_client: classes each client holds.
        sigma: of the log-normal from which the counts of a class are drawn; larger = more unequal.
        at_least: examples that a client holds of each of its classes in any case.
    """

    name = "distribution"
    kind = "DistributionPartitioner"
    options: ClassVar = {
        "num_unique_labels_per_partition": "num_classes_per_client",
        "preassigned_num_samples_per_label": "at_least",
    }

    def __init__(
        self,
        num_clients: int | None = None,
        *,
        num_classes_per_client: int = 2,
        sigma: float = 2.0,
        at_least: int = 5,
    ):
        super().__init__(num_clients)
        integer("num_classes_per_client", num_classes_per_client, at_least=1)
        number("sigma", sigma, at_least=0)
        integer("at_least", at_least, at_least=0)
        self.num_classes_per_client, self.sigma, self.at_least = num_classes_per_client, float(sigma), at_least

    def assign(self, labels: np.ndarray | None, num_examples: int, clients: int, seed: int) -> Sequence[np.ndarray]:
        self._classes = len(np.unique(np.asarray(labels)))
        if clients % self._classes:
            fix = f"must be a multiple of the number of classes ({self._classes}) with partition=distribution"
            raise InputError("num_clients", clients, fix)
        return super().assign(labels, num_examples, clients, seed)

    def arguments(self, clients: int, seed: int) -> dict[str, Any]:
        count = clients * self.num_classes_per_client
        shares = np.random.default_rng(seed).lognormal(0.0, self.sigma, count).reshape(self._classes, -1)
        return super().arguments(clients, seed) | {"distribution_array": shares}


def check_sum(sizes: Sequence[int] | None, num_examples: int) -> None:
    """Raise InputError if explicit ``sizes`` ask for more examples than there are."""
    if sizes is not None and sum(sizes) > num_examples:
        raise InputError("sizes", list(sizes), f"sum to {sum(sizes)}, there are only {num_examples} training examples")


def clients_of(num_clients: int | None, sizes: Sequence[int] | None) -> int | None:
    """K of explicit ``sizes``.

    Raises:
        InputError: a size below 1, or another ``num_clients``.
    """
    if sizes is None:
        return num_clients
    for size in sizes:
        integer("sizes", size, at_least=1)
    if not len(sizes):
        raise InputError("sizes", list(sizes), "name the number of examples of each client, or null")
    if num_clients not in (None, len(sizes)):
        raise InputError("num_clients", num_clients, f"sizes has {len(sizes)} entries; leave num_clients null")
    return len(sizes)
