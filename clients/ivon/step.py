r"""IVON's equations as functions on tensors, in place.

Everything broadcasts against the parameters (..., P): (P,) for one client, (C, P) for clients side by side. ``D``
entries of the curvature are P, or 1 (shape () or (C, 1)) for the isotropic family; numbers that differ between clients
are (C, 1).

Kept is :math:`D = h + \delta` with its root :math:`1/\sqrt D`, rather than :math:`h`.
"""

from __future__ import annotations

import math
from functools import lru_cache

import torch
from torch import Tensor


def draw(mean: Tensor, root: Tensor, noise: Tensor, scale: Tensor, out: Tensor) -> None:
    r"""A sample of q, :math:`\theta = m + z / \sqrt{\lambda D}`, in ``out``; ``noise`` z becomes :math:`z / \sqrt D`.

    Args:
        scale: :math:`1/\sqrt\lambda`.
    """
    noise.mul_(root)
    torch.addcmul(mean, noise, scale, out=out)


def hess_step(
    total: Tensor,
    root: Tensor,
    product: Tensor,
    slope: Tensor,
    bound: Tensor,
    *,
    scale: Tensor,
    share: float | Tensor,
    work: Tensor,
) -> None:
    r"""Move the curvature towards its estimate :math:`\hat h = \sqrt{\lambda (h + \delta)}\, z \hat g - V`.

    .. math:: h \leftarrow \beta_2 h + (1 - \beta_2) \hat h + \tfrac12 (1 - \beta_2)^2 (h - \hat h)^2 / (h + \delta)

    In D this is :math:`D \leftarrow D (1 + w^2)/2` with :math:`w = 1 + (1 - \beta_2)(\hat h - h)/D`: it stays positive
    whatever the gradient is.

    Args:
        total, root: (..., D) D and :math:`1/\sqrt D`; overwritten.
        product: (..., D) :math:`z \hat g / \sqrt D`, averaged over samples (and over parameters in the isotropic
            family).
        slope: :math:`\delta - V`.
        bound: smallest D.
        scale: :math:`\sqrt\lambda`.
        share: :math:`1 - \beta_2`; 0 changes nothing.
        work: (..., D) to be overwritten.
    """
    torch.div(slope, total, out=work).addcmul_(product, scale)  # (hhat + delta) / D
    torch.lerp(number(1.0, total), work, share, out=work)  # w
    torch.addcmul(number(0.5, total), work, work, value=0.5, out=work)
    torch.maximum(total.mul_(work), bound, out=total)
    torch.rsqrt(total, out=root)


def mean_step(
    mean: Tensor,
    momentum: Tensor,
    gradient: Tensor,
    total: Tensor,
    slope: Tensor,
    offset: Tensor,
    *,
    share: float | Tensor,
    debias: Tensor,
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
        gradient: (..., P) :math:`\hat g`, averaged over samples.
        total: (..., D) D.
        slope, offset: :math:`\delta - V` and :math:`\delta m_0 - v`: prior and sites have the gradient slope m -
            offset.
        share: :math:`1 - \beta_1`.
        debias: :math:`1 - \beta_1^t`. (u is kept multiplied by it; the rate divides it out.)
        rate: :math:`-\alpha` over ``debias``; 0 changes nothing.
        clip_radius: bound on each entry of u.
        work: (..., P) to be overwritten.
    """
    momentum.lerp_(gradient, share)
    torch.mul(mean, slope, out=work).sub_(offset)
    torch.addcmul(momentum, work, debias, out=work)
    if clip_radius == math.inf and isinstance(rate, float):  # one pass over memory less
        mean.addcdiv_(work, total, value=rate)
        return
    work.div_(total)
    if clip_radius < math.inf:
        bound = clip_radius * debias
        torch.clamp(work, -bound, bound, out=work)
    mean.add_(work, alpha=rate) if isinstance(rate, float) else mean.addcmul_(work, rate)


def number(value: float, like: Tensor) -> Tensor:
    """A number as a tensor of shape (), not to be written to; made once, so that no step waits for a copy to a GPU."""
    return _cached(value, like.dtype, like.device)


@lru_cache(maxsize=64)
@torch.inference_mode(False)  # kept for callers in other modes
def _cached(value: float, dtype: torch.dtype, device: torch.device) -> Tensor:
    return torch.full((), value, dtype=dtype, device=device)
