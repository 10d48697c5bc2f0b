"""Flower's own aggregation inside bayesfed's loop: seeded sampling, resume and all engines, the update from flwr."""

from __future__ import annotations

from abc import abstractmethod
from collections.abc import Iterator
from contextlib import contextmanager
from logging import WARNING, getLogger
from typing import Any, ClassVar

import numpy as np
import torch
from flwr.app import Array, ArrayRecord, Message, MessageType, MetricRecord, RecordDict
from torch import Tensor

from bayesfed.families import PointMass
from bayesfed.federation.server.strategy import Reply, Sent, Sums
from strategies.fedavg import FedAvg


class FlowerServer(FedAvg):
    """Base of strategies whose server step is that of a ``flwr.serverapp.strategy`` class.

    It is called with Flower's messages in float64. Subclasses give the strategy in :meth:`flower`; clients are
    FedAvg's.
    """

    @abstractmethod
    def flower(self) -> Any:
        """A new flwr strategy with these settings."""

    def prepare(self, initial: Tensor) -> None:
        """The server starts at the network initialisation."""
        super().prepare(initial)
        self.round_number = 0
        self.server: Any = self.flower()

    def aggregate(self, replies: list[tuple[Tensor, int]]) -> Tensor:
        """What flwr makes of these weights (P,) float64 with their numbers of examples."""
        messages = [self._message(*reply) for reply in replies]
        with _quiet():
            arrays, _ = self.server.aggregate_train(self.round_number, messages)
        return torch.from_numpy(np.array(arrays["mean"].numpy(), dtype=np.float64))

    @staticmethod
    def _message(weights: Tensor, num_examples: int) -> Message:
        content = RecordDict(
            {
                "arrays": ArrayRecord({"mean": Array(weights.numpy())}),
                "metrics": MetricRecord({"num-examples": num_examples}),
            }
        )
        return Message(content, 0, MessageType.TRAIN)


class FlowerOptimizer(FlowerServer):
    """A server optimizer of flwr's, which sees the weighted mean (streamed, O(P)) as its pseudo-gradient."""

    state_names: ClassVar[tuple[str, ...]] = ("m_t", "v_t")  # of the flwr object, each a dictionary of one array

    def combine(self, sums: Sums, sent: Sent[PointMass], replies: int) -> dict[str, float]:
        """flwr's step from the weights as they were sent to the weighted mean."""
        self.round_number += 1
        self._place(sent.mean)
        self.posterior = PointMass(self.aggregate([(sums["weighted"] / sums["examples"], 1)]).to(self.dtype))
        return {}

    def _place(self, weights: Tensor) -> None:
        """Tell flwr what was sent."""
        self.server.current_arrays = {"mean": weights.numpy()}

    def tensors(self) -> dict[str, Tensor]:
        """flwr's moments, and its count of rounds."""
        kept = {"round": torch.tensor(self.round_number, device="cpu")}
        for name in self.state_names:
            values = getattr(self.server, name)
            if values:
                kept[name] = torch.from_numpy(np.array(values["mean"] if isinstance(values, dict) else values[0]))
        return kept

    def load_tensors(self, tensors: dict[str, Tensor]) -> None:
        """Inverse of :meth:`tensors`."""
        self.round_number = int(tensors["round"])
        for name in self.state_names:
            if name in tensors:
                values = tensors[name].numpy()
                setattr(self.server, name, {"mean": values} if name.endswith("_t") else [values])


class FlowerRobust(FlowerServer):
    """A robust rule of flwr's, which has to see all replies at once: **O(K P) memory**, nothing summed in workers."""

    streams: ClassVar[bool] = False

    def empty(self) -> Sums:
        """Nothing is summed: every reply is a tensor of its own."""
        return {}

    def accumulate(self, sums: Sums, reply: Reply[PointMass]) -> dict[str, float]:
        """Keep the reply."""
        sums[str(len(sums))] = mean = reply.posterior.mean.to(torch.float64)
        return {"residual": float((mean - reply.sent.mean).norm())}

    def combine(self, sums: Sums, sent: Sent[PointMass], replies: int) -> dict[str, float]:
        """flwr's rule, which doesn't weight."""
        self.round_number += 1
        self.posterior = PointMass(self.aggregate([(mean, 1) for mean in sums.values()]).to(self.dtype))
        return {}


@contextmanager
def _quiet() -> Iterator[None]:
    """Keep Flower's line about every aggregation off the display."""
    logger = getLogger("flwr")
    before = logger.level
    logger.setLevel(WARNING)
    try:
        yield
    finally:
        logger.setLevel(before)
