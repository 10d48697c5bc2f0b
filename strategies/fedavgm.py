"""Flower's FedAvg with server momentum."""

from __future__ import annotations

from typing import Any, ClassVar

from flwr.app import Array, ArrayRecord
from flwr.serverapp import strategy as flower
from torch import Tensor

from bayesfed.errors import number
from strategies.flower_server import FlowerOptimizer


class FedAvgM(FlowerOptimizer):
    r"""FedAvgM (Hsu et al. 2019) as in ``flwr.serverapp.strategy.FedAvgM``. With ``d = w_g - weighted mean of w_k``:

        server   u = momentum u + d,   w_g -= server_lr u

    Clients are FedAvg's. No duals, no client state. P numbers each way. Momentum 0 and ``server_lr`` 1 are FedAvg.

    Args:
        server_lr: step on the server.
        momentum: in [0, 1).
        fraction, min_replies, timeout: see :class:`FederatedStrategy`.

    Raises:
        InputError: a value out of range.
    """

    name: str = "fedavgm"
    state: ClassVar[tuple[str, ...]] = ("momentum_vector",)

    def __init__(
        self,
        server_lr: float = 1.0,
        momentum: float = 0.9,
        fraction: float = 1.0,
        min_replies: int = 1,
        timeout: float = 86400.0,
    ):
        super().__init__(fraction=fraction, min_replies=min_replies, timeout=timeout)
        number("server_lr", server_lr, above=0)
        number("momentum", momentum, at_least=0, at_most=1 - 1e-9)
        self.server_lr, self.momentum = float(server_lr), float(momentum)

    def flower(self) -> Any:
        """flwr's FedAvgM."""
        return flower.FedAvgM(server_learning_rate=self.server_lr, server_momentum=self.momentum)

    def _place(self, weights: Tensor) -> None:
        self.server.current_arrays = ArrayRecord({"mean": Array(weights.numpy())})
