"""What a message asks of a client: its plain values, checked, and the local problem they pose."""

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import Any

from flwr.app import ConfigRecord, Message

from bayesfed import wire
from bayesfed.federation import duals
from bayesfed.federation.client.memory import Memory
from bayesfed.federation.client.sites import Record
from bayesfed.federation.local import LocalProblem, Posterior


@dataclass(frozen=True)
class LocalSettings:
    """The plain values of a message.

    Attributes:
        name: strategy that sent it; must be the one this client is configured for.
        round: communication round, from 1.
        accepted: last round in which the server accepted this client's reply; 0 = never.
        durable: the same, as of the server's last checkpoint.
        older: the same, as of the checkpoint before that.
        rho, damping, temperature, proximal, learn_precision: of the local problem and the dual step.
        lr_factor: learning-rate schedule at this round.
        dual: what the dual moves along, see :func:`bayesfed.federation.duals.coordinates`.
        size_scale: weight of the *summed* loss of point estimates; 0: the mean loss has weight 1.
        work: share of its local steps that the client does, see :class:`bayesfed.system.System`.
    """

    name: str
    round: int
    accepted: int
    durable: int
    rho: float
    damping: float
    temperature: float
    proximal: float
    learn_precision: bool
    lr_factor: float
    dual: str = "natural"
    size_scale: float = 0.0
    work: float = 1.0
    older: int = 0

    @classmethod
    def parse(cls, record: object, name: str) -> LocalSettings:
        """Read and check the values of a message to clients of the strategy called ``name``.

        Raises:
            wire.BadMessage: a value is missing, of the wrong type or out of range, or the message is another
                strategy's.
        """
        kinds = {"str": str, "int": int, "float": float, "bool": bool}
        sent = record if isinstance(record, ConfigRecord) else {}
        values: dict[str, Any] = {
            n: getattr(cls, n) if hasattr(cls, n) and n not in sent else wire.value(record, n, kinds[str(kind)])
            for n, kind in cls.__annotations__.items()
        }
        own = cls(**values)
        ranges = {
            "round": own.round >= 1,
            "accepted": 0 <= own.accepted < own.round,
            "durable": 0 <= own.durable <= own.accepted,
            "older": 0 <= own.older <= own.durable,
            "rho": math.isfinite(own.rho) and own.rho >= 0,
            "damping": 0 <= own.damping <= 1,
            "temperature": math.isfinite(own.temperature) and own.temperature > 0,
            "proximal": math.isfinite(own.proximal) and own.proximal >= 0,
            "lr_factor": math.isfinite(own.lr_factor) and own.lr_factor >= 0,
            "dual": own.dual in duals.KINDS,
            "size_scale": math.isfinite(own.size_scale) and own.size_scale >= 0,
            "work": 0 < own.work <= 1,
        }
        for field, good in ranges.items():
            if not good:
                raise wire.BadMessage(f"value '{field}' is {getattr(own, field)!r}, out of range")
        if own.name != name:
            raise wire.BadMessage(f"this client is set up for strategy '{name}', the message is of '{own.name}'")
        return own


@dataclass(frozen=True)
class Assignment:
    """A message as a local problem.

    Attributes:
        message: to reply to.
        settings: its values.
        server: ``q_g`` as received, on the CPU.
        memory: what the client kept of its last accepted round.
        stateful: whether the client keeps a record of this round.
        problem: the problem to solve.
        values: all plain values of the message, for client halves that read more of them.
        vectors: the further vectors of the message, in the model's dtype, on the CPU.
    """

    message: Message
    settings: LocalSettings
    server: Posterior
    memory: Memory
    stateful: bool
    problem: LocalProblem
    values: ConfigRecord
    vectors: Record

    @property
    def state(self) -> Record:
        """What ``Trainer.settle`` kept in the client's last accepted round."""
        return self.memory.state
