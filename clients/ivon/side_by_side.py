"""IVON for many clients side by side: :mod:`clients.ivon.step` on (C, P) matrices."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from bayesfed.federation.local import LocalProblem, LocalSolution
from clients.ivon.settings import IVONSettings
from clients.ivon.state import objective
from clients.ivon.step import draw, hess_step, mean_step
from clients.noise import Noise
from clients.side_by_side import Gradients, SideBySide


@dataclass
class State:
    """What the steps read and write, a row per client; D is P for the diagonal family and 1 for the isotropic one.

    Attributes:
        mean, momentum: (C, P).
        total, root: (C, D) ``h + delta`` and ``1/sqrt(h + delta)``.
        slope, bound: (C, D), offset (C, P): see :func:`clients.ivon.state.objective`.
        ess: (C, 1) ``N_k/(tau rho)``.
    """

    mean: Tensor
    momentum: Tensor
    total: Tensor
    root: Tensor
    slope: Tensor
    offset: Tensor
    bound: Tensor
    ess: Tensor

    @classmethod
    def start(cls, solver: IVONSettings, clients: SideBySide) -> State:
        """At the network initialisation with ``h = hess_init``, from round 2 at the server's posterior."""
        problems = clients.problems
        ess = clients.column([p.data_weight / p.rho for p in problems])
        delta = clients.matrix([p.server.precision for p in problems]) / ess
        terms = [(p.site_terms(), p.data_weight) for p in problems]
        linear, quadratic = (
            clients.matrix([pair[i] / weight for pair, weight in terms if pair is not None]) if terms[0][0] else 0.0
            for i in (0, 1)
        )
        mean = clients.matrix([p.server.mean for p in problems])
        slope, offset, bound = objective(delta, delta, mean, linear, quadratic, solver.min_precision, delta.dtype)
        total = delta + clients.column([solver.hess_init if p.round == 1 else 0.0 for p in problems])
        start, momentum = clients.matrix([p.start() for p in problems]), clients.remembered("momentum")
        return cls(start, momentum, total, total.rsqrt(), slope, offset, bound, ess)

    def first(self, active: int) -> State:
        """The first rows, sharing memory."""
        return State(*(value[:active] for value in vars(self).values()))

    @property
    def precision(self) -> Tensor:
        """``ess (h + delta)``, (C, D)."""
        return self.total * self.ess

    def step(self, sampler: Sampler, rate: Tensor, debias: Tensor) -> None:
        """A step from the sampler's statistics; rate and debias are (C, 1), see :func:`clients.ivon.step.mean_step`."""
        solver, work, product = sampler.solver, sampler.points, sampler.product  # the points have served
        alike = self.total.shape == work.shape
        hess_step(
            self.total,
            self.root,
            product if alike else product.mean(1, keepdim=True),
            self.ess.sqrt(),
            self.slope,
            self.bound,
            weight=1 - solver.beta2,
            share=1 - solver.beta2,
            work=work if alike else torch.empty_like(self.total),
        )
        mean_step(
            self.mean,
            self.momentum,
            sampler.gradient,
            self.total,
            self.slope,
            self.offset,
            share=1 - solver.beta1,
            debias=debias,
            rate=rate,
            clip_radius=solver.clip_radius,
            work=work,
        )


class Sampler:
    """Gradients at samples of the posteriors.

    Args:
        solver: says how samples are drawn, how many, and the bound on the norm of each gradient.
        clients: the batch; their noise streams are those they have alone.

    Attributes:
        gradient: (A, P) the gradient, averaged over the samples of a step.
        product: (A, P) likewise of ``noise gradient / sqrt(h + delta)``.
    """

    def __init__(self, solver: IVONSettings, clients: SideBySide):
        self.solver, self.clients = solver, clients
        self._sources = [Noise(solver.noise, p.generator("noise", clients.device)) for p in clients.problems]
        self._whole = clients.problems[0].initial.new_empty(4, len(self._sources), clients.model.dim)
        self._pair: Tensor | None = None  # noise whose mirror image is due

    def begin(self, state: State) -> None:
        """Go on with the clients of ``state``, which are the first ones."""
        self._state, active = state, len(state.mean)
        self._noise, self.points, self.gradient, self.product = self._whole[:, :active].unbind()
        self._scale = state.ess.rsqrt()
        self._gradients = Gradients(self.clients, self.points)

    def draw(self, step: int) -> None:
        """The statistics of ``step``."""
        samples, gradient, state = self.solver.mc_samples, self._gradients.matrix, self._state
        batch = self.clients.batch(step, len(self.points))
        for sample in range(samples):
            self._fill()
            draw(state.mean, state.root, self._noise, self._scale, out=self.points)
            self._gradients(*batch)
            if self.solver.clip_norm is not None:
                self._gradients.clip(self.solver.clip_norm)
            if sample == 0:
                self.gradient.copy_(gradient)
                torch.mul(gradient, self._noise, out=self.product)
            else:
                self.gradient.add_(gradient)
                self.product.addcmul_(gradient, self._noise)
        if samples > 1:
            self.gradient.div_(samples)
            self.product.div_(samples)

    def _fill(self) -> None:
        """Standard normal noise; every second sample mirrors the one before if ``antithetic``."""
        if self._pair is not None:
            torch.neg(self._pair[: len(self._noise)], out=self._noise)
            self._pair = None
            return
        for source, row in zip(self._sources, self._noise, strict=False):
            source.fill(row)
        self._pair = self._noise.clone() if self.solver.antithetic else None


@torch.no_grad()
def solve(
    solver: IVONSettings, problems: Sequence[LocalProblem], solution: Callable[..., LocalSolution]
) -> list[LocalSolution]:
    """:meth:`IVONSolver.solve_together`."""
    clients = SideBySide(problems, solver)
    whole = State.start(solver, clients)
    start = whole.precision
    seen = [int(p.memory.get("steps", 0)) for p in problems]
    sampler = Sampler(solver, clients)

    for active, steps in clients.segments():
        state = whole.first(active)
        sampler.begin(state)
        for step in steps:
            sampler.draw(step)
            debias = [1 - solver.beta1 ** (before + step + 1) for before in seen[:active]]
            rates = [-rate for rate in clients.rates(step, active)]
            state.step(sampler, clients.column(rates), clients.column(debias))

    losses, precision = clients.losses.tolist(), whole.precision
    held = whole.total <= whole.bound if solver.min_precision else torch.zeros_like(whole.total)
    floored = held.expand_as(whole.mean).sum(1)
    return [
        solution(
            problem,
            solver.metrics(problem, losses[row], solver.mc_samples),
            (start[row], whole.mean[row], precision[row]),
            floored[row],
            (whole.momentum[row], seen[row] + clients.steps[row]),
        )
        for row, problem in enumerate(problems)
    ]
