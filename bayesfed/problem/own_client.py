"""A node's own data: a file that holds one client's examples and no others'."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import replace

import numpy as np

from bayesfed.errors import InputError
from bayesfed.problem.examples import Examples
from bayesfed.problem.inputs import each
from bayesfed.problem.partition.partitioner import Partitioner
from bayesfed.problem.problem import Problem


class Whole(Partitioner):
    """Everything is one client's, in the order of the file."""

    name = "whole"
    default_clients = 1
    alone = True

    def assign(self, labels: np.ndarray | None, num_examples: int, clients: int, seed: int) -> Sequence[np.ndarray]:
        return [np.arange(num_examples)]


WHOLE = {"_target_": "bayesfed.problem.own_client.Whole", "name": Whole.name, "num_clients": 1}


def place(problem: Problem, client: object) -> Problem:
    """``problem`` of one client, with its examples at position ``client`` and none before it.

    Raises:
        InputError: ``client`` is no client id.
    """
    if isinstance(client, bool) or not isinstance(client, int) or not 0 <= client < 1_000_000:
        raise InputError("partition-id", client, "a node with data of its own says which client it is: 0, 1, 2 ...")
    mine = problem.clients[0]
    nothing = Examples(each(lambda x: x[:0], mine.x), mine.y[:0], None, problem.scaling)
    return replace(problem, clients=[*[nothing] * client, mine])
