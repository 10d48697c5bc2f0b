"""Expected gradient and Hessian of the objective under each component, from what clients reply about their terms."""

from __future__ import annotations

import math
from collections.abc import Callable

import torch
from torch import Tensor

from bayesfed.errors import InputError

LogDensity = Callable[[Tensor], Tensor]
ESTIMATORS = ("fitness", "stein", "hessian")


def reply(term: LogDensity, points: Tensor, estimator: str) -> tuple[Tensor, Tensor, Tensor]:
    """What a client sends about its term at points (K, B, d).

    Values (K, B) for "fitness" and "stein". For "hessian" each component's mean value (K,), gradient (K, d) and Hessian
    (K, d, d)
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


def _require_shape(values: Tensor, points: Tensor) -> None:
    if values.shape != points.shape[:1]:
        raise InputError(
            "log_density", f"shape {tuple(values.shape)}", f"must return ({len(points)},) for {len(points)} points"
        )
