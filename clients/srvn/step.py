"""SR-VN's step and flow: square-root variational Newton (Kumar, Möllenhoff, Khan, Lucchi 2025, arXiv 2507.07853).

Minimises E_q[f] - gamma H(q) over q = N(m, C C^T) with C lower-triangular with a positive diagonal.
"""

from __future__ import annotations

from collections.abc import Callable

import torch
from torch import Tensor

from bayesfed.seeding import torch_generator

Expectations = Callable[[Tensor, Tensor], tuple[Tensor, Tensor]]
"""(mean, factor) -> (E_q[grad f], E_q[hess f]), shaped like them."""


def halved_tril(matrix: Tensor) -> Tensor:
    """The lower triangle with a halved diagonal: T + T^T = A for a symmetric A."""
    return torch.tril(matrix, -1) + torch.diag(0.5 * torch.diagonal(matrix))


def whiten(factor: Tensor, hessian: Tensor) -> Tensor:
    """The curvature as seen by standard normal noise: C^T H C (P, P), or c^2 h (P,) in the diagonal case."""
    return factor**2 * hessian if factor.ndim == 1 else factor.mT @ hessian @ factor


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
    new_factor = factor_step(factor, whiten(factor, hessian), step_size, temperature)
    return mean - step_size * precondition(factor, gradient), new_factor


def precondition(factor: Tensor, gradient: Tensor) -> Tensor:
    """C C^T g (P,)."""
    return factor**2 * gradient if factor.ndim == 1 else factor @ (factor.mT @ gradient)


def factor_step(factor: Tensor, curvature: Tensor, step_size: float | Tensor, temperature: float = 1.0) -> Tensor:
    """The new factor, from the whitened curvature (:func:`whiten`); in the diagonal case step_size may be (P,).

    Raises ValueError on breakdown.
    """
    if factor.ndim == 1:
        excess = curvature - temperature
        new_factor = diagonal = factor - 0.5 * step_size * factor * excess
    else:
        excess = torch.diagonal(curvature) - temperature
        change = torch.tril(curvature, -1) + torch.diag(0.5 * excess)
        new_factor = factor - step_size * factor @ change
        diagonal = torch.diagonal(new_factor)
    if not bool((diagonal > 0).all()):
        rate = float(torch.as_tensor(step_size).max())
        advice = f"; step_size={rate:g} must be below {2 / float(excess.max()):.4g} here" if excess.max() > 0 else ""
        raise ValueError(
            f"SR-VN broke down: a diagonal entry of the factor fell to {float(diagonal.min()):.4g}{advice}"
        )
    return new_factor


def step_limit(curvature: Tensor, temperature: float = 1.0, max_change: float = 0.5) -> Tensor:
    """The largest step that takes no eigendirection of the excess A = C^T H C - gamma I by more than it can bear.

    rho <= 2 max_change / (bound on A's largest eigenvalue, by Gershgorin's discs): then no diagonal entry of the factor
    falls by more than the fraction ``max_change`` < 1, so there is no breakdown, and the mean's step in the whitened
    space is no longer than 2 max_change times Newton's. Infinite where A is not positive.

    Shape (), or (P,) in the diagonal case, whose coordinates are independent.
    """
    if curvature.ndim == 1:
        bound = curvature - temperature
    else:
        diagonal = torch.diagonal(curvature)
        bound = (diagonal - temperature + curvature.abs().sum(1) - diagonal.abs()).max()
    return torch.where(bound > 0, 2 * max_change / bound.clamp_min(torch.finfo(bound.dtype).tiny), torch.inf)


def overshoot(steps: Tensor) -> float:
    """By how much a step along correlated entries is too long, ``steps``' (P, P) top eigenvalue from 2 on, else 1."""
    if float(torch.linalg.vector_norm(steps, 1, dim=1).max()) < 2:
        return 1.0
    vector = torch.empty_like(steps[0]).normal_(generator=torch_generator(0, "overshoot", device=steps.device))
    for _ in range(30):
        vector = steps @ (vector / vector.norm())
    largest = float(vector.norm())
    return largest if largest >= 2 else 1.0


def srvn_flow(
    mean: Tensor, factor: Tensor, expectations: Expectations, time: float, steps: int, temperature: float = 1.0
) -> tuple[Tensor, Tensor]:
    """SR-VN in continuous time, m' = -C C^T g and C' = -C tril[C^T H C - gamma I], by the classical Runge-Kutta method.

    The reference that step sizes are compared with: error O((time/steps)^4). Diagonal or full as in :func:`srvn_step`.

    Args:
        expectations: g and H at a (mean, factor).
        time: for how long; a step of SR-VN with step_size rho is Euler's for the time rho.
        steps: Runge-Kutta steps, each four evaluations.

    Raises:
        ValueError: a diagonal entry of the factor would not stay positive: too few steps.
    """
    h = time / steps

    def rate(m: Tensor, c: Tensor) -> tuple[Tensor, Tensor]:
        if not bool(((c if c.ndim == 1 else torch.diagonal(c)) > 0).all()):
            raise ValueError(f"the flow broke down at {h:g} a step: use more steps")
        gradient, hessian = expectations(m, c)
        white = whiten(c, hessian)
        if c.ndim == 1:
            return -precondition(c, gradient), -0.5 * c * (white - temperature)
        white = white - temperature * torch.eye(len(c), dtype=c.dtype, device=c.device)
        return -precondition(c, gradient), -c @ halved_tril(white)

    for _ in range(steps):
        m1, c1 = rate(mean, factor)
        m2, c2 = rate(mean + 0.5 * h * m1, factor + 0.5 * h * c1)
        m3, c3 = rate(mean + 0.5 * h * m2, factor + 0.5 * h * c2)
        m4, c4 = rate(mean + h * m3, factor + h * c3)
        mean = mean + h / 6 * (m1 + 2 * m2 + 2 * m3 + m4)
        factor = factor + h / 6 * (c1 + 2 * c2 + 2 * c3 + c4)
    return mean, factor


def factor_from_precision(precision: Tensor) -> Tensor:
    """The C of S^-1 = C C^T: (P, P) lower-triangular, or (P,), by one Cholesky factorisation and no inverse of S.

    Raises ValueError if S is not positive (definite).
    """
    if precision.ndim == 1:
        if not bool((precision > 0).all()):
            raise ValueError("the precision is not positive")
        return precision.rsqrt()
    lower, info = torch.linalg.cholesky_ex(precision.flip(0, 1))
    if int(info) > 0:
        raise ValueError("the precision is not positive definite")
    eye = torch.eye(len(precision), dtype=precision.dtype, device=precision.device)
    factor: Tensor = torch.linalg.solve_triangular(lower.flip(0, 1).mT, eye, upper=False)
    return factor


def precision_from_factor(factor: Tensor) -> Tensor:
    """S = (C C^T)^-1, (P, P) or (P,)."""
    if factor.ndim == 1:
        return factor.square().reciprocal()
    eye = torch.eye(len(factor), dtype=factor.dtype, device=factor.device)
    inverse = torch.linalg.solve_triangular(factor, eye, upper=False)
    precision: Tensor = inverse.mT @ inverse
    return precision
