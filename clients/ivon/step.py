r"""IVON's equations as functions on tensors, in place.

Everything broadcasts against the parameters (..., P): (P,) for one client, (C, P) for clients side by side. ``D``
entries of the curvature are P, or 1 (shape () or (C, 1)) for the isotropic family; numbers that differ between clients
are (C, 1). What is one number for all parameters may be Python's: torch's operations then read less memory.

Kept is :math:`D = h + \delta` with its root :math:`1/\sqrt D`, rather than :math:`h`.
"""

from __future__ import annotations

import math
from functools import lru_cache

import torch
from torch import Tensor


def draw(mean: Tensor, root: Tensor, noise: Tensor, scale: float | Tensor, out: Tensor) -> None:
    r"""A sample of q, :math:`\theta = m + z / \sqrt{\lambda D}`, in ``out``; ``noise`` z becomes :math:`z / \sqrt D`.

    Args:
        scale: :math:`1/\sqrt\lambda`.
    """
    noise.mul_(root)
    if isinstance(scale, Tensor):
        torch.addcmul(mean, noise, scale, out=out)
    else:
        torch.add(mean, noise, alpha=scale, out=out)


def hess_step(
    total: Tensor,
    root: Tensor,
    first: Tensor,
    second: Tensor,
    slope: float | Tensor,
    bound: float | Tensor,
    *,
    weight: float,
    share: float,
    work: Tensor,
    alive: Tensor | None = None,
) -> None:
    r"""Move the curvature towards its estimate :math:`\hat h = \sqrt{\lambda (h + \delta)}\, z \hat g - V`.

    .. math:: h \leftarrow \beta_2 h + (1 - \beta_2) \hat h + \tfrac12 (1 - \beta_2)^2 (h - \hat h)^2 / (h + \delta)

    In D this is :math:`D \leftarrow D (1 + w^2)/2` with :math:`w = 1 + (1 - \beta_2)(\hat h - h)/D`: it stays positive
    whatever the gradient is.

    Args:
        total, root: (..., D) D and :math:`1/\sqrt D`; overwritten.
        first, second: their product times ``weight`` is :math:`(1 - \beta_2) \sqrt\lambda z \hat g / \sqrt D`, averaged
            over samples (and over parameters in the isotropic family). Two factors: for one sample they are at hand.
        slope: :math:`\delta - V`.
        bound: smallest D.
        weight: see ``first``.
        share: :math:`1 - \beta_2`.
        work: (..., D) to be overwritten.
        alive: () bool where the parameters are; False changes nothing, None is True.
    """
    if isinstance(slope, Tensor):
        torch.addcdiv(number(1 - share, total), slope, total, value=share, out=work)
    else:  # a pass over memory less
        torch.addcmul(number(1 - share, total), root, root, value=share * slope, out=work)
    work.addcmul_(first, second, value=weight)  # w
    if alive is not None:
        work.masked_fill_(~alive, 1.0)
    torch.addcmul(number(0.5, total), work, work, value=0.5, out=work)
    total.mul_(work)
    hold(total, bound)
    torch.rsqrt(total, out=root)


def hold(total: Tensor, bound: float | Tensor) -> None:
    """Keep D at its bound or above."""
    if isinstance(bound, Tensor):
        torch.maximum(total, bound, out=total)
    elif bound:
        total.clamp_(min=bound)


def mean_step(
    mean: Tensor,
    momentum: Tensor,
    gradient: Tensor,
    total: Tensor,
    slope: float | Tensor,
    offset: float | Tensor,
    *,
    share: float | Tensor,
    debias: float | Tensor,
    rate: float | Tensor,
    clip_radius: float,
    work: Tensor,
) -> None:
    r"""Move the mean along the preconditioned direction, with the new D.

    .. math::
        g &\leftarrow \beta_1 g + (1 - \beta_1) \hat g \\
        u &= [g / (1 - \beta_1^t) + \delta (m - m_0) + v - V m] / (h + \delta) \\
        m &\leftarrow m - \alpha\, \mathrm{clip}(u)

    Args:
        mean, momentum: (..., P) m and g; overwritten.
        gradient: (..., P) :math:`\hat g`, averaged over samples; overwritten if ``debias`` is a tensor.
        total: (..., D) D.
        slope, offset: :math:`\delta - V` and :math:`\delta m_0 - v`: prior and sites have the gradient slope m -
            offset.
        share: :math:`1 - \beta_1`.
        debias: :math:`1 - \beta_1^t`. A number stays in u, and the rate divides it out.
        rate: :math:`-\alpha`; 0 changes nothing.
        clip_radius: bound on each entry of u.
        work: (..., P) to be overwritten.
    """
    momentum.lerp_(gradient, share)
    if isinstance(debias, Tensor):
        momentum, debias = torch.div(momentum, debias, out=gradient), 1.0
    if isinstance(slope, Tensor):
        torch.addcmul(momentum, slope, mean, value=debias, out=work)
    else:
        torch.add(momentum, mean, alpha=slope * debias, out=work)
    if isinstance(offset, Tensor):
        work.sub_(offset, alpha=debias)
    elif offset:
        work.sub_(offset * debias)
    rate = rate / debias
    clipped = clip_radius < math.inf
    if clipped:
        bound = clip_radius * debias
        work.div_(total).clamp_(-bound, bound)
    if isinstance(rate, Tensor):
        mean.addcmul_(work if clipped else work.div_(total), rate)
    elif clipped:
        mean.add_(work, alpha=rate)
    else:
        mean.addcdiv_(work, total, value=rate)


def number(value: float, like: Tensor) -> Tensor:
    """A number as a tensor of shape (), not to be written to; made once, so that no step waits for a copy to a GPU."""
    return _cached(value, like.dtype, like.device)


@lru_cache(maxsize=64)
@torch.inference_mode(False)  # kept for callers in other modes
def _cached(value: float, dtype: torch.dtype, device: torch.device) -> Tensor:
    return torch.full((), value, dtype=dtype, device=device)
