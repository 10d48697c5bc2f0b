"""How many clients are trained side by side: ``engine.clients_per_batch``, and which ones.

Side by side a client's result agrees with that of one client alone to rounding, not to the bit, and the last bits
depend on the batch it was in. So batches are made of clients that follow each other in the order of partition ids,
before anything is known about workers; and nothing is batched unasked where runs are promised to be equal to the bit on
all engines: on a CPU with fewer than 64 clients in a round.
"""

from __future__ import annotations

from collections.abc import Iterable, Iterator
from typing import TYPE_CHECKING

import torch
from flwr.app import Message, MessageType

from bayesfed.app import device_of

if TYPE_CHECKING:
    from bayesfed.runs.session import Session

TOGETHER = 32
CPU_SAMPLED = 64  # clients in a round from which on batching starts by itself on a CPU
CPU_PARAMETERS = 10_000  # up to here 1.3 to 9 times as fast on one core (benchmarks/client_batching.py)
CUDA_NUMBERS = 128_000_000  # of parameters of all clients in a batch; a dozen such float32 arrays take 6 GB


def clients_per_batch(requested: int | None, device: torch.device, num_params: int, sampled: int) -> int:
    """The number of clients trained side by side.

    Args:
        requested: ``engine.clients_per_batch``; None chooses.
        device: where clients are trained.
        num_params: P.
        sampled: clients in a round.
    """
    if requested is not None:
        return min(requested, sampled)
    if device.type == "cuda":
        return max(1, min(TOGETHER, sampled, CUDA_NUMBERS // num_params))
    return TOGETHER if sampled >= CPU_SAMPLED and num_params <= CPU_PARAMETERS else 1


def batch_of(session: Session, requested: int | None, device: torch.device | None = None) -> int:
    """:func:`clients_per_batch` for a run: 1 if its solver has no way to batch.

    On a CPU, models with convolutions are batched on request only: with mini-batches of 128 they are slower side by
    side.

    Args:
        session: the run.
        requested: ``engine.clients_per_batch``.
        device: where clients are trained, if that is not this process's device.
    """
    device = device or device_of(session.config)
    convolves = any(p.dim() > 2 for p in session.model.parameters)
    if not session.solver.batches or (requested is None and convolves and device.type == "cpu"):
        return 1
    return clients_per_batch(requested, device, session.num_parameters, len(session.strategy.sample(1)))


def groups(messages: Iterable[Message], size: int) -> Iterator[list[Message]]:
    """TRAIN messages that follow each other, ``size`` at a time; any other message by itself."""
    group: list[Message] = []
    for message in messages:
        if message.metadata.message_type != MessageType.TRAIN:
            if group:
                yield group
            yield [message]
            group = []
            continue
        group.append(message)
        if len(group) >= size:
            yield group
            group = []
    if group:
        yield group
