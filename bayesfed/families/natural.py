"""Natural parameters as elements of a vector space."""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor


@dataclass(frozen=True)
class NaturalParameters:
    """A point ``lambda`` in the natural-parameter space of a family.

    For the Gaussians ``lambda = (S m, -S/2)`` with precision ``S`` and mean ``m``. Differences and sums of natural
    parameters (sites, duals) live in the same space but need not describe a distribution, so nothing is checked here:
    ``Family.from_natural`` does that.

    Attributes:
        family: name of the family whose sufficient statistic ``T`` this pairs with.
        linear: (P,) coefficient of ``theta``.
        quadratic: coefficient of ``theta theta^T``: () isotropic, (P,) diagonal, (P, P) full.
    """

    family: str
    linear: Tensor
    quadratic: Tensor

    @property
    def precision(self) -> Tensor:
        """``S = -2 quadratic``, in its shape. Of a site or dual, which is a difference, it may be negative."""
        return self.quadratic * -2.0

    def _pair(self, other: NaturalParameters) -> NaturalParameters:
        if not isinstance(other, NaturalParameters):
            raise TypeError(f"expected natural parameters, got {type(other).__name__}")
        if (
            other.family != self.family
            or other.quadratic.shape != self.quadratic.shape
            or other.linear.shape != self.linear.shape
        ):
            raise ValueError(
                f"cannot combine natural parameters of {self.family} {tuple(self.linear.shape)} "
                f"and {other.family} {tuple(other.linear.shape)}"
            )
        return other

    def __add__(self, other: NaturalParameters) -> NaturalParameters:
        other = self._pair(other)
        return NaturalParameters(self.family, self.linear + other.linear, self.quadratic + other.quadratic)

    def __sub__(self, other: NaturalParameters) -> NaturalParameters:
        other = self._pair(other)
        return NaturalParameters(self.family, self.linear - other.linear, self.quadratic - other.quadratic)

    def __mul__(self, scale: float) -> NaturalParameters:
        return NaturalParameters(self.family, self.linear * scale, self.quadratic * scale)

    __rmul__ = __mul__

    def __truediv__(self, scale: float) -> NaturalParameters:
        return NaturalParameters(self.family, self.linear / scale, self.quadratic / scale)

    def __neg__(self) -> NaturalParameters:
        return self * -1.0

    def add_(self, other: NaturalParameters, scale: float = 1.0) -> NaturalParameters:
        """In place ``self += scale * other`` (streaming sums on the server)."""
        other = self._pair(other)
        self.linear.add_(other.linear, alpha=scale)
        self.quadratic.add_(other.quadratic, alpha=scale)
        return self

    def norm(self) -> Tensor:
        """Euclidean norm of all entries, shape ()."""
        return torch.sqrt(self.linear.square().sum() + self.quadratic.square().sum())

    def isfinite(self) -> Tensor:
        """Whether all entries are finite, shape ()."""
        return self.linear.isfinite().all() & self.quadratic.isfinite().all()

    def to(self, dtype: torch.dtype | None = None, device: torch.device | str | None = None) -> NaturalParameters:
        """The same point in another precision or on another device."""
        return NaturalParameters(
            self.family, self.linear.to(device=device, dtype=dtype), self.quadratic.to(device=device, dtype=dtype)
        )

    def zeros_like(self) -> NaturalParameters:
        """The zero of the space."""
        return NaturalParameters(self.family, torch.zeros_like(self.linear), torch.zeros_like(self.quadratic))

    def clone(self) -> NaturalParameters:
        """A copy that shares no memory."""
        return NaturalParameters(self.family, self.linear.clone(), self.quadratic.clone())


def all_finite(values: Tensor) -> bool:
    """Whether no entry is infinite or nan: from the sum, in a tenth of the time, unless that overflows.

    The sum is in the values' own dtype: a wider one would copy them first.
    """
    return bool(values.sum().isfinite()) or bool(values.isfinite().all())
