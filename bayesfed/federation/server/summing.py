"""From a client's reply to the sums over clients: on the server, or group by group where an engine's clients run."""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Sequence
from typing import Any, cast

import torch
from flwr.app import ArrayRecord, ConfigRecord, Message, MetricRecord, RecordDict

from bayesfed import wire
from bayesfed.errors import RunFailed
from bayesfed.federation.server.method import Method
from bayesfed.federation.server.reading import Read, Reader
from bayesfed.federation.server.replies import GroupSums, in_order
from bayesfed.federation.server.round import Posterior, Round, Sent
from bayesfed.metrics import plain_numbers
from bayesfed.profiling import span, timed
from bayesfed.wire.size import message_bytes


class Summing(Method[Posterior]):
    """A method whose clients' replies are read, checked and added up.

    Attributes:
        codec: how posteriors travel.
        reader: checks replies.
        round: the one under way, or the last.
    """

    codec: wire.Codec
    reader: Reader[Posterior]
    round: Round[Posterior]
    _folding: tuple[ArrayRecord, Sent[Posterior]] | None = None  # the message a fold was last prepared for

    def fold(self, messages: Sequence[Message], replies: Sequence[Message]) -> list[Message]:
        """Sum the replies of a group to ``messages`` where they were made, as the server would.

        Returns:
            One reply per client: its numbers, or why it is refused, without its posterior. The first that is not
            refused also holds the sums over the group.
        """
        record = cast(ArrayRecord, messages[0].content["posterior"])
        if self._folding is None or record is not self._folding[0]:
            posterior = type(self.posterior).from_arrays(self.codec.decode(record))
            self._folding = record, Sent(cast(Posterior, posterior))
        server_round = wire.value(messages[0].content["method"], "round", int)
        sums, first = GroupSums(self.empty), None
        for reply in replies:
            if reply.has_error():
                continue
            size = message_bytes(reply)
            try:
                metrics = self.absorb(sums, self.read(reply, server_round, self._folding[1]), server_round)
            except ValueError as error:  # wire.BadMessage, or what a method can't add
                refused = ConfigRecord(
                    {"reason": str(error), "diverged": isinstance(error, wire.Diverged), "bytes": size}
                )
                reply.content = RecordDict({"refused": refused})
            else:
                reply.content = RecordDict({"metrics": MetricRecord({**metrics, "bytes": size})})
                first = first or reply
        if first is not None:
            first.content["sums"] = wire.pack(sums.total)
        return list(replies)

    def _counted(self, replies: Iterable[Message]) -> Iterator[Message]:
        """The replies, with their size added to the round's bytes: whatever becomes of them, they were sent."""
        for reply in replies:
            counted: Any = 0
            if self.round.folds and not reply.has_error() and "posterior" not in reply.content:  # by the worker
                counted = next((record["bytes"] for record in reply.content.values() if "bytes" in record), 0)
            self.round.up += counted or message_bytes(reply)
            yield reply

    def read_all(self, replies: Iterable[Message]) -> Iterator[tuple[int, Read[Posterior] | ValueError]]:
        """Clients in order, with their checked replies or what is wrong with them."""
        round = self.round
        for client, reply in in_order(round.sampled, self._counted(replies)):
            try:
                if reply is None:
                    raise wire.BadMessage("no reply before the timeout")
                read = self.read(reply, round.number, round.sent, client, round.folds)
                round.outliers.check_examples(client, read.metrics["num-examples"])
            except ValueError as error:
                yield client, error
            else:
                yield client, read

    @timed("read")
    def read(
        self, reply: Message, server_round: int, sent: Sent[Posterior], client: int | None = None, folds: bool = False
    ) -> Read[Posterior]:
        """A reply (of ``client``), checked: see :meth:`bayesfed.federation.server.reading.Reader.checked`."""
        return self.reader.checked(reply, server_round, client, sent, folds)

    def absorb(self, sums: GroupSums, read: Read[Posterior], server_round: int) -> dict[str, float]:
        """Add a reply to ``sums``; its metrics and the method's.

        Raises:
            ValueError: what the method can't add (``wire.BadMessage``).
            RunFailed: the method's numbers are none.
        """
        if read.reply is not None:
            with span("accumulate"):
                added = self.accumulate(sums.group, read.reply)
            try:
                return read.metrics | plain_numbers(added, f"{type(self).__name__}.accumulate")
            except ValueError as error:  # the method's fault, and its sums have the reply already
                raise RunFailed(f"round {server_round}: {error}") from error
        if read.sums is not None:  # of its whole group, checked and made by this run's own worker
            shapes = {name: tuple(value.shape) for name, value in sums.total.items()}
            sums.add_whole(wire.unpack(read.sums, shapes, torch.float64, copy=False))
        return read.metrics
