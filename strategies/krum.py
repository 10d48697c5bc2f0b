"""Flower's Krum."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

from flwr.serverapp import strategy as flower

from bayesfed.settings import setting
from strategies.flower_server import FlowerRobust


@dataclass(kw_only=True, eq=False)
class Krum(FlowerRobust):
    r"""Krum (Blanchard et al. 2017) as in ``flwr.serverapp.strategy.Krum``:

        server   w_g = the w_k whose K - malicious - 2 nearest others are nearest in sum of squares

    Clients are FedAvg's, no duals. State: none. Traffic: P numbers each way; all replies of a round are kept: **O(K P)
    memory** at the server. Robust against clients that send nonsense, at the price of a bias under heterogeneity even
    if none does.

    Args:
        malicious: how many clients of a round may be.

    Raises:
        InputError: a value out of range.
    """

    name = "krum"

    malicious: int = setting(0, at_least=0)

    def flower(self) -> Any:
        """flwr's rule."""
        return flower.Krum(num_malicious_nodes=self.malicious)
