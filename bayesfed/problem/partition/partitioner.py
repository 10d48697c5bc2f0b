"""What every partitioner offers."""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Sequence

import numpy as np

from bayesfed.errors import InputError, integer

NO_CLIENTS = "the data have no client column: add one (npz: array 'client', parquet: data.client) or use partition=iid"


class Partitioner(ABC):
    """Splits training rows among clients; deterministic given the seed.

    Args:
        num_clients: K >= 1; null = ``default_clients``, or the number of ids if the data bring a client column.

    Attributes:
        name: as in the configuration, from where :func:`bayesfed.problem.build_problem` takes it.
        needs_labels: whether it works on class labels only.
        needs_values: which value of each example it looks at: ``mean`` (of the inputs), ``target``, ``client`` (the id
            in the data's client column), or nothing.
        alone: whether the data are one client's, so that others may hold classes it lacks.
    """

    name: str = "own"
    default_clients = 10
    needs_labels = False
    needs_values = ""
    alone = False
    values: np.ndarray | None = None  # of the examples to split, while it works

    def __init__(self, num_clients: int | None = None):
        integer("num_clients", num_clients, at_least=1, optional=True)
        self.num_clients = num_clients

    def split(
        self, labels: np.ndarray | None, num_examples: int, seed: int, values: np.ndarray | None = None
    ) -> list[np.ndarray]:
        """Positions 0..num_examples-1 of each client.

        Args:
            labels: (num_examples,) class labels, or None for regression.
            num_examples: N.
            seed: of the run.
            values: (num_examples,) what ``needs_values`` names.

        Returns:
            K arrays of positions; some may be empty.

        Raises:
            InputError: if there are fewer examples than clients, or no labels where they are needed.
        """
        clients = self.default_clients if self.num_clients is None else self.num_clients
        if clients > num_examples:
            raise InputError("num_clients", clients, f"there are only {num_examples} training examples")
        if self.needs_labels and labels is None:
            raise InputError(
                "partition", self.name, "needs class labels; for regression use partition=iid or a client column"
            )
        self.values = values if self.needs_values else None
        return [np.asarray(part, dtype=np.int64) for part in self.assign(labels, num_examples, clients, seed)]

    @abstractmethod
    def assign(self, labels: np.ndarray | None, num_examples: int, clients: int, seed: int) -> Sequence[np.ndarray]:
        """``split`` after its checks, for ``clients`` clients."""
