"""Federated averaging."""

from __future__ import annotations

import torch
from torch import Tensor

from bayesfed.families import PointMass
from strategies.base import FederatedStrategy


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

    def local_settings(self) -> dict[str, float | bool]:
        """Nothing but the client's own loss."""
        return {}

    def begin(self) -> None:
        """Empty sums."""
        self._server = self.posterior.mean.to(torch.float64)
        self._sum = torch.zeros_like(self._server)
        self._examples = 0

    def accumulate(self, posterior: PointMass, num_examples: int) -> dict[str, float]:
        """Add ``N_k w_k``."""
        self._sum.add_(posterior.mean, alpha=num_examples)
        self._examples += num_examples
        return {"residual": float((posterior.mean - self._server).norm())}

    def combine(self, replies: int) -> dict[str, float]:
        """The weighted mean."""
        self.posterior = PointMass((self._sum / self._examples).to(self.dtype))
        return {}
