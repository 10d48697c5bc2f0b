"""Bayesian logistic regression under a Gaussian, to machine precision: what variational methods are compared on."""

from __future__ import annotations

import math
from functools import lru_cache

import numpy as np
import torch
from torch import Tensor


@lru_cache
def gauss_hermite(nodes: int) -> tuple[Tensor, Tensor]:
    """Nodes and weights (n,) of the expectation under N(0, 1), float64."""
    points, weights = np.polynomial.hermite_e.hermegauss(nodes)
    return torch.from_numpy(points), torch.from_numpy(weights / math.sqrt(2 * math.pi))


class LogisticPosterior:
    """f(theta) = sum_n log(1 + exp(-y_n x_n^T theta)) + delta/2 ||theta||^2 and its expectations under q = N(m, C C^T).

    f depends on theta through the one-dimensional Gaussians x_n^T theta, so Gauss-Hermite quadrature over each of them
    is exact to rounding. O(N P^2 + N nodes) an evaluation.

    Args:
        x: (N, P) inputs.
        y: (N,) labels, -1 or 1.
        prior_precision: delta.
        nodes: of the quadrature.
    """

    def __init__(self, x: Tensor, y: Tensor, prior_precision: float = 1.0, nodes: int = 60):
        self.signed = y[:, None] * x
        self.prior_precision = prior_precision
        self.points, self.weights = gauss_hermite(nodes)

    def _margins(self, mean: Tensor, factor: Tensor) -> Tensor:
        """The margins y_n x_n^T theta at the quadrature's nodes, (N, nodes)."""
        spread = (self.signed @ factor).norm(dim=1)
        return (self.signed @ mean)[:, None] + spread[:, None] * self.points

    def value(self, mean: Tensor, factor: Tensor) -> Tensor:
        """E_q[f], shape ()."""
        likelihood = (torch.nn.functional.softplus(-self._margins(mean, factor)) @ self.weights).sum()
        return likelihood + 0.5 * self.prior_precision * (mean.square().sum() + factor.square().sum())

    def objective(self, mean: Tensor, factor: Tensor) -> Tensor:
        """E_q[f] - log det C: KL(q || posterior) up to a constant, shape ()."""
        return self.value(mean, factor) - torch.linalg.slogdet(factor)[1]

    def expectations(self, mean: Tensor, factor: Tensor) -> tuple[Tensor, Tensor]:
        """E_q[grad f] (P,) and E_q[hess f] (P, P)."""
        missing = torch.sigmoid(-self._margins(mean, factor))  # one minus the probability of the label
        gradient = self.prior_precision * mean - self.signed.mT @ (missing @ self.weights)
        curvature = (missing * (1 - missing)) @ self.weights
        hessian = self.signed.mT @ (curvature[:, None] * self.signed)
        hessian.diagonal().add_(self.prior_precision)
        return gradient, hessian
