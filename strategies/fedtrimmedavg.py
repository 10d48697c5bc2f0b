"""Flower's FedTrimmedAvg."""

from __future__ import annotations

from typing import Any

from flwr.serverapp import strategy as flower

from bayesfed.errors import number
from strategies.flower_server import FlowerRobust


class FedTrimmedAvg(FlowerRobust):
    r"""FedTrimmedAvg (Yin et al. 2018) as in ``flwr.serverapp.strategy.FedTrimmedAvg``:

        server   w_g = coordinatewise mean of w_k without the largest and smallest share ``trim`` of each, not weighted

    Clients are FedAvg's. No duals, no client state. P numbers each way; all replies of a round are kept: **O(K P) memory** at the
    server. Robust against clients that send nonsense, at the price of a bias under heterogeneity even if none does.

    Args:
        trim: share cut from each end, in [0, 0.49].
        fraction, min_replies, timeout: see :class:`FederatedStrategy`.

    Raises:
        InputError: a value out of range.
    """

    name: str = "fedtrimmedavg"

    def __init__(self, trim: float = 0.2, fraction: float = 1.0, min_replies: int = 1, timeout: float = 86400.0):
        super().__init__(fraction=fraction, min_replies=min_replies, timeout=timeout)
        number("trim", trim, at_least=0, at_most=0.49)
        self.trim = float(trim)

    def flower(self) -> Any:
        """flwr's rule."""
        return flower.FedTrimmedAvg(beta=self.trim)
