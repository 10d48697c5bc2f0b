"""Flower's FedAdagrad server optimizer."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

from flwr.serverapp import strategy as flower

from bayesfed.settings import setting
from strategies.flower_server import FlowerOptimizer


@dataclass(kw_only=True, eq=False)
class FedAdagrad(FlowerOptimizer):
    r"""FedAdagrad (Reddi et al., ICLR 2021) as in ``flwr.serverapp.strategy.FedAdagrad``.

    With ``d = weighted mean of w_k - w_g``:

        server   m = d,   v += d^2
                 w_g += server_lr m / (sqrt(v) + tau)

    Clients are FedAvg's, no duals. State: m and v on the server. Traffic: P numbers each way.

    Args:
        server_lr: eta.
        tau: adaptivity; large values make the steps proportional to m.

    Raises:
        InputError: a value out of range.
    """

    name = "fedadagrad"

    server_lr: float = setting(0.1, above=0)
    tau: float = setting(0.001, above=0)

    def flower(self) -> Any:
        """flwr's FedAdagrad."""
        return flower.FedAdagrad(eta=self.server_lr, tau=self.tau)
