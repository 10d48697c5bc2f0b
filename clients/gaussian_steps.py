"""Other geometries for SR-VN's problem: pure steps on the same expected gradient and Hessian.

All minimise E_q[f] - gamma H(q) over q = N(m, Sigma); gamma = 1 gives the posterior. They differ in what they keep
beside the mean: the precision S, the lower-triangular factor C of Sigma = C C^T, or Sigma. Every step is
``step(mean, state, gradient, hessian, step_size, temperature=1.0) -> (mean, state)`` with mean and gradient (P,), state
and hessian (P, P); gradient = E_q[grad f], hessian = E_q[hess f] under the old q. Steps raise ValueError where they
would leave the positive definite matrices.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass

import torch
from torch import Tensor

from clients.srvn.step import factor_from_precision, srvn_step


def von_step(
    mean: Tensor, precision: Tensor, gradient: Tensor, hessian: Tensor, step_size: float, temperature: float = 1.0
) -> tuple[Tensor, Tensor]:
    """Variational online Newton (Khan and Lin 2017): S <- (1 - rho gamma) S + rho H, m <- m - rho S_new^-1 g.

    The natural-gradient step in natural parameters.
    """
    precision = (1 - step_size * temperature) * precision + step_size * hessian
    return mean - step_size * _solve(_cholesky(precision, "VON"), gradient), precision


def safe_von_step(
    mean: Tensor,
    precision: Tensor,
    gradient: Tensor,
    hessian: Tensor,
    step_size: float,
    temperature: float = 1.0,
    *,
    lr: float | None = None,
) -> tuple[Tensor, Tensor]:
    """VON with the second-order retraction of Lin, Schmidt and Khan (2020): positive definite for every H and rho.

    ``lr``: another rate for the mean.
    """
    covariance = torch.cholesky_inverse(_cholesky(precision, "safe VON"))
    precision = retract(precision, covariance, hessian - temperature * precision, step_size)
    newton = _solve(_cholesky(precision, "safe VON"), gradient)
    return mean - (step_size if lr is None else lr) * newton, precision


def retract(precision: Tensor, covariance: Tensor, direction: Tensor, step_size: float) -> Tensor:
    """S + rho D + rho^2/2 D Sigma D with Sigma = S^-1, symmetrised; all (..., P, P).

    Equal to 1/2 S + 1/2 (I + rho D Sigma) S (I + rho D Sigma)^T, hence at least S/2 for every rho and symmetric D.
    """
    stepped = precision + step_size * direction + 0.5 * step_size**2 * direction @ covariance @ direction
    return 0.5 * (stepped + stepped.mT)


def local_step(
    mean: Tensor, factor: Tensor, gradient: Tensor, hessian: Tensor, step_size: float, temperature: float = 1.0
) -> tuple[Tensor, Tensor]:
    """Natural gradient in local parameters (Lin et al. 2021) for S = B B^T with B = C^-T upper-triangular.

    B <- B h(rho/2 X) with X the upper triangle, its diagonal once and the rest twice, of B^-1 (H - gamma S) B^-T and
    h(X) = I + X + X^2/2: S + rho (H - gamma S) up to O(rho^2). The state is C, so that all methods on factors start
    alike.
    """
    excess = factor.mT @ hessian @ factor
    excess.diagonal().sub_(temperature)
    move = 0.5 * step_size * (2 * excess.triu(1) + torch.diag(excess.diagonal()))
    eye = torch.eye(len(mean), dtype=mean.dtype, device=mean.device)
    grown = eye + move + 0.5 * move @ move  # B_new = C^-T grown, C_new = C grown^-T
    if not bool((grown.diagonal() > 0).all()):
        raise ValueError("the step in local parameters broke down")
    factor = torch.linalg.solve_triangular(grown.mT, factor, upper=False, left=False)
    return mean - step_size * factor @ (factor.mT @ gradient), factor


def lie_group_step(
    mean: Tensor, factor: Tensor, gradient: Tensor, hessian: Tensor, step_size: float, temperature: float = 1.0
) -> tuple[Tensor, Tensor]:
    """The affine group's retraction, C <- C expm(-rho/2 (C^T H C - gamma I)): never singular; C becomes full."""
    excess = factor.mT @ hessian @ factor
    excess.diagonal().sub_(temperature)
    new_mean = mean - step_size * factor @ (factor.mT @ gradient)
    return new_mean, factor @ torch.linalg.matrix_exp(-0.5 * step_size * excess)


def euclidean_step(
    mean: Tensor, factor: Tensor, gradient: Tensor, hessian: Tensor, step_size: float, temperature: float = 1.0
) -> tuple[Tensor, Tensor]:
    """Gradient descent on (m, C): C <- C - eta tril(H C - gamma C^-T), the plain lower triangle."""
    entropy = torch.diag(temperature / factor.diagonal())  # the lower triangle of C^-T
    factor = factor - step_size * (torch.tril(hessian @ factor) - entropy)
    if not bool((factor.diagonal() > 0).all()):
        raise ValueError("gradient descent on the factor broke down")
    return mean - step_size * gradient, factor


def bures_wasserstein_step(
    mean: Tensor, covariance: Tensor, gradient: Tensor, hessian: Tensor, step_size: float, temperature: float = 1.0
) -> tuple[Tensor, Tensor]:
    """Gradient descent in the Bures-Wasserstein geometry: Sigma <- M Sigma M with M = I - eta (H - gamma Sigma^-1)."""
    inverse = torch.cholesky_inverse(_cholesky(covariance, "Bures-Wasserstein descent"))
    move = -step_size * (hessian - temperature * inverse)
    move.diagonal().add_(1)
    return mean - step_size * gradient, _symmetric(move @ covariance @ move)


def forward_backward_step(
    mean: Tensor, covariance: Tensor, gradient: Tensor, hessian: Tensor, step_size: float, temperature: float = 1.0
) -> tuple[Tensor, Tensor]:
    """Forward-backward Bures-Wasserstein (Diao, Balasubramanian, Chewi, Salim 2023): the entropy by its proximal step.

    Half = (I - eta H) Sigma (I - eta H);  Sigma <- 1/2 (Half + 2 eta gamma I + [Half (Half + 4 eta gamma I)]^(1/2)).
    """
    move = -step_size * hessian
    move.diagonal().add_(1)
    values, vectors = torch.linalg.eigh(_symmetric(move @ covariance @ move))
    shift = step_size * temperature
    values = values.clamp_min(0)
    grown = 0.5 * (values + 2 * shift + (values * (values + 4 * shift)).sqrt())
    return mean - step_size * gradient, _symmetric((vectors * grown) @ vectors.mT)


@dataclass(frozen=True)
class Method:
    """A step and what it keeps beside the mean: ``precision``, ``factor`` or ``covariance``."""

    step: Callable[..., tuple[Tensor, Tensor]]
    keeps: str

    def start(self, factor: Tensor) -> Tensor:
        """The state of N(., C C^T)."""
        if self.keeps == "factor":
            return factor
        return factor @ factor.mT if self.keeps == "covariance" else torch.cholesky_inverse(factor)

    def factor(self, state: Tensor) -> Tensor:
        """A square root of the covariance of a state; raises ValueError if there is none."""
        if self.keeps == "factor":
            return state
        if self.keeps == "precision":
            return factor_from_precision(state)
        return _cholesky(state, "this covariance")


METHODS = {
    "SR-VN": Method(srvn_step, "factor"),
    "VON": Method(von_step, "precision"),
    "VON, safe": Method(safe_von_step, "precision"),
    "local parameters": Method(local_step, "factor"),
    "Lie group": Method(lie_group_step, "factor"),
    "Euclidean": Method(euclidean_step, "factor"),
    "Bures-Wasserstein": Method(bures_wasserstein_step, "covariance"),
    "forward-backward": Method(forward_backward_step, "covariance"),
}


def _symmetric(matrix: Tensor) -> Tensor:
    return 0.5 * (matrix + matrix.mT)


def _cholesky(matrix: Tensor, what: str) -> Tensor:
    factor, info = torch.linalg.cholesky_ex(matrix)
    if int(info) > 0:
        raise ValueError(f"{what} broke down: not positive definite")
    return factor


def _solve(factor: Tensor, vector: Tensor) -> Tensor:
    solution: Tensor = torch.cholesky_solve(vector[:, None], factor)[:, 0]
    return solution
