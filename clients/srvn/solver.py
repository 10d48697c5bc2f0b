"""SR-VN as a client solver: the full and the diagonal Gaussian."""

from __future__ import annotations

from dataclasses import dataclass
from types import MappingProxyType
from typing import ClassVar

import torch
from torch import Tensor

from bayesfed.errors import InputError, choice, integer, number
from bayesfed.families import gaussian
from bayesfed.federation.local import LEARNS, NO_PATH, LocalProblem, LocalSolution
from bayesfed.profiling import span
from bayesfed.schedule import Schedule
from clients.dense import DenseProblem
from clients.srvn.optimizer import SRVN
from clients.srvn.step import (
    factor_from_precision,
    factor_step,
    overshoot,
    precision_from_factor,
    precondition,
    step_limit,
    whiten,
)
from clients.training import GradientSolver, begin

LARGEST_DENSE = 20_000  # parameters whose dense Hessian (3 GB) is still formed for its diagonal


@dataclass(kw_only=True, eq=False)
class SRVNSolver(GradientSolver):
    """Solve the local variational problem by square-root variational Newton (arXiv 2507.07853), without inverses or
    solves.

    With ``q = N(m, C C^T)``, ``G = E_q[hess l_k]/tau`` and ``g = E_q[grad l_k]/tau``, a step of rates (a, b) is

        A  =  C^T {S_g + (G - V_k)/rho} C - I
        C <-  C - b C tril[A]                                         (lower triangle, its diagonal halved)
        m <-  m - a C C^T {(g + v_k - V_k m)/rho + S_g (m - m_g)}     (old C)

    Its fixed point is VON's: ``S_k = S_g + (E_q[hess l_k]/tau - V_k)/rho``. Steps too long for the curvature are
    shortened (metric ``reduced``, steps), so that C never breaks down.

    ``curvature=hessian``: exact Hessians over all of the client's data each step, in float64 (small models); the
    covariance is first scaled down to where the step is stable. Where ``learn_precision`` is off, expectations are
    taken at the mean, C (dense) only scales the steps, and the server's precision is returned. ``curvature=stein``:
    from the gradients of mini-batches alone, with :class:`clients.optim.SRVN` in the model's dtype. Uploads mean and
    precision, P + P^2 or 2P numbers.

    Args:
        lr: rate ``a`` of the mean, relative to Newton's step; null = 1 (hessian) or 0.02 (stein).
        lr_covariance: rate ``b`` of the covariance; null = ``lr`` (hessian) or 0.001 (stein, whose estimates are
            noisy).
        epochs, batch_size, local_schedule, amp: see :class:`clients.training.GradientSolver`; with
            ``curvature=hessian`` an epoch is one step, both rates follow ``local_schedule``, and the others are without
            effect.
        curvature: ``hessian`` or ``stein``; null = hessian for the full, stein for the diagonal family.
        mc_samples: posterior samples per step; 0 (hessian only) evaluates at the mean.
        hess_init: curvature in excess of the server's precision at the start of round 1, in mean-loss units (stein).
        beta1: momentum of the gradient (stein).
        min_precision: smallest precision relative to the server's, for the diagonal family with ``curvature=stein``.
        antithetic: every second sample mirrors the one before (stein).

    Raises:
        InputError: a value out of range.
    """

    families: ClassVar[frozenset[str]] = frozenset({"full", "diagonal"})
    lacks = MappingProxyType({"path": NO_PATH})

    lr: float | None = None  # type: ignore[assignment]
    lr_covariance: float | None = None
    epochs: int = 5
    batch_size: int = 32
    curvature: str | None = None
    mc_samples: int = 1
    hess_init: float = 0.02
    beta1: float = 0.9
    min_precision: float = 0.1
    antithetic: bool = False

    def __post_init__(self) -> None:
        super().__post_init__()
        number("lr_covariance", self.lr_covariance, at_least=0, at_most=1, optional=True)
        if self.curvature is not None:
            choice("curvature", self.curvature, ("hessian", "stein"))
        integer("mc_samples", self.mc_samples, at_least=0)
        if self.curvature == "stein":
            integer("mc_samples", self.mc_samples, at_least=1)
            self.lacks = MappingProxyType({"path": NO_PATH, "fixed": LEARNS})
        number("hess_init", self.hess_init, above=0)
        number("beta1", self.beta1, at_least=0, at_most=1 - 1e-9)
        number("min_precision", self.min_precision, at_least=0, at_most=0.99)

    def solve(self, problem: LocalProblem) -> LocalSolution:
        """Steps over all of the data by exact derivatives, or over mini-batches by gradients: ``curvature``."""
        self.require(problem)
        by_hessians = problem.server.name == "full" or not problem.learn_precision
        curvature = self.curvature or ("hessian" if by_hessians else "stein")
        return self._with_hessians(problem) if curvature == "hessian" else self._with_gradients(problem)

    def _with_hessians(self, problem: LocalProblem) -> LocalSolution:
        """Expected gradients and Hessians of the whole local loss, float64."""
        if problem.model.dim > LARGEST_DENSE:
            instead = "curvature=stein" if problem.learn_precision else "client=adam"
            fix = f"forms dense Hessians, too large for {problem.model.dim:,} parameters; use {instead}"
            raise InputError("client.curvature", "hessian", fix)
        if self.amp != "none":
            raise InputError("client.amp", self.amp, "must be none with curvature=hessian, which works in float64")
        dense, learn = DenseProblem(problem), problem.learn_precision
        server, generator = dense.server, problem.generator("noise", problem.device)
        # without a precision to learn C only scales the mean's steps, and a full one bounds those of correlated entries
        diagonal = server.name == "diagonal" and learn
        precision = server.precision if diagonal or server.precision.dim() == 2 else server.precision.diag()
        steps = problem.budget(self.epochs)
        samples = self.mc_samples if learn else 0
        rates = Schedule(self.local_schedule, steps)
        lr = 1.0 if self.lr is None else self.lr
        rate_covariance = lr if self.lr_covariance is None else self.lr_covariance
        rate_mean = lr * problem.lr_factor
        mean, factor = problem.start().to(torch.float64), factor_from_precision(precision)
        reduced = 0

        for step in range(steps):
            with span("sampling"):
                points = _points(mean, factor, samples, generator)
            with span("gradient"):
                gradient, hessian = dense.derivatives(mean, points)
            with span("update"):
                white = whiten(factor, hessian.diagonal() if diagonal else hessian)
                if not bool(white.isfinite().all()):
                    raise ValueError(
                        "the covariance grows without end: S_g + (G - V_k)/rho is not positive definite; use a smaller "
                        "strategy.damping or a larger strategy.rho"
                    )
                if step == 0:  # start small: the curvature seen from the server's covariance can be huge
                    scale = (0.5 * step_limit(white, 0.0, 1.0)).clamp_max(1.0).sqrt()
                    factor, white = factor * scale, white * scale**2
                short = torch.clamp(step_limit(white) / max(rate_mean, rate_covariance, 1e-12), max=1.0) * rates(step)
                reduced += int(bool((short < rates(step)).any()))
                change = precondition(factor, gradient)
                root = factor * (rate_mean * short).sqrt()
                factor = factor_step(factor, white, rate_covariance * short)
                if diagonal:  # what one entry's curvature allows can be too long for correlated ones together
                    change = change / overshoot(hessian.mul_(root[:, None]).mul_(root))
                mean = mean - rate_mean * short * change

        precision = precision_from_factor(factor) if learn else server.precision
        posterior = gaussian(server.name).from_mean_precision(mean, precision)
        return dense.solution(posterior, steps * max(samples, 1), {"reduced": float(reduced)})

    def _with_gradients(self, problem: LocalProblem) -> LocalSolution:
        """Mini-batches and gradients only, by the optimizer."""
        if self.mc_samples == 0:
            raise InputError("client.mc_samples", 0, "must be >= 1 with curvature=stein")
        begin(problem)
        with span("optimizer"):
            optimizer = self._optimizer(problem)
        start = optimizer.precision
        metrics = self.train(problem, optimizer)
        precision = optimizer.precision
        moved = (precision - start).abs() > 0.1 * start.abs()
        metrics["hessian-moved"] = float((moved.diagonal() if moved.dim() == 2 else moved).to(problem.dtype).mean())
        metrics["reduced"] = float(optimizer.reductions)
        posterior = gaussian(problem.server.name).from_mean_precision(optimizer.mean, precision)
        return LocalSolution(posterior, metrics)

    def _optimizer(self, problem: LocalProblem) -> SRVN:
        """SR-VN on the local problem, in units of the mean loss, at its start."""
        server, weight, site = problem.server, problem.data_weight, problem.site_terms()
        full, ess = server.name == "full", weight / problem.rho
        excess = self.hess_init * ess if problem.round == 1 else 0.0
        return SRVN(
            problem.model.parameters,
            lr=(0.02 if self.lr is None else self.lr) * problem.lr_factor,
            ess=ess,
            covariance=server.name,
            mc_samples=self.mc_samples,
            lr_covariance=0.001 if self.lr_covariance is None else self.lr_covariance,
            beta1=self.beta1,
            init_precision=server.precision + (excess * torch.eye(server.dim).to(server.mean) if full else excess),
            prior_mean=server.mean,
            prior_precision=server.precision,
            site_linear=0.0 if site is None else site[0] / weight,
            site_quadratic=0.0 if site is None else site[1] / weight,
            min_precision=0.0 if full else self.min_precision,
            antithetic=self.antithetic,
            noise="normal" if full else "quantile",
            generator=problem.generator("noise", problem.device),
        )


def _points(mean: Tensor, factor: Tensor, samples: int, generator: torch.Generator) -> Tensor:
    """Samples of q, (n, P); the mean alone for the delta method."""
    if not samples:
        return mean[None]
    noise = torch.empty(samples, len(mean), dtype=mean.dtype, device=mean.device)
    noise.normal_(generator=generator)
    return mean + (noise * factor if factor.ndim == 1 else noise @ factor.mT)
