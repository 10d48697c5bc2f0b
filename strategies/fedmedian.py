"""Flower's FedMedian."""

from __future__ import annotations

from typing import Any

from flwr.serverapp import strategy as flower

from strategies.flower_server import FlowerRobust


class FedMedian(FlowerRobust):
    r"""FedMedian (Yin et al. 2018) as in ``flwr.serverapp.strategy.FedMedian``:

        server   w_g = coordinatewise median of w_k, not weighted

    Clients are FedAvg's, no duals. State: none. Traffic: P numbers each way; all replies of a round are kept: **O(K P)
    memory** at the server. Robust against clients that send nonsense, at the price of a bias under heterogeneity even
    if none does.
    """

    name = "fedmedian"

    def flower(self) -> Any:
        """flwr's FedMedian."""
        return flower.FedMedian()
