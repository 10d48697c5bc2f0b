"""Flower's FedYogi server optimizer."""

from __future__ import annotations

from typing import Any

from flwr.serverapp import strategy as flower

from bayesfed.errors import number
from strategies.flower_server import FlowerOptimizer


class FedYogi(FlowerOptimizer):
    r"""FedYogi (Reddi et al., ICLR 2021) as in ``flwr.serverapp.strategy.FedYogi``. With ``d = weighted mean of w_k - w_g``:

        server   m = beta1 m + (1 - beta1) d,   v -= (1 - beta2) d^2 sign(v - d^2)
                 w_g += server_lr m / (sqrt(v) + tau)

    Clients are FedAvg's. No duals, no client state; m and v on the server. P numbers each way.

    Args:
        server_lr: eta.
        beta1: rate of m, in [0, 1).
        beta2: rate of v, in [0, 1).
        tau: adaptivity; large values make the steps proportional to m.
        fraction, min_replies, timeout: see :class:`FederatedStrategy`.

    Raises:
        InputError: a value out of range.
    """

    name: str = "fedyogi"

    def __init__(
        self,
        server_lr: float = 0.01,
        beta1: float = 0.9,
        beta2: float = 0.99,
        tau: float = 0.001,
        fraction: float = 1.0,
        min_replies: int = 1,
        timeout: float = 86400.0,
    ):
        super().__init__(fraction=fraction, min_replies=min_replies, timeout=timeout)
        number("server_lr", server_lr, above=0)
        number("beta1", beta1, at_least=0, at_most=1 - 1e-9)
        number("beta2", beta2, at_least=0, at_most=1 - 1e-9)
        number("tau", tau, above=0)
        self.server_lr, self.beta1, self.beta2, self.tau = float(server_lr), float(beta1), float(beta2), float(tau)

    def flower(self) -> Any:
        """flwr's FedYogi."""
        return flower.FedYogi(eta=self.server_lr, beta_1=self.beta1, beta_2=self.beta2, tau=self.tau)
