"""Flower's FedTrimmedAvg."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

from flwr.serverapp import strategy as flower

from bayesfed.settings import setting
from strategies.flower_server import FlowerRobust


@dataclass(kw_only=True, eq=False)
class FedTrimmedAvg(FlowerRobust):
    r"""FedTrimmedAvg (Yin et al. 2018) as in ``flwr.serverapp.strategy.FedTrimmedAvg``:

        server   w_g = coordinatewise mean of w_k without the largest and smallest share ``trim`` of each, not weighted

    Clients are FedAvg's, no duals. State: none. Traffic: P numbers each way; all replies of a round are kept: **O(K P)
    memory** at the server. Robust against clients that send nonsense, at the price of a bias under heterogeneity even
    if none does.

    Args:
        trim: share cut from each end, in [0, 0.49].

    Raises:
        InputError: a value out of range.
    """

    name = "fedtrimmedavg"

    trim: float = setting(0.2, at_least=0, at_most=0.49)

    def flower(self) -> Any:
        """flwr's rule."""
        return flower.FedTrimmedAvg(beta=self.trim)
