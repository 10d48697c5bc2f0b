"""A point mass: the 'posterior' of methods that only estimate parameters."""

from __future__ import annotations

from typing import ClassVar, Self

import torch
from torch import Tensor

from bayesfed.families.natural import NaturalParameters, all_finite


class PointMass:
    """All probability at ``mean`` (P,); ``precision`` is infinite. The posterior of FedAvg and its kin.

    Not an exponential family: it has no natural parameters, density or KL. Duals of point estimates are elements
    ``(v, 0)`` of the same vector space: ``<eta, T(w)> = v^T w``.
    """

    name: ClassVar[str] = "point"
    is_point: ClassVar[bool] = True

    def __init__(self, mean: Tensor):
        self.mean = mean
        self.precision = mean.new_full((), torch.inf)

    @classmethod
    def from_arrays(cls, arrays: dict[str, Tensor]) -> Self:
        """The inverse of :meth:`arrays`."""
        if not arrays["mean"].is_meta and not all_finite(arrays["mean"]):
            raise ValueError("mean is not finite")
        return cls(arrays["mean"])

    @classmethod
    def array_shapes(cls, dim: int) -> dict[str, tuple[int, ...]]:
        """The shapes of :meth:`arrays` for P = ``dim``."""
        return {"mean": (dim,)}

    @classmethod
    def zero(cls, mean: Tensor) -> NaturalParameters:
        """The zero dual ``(0, 0)`` for ``mean``'s dimension, dtype and device."""
        return NaturalParameters(cls.name, torch.zeros_like(mean), mean.new_zeros(()))

    @property
    def dim(self) -> int:
        """The number of parameters P."""
        return self.mean.numel()

    def sample(self, n: int, generator: torch.Generator | None = None) -> Tensor:
        """``n`` copies of the mean, (n, P); ``generator`` is not used."""
        return self.mean.expand(n, -1).clone()

    def arrays(self) -> dict[str, Tensor]:
        """The named arrays that travel and that are saved: ``mean``."""
        return {"mean": self.mean}

    def to(self, dtype: torch.dtype | None = None, device: torch.device | str | None = None) -> Self:
        """The same point in another floating-point precision or on another device."""
        return type(self)(self.mean.to(device=device, dtype=dtype))
