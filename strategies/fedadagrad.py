"""Flower's FedAdagrad server optimizer."""

from __future__ import annotations

from typing import Any

from flwr.serverapp import strategy as flower

from bayesfed.errors import number
from strategies.flower_server import FlowerOptimizer


class FedAdagrad(FlowerOptimizer):
    r"""FedAdagrad (Reddi et al., ICLR 2021) as in ``flwr.serverapp.strategy.FedAdagrad``. With ``d = weighted mean of w_k - w_g``:

        server   m = d,   v += d^2
                 w_g += server_lr m / (sqrt(v) + tau)

    Clients are FedAvg's. No duals, no client state; m and v on the server. P numbers each way.

    Args:
        server_lr: eta.
        tau: adaptivity; large values make the steps proportional to m.
        fraction, min_replies, timeout: see :class:`FederatedStrategy`.

    Raises:
        InputError: a value out of range.
    """

    name: str = "fedadagrad"

    def __init__(
        self,
        server_lr: float = 0.1,
        tau: float = 0.001,
        fraction: float = 1.0,
        min_replies: int = 1,
        timeout: float = 86400.0,
    ):
        super().__init__(fraction=fraction, min_replies=min_replies, timeout=timeout)
        number("server_lr", server_lr, above=0)
        number("tau", tau, above=0)
        self.server_lr, self.tau = float(server_lr), float(tau)

    def flower(self) -> Any:
        """flwr's FedAdagrad."""
        return flower.FedAdagrad(eta=self.server_lr, tau=self.tau)
