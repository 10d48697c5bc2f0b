"""Clients one after the other in this process: no start-up, debuggers work."""

from __future__ import annotations

import time
from collections.abc import Iterable, Iterator
from typing import TYPE_CHECKING

from flwr.app import Context, Message
from flwr.clientapp import ClientApp

from bayesfed.engine.batching import batch_of, groups
from bayesfed.engine.grid import LocalGrid
from bayesfed.errors import integer
from bayesfed.wire.flower_version import error_reply, node_context

if TYPE_CHECKING:
    from bayesfed.runs.session import Session


class InlineGrid(LocalGrid):
    """Calls the ClientApp directly.

    Args:
        app: what serves the messages.
        num_clients: number of nodes.
        clients_per_batch: TRAIN messages given to ``app.train_many`` at once, if it has that.
    """

    def __init__(self, app: ClientApp, num_clients: int, clients_per_batch: int = 1):
        super().__init__(num_clients)
        self.app, self.clients_per_batch = app, clients_per_batch
        self._contexts: dict[int, Context] = {}

    def stream(self, messages: Iterable[Message], *, timeout: float | None = None) -> Iterator[Message]:
        deadline = None if timeout is None else time.monotonic() + timeout
        for group in groups(messages, self.clients_per_batch):
            if deadline is not None and time.monotonic() > deadline:
                return
            yield from self._serve(group)

    def _serve(self, group: list[Message]) -> Iterator[Message]:
        contexts = [self._context(message.metadata.dst_node_id) for message in group]
        train_many = getattr(self.app, "train_many", None)
        if len(group) > 1 and train_many is not None:
            yield from train_many(group, contexts)
            return
        for message, context in zip(group, contexts, strict=True):
            try:
                yield self.app(message, context)
            except Exception as error:  # whatever a client raises is that client's failure
                yield error_reply(message, error)

    def _context(self, node: int) -> Context:
        return self._contexts.setdefault(node, node_context(node, node - 1, self.num_clients))


class InlineEngine:
    """``engine=inline``. ``num_workers``, ``num_gpus`` and ``address`` mean nothing here and are accepted so that one
    command line can switch engines.

    Args:
        clients_per_batch: clients trained side by side; None chooses (:mod:`bayesfed.engine.batching`).

    Raises:
        InputError: ``clients_per_batch`` is not a whole number of at least 1.
    """

    def __init__(
        self,
        num_workers: int | None = None,
        num_gpus: float = 0.0,
        address: str | None = None,
        clients_per_batch: int | None = None,
    ):
        integer("clients_per_batch", clients_per_batch, at_least=1, optional=True)
        self.clients_per_batch = clients_per_batch

    def run(self, session: Session) -> None:
        """Run ``session`` to its end."""
        size = batch_of(session, self.clients_per_batch)
        grid = InlineGrid(session.client_app(), session.num_clients, size)
        session.server_app()(grid, node_context(0, 0, session.num_clients))
