"""NVA: natural variational annealing (Le Minh, Arbel, Möllenhoff, Khan, Forbes 2025, arXiv 2501.04667).

Maximises E_q[l] + omega H(q) over Gaussian mixtures q by natural-gradient steps while omega falls to zero: the
components settle on the global modes of l.
"""

from __future__ import annotations

import math
from collections.abc import Callable
from dataclasses import dataclass
from functools import cached_property

import torch
from torch import Tensor

from bayesfed.errors import InputError, choice, integer

LOG_DENSITY_FLOOR = -743.0  # exp underflows below it
LARGEST_LOGIT = 10.0


@dataclass(frozen=True)
class Mixture:
    """means (K, d), covariances (K, d, d), weights (K,)."""

    means: Tensor
    covariances: Tensor
    weights: Tensor

    @cached_property
    def factors(self) -> Tensor:
        """Lower Cholesky factors of the covariances, (K, d, d)."""
        factors: Tensor = torch.linalg.cholesky(self.covariances)
        return factors


def maximize(
    log_density: Callable[[Tensor], Tensor],
    dim: int,
    num_components: int,
    num_steps: int,
    seed: int,
    estimator: str = "fitness",
    *,
    samples: int = 16,
    parents: int = 4,
    temperature: float = 1.0,
    cooling: float = 1.0,
    step_size: float = 1e-4,
    damping: float = 1e-7,
    init_range: float = 2.0,
) -> Mixture:
    """The annealed mixture after `num_steps` steps; `log_density` takes (B, d) and returns (B,), in float64.

    omega_i = temperature / i^cooling, rho_i = step_size min(i^(0.7 cooling), 1/damping), i = 2, 3, ...; means start
    uniform in [-init_range, init_range]^d with unit covariances and equal weights. `samples` per component and step.
    `estimator` of the expected gradient and Hessian of l - omega log q: "fitness" (rank weights of the best `parents`
    samples), "stein" (values; needs many samples), "hessian" (derivatives of `log_density` by autograd).

    Raises ValueError for an unknown estimator or counts out of range.
    """
    choice("estimator", estimator, ("fitness", "stein", "hessian"))
    counts = {"dim": dim, "num_components": num_components, "samples": samples, "parents": parents}
    for name, count in counts.items():
        integer(name, count, at_least=1)
    integer("num_steps", num_steps, at_least=0)
    if parents > samples:
        raise InputError("parents", parents, f"must be at most samples={samples}")
    generator = torch.Generator().manual_seed(seed)
    eye = torch.eye(dim, dtype=torch.float64)
    means = init_range * (2 * torch.rand(num_components, dim, generator=generator, dtype=torch.float64) - 1)
    covariances = eye.repeat(num_components, 1, 1)
    precisions = covariances.clone()
    logits = torch.zeros(num_components, dtype=torch.float64)
    for i in range(2, num_steps + 2):
        omega = temperature / i**cooling
        rho = step_size * min(i ** (0.7 * cooling), 1 / damping if damping else float("inf"))
        noise = torch.randn(num_components, samples, dim, generator=generator, dtype=torch.float64)
        mixture = Mixture(means, covariances, torch.softmax(logits, 0))
        offsets = noise @ mixture.factors.mT
        points = (means[:, None] + offsets).flatten(0, 1)

        def penalised(x: Tensor, mixture: Mixture = mixture, omega: float = omega) -> Tensor:
            return log_density(x) - omega * mixture_log_density(mixture, x).clamp(min=LOG_DENSITY_FLOOR)

        values = penalised(points).detach().view(num_components, samples)
        if estimator == "hessian":
            gradient, hessian = _derivatives(penalised, points, num_components)
        else:
            weights = rank_weights(values, parents) if estimator == "fitness" else values / samples
            whitened = offsets @ precisions  # S d
            gradient = torch.einsum("kb,kbi->ki", weights, whitened)
            outer = torch.einsum("kb,kbi,kbj->kij", weights, whitened, whitened)
            hessian = outer - weights.sum(1)[:, None, None] * precisions
        stepped = precisions - rho * hessian + 0.5 * rho**2 * hessian @ covariances @ hessian
        covariances = torch.linalg.inv(0.5 * (stepped + stepped.mT)) + damping * eye
        covariances = 0.5 * (covariances + covariances.mT)
        precisions = torch.linalg.inv(covariances)
        means = means + rho * torch.einsum("kij,kj->ki", covariances, gradient)
        heights = values.mean(1)
        logits = (logits + rho * (heights - heights[-1])).clamp(-LARGEST_LOGIT, LARGEST_LOGIT)
    return Mixture(means, covariances, torch.softmax(logits, 0))


def mixture_log_density(mixture: Mixture, x: Tensor) -> Tensor:
    """log q at x (B, d): (B,)."""
    factors = mixture.factors
    offsets = (x[None] - mixture.means[:, None]).mT  # (K, d, B)
    squares = torch.linalg.solve_triangular(factors, offsets, upper=False).square().sum(1)
    log_scale = factors.diagonal(dim1=-2, dim2=-1).log().sum(-1) + 0.5 * math.log(2 * math.pi) * x.shape[-1]
    return torch.logsumexp(mixture.weights.log()[:, None] - log_scale[:, None] - 0.5 * squares, 0)


def rank_weights(values: Tensor, parents: int) -> Tensor:
    """Weights (K, B) of each row's best `parents` values: log(P+1) - log r for rank r, summing to one; else 0."""
    ranks = torch.arange(1, parents + 1, dtype=values.dtype)
    weights = torch.log(torch.tensor(parents + 1.0, dtype=values.dtype)) - ranks.log()
    best = values.argsort(dim=1, descending=True, stable=True)[:, :parents]
    return torch.zeros_like(values).scatter(1, best, (weights / weights.sum()).expand(len(values), -1))


def _derivatives(f: Callable[[Tensor], Tensor], points: Tensor, num_components: int) -> tuple[Tensor, Tensor]:
    """Each component's average gradient (K, d) and Hessian (K, d, d) of f over its points."""

    def single(x: Tensor) -> Tensor:
        return f(x[None])[0]

    gradient = torch.func.vmap(torch.func.grad(single))(points)
    hessian = torch.func.vmap(torch.func.hessian(single))(points)
    return (
        gradient.unflatten(0, (num_components, -1)).mean(1),
        hessian.unflatten(0, (num_components, -1)).mean(1),
    )
