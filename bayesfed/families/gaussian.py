"""What all Gaussian families share: natural parameters ``(S m, -S/2)`` and checks."""

from __future__ import annotations

from abc import ABC, abstractmethod
from typing import ClassVar, Self

import torch
from torch import Tensor

from bayesfed.families.natural import NaturalParameters, all_finite


class Gaussian(ABC):
    """A Gaussian ``N(m, S^-1)`` with some structure of the precision ``S``.

    The families differ only in the shape of ``S``: () isotropic, (P,) diagonal, (P, P) full. With ``T(theta) = (theta, theta theta^T)``
    (restricted to that structure) the density is ``exp(<lambda, T> - A(lambda))`` and ``lambda = (S m, -S/2)``
    (arXiv 2506.13150; Wainwright and Jordan 2008, section 3).

    Attributes:
        mean: (P,).
        precision: (), (P,) or (P, P); positive (definite).
    """

    name: ClassVar[str]
    is_point: ClassVar[bool] = False  # whether the predictive at the mean is the model average

    def __init__(self, mean: Tensor, precision: Tensor):
        self.mean = mean
        self.precision = precision

    # -- construction ---------------------------------------------------------------------------------------------

    @classmethod
    def from_mean_precision(cls, mean: Tensor, precision: Tensor) -> Self:
        """The Gaussian with this mean (P,) and precision.

        Raises:
            ValueError: naming the entries that are not finite or not positive, or the shape expected.
        """
        if mean.dim() != 1:
            raise ValueError(f"mean must have shape (P,), got {tuple(mean.shape)}")
        precision = precision.to(mean)
        expected = cls.precision_shape(mean.numel())
        if precision.shape != expected:
            raise ValueError(
                f"precision of a {cls.name} Gaussian in {mean.numel()} dimensions must have shape {tuple(expected)}, "
                f"got {tuple(precision.shape)}"
            )
        if not mean.is_meta:
            require_finite(mean, "mean")
            require_finite(precision, "precision")
            cls.require_positive(precision)
        return cls(mean, precision)

    @classmethod
    def from_natural(cls, natural: NaturalParameters) -> Self:
        """The Gaussian with natural parameters ``lambda = (S m, -S/2)``.

        Raises:
            ValueError: where ``-2 second`` is not a positive (definite) precision, naming the entries.
        """
        cls._require_family(natural)
        precision = natural.quadratic * -2.0
        if not precision.is_meta:
            require_finite(precision, "precision")
            cls.require_positive(precision)
        return cls.from_mean_precision(cls.solve(precision, natural.linear), precision)

    @classmethod
    @abstractmethod
    def from_expectation(cls, first: Tensor, second: Tensor) -> Self:
        """The Gaussian with expectation parameters ``mu = E[T]`` (as given by :attr:`expectation`)."""

    @classmethod
    def isotropic(cls, mean: Tensor, precision: float) -> Self:
        """The member with precision ``precision * I`` (every family has it: the prior, a first guess)."""
        return cls.from_mean_precision(mean, cls.precision_like(mean, precision))

    @classmethod
    def prior(cls, initial: Tensor, precision: float) -> Self:
        """Where a server starts: weights around 0, for a network whose initialisation is ``initial`` (P,)."""
        return cls.isotropic(torch.zeros_like(initial), precision)

    @classmethod
    def array_shapes(cls, dim: int) -> dict[str, tuple[int, ...]]:
        """The shapes of :meth:`arrays` for P = ``dim``."""
        return {"mean": (dim,), "precision": tuple(cls.precision_shape(dim))}

    @classmethod
    def from_arrays(cls, arrays: dict[str, Tensor]) -> Self:
        """The inverse of :meth:`arrays`."""
        return cls.from_mean_precision(arrays["mean"], arrays["precision"])

    @classmethod
    def zero(cls, mean: Tensor) -> NaturalParameters:
        """The zero of the natural-parameter space for ``mean``'s dimension, dtype and device."""
        return NaturalParameters(cls.name, torch.zeros_like(mean), mean.new_zeros(cls.precision_shape(mean.numel())))

    # -- structure of the precision -------------------------------------------------------------------------------

    @classmethod
    @abstractmethod
    def precision_shape(cls, dim: int) -> torch.Size:
        """Shape of the precision for P = ``dim``."""

    @classmethod
    @abstractmethod
    def precision_like(cls, mean: Tensor, value: float) -> Tensor:
        """``value * I`` in this family's shape, with ``mean``'s dtype and device."""

    @classmethod
    @abstractmethod
    def require_positive(cls, precision: Tensor) -> None:
        """Raise ValueError unless ``precision`` is positive (definite)."""

    @classmethod
    @abstractmethod
    def solve(cls, precision: Tensor, vector: Tensor) -> Tensor:
        """``S^-1 vector`` for vector (P,)."""

    @classmethod
    @abstractmethod
    def multiply(cls, precision: Tensor, vector: Tensor) -> Tensor:
        """``S vector`` for vector (P,); ``precision`` need not be positive (sites, duals)."""

    @classmethod
    @abstractmethod
    def raise_precision(
        cls, natural: NaturalParameters, floor: Tensor, mean: Tensor
    ) -> tuple[NaturalParameters, Tensor]:
        """Lift the precision to ``floor`` where it is below, there with the given ``mean``.

        Args:
            natural: may have any (also negative) precision.
            floor: the smallest precision allowed, in this family's shape; () for the full family (smallest eigenvalue).
            mean: (P,) the mean that lifted coordinates (or eigendirections) get.

        Returns:
            natural parameters with precision at least ``floor``, and how many entries were lifted, shape ().
        """

    # -- the exponential family -----------------------------------------------------------------------------------

    @property
    def dim(self) -> int:
        """The number of parameters P."""
        return self.mean.numel()

    @property
    def natural(self) -> NaturalParameters:
        """The natural parameters ``lambda = (S m, -S/2)``."""
        return NaturalParameters(self.name, self.multiply(self.precision, self.mean), self.precision * -0.5)

    @property
    @abstractmethod
    def expectation(self) -> tuple[Tensor, Tensor]:
        """The expectation parameters ``mu = (m, E[theta theta^T])`` restricted to the family's structure."""

    @abstractmethod
    def sample(self, n: int, generator: torch.Generator | None = None) -> Tensor:
        """``n`` independent draws, shape (n, P)."""

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
        """The diagonal of ``S``, () or (P,)."""
        return self.precision

    def arrays(self) -> dict[str, Tensor]:
        """The named arrays that travel and that are saved: ``mean`` and ``precision``."""
        return {"mean": self.mean, "precision": self.precision}

    def to(self, dtype: torch.dtype | None = None, device: torch.device | str | None = None) -> Self:
        """The same distribution in another floating-point precision or on another device."""
        return type(self)(self.mean.to(device=device, dtype=dtype), self.precision.to(device=device, dtype=dtype))

    def __repr__(self) -> str:
        return f"{type(self).__name__}(dim={self.dim}, dtype={self.mean.dtype}, device={self.mean.device})"

    def _require_same(self, other: Gaussian) -> None:
        if type(other) is not type(self) or other.dim != self.dim:
            raise ValueError(
                f"KL needs two {self.name} Gaussians of one dimension, got {other.name} in {other.dim} (here {self.dim})"
            )

    @classmethod
    def _require_family(cls, natural: NaturalParameters) -> None:
        if natural.family != cls.name:
            raise ValueError(f"expected natural parameters of the {cls.name} family, got {natural.family}")


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
