"""VON: natural-gradient variational inference with a full covariance."""

from __future__ import annotations

from types import MappingProxyType
from typing import ClassVar

import torch

from bayesfed.errors import choice, integer, number
from bayesfed.families import FullGaussian
from bayesfed.federation.local import NO_PATH, LocalProblem, LocalSolution, Solver
from bayesfed.problem.curvature import SummedLoss
from bayesfed.profiling import span
from bayesfed.schedule import Schedule


class VONSolver(Solver):
    """Solve the local variational problem over full-covariance Gaussians by natural-gradient steps (spec 1.5).

    With ``G = E_q[hess l_k]/tau``, ``g = E_q[grad l_k]/tau`` over the whole local data set, a step of rates (a, b) is

        D  =  S - (S_g + (G - V_k)/rho)
        S <-  S - b D + b^2/2 D S^-1 D                              (positive definite for every b; Lin et al. 2020)
        m <-  m - a/rho S^-1 { g + v_k - V_k m + rho S_g (m - m_g) }

    so ``a = b = 1`` is Newton's method. Expectations are Monte-Carlo over ``m + L^-T z``, or the delta method (0 samples).
    Where ``learn_precision`` is off, expectations are taken at the mean, S only scales the steps, and the server's precision is returned.
    O(P^2) memory and O(P^3) time a step. Uploads mean and precision, P + P^2 numbers.

    Args:
        lr: rate ``a`` of the mean, relative to Newton's step.
        lr_precision: rate ``b`` of the precision, in (0, 1].
        epochs: steps; each is one pass over the client's data.
        mc_samples: posterior samples per step; 0 evaluates at the mean.
        schedule, schedule_rounds, schedule_decay: rate of the mean over communication rounds.
        local_schedule: both rates over the steps of a round.

    Raises:
        InputError: a value out of range.
    """

    families: ClassVar[frozenset[str]] = frozenset({"full"})
    lacks = MappingProxyType({"path": NO_PATH})

    def __init__(
        self,
        lr: float = 1.0,
        lr_precision: float = 1.0,
        epochs: int = 10,
        mc_samples: int = 1,
        schedule: str = "constant",
        schedule_rounds: int | None = None,
        schedule_decay: float = 0.1,
        local_schedule: str = "inverse",
    ):
        number("lr", lr, above=0)
        number("lr_precision", lr_precision, above=0, at_most=1)
        integer("epochs", epochs, at_least=1)
        integer("mc_samples", mc_samples, at_least=0)
        choice("local_schedule", local_schedule, Schedule.KINDS)
        Schedule(schedule, schedule_rounds or 1, schedule_decay)
        self.lr, self.lr_precision, self.epochs, self.mc_samples = lr, lr_precision, epochs, mc_samples
        self.local_schedule = local_schedule

    def solve(self, problem: LocalProblem) -> LocalSolution:
        self.require(problem)
        with span("data"):
            loss = SummedLoss(problem.model, problem.likelihood, problem.data)
        server = FullGaussian.from_arrays(problem.server.arrays()).to(torch.float64)
        site = problem.site if problem.site is not None else server.zero(server.mean)
        linear, quadratic = site.linear, site.precision  # v_k, V_k
        rho, tau = problem.rho, problem.temperature
        generator = problem.generator("noise", problem.device)
        steps = problem.budget(self.epochs)
        samples = self.mc_samples if problem.learn_precision else 0
        rates = Schedule(self.local_schedule, steps)
        posterior = FullGaussian(problem.start().to(torch.float64), server.precision)

        for step in range(steps):
            mean, precision = posterior.mean, posterior.precision
            with span("sampling"):
                points = posterior.sample(samples, generator) if samples else mean[None]
            with span("gradient"):
                gradient = torch.stack([loss.gradient(point) for point in points]).mean(0) / tau
                curvature = torch.stack([loss.hessian(point) for point in points]).mean(0) / tau
            with span("update"):
                gap = precision - server.precision - (curvature - quadratic) / rho
                rate = self.lr_precision * rates(step)
                correction = gap @ torch.cholesky_solve(gap, posterior.factor)
                precision = precision - rate * gap + 0.5 * rate**2 * correction
                precision = 0.5 * (precision + precision.mT)
                slope = gradient + linear - quadratic @ mean + rho * (server.precision @ (mean - server.mean))
                newton = FullGaussian.solve(precision, slope) / rho
                posterior = FullGaussian(mean - self.lr * problem.lr_factor * rates(step) * newton, precision)

        value = float(loss.loss(posterior.mean)) / problem.num_examples
        precision = posterior.precision if problem.learn_precision else server.precision
        posterior = FullGaussian.from_mean_precision(posterior.mean, precision)
        points_used = steps * max(samples, 1)
        metrics = {"loss": value, "gradient-evaluations": points_used * loss.gradients_per_point}
        return LocalSolution(posterior.to(problem.dtype), metrics)
