"""The closed form for quadratic client problems (linear model, Gaussian likelihood)."""

from __future__ import annotations

from types import MappingProxyType
from typing import ClassVar

import torch

from bayesfed.errors import InputError
from bayesfed.families import PointMass
from bayesfed.federation.local import LocalProblem, LocalSolution, Solver
from bayesfed.problem.curvature import SummedLoss
from bayesfed.profiling import span


class ExactSolver(Solver):
    """Solve the local problem exactly when ``l_k(theta) = 1/2 theta^T A_k theta - b_k^T theta`` (spec 1.5).

    The mean solves ``(A_k/tau - V_k + rho S_g) m = b_k/tau - v_k + rho S_g m_g`` for every family; the precision is
    ``S_g + (A_k/tau - V_k)/rho`` with ``A_k``, its diagonal, or its mean eigenvalue ``tr(A_k)/P`` (or ``S_g`` when not learned).
    All in float64. Uploads mean and precision.
    """

    families: ClassVar[frozenset[str]] = frozenset({"point", "isotropic", "diagonal", "full"})
    stepwise: ClassVar[bool] = False
    lacks = MappingProxyType({"path": ("takes no gradient steps", "client=sgd or client=adam")})

    def check(self, model: str, likelihood: str) -> None:
        if model != "linear" or likelihood != "gaussian":
            raise InputError(
                "client",
                "exact",
                f"needs model=linear and likelihood=gaussian (got model={model}, likelihood={likelihood})",
            )

    def solve(self, problem: LocalProblem) -> LocalSolution:
        self.require(problem)
        with span("data"):
            loss = SummedLoss(problem.model, problem.likelihood, problem.data)
        origin = torch.zeros(problem.model.dim, dtype=torch.float64, device=problem.device)
        with span("gradient"):
            curvature, pull = loss.hessian(origin), -loss.gradient(origin)  # A_k, b_k
        with span("update"):
            return self._optimum(problem, loss, curvature, pull)

    def _optimum(
        self, problem: LocalProblem, loss: SummedLoss, curvature: torch.Tensor, pull: torch.Tensor
    ) -> LocalSolution:
        server = problem.server.to(torch.float64)

        if isinstance(server, PointMass):
            size = problem.num_examples
            scale = problem.loss_scale
            right = pull / size + problem.proximal / scale * server.mean
            if problem.site is not None:
                right = right - problem.site.linear / scale
            left = curvature / size + problem.proximal / scale * torch.eye(len(pull), dtype=pull.dtype)
            mean = torch.linalg.lstsq(left, right[:, None], driver="gelsd")
            return self._solution(problem, PointMass(mean.solution[:, 0]), loss)

        site = problem.site if problem.site is not None else server.zero(server.mean)
        linear, quadratic = site.linear, site.precision  # v_k, V_k
        anchor = server.precision * problem.rho
        excess = {
            "full": curvature,
            "diagonal": curvature.diagonal(),
            "isotropic": curvature.diagonal().mean(),
        }[server.name] / problem.temperature - quadratic
        family = type(server)
        left = curvature / problem.temperature + as_matrix(anchor - quadratic, len(pull))
        right = pull / problem.temperature - linear + server.multiply(anchor, server.mean)
        mean = torch.linalg.solve(left, right)
        precision = server.precision + excess / problem.rho if problem.learn_precision else server.precision
        return self._solution(problem, family.from_mean_precision(mean, precision), loss)

    @staticmethod
    def _solution(problem: LocalProblem, posterior, loss: SummedLoss) -> LocalSolution:
        value = float(loss.loss(posterior.mean)) / problem.num_examples
        metrics = {"loss": value, "gradient-evaluations": loss.gradients_per_point}
        return LocalSolution(posterior.to(problem.dtype), metrics)


def as_matrix(precision: torch.Tensor, dim: int) -> torch.Tensor:
    """A precision of any family as a (P, P) matrix."""
    if precision.dim() == 2:
        return precision
    return torch.diag(precision.expand(dim))
