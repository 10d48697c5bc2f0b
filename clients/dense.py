"""A client's problem with dense derivatives over all of its data, float64: what learners of small models work on."""

from __future__ import annotations

import torch
from torch import Tensor

from bayesfed.families import Gaussian
from bayesfed.federation.local import LocalProblem, LocalSolution, Posterior
from bayesfed.problem.curvature import SummedLoss
from bayesfed.profiling import span


class DenseProblem:
    """The local problem as ``min_q E_q[f] - H(q)`` with ``f = (l_k/tau + v_k^T theta - theta^T V_k theta/2)/rho - log
    q_g``.

    Attributes:
        server: ``q_g``, float64.
        linear, quadratic: ``v_k`` and ``V_k`` of the site (zero without one), float64.
        loss: ``l_k``.
    """

    def __init__(self, problem: LocalProblem):
        self.problem, self.server = problem, problem.server.to(torch.float64)
        with span("data"):
            self.loss = SummedLoss(problem.model, problem.likelihood, problem.data)
        site = problem.site if problem.site is not None else self.server.zero(self.server.mean)
        self.linear, self.quadratic = site.linear, site.precision

    def derivatives(self, mean: Tensor, points: Tensor) -> tuple[Tensor, Tensor]:
        """``E_q[grad f]`` (P,) and ``E_q[hess f]`` (P, P) for a diagonal or full ``q_g``; at the optimum 0 and q's
        precision.

        Args:
            mean: (P,) of q.
            points: (n, P) samples of q, or its mean alone (delta method); for the loss, all else is exact.
        """
        server, rho, tau = self.server, self.problem.rho, self.problem.temperature
        assert isinstance(server, Gaussian)
        gradient = torch.stack([self.loss.gradient(point) for point in points]).mean(0) / tau
        hessian = torch.stack([self.loss.hessian(point) for point in points]).mean(0).div_(tau)
        entries = hessian if self.quadratic.dim() == 2 else hessian.diagonal()  # a view: dense matrices can be large
        entries.sub_(self.quadratic)
        hessian.div_(rho)
        entries.add_(server.precision)
        slope = (gradient + self.linear - server.multiply(self.quadratic, mean)) / rho
        return slope + server.multiply(server.precision, mean - server.mean), hessian

    def solution(self, posterior: Posterior, points: int, metrics: dict[str, float] | None = None) -> LocalSolution:
        """The solution in the model's dtype, with the loss at its mean and the cost of so many ``points``."""
        loss = float(self.loss.loss(posterior.mean)) / self.problem.num_examples
        cost = {"gradient-evaluations": points * self.loss.gradients_per_point}
        return LocalSolution(posterior.to(self.problem.dtype), {"loss": loss} | (metrics or {}) | cost)
