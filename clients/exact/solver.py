"""The closed form for quadratic client problems (linear model, Gaussian likelihood)."""

from __future__ import annotations

from types import MappingProxyType
from typing import ClassVar

import torch
from torch import Tensor

from bayesfed.errors import InputError
from bayesfed.families import ExponentialFamily, PointMass
from bayesfed.federation.local import LocalProblem, LocalSolution, Solver
from bayesfed.profiling import span
from clients.dense import DenseProblem


class ExactSolver(Solver):
    """Solve the local problem exactly when ``l_k(theta) = 1/2 theta^T A_k theta - b_k^T theta`` (docs/method.md 3).

    The mean solves ``(A_k/tau - V_k + rho S_g) m = b_k/tau - v_k + rho S_g m_g`` for every family; the precision is
    ``S_g + (A_k/tau - V_k)/rho`` with ``A_k``, its diagonal, or its mean eigenvalue ``tr(A_k)/P`` (or ``S_g`` when not
    learned). All in float64. Uploads mean and precision.
    """

    families: ClassVar[frozenset[str]] = frozenset({"point", "isotropic", "diagonal", "full"})
    stepwise: ClassVar[bool] = False
    lacks = MappingProxyType({"path": ("takes no gradient steps", "client=sgd or client=adam")})

    def check(self, model: str, likelihood: str) -> None:
        """Refuse all but linear models with a Gaussian likelihood."""
        if model != "linear" or likelihood != "gaussian":
            raise InputError(
                "client",
                "exact",
                f"needs model=linear and likelihood=gaussian (got model={model}, likelihood={likelihood})",
            )

    def solve(self, problem: LocalProblem) -> LocalSolution:
        """One gradient and Hessian at 0, and a linear system."""
        self.require(problem)
        dense = DenseProblem(problem)
        origin = torch.zeros(problem.model.dim, dtype=torch.float64, device=problem.device)
        with span("gradient"):
            curvature, pull = dense.loss.hessian(origin), -dense.loss.gradient(origin)  # A_k, b_k
        with span("update"):
            optimum = _point if isinstance(dense.server, PointMass) else _gaussian
            return dense.solution(optimum(dense, curvature, pull), 1)


def _point(dense: DenseProblem, curvature: Tensor, pull: Tensor) -> PointMass:
    """The minimum of ``l_k/N_k + (v_k^T w + proximal/2 ||w - w_g||^2)/loss_scale``, of least norm."""
    problem, size, scale = dense.problem, dense.problem.num_examples, dense.problem.loss_scale
    right = pull / size + problem.proximal / scale * dense.server.mean - dense.linear / scale
    left = curvature / size + problem.proximal / scale * torch.eye(len(pull), dtype=pull.dtype)
    return PointMass(torch.linalg.lstsq(left, right[:, None], driver="gelsd").solution[:, 0])


def _gaussian(dense: DenseProblem, curvature: Tensor, pull: Tensor) -> ExponentialFamily:
    """The optimum over the server's family."""
    problem, server = dense.problem, dense.server
    assert isinstance(server, ExponentialFamily)
    anchor, tau = server.precision * problem.rho, problem.temperature
    left = curvature / tau + as_matrix(anchor - dense.quadratic, len(pull))
    right = pull / tau - dense.linear + server.multiply(anchor, server.mean)
    entries = {
        "full": curvature,
        "diagonal": curvature.diagonal(),
        "isotropic": curvature.diagonal().mean(),
    }[server.name]
    precision = server.precision
    if problem.learn_precision:
        precision = precision + (entries / tau - dense.quadratic) / problem.rho
    return server.from_mean_precision(torch.linalg.solve(left, right), precision)


def as_matrix(precision: Tensor, dim: int) -> Tensor:
    """A precision of any family as a (P, P) matrix."""
    if precision.dim() == 2:
        return precision
    return torch.diag(precision.expand(dim))
