"""The messages of a round: the posterior, what the method adds to it, and each client's place in the ledger."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from typing import Any

from flwr.app import ArrayRecord, ConfigRecord, Message, MessageType, RecordDict
from torch import Tensor

from bayesfed import wire
from bayesfed.errors import RunFailed
from bayesfed.federation.server.ledger import Ledger
from bayesfed.system import Fate
from bayesfed.wire.size import record_bytes


def train_messages(
    round: int,
    records: Mapping[str, ArrayRecord],
    settings: Mapping[str, Any],
    nodes: Mapping[int, int],
    ledger: Ledger,
    fates: Mapping[int, Fate],
) -> Iterator[tuple[int, Message, int]]:
    """A TRAIN message for each client of ``nodes`` (partition id -> node), with its client and its bytes.

    Args:
        round: from 1.
        records: arrays for all of them.
        settings: plain values for all of them.
        nodes: who is asked.
        ledger: which of its rounds counted, for each client.
        fates: simulated stragglers do a part of their steps.
    """
    size = sum(record_bytes(name, record) for name, record in records.items())
    methods: dict[tuple[float, ...], tuple[ConfigRecord, int]] = {}  # most clients get the same record
    for client, node in nodes.items():
        own: dict[str, float] = {**ledger.rounds(client)}
        if client in fates and fates[client].work < 1:
            own["work"] = fates[client].work
        key = tuple(own.values())
        if key not in methods:
            record = ConfigRecord({**settings, "round": round, **own})
            methods[key] = record, size + record_bytes("method", record)
        record, total = methods[key]
        yield (
            client,
            Message(RecordDict({**records, "method": record}), node, MessageType.TRAIN, group_id=str(round)),
            total,
        )


def encoded(codec: wire.Codec, arrays: Mapping[str, Tensor], round: int) -> tuple[ArrayRecord, dict[str, Tensor]]:
    """Arrays as they travel, and what they decode to.

    Raises:
        RunFailed: they can't.
    """
    try:
        return codec.encode(arrays)
    except ValueError as error:
        raise RunFailed(f"round {round}: the server's {error}") from error
