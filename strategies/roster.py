"""Which node holds which partition."""

from __future__ import annotations

import time
from logging import getLogger

from flwr.app import Message, MessageType, RecordDict
from flwr.serverapp import Grid

from bayesfed import wire
from bayesfed.errors import RunFailed

log = getLogger("bayesfed")


def roster(grid: Grid, num_clients: int, timeout: float) -> dict[int, int]:
    """Partition id -> node id. Flower's node ids are random, so every node is asked once which partition it holds."""
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
            nodes[int(wire.value(reply.content.get("client"), "partition-id", int))] = reply.metadata.src_node_id
        if len(nodes) + len(refused) >= max(num_clients, 1) or time.monotonic() > deadline:
            if not nodes:
                raise RunFailed(next(iter(refused.values()), "no client connected"))
            return dict(sorted(nodes.items()))
        time.sleep(0.5)
