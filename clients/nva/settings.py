"""How NVA samples, cools and steps."""

from __future__ import annotations

import math
from dataclasses import dataclass

import torch

from bayesfed.errors import InputError, integer, number
from bayesfed.seeding import torch_generator
from clients.nva.state import Mixture


@dataclass(frozen=True)
class Annealing:
    """In step i = 2, 3, ...: omega_i = temperature / i^cooling, rho_i = step_size min(i^(0.7 cooling), 1/damping).

    Attributes:
        samples: of each component in a step.
        parents: how many of them count with estimator "fitness".
        temperature, cooling: of omega.
        step_size: of rho, > 0. The estimator "hessian" takes far larger ones: 0.01 ... 0.1.
        damping: added to the covariances' diagonals in each step; their floor.
        init_range: means start uniform in [-init_range, init_range]^d, with unit covariances and equal weights.

    Raises:
        InputError: a value out of range.
    """

    samples: int = 16
    parents: int = 4
    temperature: float = 1.0
    cooling: float = 1.0
    step_size: float = 1e-4
    damping: float = 1e-7
    init_range: float = 2.0

    def __post_init__(self) -> None:
        for name in ("samples", "parents"):
            object.__setattr__(self, name, integer(name, getattr(self, name), at_least=1))
        for name in ("temperature", "cooling", "damping", "init_range"):
            object.__setattr__(self, name, number(name, getattr(self, name), at_least=0))
        object.__setattr__(self, "step_size", number("step_size", self.step_size, above=0))
        if self.parents > self.samples:
            raise InputError("parents", self.parents, f"must be at most samples={self.samples}")

    def omega(self, i: int) -> float:
        """Temperature of step i."""
        return self.temperature / i**self.cooling

    def rho(self, i: int) -> float:
        """Step size of step i."""
        return self.step_size * min(i ** (0.7 * self.cooling), 1 / self.damping if self.damping else math.inf)

    def start(self, dim: int, num_components: int, seed: int) -> Mixture:
        """Where the components begin."""
        uniform = torch.rand(num_components, dim, generator=torch_generator(seed, "nva", "means"), dtype=torch.float64)
        weights = torch.full((num_components,), 1 / num_components, dtype=torch.float64)
        covariances = torch.eye(dim, dtype=torch.float64).repeat(num_components, 1, 1)
        return Mixture(self.init_range * (2 * uniform - 1), covariances, weights)
