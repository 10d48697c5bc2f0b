"""LMD's equations: regularisers and the step, elementwise on the two parts of every weight."""

from __future__ import annotations

import math
from collections.abc import Callable

import torch
from torch import Tensor

REGULARISERS: dict[str, Callable[[Tensor, float], Tensor]] = {
    # d/dlog m of the expected negative log prior at strength 1, from (E[u], E[v]), (2, P), and sigma^2
    "l1": lambda means, variance: means,
    "l2": lambda means, variance: means.square() * math.exp(variance),
    "weight": lambda means, variance: means * (means * math.exp(variance) - means.flip(0)),
}


def lmd_step(
    log_median: Tensor,
    momentum: Tensor,
    gradient: Tensor,
    regulariser: Tensor,
    *,
    decay: float = 1.0,
    lr: float,
    beta1: float,
    beta2: float,
    signed: bool = True,
    temperature: float = 0.0,
    pull: tuple[Tensor, float] | None = None,
    work: Tensor | None = None,
    alive: Tensor | None = None,
) -> None:
    """One step of :class:`clients.optim.LMD`, in place.

    Args:
        log_median: (2, P) log m+ and log m-; overwritten.
        momentum: (2, P); overwritten.
        gradient: (2, P) E[u g] and E[-v g]; overwritten.
        regulariser: (2, P) R at ``log_median``, of strength ``decay``, outside sign and momentum.
        lr, beta1, beta2, signed, temperature: see there.
        pull: (2, P) constant and slope of terms linear in ``log_median``, inside the sign and outside the momentum.
        work: (2, P) to be overwritten; a new tensor can cost more than the arithmetic.
        alive: () bool on the device, False to change nothing; None for True.
    """
    if not signed and temperature:
        gradient.sub_(temperature)
    direction = torch.lerp(gradient, momentum, beta1, out=work)
    momentum.lerp_(gradient, 1 - beta2 if alive is None else (alive * (1 - beta2)).to(gradient.dtype))
    if pull is not None:
        direction.add_(pull[0]).add_(log_median, alpha=pull[1])
    if signed:
        direction.sign_()
        if temperature:
            direction.sub_(temperature)
    if decay:
        direction.add_(regulariser, alpha=decay)
    if alive is not None:
        direction.mul_(alive)
    log_median.sub_(direction, alpha=lr)
