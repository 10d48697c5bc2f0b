"""IVON as a client solver: the diagonal (IVON-ADMM) and isotropic Gaussian."""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass
from types import MappingProxyType
from typing import ClassVar

import torch
from torch import Tensor

from bayesfed.errors import choice, integer, number
from bayesfed.families import gaussian
from bayesfed.federation.local import LEARNS, NO_PATH, LocalProblem, LocalSolution
from bayesfed.profiling import span
from clients.ivon import side_by_side
from clients.ivon.optimizer import IVON
from clients.side_by_side import BatchingSolver
from clients.training import begin


@dataclass(kw_only=True, eq=False)
class IVONSolver(BatchingSolver):
    """Solve the local variational problem with IVON (arXiv 2506.13150, IVON-ADMM; docs/method.md 7).

    IVON runs with effective sample size ``N_k/(tau rho)``, prior ``q_g`` and the site as linear and quadratic terms.
    Its fixed point is ``S_k = S_g + (N_k/tau E[hess lbar_k] - V_k)/rho``: ``h`` is the curvature *in excess of* the
    server's precision. In round 1 it starts at the network initialisation with ``h = hess_init``, later at ``(m_g, h =
    0)``.

    The curvature is estimated from samples of the posterior, so IVON can't keep the server's precision: such problems
    are refused.

    Uploads mean and precision (2P numbers; P + 1 for the isotropic family).

    Args:
        lr: multiplies the Newton direction (``rescale_lr=False``, as the federated settings assume).
        beta1, beta2: decay of momentum and of the curvature estimate. A round of T steps learns a fraction ``1 -
            beta2**T``.
        hess_init: curvature ``h`` at the start of round 1, in mean-loss units.
        mc_samples: posterior samples (gradients) per step.
        min_precision: smallest precision a client may reach, relative to the server's. Where the local problem asks for
            less (expected Hessians are indefinite, and the site can exceed the curvature), the precision is held there
            and counted (``guard/clients``).
        clip_radius: elementwise bound on the preconditioned step, before ``lr``.
        clip_norm: bound on the norm of each sampled gradient; null for none.
        noise: ``quantile`` (fast on CPUs) or ``normal``, see :mod:`clients.noise`.
        keep_momentum: keep momentum and debias counter between rounds instead of restarting them.
        antithetic: every second sample mirrors the one before, see :class:`clients.optim.IVON`.

    Raises:
        InputError: a value out of range.
    """

    families: ClassVar[frozenset[str]] = frozenset({"diagonal", "isotropic"})
    lacks = MappingProxyType({"path": NO_PATH, "fixed": LEARNS})

    beta1: float = 0.9
    beta2: float = 0.999
    hess_init: float = 0.01
    mc_samples: int = 1
    clip_radius: float = math.inf
    clip_norm: float | None = None
    min_precision: float = 0.1
    noise: str = "quantile"
    keep_momentum: bool = False
    antithetic: bool = False

    def __post_init__(self) -> None:
        super().__post_init__()
        number("beta1", self.beta1, at_least=0, at_most=1 - 1e-9)
        number("beta2", self.beta2, at_least=0, at_most=1 - 1e-12)
        number("hess_init", self.hess_init, above=0)
        integer("mc_samples", self.mc_samples, at_least=1)
        number("clip_radius", self.clip_radius, above=0, finite=False)
        number("clip_norm", self.clip_norm, above=0, optional=True)
        number("min_precision", self.min_precision, at_least=0, at_most=0.99)
        choice("noise", self.noise, ("quantile", "normal"))

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
        return side_by_side.solve(self, problems)

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
