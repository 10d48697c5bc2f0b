"""Flower's Krum."""

from __future__ import annotations

from typing import Any

from flwr.serverapp import strategy as flower

from bayesfed.errors import integer
from strategies.flower_server import FlowerRobust


class Krum(FlowerRobust):
    r"""Krum (Blanchard et al. 2017) as in ``flwr.serverapp.strategy.Krum``:

        server   w_g = the w_k whose K - malicious - 2 nearest others are nearest in sum of squares

    Clients are FedAvg's. No duals, no client state. P numbers each way; all replies of a round are kept: **O(K P) memory** at the
    server. Robust against clients that send nonsense, at the price of a bias under heterogeneity even if none does.

    Args:
        malicious: how many clients of a round may be.
        fraction, min_replies, timeout: see :class:`FederatedStrategy`.

    Raises:
        InputError: a value out of range.
    """

    name: str = "krum"

    def __init__(self, malicious: int = 0, fraction: float = 1.0, min_replies: int = 1, timeout: float = 86400.0):
        super().__init__(fraction=fraction, min_replies=min_replies, timeout=timeout)
        integer("malicious", malicious, at_least=0)
        self.malicious = malicious

    def flower(self) -> Any:
        """flwr's rule."""
        return flower.Krum(num_malicious_nodes=self.malicious)
