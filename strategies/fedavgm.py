"""Flower's FedAvg with server momentum."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any, ClassVar

from flwr.app import Array, ArrayRecord
from flwr.serverapp import strategy as flower
from torch import Tensor

from bayesfed.settings import setting
from strategies.flower_server import FlowerOptimizer


@dataclass(kw_only=True, eq=False)
class FedAvgM(FlowerOptimizer):
    r"""FedAvgM (Hsu et al. 2019) as in ``flwr.serverapp.strategy.FedAvgM``. With ``d = w_g - weighted mean of w_k``:

        server   u = momentum u + d,   w_g -= server_lr u

    Clients are FedAvg's, no duals. Relation: momentum 0 and ``server_lr`` 1 are FedAvg. State: u on the server.
    Traffic: P numbers each way.

    Args:
        server_lr: step on the server.
        momentum: in [0, 1).

    Raises:
        InputError: a value out of range.
    """

    name = "fedavgm"
    state_names: ClassVar[tuple[str, ...]] = ("momentum_vector",)

    server_lr: float = setting(1.0, above=0)
    momentum: float = setting(0.9, at_least=0, at_most=1 - 1e-9)

    def flower(self) -> Any:
        """flwr's FedAvgM."""
        return flower.FedAvgM(server_learning_rate=self.server_lr, server_momentum=self.momentum)

    def _place(self, weights: Tensor) -> None:
        self.server.current_arrays = ArrayRecord({"mean": Array(weights.numpy())})
