"""What bayesfed's own grids share."""

from __future__ import annotations

from abc import abstractmethod
from collections.abc import Iterable, Iterator
from typing import Any

from flwr.app import Message, RecordDict
from flwr.serverapp import Grid

from bayesfed.wire.flower_version import set_identity


class LocalGrid(Grid):
    """A Flower ``Grid`` over simulated clients: node id = partition id + 1.

    Beyond Flower's interface it has :meth:`stream`, which yields replies as they come.

    Args:
        num_clients: number of nodes.
    """

    def __init__(self, num_clients: int):
        set_identity()
        self.num_clients = num_clients
        self._run: Any = None
        self._replies: dict[str, Message] = {}
        self._next = 0

    @abstractmethod
    def stream(self, messages: Iterable[Message], *, timeout: float | None = None) -> Iterator[Message]:
        """Deliver ``messages``, yield the replies in the order of completion until all are in or ``timeout`` seconds
        passed."""

    def send_and_receive(self, messages: Iterable[Message], *, timeout: float | None = None) -> Iterable[Message]:
        """All replies, as a list."""
        return list(self.stream(messages, timeout=timeout))

    def get_node_ids(self) -> Iterable[int]:
        """1 ... num_clients."""
        return range(1, self.num_clients + 1)

    def push_messages(self, messages: Iterable[Message]) -> Iterable[str]:
        """Deliver and keep the replies for :meth:`pull_messages`."""
        ids = []
        for reply in self.stream(messages):
            self._next += 1
            ids.append(str(self._next))
            self._replies[ids[-1]] = reply
        return ids

    def pull_messages(self, message_ids: Iterable[str]) -> Iterable[Message]:
        """Replies of pushed messages; each can be had once."""
        return [self._replies.pop(i) for i in message_ids if i in self._replies]

    def create_message(
        self, content: RecordDict, message_type: str, dst_node_id: int, group_id: str, ttl: float | None = None
    ) -> Message:
        """A message to a node."""
        return Message(content, dst_node_id, message_type, group_id=group_id, ttl=ttl)

    def set_run(self, run: Any) -> None:
        """Kept for Flower's interface."""
        self._run = run

    @property
    def run(self) -> Any:
        """What :meth:`set_run` was given."""
        return self._run
