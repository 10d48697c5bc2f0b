"""SR-VN: square-root variational Newton (Kumar, Möllenhoff, Khan, Lucchi 2025, arXiv 2507.07853).

Minimises E_q[f] - gamma H(q) over q = N(m, C C^T) with C lower-triangular with a positive diagonal.
"""

from __future__ import annotations

import torch
from torch import Tensor


def halved_tril(matrix: Tensor) -> Tensor:
    """The lower triangle with a halved diagonal: T + T^T = A for a symmetric A."""
    return torch.tril(matrix, -1) + torch.diag(0.5 * torch.diagonal(matrix))


def srvn_step(
    mean: Tensor, factor: Tensor, gradient: Tensor, hessian: Tensor, step_size: float, temperature: float = 1.0
) -> tuple[Tensor, Tensor]:
    """One step C - rho C tril[C^T H C - gamma I], m - rho C C^T g; both from the old C. No inverse, no solve.

    mean (P,); factor (P, P) lower-triangular, or (P,) for a diagonal covariance; gradient (P,) = E_q[grad f];
    hessian of factor's shape = E_q[hess f] (its diagonal in the diagonal case); step_size rho; temperature gamma.

    Returns (mean, factor). Raises ValueError on breakdown: a diagonal entry of the new factor is not positive, i.e.
    rho ([C^T H C]_ii - gamma) >= 2 (the covariance C C^T itself would not show it), and for shapes that don't fit.
    """
    if gradient.shape != mean.shape or hessian.shape != factor.shape:
        raise ValueError(
            f"shapes don't fit: mean {tuple(mean.shape)} and gradient {tuple(gradient.shape)}, "
            f"factor {tuple(factor.shape)} and hessian {tuple(hessian.shape)}"
        )
    if factor.shape not in (mean.shape, mean.shape * 2):
        raise ValueError(f"factor must have shape (P,) or (P, P) with P = {mean.numel()}, not {tuple(factor.shape)}")
    if factor.ndim == 1:
        excess = factor**2 * hessian - temperature
        new_factor = factor - 0.5 * step_size * factor * excess
        new_mean = mean - step_size * factor**2 * gradient
        diagonal = new_factor
    else:
        curvature = factor.T @ hessian @ factor
        excess = torch.diagonal(curvature).sub_(temperature)
        new_factor = factor - step_size * factor @ halved_tril(curvature)
        new_mean = mean - step_size * factor @ (factor.T @ gradient)
        diagonal = torch.diagonal(new_factor)
    if not bool((diagonal > 0).all()):
        limit = 2 / float(excess.max())
        raise ValueError(
            f"SR-VN broke down: a diagonal entry of the factor fell to {float(diagonal.min()):.4g}; "
            f"step_size={step_size:g} must be below {limit:.4g} here"
        )
    return new_mean, new_factor
