"""Clients one after the other in this process: no start-up, debuggers work."""

from __future__ import annotations

import time
from collections.abc import Iterable, Iterator
from typing import TYPE_CHECKING

from flwr.app import Context, Message
from flwr.clientapp import ClientApp

from bayesfed.engine.flower_version import error_reply, node_context
from bayesfed.engine.grid import LocalGrid

if TYPE_CHECKING:
    from bayesfed.runs.session import Session


class InlineGrid(LocalGrid):
    """Calls the ClientApp directly."""

    def __init__(self, app: ClientApp, num_clients: int):
        super().__init__(num_clients)
        self.app = app
        self._contexts: dict[int, Context] = {}

    def stream(self, messages: Iterable[Message], *, timeout: float | None = None) -> Iterator[Message]:
        deadline = None if timeout is None else time.monotonic() + timeout
        for message in messages:
            if deadline is not None and time.monotonic() > deadline:
                return
            node = message.metadata.dst_node_id
            context = self._contexts.setdefault(node, node_context(node, node - 1, self.num_clients))
            try:
                yield self.app(message, context)
            except Exception as error:  # whatever a client raises is that client's failure
                yield error_reply(message, error)


class InlineEngine:
    """``engine=inline``. ``num_workers``, ``num_gpus`` and ``address`` mean nothing here and are accepted so that one
    command line can switch engines."""

    def __init__(self, num_workers: int | None = None, num_gpus: float = 0.0, address: str | None = None):
        pass

    def run(self, session: Session) -> None:
        """Run ``session`` to its end."""
        grid = InlineGrid(session.client_app(), session.num_clients)
        session.server_app()(grid, node_context(0, 0, session.num_clients))
