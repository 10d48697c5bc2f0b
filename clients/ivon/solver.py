"""IVON as a client solver: the diagonal (IVON-ADMM) and isotropic Gaussian."""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor

from bayesfed.families import gaussian
from bayesfed.federation.local import LocalProblem, LocalSolution
from bayesfed.profiling import span
from clients.ivon import side_by_side
from clients.ivon.optimizer import IVON
from clients.ivon.settings import IVONSettings
from clients.training import begin


class IVONSolver(IVONSettings):
    """Solve the local variational problem with IVON (arXiv 2506.13150, IVON-ADMM; docs/method.md 7).

    IVON runs with effective sample size ``N_k/(tau rho)``, prior ``q_g`` and the site as linear and quadratic terms.
    Its fixed point is ``S_k = S_g + (N_k/tau E[hess lbar_k] - V_k)/rho``: ``h`` is the curvature *in excess of* the
    server's precision. In round 1 it starts at the network initialisation with ``h = hess_init``, later at ``(m_g, h =
    0)``.

    The curvature is estimated from samples of the posterior, so IVON can't keep the server's precision: such problems
    are refused.

    Uploads mean and precision (2P numbers; P + 1 for the isotropic family).

    Args and errors are those of :class:`IVONSettings`.
    """

    def solve(self, problem: LocalProblem) -> LocalSolution:
        """Mini-batch steps of :class:`clients.optim.IVON`, from the start of the round."""
        self.require(problem)
        begin(problem)
        with span("optimizer"):
            optimizer = self._optimizer(problem)
        start = optimizer.precision
        metrics = self.train(problem, optimizer)
        return self.solution(problem, metrics, (start, *optimizer.posterior), optimizer.floored(), optimizer.momentum())

    def solve_together(self, problems: Sequence[LocalProblem]) -> list[LocalSolution]:
        """:meth:`solve` for clients side by side."""
        return side_by_side.solve(self, problems, self.solution)

    def backward(self, problem: LocalProblem, x: Tensor, y: Tensor) -> Tensor:
        """The loss of a mini-batch at a sample, after its gradient is clipped."""
        loss = super().backward(problem, x, y)
        if self.clip_norm is not None:
            torch.nn.utils.clip_grad_norm_(problem.model.parameters, self.clip_norm)
        return loss

    def _optimizer(self, problem: LocalProblem) -> IVON:
        """IVON on the local problem, in units of the mean loss, at its start."""
        server, weight, site = problem.server, problem.data_weight, problem.site_terms()
        optimizer = IVON(
            problem.model.parameters,
            lr=self.lr * problem.lr_factor,
            ess=weight / problem.rho,
            hess_init=self.hess_init,
            beta1=self.beta1,
            beta2=self.beta2,
            mc_samples=self.mc_samples,
            clip_radius=self.clip_radius,
            rescale_lr=False,
            prior_mean=server.mean,
            prior_precision=server.precision,
            site_linear=None if site is None else site[0] / weight,
            site_quadratic=None if site is None else site[1] / weight,
            min_precision=self.min_precision,
            noise=self.noise,  # type: ignore[arg-type]
            antithetic=self.antithetic,
            generator=problem.generator("noise", problem.device),
            hess_structure="scalar" if server.name == "isotropic" else "diagonal",
        )
        if problem.round > 1:
            optimizer.set_posterior(server.mean, server.precision)
        if problem.memory:
            optimizer.load_momentum(problem.memory["momentum"], int(problem.memory["steps"]))
        return optimizer

    def solution(
        self,
        problem: LocalProblem,
        metrics: dict[str, float],
        moved: tuple[Tensor, Tensor, Tensor],
        floored: Tensor,
        momentum: tuple[Tensor, int],
    ) -> LocalSolution:
        """The answer of a round.

        Args:
            moved: precision before, mean and precision after; (P,) each, or (1,) for isotropic precisions.
            floored: how many precisions are held at ``min_precision``, shape ().
            momentum: (P,), and how many steps it has seen.
        """
        start, mean, precision = moved
        metrics |= {
            "hessian-moved": float(((precision - start).abs() > 0.1 * start).to(problem.dtype).mean()),
            "floored": float(floored),
        }
        name = problem.server.name
        posterior = gaussian(name).from_mean_precision(
            mean.clone(), precision.mean() if name == "isotropic" else precision.clone()
        )
        memory = {}
        if self.keep_momentum:
            memory = {"momentum": momentum[0].clone(), "steps": torch.tensor(momentum[1], device="cpu")}
        return LocalSolution(posterior, metrics, memory)
