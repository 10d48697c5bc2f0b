"""What a client's answer holds, checked before any state changes."""

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import Generic, cast

import torch
from flwr.app import Message, MetricRecord
from torch import Tensor

from bayesfed import wire
from bayesfed.families import ExponentialFamily, PointMass
from bayesfed.families.natural import all_finite
from bayesfed.federation.server.limits import Limits
from bayesfed.federation.server.round import Posterior, Sent
from bayesfed.foreign import plain_text
from bayesfed.wire.flower_version import raised, reason
from bayesfed.wire.size import message_bytes

MOST_EXAMPLES = 10**15  # of one client: sums of such numbers stay exact in float64
MOST_METRICS, LONGEST_NAME = 500, 80  # of a reply: names are a stranger's text, and kept for every client and round
OURS = ("accepted", "reason")  # what the server says of a reply, in the same line of clients.jsonl


@dataclass(frozen=True)
class Reply(Generic[Posterior]):
    """A client's answer, checked.

    Attributes:
        posterior: on the CPU; an exponential family in float64, a point as it travelled (not to be written to: it may
            be the message's memory).
        num_examples: ``N_k``.
        metrics: numbers the client sent.
        extra: the vectors (P,) named in ``FederatedStrategy.received``, float64.
        sent: what the client got.
    """

    posterior: Posterior
    num_examples: int
    metrics: dict[str, float]
    extra: dict[str, Tensor]
    sent: Sent[Posterior]

    def metric(self, name: str) -> float:
        """A number the method can't do without.

        Raises:
            wire.BadMessage: it is missing, not finite or not positive.
        """
        value = self.metrics.get(name)
        if value is None or not 0 < value < float("inf"):
            raise wire.BadMessage(
                f"metric '{name}' is {value}, expected a positive number; not every client reports it"
            )
        return value


@dataclass(frozen=True)
class Read(Generic[Posterior]):
    """What was read: the metrics, and the reply or, if it was summed where its client runs, the sums of its group."""

    metrics: dict[str, float]
    reply: Reply[Posterior] | None
    sums: object = None

    @property
    def posterior(self) -> Posterior | None:
        """The client's, if it is here."""
        return None if self.reply is None else self.reply.posterior


def numbers(record: MetricRecord) -> dict[str, float]:
    """The numbers of a record under printable names.

    Raises:
        wire.BadMessage: more of them than any client reports.
    """
    if len(record) > MOST_METRICS:
        raise wire.BadMessage(f"{len(record):,} metrics, at most {MOST_METRICS} are taken")
    return {plain_text(name, LONGEST_NAME): value for name, value in record.items() if isinstance(value, int | float)}


class Reader(Generic[Posterior]):
    """Reads answers; what is wrong with one is a ``wire.BadMessage``, and nothing else is ever raised.

    Args:
        family: of the posteriors.
        codec: how posteriors travel.
        extra: how the further vectors travel; of none, if there are none.
        limits: bounds on sizes and values.
    """

    def __init__(self, family: type[Posterior], codec: wire.Codec, extra: wire.Codec, limits: Limits):
        self.family, self.codec, self.extra, self.limits = family, codec, extra, limits
        shapes = (*codec.shapes.values(), *extra.shapes.values())
        self._array_bytes = sum(map(math.prod, shapes)) * codec.dtype.itemsize

    def checked(
        self, reply: Message, server_round: int, client: int | None, sent: Sent[Posterior], folds: bool
    ) -> Read[Posterior]:
        """The whole answer, or a group's sums where a grid ``folds``; arguments as below.

        Raises:
            wire.BadMessage: what is wrong, or why there is none; ``wire.Diverged`` if numbers ran away.
        """
        if reply.has_error():
            kind = wire.Diverged if raised(reply, wire.Diverged) else wire.BadMessage
            raise kind(reason(reply))
        folded = folds and "posterior" not in reply.content
        if folded and "refused" in reply.content:
            record = reply.content["refused"]
            kind = wire.Diverged if wire.value(record, "diverged", bool) else wire.BadMessage
            raise kind(wire.value(record, "reason", str))
        if not folded and "posterior" not in reply.content:
            raise wire.BadMessage(f"expected arrays {sorted(self.codec.shapes)}, got NoneType")
        metrics = self.metrics(reply, server_round, client)
        if folded:
            return Read(metrics, None, reply.content.get("sums"))
        return Read(metrics, self.read(reply, metrics, sent))

    def metrics(self, reply: Message, server_round: int, client: int | None = None) -> dict[str, float]:
        """The numbers of an answer to this round's message (those that are not finite are left out).

        Args:
            reply: what arrived.
            server_round: the round it must be of.
            client: the client it must be of, if it says so; None = any.

        Raises:
            wire.BadMessage: there are none, they are of another round or client, or the number of examples is none.
        """
        record = reply.content.get("metrics")
        if not isinstance(record, MetricRecord):
            raise wire.BadMessage("metrics are missing")
        found = numbers(record)
        if found.get("round") != server_round:
            raise wire.BadMessage(f"reply is of round {found.get('round')}")
        if client is not None and found.get("client", client) != client:
            raise wire.BadMessage(f"reply is of client {found['client']}; was its node started anew as another client?")
        if not 1 <= found.get("num-examples", 0) <= MOST_EXAMPLES:
            raise wire.BadMessage(f"num-examples is {found.get('num-examples')}")
        return {name: value for name, value in found.items() if math.isfinite(value) and name not in OURS}

    def read(self, reply: Message, metrics: dict[str, float], sent: Sent[Posterior]) -> Reply[Posterior]:
        """The whole answer: size, names, shapes, dtypes, finite, positive, within limits.

        Args:
            reply: what arrived.
            metrics: its :meth:`metrics`.
            sent: what the message brought to the client.

        Raises:
            wire.BadMessage: what is wrong; ``wire.Diverged`` if a value is not finite or beyond the limits.
        """
        self._check_size(message_bytes(reply))
        wide = (
            torch.float64 if issubclass(self.family, ExponentialFamily) else None
        )  # points are only added: no copy is needed
        arrays = self.codec.decode(reply.content.get("posterior"), sent.posterior.arrays(), to=wide, copy=False)
        try:
            posterior = cast(Posterior, self.family.from_arrays(arrays))
        except ValueError as error:
            kind = wire.BadMessage if all(map(all_finite, arrays.values())) else wire.Diverged
            raise kind(str(error)) from error
        self._check_values(posterior)
        extra: dict[str, Tensor] = {}
        if self.extra.shapes:
            extra = self.extra.decode(reply.content.get("extra"), to=torch.float64)
            for name, vector in extra.items():
                if not all_finite(vector):
                    raise wire.Diverged(f"array '{name}' is not finite")
        return Reply(posterior, int(metrics["num-examples"]), metrics, extra, sent)

    def _check_size(self, size: int) -> None:
        most = self.limits.reply_bytes or 2 * self._array_bytes + (1 << 20)
        if size > most:
            raise wire.BadMessage(f"the reply has {size:,} bytes, at most {most:,} are taken (limits.reply_bytes)")

    def _check_values(self, posterior: ExponentialFamily | PointMass) -> None:
        limits = self.limits
        norm = float(torch.linalg.vector_norm(posterior.mean))
        if not norm <= limits.mean_norm:  # float32 may have overflowed
            norm = float(torch.linalg.vector_norm(posterior.mean, dtype=torch.float64))
        if not norm <= limits.mean_norm:
            raise wire.Diverged(f"the mean has norm {norm:g}, limits.mean_norm={limits.mean_norm:g}")
        if isinstance(posterior, ExponentialFamily):
            largest = float(posterior.precision.max())  # of a positive definite matrix, too: it is on the diagonal
            if not largest <= limits.precision:
                raise wire.Diverged(f"a precision is {largest:g}, limits.precision={limits.precision:g}")
