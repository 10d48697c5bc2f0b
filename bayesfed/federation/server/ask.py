"""Questions to all clients: each starts from the server's posterior, answers in numbers, and nothing changes."""

from __future__ import annotations

import copy
from collections.abc import Mapping
from logging import getLogger
from typing import Any

from flwr.app import ConfigRecord, Message, MessageType, MetricRecord, RecordDict
from flwr.serverapp import Grid

from bayesfed import wire
from bayesfed.federation.server.reading import numbers
from bayesfed.federation.server.replies import in_order
from bayesfed.federation.server.strategy import FederatedStrategy
from bayesfed.wire.flower_version import reason

log = getLogger("bayesfed")


def ask(
    strategy: FederatedStrategy[Any],
    grid: Grid,
    server_round: int,
    question: str,
    parameters: Mapping[str, int | float],
) -> dict[int, dict[str, float]]:
    """Ask every client a question of :mod:`bayesfed.federation.client.questions`, by its name.

    The messages are those of round ``server_round + 1`` with all clients taking part and all of their steps, at the
    learning rate of ``server_round``, but of type EVALUATE: clients reply with numbers only and change no state. Here
    the messages are made by a copy of the strategy, so that nothing changes either, whatever a subclass does in
    ``configure_train``; the copy takes as much memory as the strategy's vectors.

    Args:
        strategy: after its last round.
        grid: reaches the clients.
        server_round: the last round.
        question: its name.
        parameters: of the question.

    Returns:
        Per client that answered, its numbers; the others are named in the log.
    """
    strategy.connect(grid)
    asking = copy.copy(strategy)
    asking.callbacks, asking.fates, asking.fraction = None, None, 1.0
    factor = strategy.lr_factor(max(server_round, 1))
    asking.lr_factor = lambda round: factor
    asking = copy.deepcopy(asking)
    arrays = wire.pack(asking.posterior.arrays())
    asked = ConfigRecord({"name": question, **parameters})
    messages = [
        Message(
            RecordDict({**dict(m.content.items()), "question": asked}),
            m.metadata.dst_node_id, MessageType.EVALUATE, group_id=m.metadata.group_id,
        )
        for m in asking.configure_train(server_round + 1, arrays, ConfigRecord(), grid)
    ]  # fmt: skip
    answers: dict[int, dict[str, float]] = {}
    for client, reply in in_order(asking.round.sampled, grid.send_and_receive(messages, timeout=strategy.timeout)):
        try:
            record = None if reply is None or reply.has_error() else reply.content.get("metrics")
            if not isinstance(record, MetricRecord):
                raise wire.BadMessage(reason(reply) if reply is not None and reply.has_error() else "no reply")
            answers[client] = {k: v for k, v in numbers(record).items() if k != "round"}
        except wire.BadMessage as error:
            log.warning("client %d did not answer '%s': %s", client, question, error)
    return answers
