"""Which node holds which partition."""

from __future__ import annotations

import time
from logging import getLogger

from flwr.app import ConfigRecord, Message, MessageType, RecordDict
from flwr.serverapp import Grid

from bayesfed import wire
from bayesfed.errors import RunFailed

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
    nodes: dict[int, int] = {}
    refused: dict[int, str] = {}
    while True:
        known = {*nodes.values(), *refused}
        new = [node for node in grid.get_node_ids() if node not in known]
        messages = [Message(RecordDict(), node, MessageType.QUERY, group_id="roster") for node in new]
        for reply in grid.send_and_receive(messages, timeout=60) if messages else ():
            if reply.has_error():
                refused[reply.metadata.src_node_id] = reply.error.reason or f"error {reply.error.code}"
                log.warning("node %d did not say who it is: %s", *list(refused.items())[-1])
                continue
            answer = reply.content.get("client")
            partition = int(wire.value(answer, "partition-id", int))
            nodes[partition] = reply.metadata.src_node_id
            if sizes is not None and isinstance(answer, ConfigRecord) and "num-examples" in answer:
                sizes[partition] = int(wire.value(answer, "num-examples", int))
        if len(nodes) + len(refused) >= max(num_clients, 1) or time.monotonic() > deadline:
            if not nodes:
                raise RunFailed(next(iter(refused.values()), "no client connected"))
            return dict(sorted(nodes.items()))
        time.sleep(0.5)
