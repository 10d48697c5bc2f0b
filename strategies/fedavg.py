"""Federated averaging."""

from __future__ import annotations

import torch
from torch import Tensor

from bayesfed.families import PointMass
from bayesfed.federation.server.strategy import FederatedStrategy, Sums

PIECE = 65536  # numbers


class FedAvg(FederatedStrategy[PointMass]):
    """FedAvg (McMahan et al. 2017): ``w_g = sum_{k in P} N_k w_k / sum_{k in P} N_k``.

    Clients minimise their mean loss ``l_k/N_k`` from ``w_g``. The server starts at the network initialisation. In bayesfed's
    terms: no prior, no duals, a point mass as posterior.

    Args:
        fraction, min_replies, timeout: see :class:`FederatedStrategy`.
    """

    name: str = "fedavg"
    family: str = PointMass.name

    def prepare(self, initial: Tensor) -> None:
        """The server starts at the network initialisation."""
        self.posterior = PointMass(initial.clone())

    def local_settings(self) -> dict[str, float | bool | str]:
        """Nothing but the client's own loss."""
        return {}

    def begin(self) -> None:
        """The server's weights, as clients got them and in float64."""
        self._received = self.posterior.mean
        self._server = self._received.to(torch.float64)

    def empty(self) -> Sums:
        """``sum_k N_k w_k`` and ``sum_k N_k``."""
        return {"weighted": torch.zeros_like(self._server), "examples": self._server.new_zeros(())}

    def accumulate(self, sums: Sums, posterior: PointMass, num_examples: int) -> dict[str, float]:
        """Add ``N_k w_k``."""
        sums["examples"].add_(num_examples)
        return {"residual": self.add_mean(sums["weighted"], posterior, num_examples)}

    def add_mean(self, total: Tensor, posterior: PointMass, weight: float = 1) -> float:
        """Add ``weight w_k`` to ``total`` (P,); returns ``||w_k - w_g||``. In pieces that stay in the cache: large vectors cost what is read."""
        squares = total.new_zeros(())
        mean, server = posterior.mean.split(PIECE), self._received.split(PIECE)
        for piece, mine, servers in zip(total.split(PIECE), mean, server, strict=True):
            difference = mine - servers
            squares += difference.dot(difference)
            piece.add_(mine, alpha=weight)
        return float(squares.sqrt())

    def combine(self, sums: Sums, replies: int) -> dict[str, float]:
        """The weighted mean."""
        self.posterior = PointMass((sums["weighted"] / sums["examples"]).to(self.dtype))
        return {}
