"""Precisions that multiply coordinates one by one, and the two Gaussians that have them: isotropic and diagonal."""

from __future__ import annotations

import math
from typing import ClassVar, Self

import torch
from torch import Tensor

from bayesfed.families.base import ExponentialFamily, require
from bayesfed.families.gaussian import Gaussian
from bayesfed.families.natural import NaturalParameters


class ElementwisePrecision(ExponentialFamily):
    """Families whose precision multiplies coordinates, by one number or by a vector."""

    @classmethod
    def require_positive(cls, precision: Tensor) -> None:
        require(precision > 0, precision, "precision", "not positive")

    @classmethod
    def solve(cls, precision: Tensor, vector: Tensor) -> Tensor:
        return vector / precision

    @classmethod
    def multiply(cls, precision: Tensor, vector: Tensor) -> Tensor:
        return precision * vector

    @classmethod
    def raise_precision(
        cls, natural: NaturalParameters, floor: Tensor, location: Tensor
    ) -> tuple[NaturalParameters, Tensor]:
        precision = natural.precision
        low = ~(precision >= floor)  # also catches nan
        lifted = torch.where(low, floor, precision)
        linear = torch.where(low, lifted * location, natural.linear)
        return NaturalParameters(cls.name, linear, lifted * -0.5), low.sum()


class ElementwiseGaussian(ElementwisePrecision, Gaussian):
    """Gaussians with such a precision."""

    @classmethod
    def precision_like(cls, mean: Tensor, value: float) -> Tensor:
        return mean.new_full(cls.precision_shape(mean.numel()), value)

    def sample(self, n: int, generator: torch.Generator | None = None) -> Tensor:
        noise = torch.empty(n, self.dim, dtype=self.mean.dtype, device=self.mean.device).normal_(generator=generator)
        return noise.mul_(self.precision.rsqrt()).add_(self.mean)

    def log_prob(self, theta: Tensor) -> Tensor:
        squares = (self.precision * (theta - self.mean).square()).sum(-1)
        return 0.5 * (self._log_det() - self.dim * math.log(2 * math.pi) - squares)

    def kl(self, other: Self) -> Tensor:
        self._require_same(other)
        ratio = other.precision / self.precision
        per_entry = (ratio - 1 - ratio.log()) * self._repeats()
        return 0.5 * (per_entry.sum() + (other.precision * (self.mean - other.mean).square()).sum())

    def _repeats(self) -> int:
        """How many coordinates share one entry of the precision."""
        return 1

    def _log_det(self) -> Tensor:
        return self.precision.log().sum() * self._repeats()


class DiagonalGaussian(ElementwiseGaussian):
    """``N(m, diag(S)^-1)``, precision (P,); ``T(theta) = (theta, theta^2)`` elementwise."""

    name: ClassVar[str] = "diagonal"

    @classmethod
    def precision_shape(cls, size: int) -> torch.Size:
        return torch.Size([size])

    @property
    def expectation(self) -> tuple[Tensor, Tensor]:
        return self.mean, self.precision.reciprocal() + self.mean.square()

    @classmethod
    def from_expectation(cls, first: Tensor, second: Tensor) -> Self:
        variance = second - first.square()
        require(variance > 0, variance, "variance", "not positive")
        return cls.from_mean_precision(first, variance.reciprocal())


class IsotropicGaussian(ElementwiseGaussian):
    """``N(m, I/S)``, precision (); ``T(theta) = (theta, theta^T theta)``."""

    name: ClassVar[str] = "isotropic"

    @classmethod
    def precision_shape(cls, size: int) -> torch.Size:
        return torch.Size([])

    @property
    def expectation(self) -> tuple[Tensor, Tensor]:
        return self.mean, self.dim / self.precision + self.mean.square().sum()

    @classmethod
    def from_expectation(cls, first: Tensor, second: Tensor) -> Self:
        variance = (second - first.square().sum()) / first.numel()
        require(variance > 0, variance, "variance", "not positive")
        return cls.from_mean_precision(first, variance.reciprocal())

    def _repeats(self) -> int:
        return self.dim
