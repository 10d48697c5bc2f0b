"""What families with natural parameters share: ``lambda = (S l, -S/2)``, their arrays, and checks."""

from __future__ import annotations

from abc import ABC, abstractmethod
from typing import ClassVar, Self

import torch
from torch import Tensor

from bayesfed.families.natural import NaturalParameters, all_finite


class ExponentialFamily(ABC):
    """A distribution ``exp(<lambda, T(theta)> - A(lambda))`` of P weights, Gaussian in some coordinates.

    There it has a location ``l`` and a precision ``S`` of some structure, so that ``lambda = (S l, -S/2)``. The
    coordinates are the weights themselves for Gaussians (``l`` is the mean), and logarithms for the log-normal family.

    Attributes:
        mean: (P,) the weights' mean.
        precision: ``S``: (), (n,) or (n, n) in n coordinates; positive (definite).
    """

    name: ClassVar[str]
    is_point: ClassVar[bool] = False  # whether the predictive at the mean is the model average
    location_name: ClassVar[str]  # of the attribute that holds ``l`` (n,), and of the array that travels and is saved
    coordinates: ClassVar[int] = 1  # of a weight: n = coordinates * P

    mean: Tensor
    precision: Tensor

    @abstractmethod
    def __init__(self, location: Tensor, precision: Tensor):
        """Without checks; see :meth:`from_location`."""

    # -- construction -------------------------------------------------------------------------------------------------

    @classmethod
    def from_location(cls, location: Tensor, precision: Tensor) -> Self:
        """The member with this location (n,) and precision.

        Raises:
            ValueError: naming the entries that are not finite or not positive, or the shape expected.
        """
        if location.dim() != 1 or location.numel() % cls.coordinates:
            size = "P" if cls.coordinates == 1 else f"{cls.coordinates}P"
            raise ValueError(f"{cls.location_name} must have shape ({size},), got {tuple(location.shape)}")
        precision = precision.to(location)
        expected = cls.precision_shape(location.numel())
        if precision.shape != expected:
            raise ValueError(
                f"precision of a {cls.name} posterior of {location.numel() // cls.coordinates} weights must have shape "
                f"{tuple(expected)}, got {tuple(precision.shape)}"
            )
        if not location.is_meta:
            require_finite(location, cls.location_name)
            require_finite(precision, "precision")
            cls.require_positive(precision)
        return cls(location, precision)

    @classmethod
    def from_natural(cls, natural: NaturalParameters) -> Self:
        """The member with natural parameters ``lambda = (S l, -S/2)``.

        Raises:
            ValueError: where their precision is not positive (definite), naming the entries.
        """
        if natural.family != cls.name:
            raise ValueError(f"expected natural parameters of the {cls.name} family, got {natural.family}")
        precision = natural.precision
        if not precision.is_meta:
            require_finite(precision, "precision")
            cls.require_positive(precision)
        return cls.from_location(cls.solve(precision, natural.linear), precision)

    @classmethod
    @abstractmethod
    def from_mean_precision(cls, mean: Tensor, precision: Tensor) -> Self:
        """A member with this mean (P,) of the weights and this precision; ValueError as in :meth:`from_location`."""

    @classmethod
    @abstractmethod
    def from_expectation(cls, first: Tensor, second: Tensor) -> Self:
        """The member with expectation parameters ``mu = E[T]`` (as given by :attr:`expectation`)."""

    @classmethod
    @abstractmethod
    def prior(cls, initial: Tensor, precision: float) -> Self:
        """Where a server starts: weights around 0, for a network whose initialisation is ``initial`` (P,)."""

    @classmethod
    def array_shapes(cls, dim: int) -> dict[str, tuple[int, ...]]:
        """The shapes of :meth:`arrays` for P = ``dim``."""
        size = dim * cls.coordinates
        return {cls.location_name: (size,), "precision": tuple(cls.precision_shape(size))}

    @classmethod
    def from_arrays(cls, arrays: dict[str, Tensor]) -> Self:
        """The inverse of :meth:`arrays`."""
        return cls.from_location(arrays[cls.location_name], arrays["precision"])

    @classmethod
    def zero(cls, mean: Tensor) -> NaturalParameters:
        """The zero of the natural-parameter space for ``mean``'s dimension, dtype and device."""
        size = mean.numel() * cls.coordinates
        return NaturalParameters(cls.name, mean.new_zeros(size), mean.new_zeros(cls.precision_shape(size)))

    # -- structure of the precision -----------------------------------------------------------------------------------

    @classmethod
    @abstractmethod
    def precision_shape(cls, size: int) -> torch.Size:
        """Shape of the precision in ``size`` coordinates."""

    @classmethod
    @abstractmethod
    def require_positive(cls, precision: Tensor) -> None:
        """Raise ValueError unless ``precision`` is positive (definite)."""

    @classmethod
    @abstractmethod
    def solve(cls, precision: Tensor, vector: Tensor) -> Tensor:
        """``S^-1 vector`` for vector (n,)."""

    @classmethod
    @abstractmethod
    def multiply(cls, precision: Tensor, vector: Tensor) -> Tensor:
        """``S vector`` for vector (n,); ``precision`` need not be positive (sites, duals)."""

    @classmethod
    @abstractmethod
    def raise_precision(
        cls, natural: NaturalParameters, floor: Tensor, location: Tensor
    ) -> tuple[NaturalParameters, Tensor]:
        """Lift the precision to ``floor`` where it is below, there with the given ``location``.

        Args:
            natural: may have any (also negative) precision.
            floor: the smallest precision allowed, in this family's shape; () for the full family (smallest eigenvalue).
            location: (n,) that lifted coordinates (or eigendirections) get.

        Returns:
            natural parameters with precision at least ``floor``, and how many entries were lifted, shape ().
        """

    # -- the exponential family ---------------------------------------------------------------------------------------

    @property
    def dim(self) -> int:
        """The number of weights P."""
        return self.mean.numel()

    @property
    def location(self) -> Tensor:
        """``l``, (n,)."""
        location: Tensor = getattr(self, self.location_name)
        return location

    @property
    def natural(self) -> NaturalParameters:
        """The natural parameters ``lambda = (S l, -S/2)``."""
        return NaturalParameters(self.name, self.multiply(self.precision, self.location), self.precision * -0.5)

    @property
    @abstractmethod
    def expectation(self) -> tuple[Tensor, Tensor]:
        """The expectation parameters ``mu = E[T]``: the coordinates' first moments, and second ones as S has them."""

    @abstractmethod
    def sample(self, n: int, generator: torch.Generator | None = None) -> Tensor:
        """``n`` independent draws of the weights, shape (n, P)."""

    @abstractmethod
    def log_prob(self, theta: Tensor) -> Tensor:
        """Log density at theta (..., P), shape (...)."""

    @abstractmethod
    def kl(self, other: Self) -> Tensor:
        """``KL(self || other)`` in nats, shape ()."""

    def precision_summary(self) -> tuple[float, float, float]:
        """Smallest, mean and largest marginal precision (diagonal of ``S``), for logs."""
        diagonal = self.precision_diagonal()
        return float(diagonal.min()), float(diagonal.mean()), float(diagonal.max())

    def precision_diagonal(self) -> Tensor:
        """The diagonal of ``S``, () or (n,)."""
        return self.precision

    def arrays(self) -> dict[str, Tensor]:
        """The named arrays that travel and that are saved: location and ``precision``."""
        return {self.location_name: self.location, "precision": self.precision}

    def to(self, dtype: torch.dtype | None = None, device: torch.device | str | None = None) -> Self:
        """The same distribution in another floating-point precision or on another device."""
        return type(self)(self.location.to(device=device, dtype=dtype), self.precision.to(device=device, dtype=dtype))

    def __repr__(self) -> str:
        return f"{type(self).__name__}(dim={self.dim}, dtype={self.mean.dtype}, device={self.mean.device})"

    def _require_same(self, other: ExponentialFamily) -> None:
        if type(other) is not type(self) or other.dim != self.dim:
            raise ValueError(
                f"KL needs two {self.name} posteriors of one dimension, got {other.name} in {other.dim} ({self.dim})"
            )


def require_finite(values: Tensor, name: str) -> None:
    """Raise ValueError naming the entries of ``values`` that are not finite."""
    if not all_finite(values):
        require(values.isfinite(), values, name, "not finite")


def require(good: Tensor, values: Tensor, what: str, problem: str) -> None:
    """Raise ValueError naming the entries of ``values`` where ``good`` (bool, same shape) is False."""
    if bool(good.all()):
        return
    bad = (~good).nonzero()
    first = bad[0].tolist()
    where = f"entry {first if len(first) != 1 else first[0]}" if first else "value"
    raise ValueError(
        f"{what} is {problem} in {len(bad)} of {good.numel()} entries, first {where}: {values[tuple(first)].item():g}"
    )
