"""What a client sends, and the place between its answer and the encoding."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass, field, replace

import torch
from flwr.app import ArrayRecord, RecordDict

from bayesfed import wire
from bayesfed.families import ExponentialFamily, PointMass
from bayesfed.federation.client.assignment import Assignment
from bayesfed.federation.client.sites import Record
from bayesfed.federation.local import Posterior


@dataclass(frozen=True)
class Contribution:
    """A client's answer on its way to the server.

    Attributes:
        posterior: what the server adds up.
        vectors: (P,) the further vectors that the method's client half names in ``returned``.
        metrics: numbers for the log.
    """

    posterior: Posterior
    vectors: Record = field(default_factory=dict)
    metrics: dict[str, float] = field(default_factory=dict)


# Clipping, noise, masking, compression: one after the other, for every method alike. What comes out is what leaves, and
# what the client's dual and state follow; so the server's sums agree with the clients' whatever stands here.
Transform = Callable[[Contribution, Assignment], Contribution]


class Narrow:
    """To the CPU and the dtype of the wire: the transform that every contribution ends with."""

    def __init__(self, dtype: torch.dtype):
        self.dtype = dtype

    def __call__(self, contribution: Contribution, assignment: Assignment) -> Contribution:
        """The same contribution in the wire's dtype."""
        vectors = {name: value.to(dtype=self.dtype, device="cpu") for name, value in contribution.vectors.items()}
        return replace(
            contribution, posterior=contribution.posterior.to(dtype=self.dtype, device="cpu"), vectors=vectors
        )


class Line:
    """How posteriors and further vectors of P entries travel between the server and a method's clients.

    Args:
        family: of the posteriors.
        dim: P.
        dtype: of the arrays, before and after.
        wire_format: see :class:`bayesfed.wire.Codec`.
        received, returned: names of the further vectors in messages and replies.
    """

    def __init__(
        self,
        family: type[ExponentialFamily] | type[PointMass],
        dim: int,
        dtype: torch.dtype,
        wire_format: str,
        received: tuple[str, ...],
        returned: tuple[str, ...],
    ):
        self.family = family
        self._posterior = wire.Codec(wire_format, family.array_shapes(dim), dtype)
        self._in, self._out = (
            wire.Codec(wire_format, dict.fromkeys(names, (dim,)), dtype) for names in (received, returned)
        )
        self._posterior_record: object = None
        self._vectors_record: object = None
        self._server: Posterior
        self._vectors: Record = {}

    def decode(self, content: RecordDict) -> tuple[Posterior, Record]:
        """``q_g`` and the further vectors of a message; once for all clients to which engines give one object.

        Raises:
            wire.BadMessage: what they hold is not what this client expects.
        """
        record = content.get("posterior")
        if record is None or record is not self._posterior_record:
            self._server = self.family.from_arrays(self._posterior.decode(record))
            self._posterior_record = record
        if self._in.shapes:
            record = content.get("extra")
            if record is None or record is not self._vectors_record:
                self._vectors = self._in.decode(record)
                self._vectors_record = record
        return self._server, self._vectors

    def encode(self, contribution: Contribution, server: Posterior) -> tuple[Mapping[str, ArrayRecord], Contribution]:
        """The records to send, and the contribution as the server will see it (and judge it).

        Raises:
            wire.BadMessage: an entry can't travel in this format.
        """
        arrays, values = self._posterior.encode(contribution.posterior.arrays(), server.arrays())
        records = {"posterior": arrays}
        vectors: Record = {}
        if self._out.shapes:
            records["extra"], vectors = self._out.encode(contribution.vectors)
        posterior = type(contribution.posterior)(**values)
        return records, replace(contribution, posterior=posterior, vectors=vectors)
