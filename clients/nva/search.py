"""NVA: natural variational annealing (Le Minh, Arbel, Möllenhoff, Khan, Forbes 2025, arXiv 2501.04667).

Maximises E_q[l] + omega H(q) over Gaussian mixtures q by natural-gradient steps while omega falls to zero: the
components settle on the global modes of l. With l a sum of terms that different clients hold, the clients only
evaluate.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from typing import Any

import torch
from torch import Tensor

from bayesfed.errors import InputError, choice, integer
from bayesfed.families.natural import all_finite
from bayesfed.seeding import torch_generator
from clients.gaussian_steps import retract
from clients.nva.settings import Annealing
from clients.nva.state import Mixture
from clients.nva.step import ESTIMATORS, LogDensity, rank_weights, reply, stein

Observer = Callable[[int, "Mixture"], None]
LOG_DENSITY_FLOOR = -743.0  # exp underflows below it
LARGEST_LOGIT = 10.0


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
    samples; black box, the most robust), "stein" (values; black box, needs many samples), "hessian" (derivatives by
    autograd). num_steps * num_components * samples evaluations in all.

    `init` replaces the random start. `observer(i, mixture)` is called with what each step starts from and with the
    result. Further keywords (`samples`, `step_size`, `temperature` ...) are those of :class:`Annealing`.

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

    In every step the server sends the points (or, cheaper, the mixture: the noise is keyed by the seed and the step),
    each client replies with :func:`reply`, and the server adds the replies up. Sums are all the server sees, so secure
    aggregation applies, and the result is that of :func:`maximize` on the sum, to rounding: modes of single terms that
    are none of the sum are not found.

    A reply has K B numbers ("fitness", "stein") or K (1 + d + d^2) ("hessian", averaged over the client's points). A
    mixture is no exponential family, so there is no natural parameter to upload and no `client=nva` under BayesADMM.
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
