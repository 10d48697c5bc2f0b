"""Signed weights as differences of log-normal parts: the posterior of multiplicative learners."""

from __future__ import annotations

from functools import cached_property
from typing import ClassVar, Self

import torch
from torch import Tensor

from bayesfed.families.elementwise import ElementwisePrecision, IsotropicGaussian

SMALLEST_OFFSET = 0.05  # where the weights don't tell a scale


def split_mean(mean: Tensor, offset: Tensor | float, variance: Tensor | float) -> Tensor:
    """Log medians (2, ...) of parts u, v whose difference has the ``mean`` (...), the smaller one the mean ``offset``.

    ``m+ = e^(-variance/2) (max(mean, 0) + offset)``, ``m-`` likewise with ``-mean``. A median of 0 could never move, so
    ``offset`` must be > 0.
    """
    parts = torch.stack([mean.clamp(min=0), mean.neg().clamp(min=0)])
    return (parts + offset).log() - 0.5 * variance


class LogNormal(ElementwisePrecision):
    r"""``w = u - v`` with ``(log u, log v) ~ N(log_median, I/S)``: the family of LMD, with one ``sigma^2 = 1/S``.

    The parts ``x = (u, v)``, 2P positive numbers, are log-normal with ``T(x) = (log x, |log x|^2)`` and
    ``lambda = (S log m, -S/2)``: an isotropic Gaussian of the logarithms. A combination of natural parameters is
    therefore a weighted geometric mean of the medians. Of the weights, ``E[w] = (m+ - m-) e^(1/2S)`` and ``Var[w] =
    (m+^2 + m-^2) k (k - 1)``, ``k = e^(1/S)``; they have no density in closed form, so :meth:`log_prob`, :meth:`kl` and
    :attr:`expectation` are those of the parts.

    Attributes:
        log_median: (2P,) the parts u of all weights, then the parts v.
        precision: () S > 0, of the logarithms.
        mean: (P,) E[w].
    """

    name: ClassVar[str] = "lognormal"
    location_name: ClassVar[str] = "log_median"
    coordinates: ClassVar[int] = 2

    def __init__(self, log_median: Tensor, precision: Tensor):
        self.log_median = log_median
        parts = (log_median + 0.5 / precision).exp().view(2, -1)
        self.mean, self.precision = parts[0] - parts[1], precision

    @classmethod
    def precision_shape(cls, size: int) -> torch.Size:
        return torch.Size([])

    # -- construction -------------------------------------------------------------------------------------------------

    @classmethod
    def from_log_median(cls, log_median: Tensor, precision: Tensor) -> Self:
        """The member with these log medians (2P,) and precision () of the logarithms, checked as locations are."""
        return cls.from_location(log_median, precision)

    @classmethod
    def from_mean_precision(cls, mean: Tensor, precision: Tensor, offset: Tensor | float | None = None) -> Self:
        """The member with ``E[w] = mean`` (P,) whose smaller parts have the mean ``offset`` > 0 (half its rms)."""
        offset = _offset(mean) if offset is None else offset
        return cls.from_log_median(split_mean(mean, offset, precision.to(mean).reciprocal()).flatten(), precision)

    @classmethod
    def prior(cls, initial: Tensor, precision: float) -> Self:
        """Weights around 0 with the scale of the network initialisation: both parts have half its rms as mean."""
        zero = torch.zeros_like(initial)
        return cls.from_mean_precision(zero, initial.new_tensor(precision), _offset(initial))

    @classmethod
    def from_expectation(cls, first: Tensor, second: Tensor) -> Self:
        logs = IsotropicGaussian.from_expectation(first, second)
        return cls.from_log_median(logs.mean, logs.precision)

    # -- the exponential family ---------------------------------------------------------------------------------------

    @cached_property
    def logs(self) -> IsotropicGaussian:
        """The distribution of the logarithms of the parts, in 2P dimensions."""
        return IsotropicGaussian(self.log_median, self.precision)

    @property
    def expectation(self) -> tuple[Tensor, Tensor]:
        return self.logs.expectation

    @property
    def variance(self) -> Tensor:
        """Var[w], (P,)."""
        k = self.precision.reciprocal().exp()
        return (2 * self.log_median).exp().view(2, -1).sum(0) * k * (k - 1)

    def sample_parts(self, n: int, generator: torch.Generator | None = None) -> Tensor:
        """``n`` draws of the parts (u, v), (n, 2P)."""
        return self.logs.sample(n, generator).exp_()

    def sample(self, n: int, generator: torch.Generator | None = None) -> Tensor:
        parts = self.sample_parts(n, generator)
        return parts[:, : self.dim] - parts[:, self.dim :]

    def log_prob(self, theta: Tensor) -> Tensor:
        """Log density of parts (..., 2P), shape (...)."""
        logs = theta.log()
        return self.logs.log_prob(logs) - logs.sum(-1)

    def kl(self, other: Self) -> Tensor:
        self._require_same(other)
        return self.logs.kl(other.logs)


def _offset(weights: Tensor) -> Tensor:
    """Half the root mean square of ``weights``, () ; a small number if they are all 0."""
    half = 0.5 * weights.square().mean().sqrt()
    return torch.where(half > 0, half, SMALLEST_OFFSET)
