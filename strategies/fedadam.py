"""Flower's FedAdam server optimizer."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

from flwr.serverapp import strategy as flower

from bayesfed.settings import setting
from strategies.flower_server import FlowerOptimizer


@dataclass(kw_only=True, eq=False)
class FedAdam(FlowerOptimizer):
    r"""FedAdam (Reddi et al., ICLR 2021) as in ``flwr.serverapp.strategy.FedAdam``.

    With ``d = weighted mean of w_k - w_g``:

        server   m = beta1 m + (1 - beta1) d,   v = beta2 v + (1 - beta2) d^2
                 w_g += server_lr sqrt(1 - beta2^(t+1))/(1 - beta1^(t+1)) m / (sqrt(v) + tau)

    Clients are FedAvg's, no duals. State: m and v on the server. Traffic: P numbers each way.

    Args:
        server_lr: eta.
        beta1: rate of m, in [0, 1).
        beta2: rate of v, in [0, 1).
        tau: adaptivity; large values make the steps proportional to m.

    Raises:
        InputError: a value out of range.
    """

    name = "fedadam"

    server_lr: float = setting(0.01, above=0)
    beta1: float = setting(0.9, at_least=0, at_most=1 - 1e-9)
    beta2: float = setting(0.99, at_least=0, at_most=1 - 1e-9)
    tau: float = setting(0.001, above=0)

    def flower(self) -> Any:
        """flwr's FedAdam."""
        return flower.FedAdam(eta=self.server_lr, beta_1=self.beta1, beta_2=self.beta2, tau=self.tau)
