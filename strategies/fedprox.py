"""Federated averaging with a proximal term."""

from __future__ import annotations

from dataclasses import dataclass

from bayesfed.settings import setting
from strategies.fedavg import FedAvg


@dataclass(kw_only=True, eq=False)
class FedProx(FedAvg):
    """FedProx (Li et al. 2020):

        client   w_k = argmin_w  l_k(w)/N_k + mu/2 ||w - w_g||^2
        dual     none
        server   w_g = sum_{k in P} N_k w_k / sum_{k in P} N_k

    The norm is *squared*, as published (some public code takes the norm itself, whose pull does not vanish near
    ``w_g``). State: none. Traffic: P numbers each way.

    Args:
        mu: weight of the proximal term; 0 is FedAvg.

    Raises:
        InputError: ``mu`` is negative or not finite.
    """

    name = "fedprox"

    mu: float = setting(0.01, at_least=0)

    def __post_init__(self) -> None:
        super().__post_init__()
        self.asks = frozenset({"proximal"} if self.mu else ())

    def local_settings(self) -> dict[str, float | bool | str]:
        """The proximal weight, per mean loss."""
        return {"proximal": self.mu}
