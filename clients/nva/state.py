"""The Gaussian mixture that NVA moves."""

from __future__ import annotations

import math
from dataclasses import dataclass
from functools import cached_property

import torch
from torch import Tensor


@dataclass(frozen=True)
class Mixture:
    """means (K, d), covariances (K, d, d), weights (K,), all float64."""

    means: Tensor
    covariances: Tensor
    weights: Tensor

    @cached_property
    def factors(self) -> Tensor:
        """Lower Cholesky factors of the covariances, (K, d, d)."""
        factors: Tensor = torch.linalg.cholesky(self.covariances)
        return factors

    def log_density(self, x: Tensor) -> Tensor:
        """log q at x (B, d): (B,)."""
        return torch.logsumexp(self._component_terms(x)[0], 0)

    def _component_terms(self, x: Tensor) -> tuple[Tensor, Tensor]:
        """log pi_k N_k(x) (K, B) and the whitened offsets L_k^-1 (x - mu_k) (K, d, B)."""
        offsets = (x[None] - self.means[:, None]).mT
        whitened = torch.linalg.solve_triangular(self.factors, offsets, upper=False)
        log_scale = self.factors.diagonal(dim1=-2, dim2=-1).log().sum(-1) + 0.5 * math.log(2 * math.pi) * x.shape[-1]
        return self.weights.log()[:, None] - log_scale[:, None] - 0.5 * whitened.square().sum(1), whitened

    def derivatives(self, x: Tensor) -> tuple[Tensor, Tensor]:
        """Gradient (B, d) and Hessian (B, d, d) of log q at x (B, d), in closed form."""
        terms, whitened = self._component_terms(x)
        shares = torch.softmax(terms, 0)  # responsibilities (K, B)
        pulls = -torch.linalg.solve_triangular(self.factors.mT, whitened, upper=True)  # S_k (mu_k - x), (K, d, B)
        gradient = torch.einsum("kb,kib->bi", shares, pulls)
        precisions = torch.cholesky_inverse(self.factors)
        hessian = torch.einsum("kb,kib,kjb->bij", shares, pulls, pulls)
        hessian = hessian - torch.einsum("kb,kij->bij", shares, precisions)
        return gradient, hessian - gradient[:, :, None] * gradient[:, None]
