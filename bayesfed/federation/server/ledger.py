"""Which round's reply of a client the server has counted: a client goes on from its dual of exactly that round."""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from dataclasses import dataclass, field
from typing import Any


@dataclass
class Ledger:
    """Per partition id, the last round whose reply is in the server's sums (0 = none), in three states of the server.

    The server may fall back to its last checkpoint, or to the one before if the last is damaged; clients keep the duals
    of all three rounds (see :mod:`bayesfed.federation.client.sites`), and every message tells them which.

    Attributes:
        accepted: now.
        durable: as of the last checkpoint.
        older: as of the checkpoint before that.
    """

    accepted: dict[int, int] = field(default_factory=dict)
    durable: dict[int, int] = field(default_factory=dict)
    older: dict[int, int] = field(default_factory=dict)

    def accept(self, clients: Iterable[int], round: int) -> None:
        """The replies of ``clients`` in ``round`` are in the sums."""
        self.accepted.update(dict.fromkeys(clients, round))

    def rounds(self, client: int) -> dict[str, int]:
        """What a message tells a client: ``accepted``, ``durable`` and ``older``."""
        return {name: rounds.get(client, 0) for name, rounds in vars(self).items()}

    def state(self) -> dict[str, Any]:
        """What a checkpoint holds of it."""
        return {"accepted": dict(self.accepted), "durable": dict(self.durable)}

    def saved(self) -> None:
        """A checkpoint of the present :meth:`state` is on the disk."""
        self.older, self.durable = self.durable, dict(self.accepted)

    def load(self, state: Mapping[str, Any]) -> None:
        """Take up a checkpoint's :meth:`state`, as JSON gives it; the oldest checkpoints have no ``durable``."""
        self.accepted = {int(client): round for client, round in state["accepted"].items()}
        self.durable = dict(self.accepted)
        older = state.get("durable", state["accepted"])
        self.older = {int(client): round for client, round in older.items()}
