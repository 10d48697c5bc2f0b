"""VON: natural-gradient variational inference with a full covariance."""

from __future__ import annotations

from dataclasses import dataclass
from types import MappingProxyType
from typing import ClassVar

import torch

from bayesfed.errors import choice, integer, number
from bayesfed.families import FullGaussian
from bayesfed.federation.local import NO_PATH, LocalProblem, LocalSolution, Solver
from bayesfed.profiling import span
from bayesfed.schedule import Schedule
from clients.dense import DenseProblem
from clients.gaussian_steps import safe_von_step


@dataclass(kw_only=True, eq=False)
class VONSolver(Solver):
    """Solve the local variational problem over full-covariance Gaussians by natural-gradient steps (docs/method.md 7).

    With ``g`` and ``H`` the expected gradient and Hessian of :class:`clients.dense.DenseProblem`'s f over the whole
    local data set, ``H = S_g + (E_q[hess l_k]/tau - V_k)/rho``, a step of rates (a, b) is

        S <-  S + b (H - S) + b^2/2 (H - S) S^-1 (H - S)            (positive definite for every b; Lin et al. 2020)
        m <-  m - a S^-1 g

    so ``a = b = 1`` is Newton's method. Expectations are Monte-Carlo over ``m + L^-T z``, or the delta method (0
    samples). Where ``learn_precision`` is off, expectations are taken at the mean, S only scales the steps, and the
    server's precision is returned. O(P^2) memory and O(P^3) time a step. Uploads mean and precision, P + P^2 numbers.

    Args:
        lr: rate ``a`` of the mean, relative to Newton's step.
        lr_precision: rate ``b`` of the precision, in (0, 1].
        epochs: steps; each is one pass over the client's data.
        mc_samples: posterior samples per step; 0 evaluates at the mean.
        local_schedule: both rates over the steps of a round.

    Raises:
        InputError: a value out of range.
    """

    families: ClassVar[frozenset[str]] = frozenset({"full"})
    lacks = MappingProxyType({"path": NO_PATH})

    lr: float = 1.0
    lr_precision: float = 1.0
    epochs: int = 5
    mc_samples: int = 1
    local_schedule: str = "inverse"

    def __post_init__(self) -> None:
        number("lr", self.lr, above=0)
        number("lr_precision", self.lr_precision, above=0, at_most=1)
        integer("epochs", self.epochs, at_least=1)
        integer("mc_samples", self.mc_samples, at_least=0)
        choice("local_schedule", self.local_schedule, Schedule.KINDS)

    def solve(self, problem: LocalProblem) -> LocalSolution:
        """Steps over all of the client's data, float64, from the start of the round and the server's precision."""
        self.require(problem)
        dense = DenseProblem(problem)
        generator = problem.generator("noise", problem.device)
        steps = problem.budget(self.epochs)
        samples = self.mc_samples if problem.learn_precision else 0
        rates = Schedule(self.local_schedule, steps)
        posterior = FullGaussian(problem.start().to(torch.float64), dense.server.precision)

        for step in range(steps):
            with span("sampling"):
                points = posterior.sample(samples, generator) if samples else posterior.mean[None]
            with span("gradient"):
                gradient, hessian = dense.derivatives(posterior.mean, points)
            with span("update"):
                lr, lr_precision = self.lr * problem.lr_factor * rates(step), self.lr_precision * rates(step)
                posterior = FullGaussian(
                    *safe_von_step(posterior.mean, posterior.precision, gradient, hessian, lr_precision, lr=lr)
                )

        precision = posterior.precision if problem.learn_precision else dense.server.precision
        return dense.solution(FullGaussian.from_mean_precision(posterior.mean, precision), steps * max(samples, 1))
