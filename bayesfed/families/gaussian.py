"""What all Gaussian families share: the weights themselves are the coordinates."""

from __future__ import annotations

from abc import abstractmethod
from typing import ClassVar, Self

import torch
from torch import Tensor

from bayesfed.families.base import ExponentialFamily


class Gaussian(ExponentialFamily):
    """A Gaussian ``N(m, S^-1)`` with some structure of the precision ``S``.

    The families differ only in the shape of ``S``: () isotropic, (P,) diagonal, (P, P) full. With ``T(theta) = (theta,
    theta theta^T)`` (restricted to that structure) ``lambda = (S m, -S/2)`` (arXiv 2506.13150; Wainwright and Jordan
    2008, section 3).

    Attributes:
        mean: (P,).
        precision: (), (P,) or (P, P); positive (definite).
    """

    location_name: ClassVar[str] = "mean"

    def __init__(self, mean: Tensor, precision: Tensor):
        self.mean = mean
        self.precision = precision

    @classmethod
    def from_mean_precision(cls, mean: Tensor, precision: Tensor) -> Self:
        """The Gaussian with this mean (P,) and precision.

        Raises:
            ValueError: naming the entries that are not finite or not positive, or the shape expected.
        """
        return cls.from_location(mean, precision)

    @classmethod
    def isotropic(cls, mean: Tensor, precision: float) -> Self:
        """The member with precision ``precision * I`` (every family has it: the prior, a first guess)."""
        return cls.from_location(mean, cls.precision_like(mean, precision))

    @classmethod
    def prior(cls, initial: Tensor, precision: float) -> Self:
        return cls.isotropic(torch.zeros_like(initial), precision)

    @classmethod
    @abstractmethod
    def precision_like(cls, mean: Tensor, value: float) -> Tensor:
        """``value * I`` in this family's shape, with ``mean``'s dtype and device."""
