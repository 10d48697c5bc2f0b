"""Which node holds which partition."""

from __future__ import annotations

import time
from functools import partial
from logging import getLogger

from flwr.app import ConfigRecord, Message, MessageType, RecordDict
from flwr.serverapp import Grid

from bayesfed import wire
from bayesfed.engine.flower_version import AWAY
from bayesfed.errors import RunFailed
from strategies.delivery import deliver

log = getLogger("bayesfed")


def roster(grid: Grid, num_clients: int, timeout: float, sizes: dict[int, int] | None = None) -> dict[int, int]:
    """Partition id -> node id. Flower's node ids are random, so every node is asked once which partition it holds.

    Args:
        grid: reaches the nodes.
        num_clients: how many there should be.
        timeout: seconds to wait for them (at most 300).
        sizes: gets the number of examples each partition has, as its node says.
    """
    deadline = time.monotonic() + min(timeout, 300)
    ask = grid.send_and_receive if hasattr(grid, "stream") else partial(deliver, grid)
    nodes: dict[int, int] = {}
    refused: dict[int, str] = {}
    while True:
        known = {*nodes.values(), *refused}
        new = [node for node in grid.get_node_ids() if node not in known]
        messages = [Message(RecordDict(), node, MessageType.QUERY, group_id="roster") for node in new]
        for reply in ask(messages, timeout=60) if messages else ():
            if reply.has_error() and reply.error.code in AWAY:
                continue  # Flower's word for a node that is away; it may be back in a moment
            if reply.has_error():
                refused[reply.metadata.src_node_id] = reply.error.reason or f"error {reply.error.code}"
                log.warning("node %d did not say who it is: %s", *list(refused.items())[-1])
                continue
            try:
                partition, size = _who(reply.content.get("client"), num_clients)
                if partition in nodes:
                    raise wire.BadMessage(f"client {partition} is node {nodes[partition]} already")
            except wire.BadMessage as error:
                refused[reply.metadata.src_node_id] = str(error)
                log.warning("node %d is left out: %s", *list(refused.items())[-1])
                continue
            nodes[partition] = reply.metadata.src_node_id
            if sizes is not None and size:
                sizes[partition] = size
        if len(nodes) + len(refused) >= max(num_clients, 1) or time.monotonic() > deadline:
            if not nodes:
                raise RunFailed(next(iter(refused.values()), "no client connected"))
            return dict(sorted(nodes.items()))
        time.sleep(0.5)


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
