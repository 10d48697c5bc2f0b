"""Federated averaging."""

from __future__ import annotations

import torch
from torch import Tensor

from bayesfed.families import PointMass
from bayesfed.federation.server.strategy import FederatedStrategy, Reply, Sent, Sums

PIECE = 65536  # numbers


class FedAvg(FederatedStrategy[PointMass]):
    """FedAvg (McMahan et al. 2017), a point mass as posterior.

        client   w_k = argmin_w  l_k(w)/N_k, from w_g
        dual     none
        server   w_g = sum_{k in P} N_k w_k / sum_{k in P} N_k

    The server starts at the network initialisation. No prior. State: none. Traffic: P numbers each way.
    """

    name = "fedavg"
    family = PointMass.name

    # -- state --------------------------------------------------------------------------------------------------------

    def prepare(self, initial: Tensor) -> None:
        """The server starts at the network initialisation."""
        self.posterior = PointMass(initial.clone())

    def zeros(self) -> Tensor:
        """A sum (P,) over no clients."""
        return torch.zeros_like(self.posterior.mean, dtype=torch.float64)

    # -- one round ----------------------------------------------------------------------------------------------------

    def local_settings(self) -> dict[str, float | bool | str]:
        """Nothing but the client's own loss."""
        return {}

    def empty(self) -> Sums:
        """``sum_k N_k w_k`` and ``sum_k N_k``."""
        zeros = self.zeros()
        return {"weighted": zeros, "examples": zeros.new_zeros(())}

    def accumulate(self, sums: Sums, reply: Reply[PointMass]) -> dict[str, float]:
        """Add ``N_k w_k``."""
        return self.add_weighted(sums, reply, reply.num_examples)

    def add_weighted(self, sums: Sums, reply: Reply[PointMass], weight: float) -> dict[str, float]:
        """Add a client's weights ``weight`` times."""
        sums["examples"].add_(weight)
        return {"residual": add_mean(sums["weighted"], reply, weight)}

    def combine(self, sums: Sums, sent: Sent[PointMass], replies: int) -> dict[str, float]:
        """The weighted mean."""
        self.posterior = PointMass((sums["weighted"] / sums["examples"]).to(self.dtype))
        return {}


def add_mean(total: Tensor, reply: Reply[PointMass], weight: float = 1) -> float:
    """Add ``weight w_k`` to ``total`` (P,); returns ``||w_k - w_g||``.

    In pieces that stay in the cache: large vectors cost what is read.
    """
    squares = total.new_zeros(())
    mean, server = reply.posterior.mean.split(PIECE), reply.sent.posterior.mean.split(PIECE)
    for piece, mine, servers in zip(total.split(PIECE), mean, server, strict=True):
        difference = mine - servers
        squares += difference.dot(difference)
        piece.add_(mine, alpha=weight)
    return float(squares.sqrt())
