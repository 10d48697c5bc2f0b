"""The Gaussian with a full precision matrix, through Cholesky factors."""

from __future__ import annotations

import math
from functools import cached_property
from typing import ClassVar, Self

import torch
from torch import Tensor

from bayesfed.families.base import require
from bayesfed.families.gaussian import Gaussian
from bayesfed.families.natural import NaturalParameters


class FullGaussian(Gaussian):
    """``N(m, S^-1)``, precision (P, P) symmetric positive definite; ``T(theta) = (theta, theta theta^T)``.

    With ``S = L L^T``: samples are ``m + L^-T z``, solves are two triangular solves; ``S`` is never inverted.
    Memory is O(P^2), time O(P^3).
    """

    name: ClassVar[str] = "full"

    @classmethod
    def precision_shape(cls, size: int) -> torch.Size:
        return torch.Size([size, size])

    @classmethod
    def precision_like(cls, mean: Tensor, value: float) -> Tensor:
        return torch.eye(mean.numel(), dtype=mean.dtype, device=mean.device) * value

    @classmethod
    def require_positive(cls, precision: Tensor) -> None:
        symmetric = torch.isclose(precision, precision.mT, rtol=1e-4, atol=1e-6 * float(precision.abs().max()))
        require(symmetric, precision, "precision", "not symmetric")
        _, info = torch.linalg.cholesky_ex(precision)
        if int(info) > 0:
            raise ValueError(
                f"precision is not positive definite: its leading {int(info)} x {int(info)} block fails, "
                f"smallest eigenvalue {float(torch.linalg.eigvalsh(precision)[0]):g}"
            )

    @classmethod
    def solve(cls, precision: Tensor, vector: Tensor) -> Tensor:
        factor: Tensor = torch.linalg.cholesky(precision)
        solution: Tensor = torch.cholesky_solve(vector[:, None], factor)
        return solution.reshape(-1)

    @classmethod
    def multiply(cls, precision: Tensor, vector: Tensor) -> Tensor:
        return precision @ vector

    @cached_property
    def factor(self) -> Tensor:
        """Lower Cholesky factor L of the precision, (P, P)."""
        factor: Tensor = torch.linalg.cholesky(self.precision)
        return factor

    @property
    def covariance(self) -> Tensor:
        """``S^-1`` from the Cholesky factor, (P, P)."""
        return torch.cholesky_inverse(self.factor)

    @property
    def expectation(self) -> tuple[Tensor, Tensor]:
        return self.mean, self.covariance + torch.outer(self.mean, self.mean)

    @classmethod
    def from_expectation(cls, first: Tensor, second: Tensor) -> Self:
        covariance = second - torch.outer(first, first)
        factor, info = torch.linalg.cholesky_ex(covariance)
        if int(info) > 0:
            raise ValueError("the covariance in these expectation parameters is not positive definite")
        return cls.from_mean_precision(first, torch.cholesky_inverse(factor))

    def sample(self, n: int, generator: torch.Generator | None = None) -> Tensor:
        noise = torch.empty(self.dim, n, dtype=self.mean.dtype, device=self.mean.device).normal_(generator=generator)
        offsets: Tensor = torch.linalg.solve_triangular(self.factor.mT, noise, upper=True)
        return self.mean + offsets.mT

    def log_prob(self, theta: Tensor) -> Tensor:
        squares = ((theta - self.mean) @ self.factor).square().sum(-1)
        return self._half_log_det() - 0.5 * (self.dim * math.log(2 * math.pi) + squares)

    def kl(self, other: Self) -> Tensor:
        self._require_same(other)
        # trace(S2 S1^-1) = ||L1^-1 L2||_F^2
        ratio: Tensor = torch.linalg.solve_triangular(self.factor, other.factor, upper=False)
        trace = ratio.square().sum()
        distance = ((self.mean - other.mean) @ other.factor).square().sum()
        return 0.5 * (trace + distance - self.dim) + self._half_log_det() - other._half_log_det()

    @classmethod
    def raise_precision(
        cls, natural: NaturalParameters, floor: Tensor, location: Tensor
    ) -> tuple[NaturalParameters, Tensor]:
        values, vectors = torch.linalg.eigh(natural.precision)
        low = ~(values >= floor)
        if not bool(low.any()):  # keep the bits of a healthy precision
            return natural, low.sum()
        lifted = torch.where(low, floor, values)
        rotated = torch.where(low, lifted * (vectors.mT @ location), vectors.mT @ natural.linear)
        second = (vectors * lifted) @ vectors.mT
        return NaturalParameters(cls.name, vectors @ rotated, (second + second.mT) * -0.25), low.sum()

    def precision_diagonal(self) -> Tensor:
        return self.precision.diagonal()

    def _half_log_det(self) -> Tensor:
        return self.factor.diagonal().log().sum()
