"""Which node holds which partition."""

from __future__ import annotations

import time
from collections.abc import Iterable, Mapping
from functools import partial
from logging import getLogger

from flwr.app import ConfigRecord, Message, MessageType, RecordDict
from flwr.serverapp import Grid

from bayesfed import wire
from bayesfed.engine.flower_version import AWAY
from bayesfed.errors import RunFailed
from strategies.delivery import deliver

log = getLogger("bayesfed")
REFUSED = -1  # in place of a partition id


class Roster:
    """The node of each client. Flower's node ids are random, so every node is asked once which partition it holds.

    Args:
        num_clients: how many there should be; 0: as many as there are nodes.
        sizes: gets the number of examples each partition has, as its node says.
        shape: what every node's data must have in common, see :meth:`clients.handler.Trainer.query`.

    Attributes:
        nodes: partition id -> node id.
    """

    def __init__(self, num_clients: int, sizes: dict[int, int] | None = None, shape: Mapping[str, int] | None = None):
        self.shape = shape or {}
        self.num_clients, self.sizes = num_clients, {} if sizes is None else sizes
        self.nodes: dict[int, int] = {}
        self._said: dict[int, int] = {}  # node id -> partition id, in the order in which they were heard
        self._reason = "no client connected"

    def gather(self, grid: Grid, timeout: float) -> None:
        """Wait for the nodes before the first round.

        Args:
            grid: reaches the nodes.
            timeout: seconds to wait for them (at most 300).

        Raises:
            RunFailed: there is none.
        """
        deadline = time.monotonic() + min(timeout, 300)
        while True:
            self._ask(grid, grid.get_node_ids())
            for node, partition in self._said.items():
                if partition != REFUSED and self.nodes.setdefault(partition, node) != node:
                    self._refuse(node, f"client {partition} is node {self.nodes[partition]} already")
            if len(self._said) >= max(self.num_clients, 1) or time.monotonic() > deadline:
                if not self.nodes:
                    raise RunFailed(self._reason)
                self.nodes = dict(sorted(self.nodes.items()))
                return
            time.sleep(0.5)

    def update(self, grid: Grid) -> None:
        """Take in nodes that connected since: clients that were missing, and SuperNodes without a registered key that were started anew,
        which Flower takes for others. A client whose node is online keeps it; else it goes to the node that said first to hold it.
        """
        if hasattr(grid, "stream"):  # bayesfed's engines: all nodes are there from the start
            return
        online = set(grid.get_node_ids())
        if len(self.nodes) >= self.num_clients and online.issuperset(self.nodes.values()):
            return
        self._ask(grid, sorted(online))
        for node, partition in self._said.items():
            if partition != REFUSED and node in online and self.nodes.get(partition) not in online:
                log.warning("client %d is node %d from now on", partition, node)
                self.nodes[partition] = node

    def _ask(self, grid: Grid, nodes: Iterable[int]) -> None:
        """Hear from those of ``nodes`` that were not heard before."""
        ask = grid.send_and_receive if hasattr(grid, "stream") else partial(deliver, grid)
        messages = [
            Message(RecordDict(), node, MessageType.QUERY, group_id="roster")
            for node in nodes
            if node not in self._said
        ]
        for reply in ask(messages, timeout=60) if messages else ():
            node = reply.metadata.src_node_id
            if reply.has_error() and reply.error.code in AWAY:
                continue  # Flower's word for a node that is away; it may be back in a moment
            if reply.has_error():
                self._refuse(node, reply.error.reason or f"error {reply.error.code}")
                continue
            try:
                partition, size = _who(reply.content.get("client"), self.num_clients)
                _same_problem(reply.content.get("client"), self.shape, partition)
                if size and self.sizes.get(partition, size) != size and partition in self.nodes:
                    raise wire.BadMessage(f"client {partition} had {self.sizes[partition]} examples and now has {size}")
            except wire.BadMessage as error:
                self._refuse(node, str(error))
                continue
            self._said[node] = partition
            if size:
                self.sizes.setdefault(partition, size)

    def _refuse(self, node: int, reason: str) -> None:
        self._said[node], self._reason = REFUSED, reason
        log.warning("node %d is left out: %s", node, reason)


def _who(answer: object, num_clients: int) -> tuple[int, int]:
    """Partition id and number of examples (0 if not given) as a node says.

    Raises:
        BadMessage: a value is missing or out of range.
    """
    partition = int(wire.value(answer, "partition-id", int))
    if partition < 0 or (num_clients and partition >= num_clients):
        raise wire.BadMessage(f"value 'partition-id' is {partition}, there are {num_clients} clients")
    size = 0
    if isinstance(answer, ConfigRecord) and "num-examples" in answer:
        size = int(wire.value(answer, "num-examples", int))
        if not 1 <= size <= 10**15:
            raise wire.BadMessage(f"value 'num-examples' is {size}, out of range")
    return partition, size


def _same_problem(answer: object, shape: Mapping[str, int], partition: int) -> None:
    """Compare a node's numbers of features and outputs with the federation's, where it gives them.

    Raises:
        BadMessage: they differ.
    """
    for name, ours in shape.items():
        if isinstance(answer, ConfigRecord) and name in answer and (theirs := wire.value(answer, name, int)) != ours:
            fix = "; data.classes says how many classes there are, for all" if name == "outputs" else ""
            raise wire.BadMessage(
                f"the data of client {partition} have {theirs} {name}, the federation has {ours}{fix}"
            )
