"""LMD's equations: regularisers and the step, elementwise on the two parts of every weight."""

from __future__ import annotations

import math
from collections.abc import Callable

import torch
from torch import Tensor

REGULARISERS: dict[str, Callable[[Tensor, Tensor, float], Tensor]] = {
    # d/dlog m of the expected negative log prior at strength 1, from log m, E[u] and sigma^2; (2, P) each
    "l1": lambda log_median, means, variance: means,
    "l2": lambda log_median, means, variance: means.square() * math.exp(variance),
    "weight": lambda log_median, means, variance: means * (means * math.exp(variance) - means.flip(0)),
    "lognormal": lambda log_median, means, variance: log_median,
}


def lmd_step(
    log_median: Tensor,
    momentum: Tensor,
    gradient: Tensor,
    regulariser: Tensor | float,
    *,
    lr: float,
    beta1: float,
    beta2: float,
    signed: bool = True,
    temperature: float = 0.0,
    pull: Tensor | None = None,
) -> None:
    """One step of :class:`clients.optim.LMD`, in place.

    Args:
        log_median: (2, P) log m+ and log m-; overwritten.
        momentum: (2, P); overwritten.
        gradient: (2, P) E[u g] and E[-v g]; overwritten.
        regulariser: R at ``log_median``, outside sign and momentum.
        lr, beta1, beta2, signed, temperature: see there.
        pull: (2, P) terms inside the sign and outside the momentum.
    """
    if not signed and temperature:
        gradient.sub_(temperature)
    direction = torch.lerp(gradient, momentum, beta1)
    momentum.lerp_(gradient, 1 - beta2)
    if pull is not None:
        direction.add_(pull)
    if signed:
        direction.sign_()
        if temperature:
            direction.sub_(temperature)
    log_median.sub_(direction.add_(regulariser), alpha=lr)
