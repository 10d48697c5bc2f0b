"""SR-VN as a client solver: the full and the diagonal Gaussian."""

from __future__ import annotations

from types import MappingProxyType
from typing import ClassVar

import torch
from torch import Tensor

from bayesfed import accelerate
from bayesfed.errors import InputError, choice, integer, number
from bayesfed.families import gaussian
from bayesfed.federation.local import LEARNS, NO_PATH, LocalProblem, LocalSolution, Solver, check_gradients
from bayesfed.problem.curvature import SummedLoss
from bayesfed.profiling import each, inside, span
from bayesfed.schedule import Schedule
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

LARGEST_DENSE = 20_000  # parameters whose dense Hessian (3 GB) is still formed for its diagonal


class SRVNSolver(Solver):
    """Solve the local variational problem by square-root variational Newton (arXiv 2507.07853), without inverses or solves.

    With ``q = N(m, C C^T)``, ``G = E_q[hess l_k]/tau`` and ``g = E_q[grad l_k]/tau``, a step of rates (a, b) is

        A  =  C^T {S_g + (G - V_k)/rho} C - I
        C <-  C - b C tril[A]                                         (lower triangle, its diagonal halved)
        m <-  m - a C C^T {(g + v_k - V_k m)/rho + S_g (m - m_g)}     (old C)

    Its fixed point is VON's: ``S_k = S_g + (E_q[hess l_k]/tau - V_k)/rho``. Steps too long for the curvature are shortened
    (metric ``reduced``, steps), so that C never breaks down.

    ``curvature=hessian``: exact Hessians over all of the client's data each step, in float64 (small models); the covariance is first
    scaled down to where the step is stable. Where ``learn_precision`` is off, expectations are taken at the mean, C (dense) only scales the steps,
    and the server's precision is returned. ``curvature=stein``: from the gradients of mini-batches alone, with
    :class:`clients.optim.SRVN` in the model's dtype. Uploads mean and precision, P + P^2 or 2P numbers.

    Args:
        lr: rate ``a`` of the mean, relative to Newton's step; null = 1 (hessian) or 0.02 (stein).
        lr_covariance: rate ``b`` of the covariance; null = ``lr`` (hessian) or 0.001 (stein, whose estimates are noisy).
        epochs: passes over the client's data; with ``curvature=hessian`` each is one step.
        batch_size: examples per step, for ``curvature=stein``.
        curvature: ``hessian`` or ``stein``; null = hessian for the full, stein for the diagonal family.
        mc_samples: posterior samples per step; 0 (hessian only) evaluates at the mean.
        hess_init: curvature in excess of the server's precision at the start of round 1, in mean-loss units (stein).
        beta1: momentum of the gradient (stein).
        min_precision: smallest precision relative to the server's, for the diagonal family with ``curvature=stein``.
        antithetic: every second sample mirrors the one before (stein).
        schedule, schedule_rounds, schedule_decay: rate of the mean over communication rounds.
        local_schedule: rate of the mean (hessian: both rates) over the steps of a round.

    Raises:
        InputError: a value out of range.
    """

    families: ClassVar[frozenset[str]] = frozenset({"full", "diagonal"})
    lacks = MappingProxyType({"path": NO_PATH})

    def __init__(
        self,
        lr: float | None = None,
        lr_covariance: float | None = None,
        epochs: int = 5,
        batch_size: int = 32,
        curvature: str | None = None,
        mc_samples: int = 1,
        hess_init: float = 0.02,
        beta1: float = 0.9,
        min_precision: float = 0.1,
        antithetic: bool = False,
        schedule: str = "constant",
        schedule_rounds: int | None = None,
        schedule_decay: float = 0.1,
        local_schedule: str = "constant",
    ):
        number("lr", lr, above=0, optional=True)
        number("lr_covariance", lr_covariance, at_least=0, at_most=1, optional=True)
        integer("epochs", epochs, at_least=1)
        integer("batch_size", batch_size, at_least=1)
        if curvature is not None:
            choice("curvature", curvature, ("hessian", "stein"))
        integer("mc_samples", mc_samples, at_least=0)
        if curvature == "stein" and mc_samples == 0:
            raise InputError("mc_samples", 0, "must be >= 1 with curvature=stein")
        if curvature == "stein":
            self.lacks = MappingProxyType({"path": NO_PATH, "fixed": LEARNS})
        number("hess_init", hess_init, above=0)
        number("beta1", beta1, at_least=0, at_most=1 - 1e-9)
        number("min_precision", min_precision, at_least=0, at_most=0.99)
        choice("local_schedule", local_schedule, Schedule.KINDS)
        Schedule(schedule, schedule_rounds or 1, schedule_decay)
        self.lr, self.lr_covariance, self.epochs, self.batch_size = lr, lr_covariance, epochs, batch_size
        self.curvature, self.mc_samples, self.hess_init = curvature, mc_samples, hess_init
        self.beta1, self.min_precision, self.antithetic = beta1, min_precision, antithetic
        self.local_schedule = local_schedule

    def solve(self, problem: LocalProblem) -> LocalSolution:
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
        with span("data"):
            loss = SummedLoss(problem.model, problem.likelihood, problem.data)
        family = gaussian(problem.server.name)
        server = family.from_arrays(problem.server.arrays()).to(torch.float64)
        site = problem.site if problem.site is not None else server.zero(server.mean)
        linear, quadratic = site.linear, site.precision  # v_k, V_k
        rho, tau, diagonal = problem.rho, problem.temperature, problem.server.name == "diagonal"
        server_precision, site_precision = server.precision, quadratic
        if (
            diagonal and not problem.learn_precision
        ):  # C only scales the mean's steps, and a full one bounds those of correlated entries
            server_precision, site_precision, diagonal = server_precision.diag(), site_precision.diag(), False
        generator = problem.generator("noise", problem.device)
        steps = problem.budget(self.epochs)
        samples = self.mc_samples if problem.learn_precision else 0
        rates = Schedule(self.local_schedule, steps)
        lr = 1.0 if self.lr is None else self.lr
        rate_covariance = lr if self.lr_covariance is None else self.lr_covariance
        rate_mean = lr * problem.lr_factor
        mean, factor = problem.start().to(torch.float64), factor_from_precision(server_precision)
        reduced = 0

        for step in range(steps):
            with span("sampling"):
                points = self._points(mean, factor, samples, generator)
            with span("gradient"):
                gradient = torch.stack([loss.gradient(point) for point in points]).mean(0) / tau
                dense = torch.stack([loss.hessian(point) for point in points]).mean(0)
                hessian = (dense.diagonal() if diagonal else dense) / tau
            with span("update"):
                white = whiten(factor, server_precision + (hessian - site_precision) / rho)
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
                slope = (gradient + linear - server.multiply(quadratic, mean)) / rho
                slope = slope + server.multiply(server.precision, mean - server.mean)
                change = precondition(factor, slope)
                root = factor * (rate_mean * short).sqrt()
                factor = factor_step(factor, white, rate_covariance * short)
                if diagonal:  # what one entry's curvature allows can be too long for correlated ones together
                    dense.div_(rho * tau).diagonal().add_(server.precision - quadratic / rho)
                    change = change / overshoot(dense.mul_(root[:, None]).mul_(root))
                mean = mean - rate_mean * short * change

        value = float(loss.loss(mean)) / problem.num_examples
        precision = precision_from_factor(factor) if problem.learn_precision else server.precision
        posterior = family.from_mean_precision(mean, precision)
        used = steps * max(samples, 1)
        metrics = {
            "loss": value,
            "reduced": float(reduced),
            "gradient-evaluations": used * loss.gradients_per_point,
        }
        return LocalSolution(posterior.to(problem.dtype), metrics)

    @staticmethod
    def _points(mean: Tensor, factor: Tensor, samples: int, generator: torch.Generator) -> Tensor:
        """Samples of q, (n, P); the mean alone for the delta method."""
        if not samples:
            return mean[None]
        noise = torch.empty(samples, len(mean), dtype=mean.dtype, device=mean.device)
        noise.normal_(generator=generator)
        return mean + (noise * factor if factor.ndim == 1 else noise @ factor.mT)

    def _with_gradients(self, problem: LocalProblem) -> LocalSolution:
        """Mini-batches and gradients only, by the optimizer."""
        if self.mc_samples == 0:
            raise InputError("client.mc_samples", 0, "must be >= 1 with curvature=stein")
        model, server = problem.model, problem.server
        full = server.name == "full"
        model.load(problem.start())
        model.module.train()
        model.drop_grad()
        site = problem.site_terms()
        ess = problem.data_weight / problem.rho
        excess = self.hess_init * ess if problem.round == 1 else 0.0
        lr = (0.02 if self.lr is None else self.lr) * problem.lr_factor
        with span("optimizer"):
            optimizer = SRVN(
                model.parameters,
                lr=lr,
                ess=ess,
                covariance=server.name,
                lr_covariance=0.001 if self.lr_covariance is None else self.lr_covariance,
                beta1=self.beta1,
                init_precision=server.precision + (excess * torch.eye(model.dim).to(server.mean) if full else excess),
                prior_mean=server.mean,
                prior_precision=server.precision,
                site_linear=0.0 if site is None else site[0] / problem.data_weight,
                site_quadratic=0.0 if site is None else site[1] / problem.data_weight,
                min_precision=0.0 if full else self.min_precision,
                antithetic=self.antithetic,
                noise="normal" if full else "quantile",
                generator=problem.generator("noise", problem.device),
            )
        start = optimizer.precision
        rates = Schedule(self.local_schedule, problem.steps(self.epochs, self.batch_size))
        take_step = accelerate.bare_step(optimizer)
        total = torch.zeros((), dtype=problem.dtype, device=problem.device)
        step = 0
        for step, (x, y) in enumerate(each("data", problem.batches(self.epochs, self.batch_size)), start=1):
            for _ in range(self.mc_samples):
                with inside(optimizer.sampled_params(train=True), "sampling", "gradient"):
                    loss = problem.backward(x, y)
                total += loss
            optimizer.param_groups[0]["lr"] = lr * rates(step - 1)
            with span("update"):
                take_step()

        check_gradients(optimizer.refused, step * self.mc_samples)
        precision = optimizer.precision
        moved = (precision - start).abs() > 0.1 * start.abs()
        metrics = {
            "loss": float(total) / max(step * self.mc_samples, 1),
            "hessian-moved": float((moved.diagonal() if full else moved).to(problem.dtype).mean()),
            "reduced": float(optimizer.reductions),
            "gradient-evaluations": problem.examples_seen(self.epochs, self.batch_size) * self.mc_samples,
        }
        return LocalSolution(gaussian(server.name).from_mean_precision(optimizer.mean, precision), metrics)
