"""NVA: natural variational annealing (Le Minh, Arbel, Möllenhoff, Khan, Forbes 2025, arXiv 2501.04667).

Maximises E_q[l] + omega H(q) over Gaussian mixtures q by natural-gradient steps while omega falls to zero: the
components settle on the global modes of l. With l a sum of terms that different clients hold, the clients only evaluate.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from functools import cached_property
from typing import Any

import torch
from torch import Tensor

from bayesfed.errors import InputError, choice, integer, number
from bayesfed.families.natural import all_finite
from bayesfed.seeding import torch_generator
from clients.gaussian_steps import retract

LogDensity = Callable[[Tensor], Tensor]
Observer = Callable[[int, "Mixture"], None]
LOG_DENSITY_FLOOR = -743.0  # exp underflows below it
LARGEST_LOGIT = 10.0
ESTIMATORS = ("fitness", "stein", "hessian")


@dataclass(frozen=True)
class Mixture:
    """means (K, d), covariances (K, d, d), weights (K,), all float64."""

    means: Tensor
    covariances: Tensor
    weights: Tensor

    @cached_property
    def factors(self) -> Tensor:
        """Lower Cholesky factors of the covariances, (K, d, d)."""
        factors: Tensor = torch.linalg.cholesky(self.covariances)
        return factors

    def log_density(self, x: Tensor) -> Tensor:
        """log q at x (B, d): (B,)."""
        return torch.logsumexp(self._component_terms(x)[0], 0)

    def _component_terms(self, x: Tensor) -> tuple[Tensor, Tensor]:
        """log pi_k N_k(x) (K, B) and the whitened offsets L_k^-1 (x - mu_k) (K, d, B)."""
        offsets = (x[None] - self.means[:, None]).mT
        whitened = torch.linalg.solve_triangular(self.factors, offsets, upper=False)
        log_scale = self.factors.diagonal(dim1=-2, dim2=-1).log().sum(-1) + 0.5 * math.log(2 * math.pi) * x.shape[-1]
        return self.weights.log()[:, None] - log_scale[:, None] - 0.5 * whitened.square().sum(1), whitened

    def derivatives(self, x: Tensor) -> tuple[Tensor, Tensor]:
        """Gradient (B, d) and Hessian (B, d, d) of log q at x (B, d), in closed form."""
        terms, whitened = self._component_terms(x)
        shares = torch.softmax(terms, 0)  # responsibilities (K, B)
        pulls = -torch.linalg.solve_triangular(self.factors.mT, whitened, upper=True)  # S_k (mu_k - x), (K, d, B)
        gradient = torch.einsum("kb,kib->bi", shares, pulls)
        precisions = torch.cholesky_inverse(self.factors)
        hessian = torch.einsum("kb,kib,kjb->bij", shares, pulls, pulls)
        hessian = hessian - torch.einsum("kb,kij->bij", shares, precisions)
        return gradient, hessian - gradient[:, :, None] * gradient[:, None]


@dataclass(frozen=True)
class Annealing:
    """How NVA samples, cools and steps: omega_i = temperature / i^cooling, rho_i = step_size min(i^(0.7 cooling), 1/damping), i = 2, 3, ...

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


def maximize(
    log_density: LogDensity,
    dim: int,
    num_components: int,
    num_steps: int,
    seed: int,
    estimator: str = "fitness",
    *,
    init: Mixture | None = None,
    observer: Observer | None = None,
    **annealing: Any,
) -> Mixture:
    """The annealed mixture after `num_steps` steps; `log_density` takes (B, d) and returns (B,), in float64.

    `estimator` of the expected gradient and Hessian of l - omega log q: "fitness" (rank weights of the best `parents`
    samples; black box, the most robust), "stein" (values; black box, needs many samples), "hessian" (derivatives by autograd).
    num_steps * num_components * samples evaluations in all.

    `init` replaces the random start. `observer(i, mixture)` is called with what each step starts from and with the result.
    Further keywords (`samples`, `step_size`, `temperature` ...) are those of :class:`Annealing`.

    Several components may end on one mode, and components may be left on lower ones: see :func:`modes`.

    Raises ValueError for an unknown estimator or values out of range.
    """
    return maximize_federated(
        [log_density], dim, num_components, num_steps, seed, estimator, init=init, observer=observer, **annealing
    )


@torch.inference_mode(False)  # derivatives are taken whatever the caller's mode is
def maximize_federated(
    terms: Sequence[LogDensity],
    dim: int,
    num_components: int,
    num_steps: int,
    seed: int,
    estimator: str = "fitness",
    *,
    init: Mixture | None = None,
    observer: Observer | None = None,
    **annealing: Any,
) -> Mixture:
    """:func:`maximize` for l = sum_k l_k where client k evaluates only its own term l_k (a prior is one more term).

    In every step the server sends the points (or, cheaper, the mixture: the noise is keyed by the seed and the step), each client
    replies with :func:`reply`, and the server adds the replies up. Sums are all the server sees, so secure aggregation applies, and the
    result is that of :func:`maximize` on the sum, to rounding: modes of single terms that are none of the sum are not found.

    A reply has K B numbers ("fitness", "stein") or K (1 + d + d^2) ("hessian", averaged over the client's points). A mixture is no
    exponential family, so there is no natural parameter to upload and no `client=nva` under BayesADMM.
    """
    plan = Annealing(**annealing)
    if not terms:
        raise InputError("terms", "none", "give at least one")
    choice("estimator", estimator, ESTIMATORS)
    dim = integer("dim", dim, at_least=1)
    num_components = integer("num_components", num_components, at_least=1)
    num_steps = integer("num_steps", num_steps, at_least=0)
    mixture = plan.start(dim, num_components, seed) if init is None else init
    precisions = torch.cholesky_inverse(mixture.factors)
    logits = mixture.weights.log() - mixture.weights[-1].log()
    generator, eye = torch_generator(seed, "nva", "samples"), torch.eye(dim, dtype=torch.float64)
    for i in range(2, num_steps + 2):
        if observer is not None:
            observer(i, mixture)
        noise = torch.randn(num_components, plan.samples, dim, generator=generator, dtype=torch.float64)
        offsets = noise @ mixture.factors.mT
        points = mixture.means[:, None] + offsets
        replies = [reply(term, points, estimator) for term in terms]
        values, gradient, hessian = (torch.stack(parts).sum(0) for parts in zip(*replies, strict=True))
        if not all(all_finite(part) for part in (values, gradient, hessian)):
            what = "derivatives" if all_finite(values) else "values"
            raise InputError("log_density", f"{what} that are not finite", f"must be finite at every sample (step {i})")
        omega, rho = plan.omega(i), plan.rho(i)
        entropy = (
            mixture.log_density(points.flatten(0, 1)).clamp(min=LOG_DENSITY_FLOOR).view(num_components, plan.samples)
        )
        if estimator == "hessian":
            slope, curvature = (
                d.unflatten(0, (-1, plan.samples)).mean(1) for d in mixture.derivatives(points.flatten(0, 1))
            )
            gradient, hessian = gradient - omega * slope, hessian - omega * curvature
            heights = values - omega * entropy.mean(1)
        else:
            values = values - omega * entropy
            weights = rank_weights(values, plan.parents) if estimator == "fitness" else values / plan.samples
            gradient, hessian = stein(weights, offsets, precisions)
            heights = values.mean(1)

        precisions = retract(precisions, mixture.covariances, -hessian, rho)
        covariances = torch.cholesky_inverse(torch.linalg.cholesky(precisions)) + plan.damping * eye
        precisions = torch.cholesky_inverse(torch.linalg.cholesky(covariances)) if plan.damping else precisions
        means = mixture.means + rho * (covariances @ gradient[:, :, None])[:, :, 0]
        logits = (logits + rho * (heights - heights[-1])).clamp(-LARGEST_LOGIT, LARGEST_LOGIT)
        mixture = Mixture(means, covariances, torch.softmax(logits, 0))
    if observer is not None:
        observer(num_steps + 2, mixture)
    return mixture


def reply(term: LogDensity, points: Tensor, estimator: str) -> tuple[Tensor, Tensor, Tensor]:
    """What a client sends about its term at points (K, B, d).

    Values (K, B) for "fitness" and "stein". For "hessian" each component's mean value (K,), gradient (K, d) and Hessian (K, d, d)
    by autograd: one forward, one backward and d second backward passes for all points together. The others are empty.
    """
    components, samples, dim = points.shape
    flat = points.flatten(0, 1)
    if estimator != "hessian":
        values = term(flat).detach()
        _require_shape(values, flat)
        return values.view(components, samples), values.new_zeros(0), values.new_zeros(0)
    flat = flat.detach().requires_grad_()
    with torch.enable_grad():
        values = term(flat)
        _require_shape(values, flat)
        (gradient,) = torch.autograd.grad(values.sum(), flat, create_graph=True)
        hessian = torch.zeros(len(flat), dim, dim, dtype=flat.dtype)
        if gradient.requires_grad:  # a linear term has no second derivative
            for row in range(dim):
                (hessian[:, row],) = torch.autograd.grad(
                    gradient[:, row].sum(), flat, retain_graph=row + 1 < dim, materialize_grads=True
                )
    means = (part.detach().unflatten(0, (components, samples)).mean(1) for part in (values, gradient, hessian))
    value, slope, curvature = means
    return value, slope, curvature


def stein(weights: Tensor, offsets: Tensor, precisions: Tensor) -> tuple[Tensor, Tensor]:
    """Gradient (K, d) and Hessian (K, d, d) of E f from weights (K, B) = f / B at offsets (K, B, d) from the means.

    sum_b w_b S d_b and sum_b w_b (S d_b d_b^T S - S): no derivatives of f.
    """
    whitened = offsets @ precisions  # S d
    weighted = weights[:, :, None] * whitened
    return weighted.sum(1), weighted.mT @ whitened - weights.sum(1)[:, None, None] * precisions


def rank_weights(values: Tensor, parents: int) -> Tensor:
    """Weights (K, B) of each row's best `parents` values: log(P+1) - log r for rank r, summing to one; else 0."""
    ranks = torch.arange(1, parents + 1, dtype=values.dtype)
    weights = math.log(parents + 1) - ranks.log()
    best = values.argsort(dim=1, descending=True, stable=True)[:, :parents]
    return torch.zeros_like(values).scatter(1, best, (weights / weights.sum()).expand(len(values), -1))


def modes(
    mixture: Mixture, log_density: LogDensity, radius: float = 0.1, drop: float = math.inf
) -> tuple[Tensor, Tensor]:
    """Distinct modes among the components: places (M, d) and heights (M,), highest first.

    Means within `radius` of a higher one count as the same mode; those more than `drop` below the highest are left out.
    """
    heights = log_density(mixture.means).detach()
    kept: list[int] = []
    for k in heights.argsort(descending=True).tolist():
        far = all(float((mixture.means[k] - mixture.means[j]).norm()) > radius for j in kept)
        if far and (not kept or float(heights[kept[0]] - heights[k]) <= drop):
            kept.append(k)
    return mixture.means[kept], heights[kept]


def _require_shape(values: Tensor, points: Tensor) -> None:
    if values.shape != points.shape[:1]:
        raise InputError(
            "log_density", f"shape {tuple(values.shape)}", f"must return ({len(points)},) for {len(points)} points"
        )
