"""Federated averaging with a proximal term."""

from __future__ import annotations

from bayesfed.errors import number
from strategies.fedavg import FedAvg


class FedProx(FedAvg):
    """FedProx (Li et al. 2020): clients minimise ``l_k(w)/N_k + mu/2 ||w - w_g||^2``; the server averages as FedAvg does.

    The norm is *squared*, as published (some public code takes the norm itself, whose pull does not vanish near ``w_g``).

    Args:
        mu: weight of the proximal term; 0 is FedAvg.
        fraction, min_replies, timeout: see :class:`FederatedStrategy`.

    Raises:
        InputError: ``mu`` is negative or not finite.
    """

    name: str = "fedprox"

    def __init__(self, mu: float = 0.01, fraction: float = 1.0, min_replies: int = 1, timeout: float = 86400.0):
        super().__init__(fraction=fraction, min_replies=min_replies, timeout=timeout)
        number("mu", mu, at_least=0)
        self.mu = float(mu)
        self.asks = frozenset({"proximal"} if mu else ())

    def local_settings(self) -> dict[str, float | bool | str]:
        """The proximal weight, per mean loss."""
        return {"proximal": self.mu}
