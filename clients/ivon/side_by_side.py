"""IVON for many clients side by side: the recursion of :class:`clients.optim.IVON` on (C, P) matrices."""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass, fields, replace
from typing import TYPE_CHECKING

import torch
from torch import Tensor

from bayesfed.federation.local import LocalProblem, LocalSolution
from clients.noise import Noise
from clients.side_by_side import Gradients, SideBySide

if TYPE_CHECKING:
    from clients.ivon.solver import IVONSolver


@dataclass
class State:
    """``q_k = N(m, 1/(ess (h + delta)))`` of every client and what its update needs, in units of the mean loss.

    One row per client; D is P for the diagonal family and 1 for the isotropic one.

    Attributes:
        mean: (C, P) ``m``.
        hess: (C, D) ``h``.
        root: (C, D) ``1/sqrt(h + delta)``.
        momentum: (C, P).
        ess: (C, 1) ``N_k/(tau rho)``.
        delta: (C, D) the server's precision over ``ess``.
        bound: (C, D) smallest ``h``, from ``min_precision``; None if that is 0.
        floor: (C, 1) of ``h + delta``: below the rounding error of the sum.
        site: (C, D) ``V_k``; None without sites.
        slope, offset: (C, D) and (C, P): prior and site add ``slope m - offset`` to the gradient.
    """

    mean: Tensor
    hess: Tensor
    root: Tensor
    momentum: Tensor
    ess: Tensor
    delta: Tensor
    bound: Tensor | None
    floor: Tensor
    site: Tensor | None
    slope: Tensor
    offset: Tensor

    @classmethod
    def start(cls, solver: IVONSolver, clients: SideBySide) -> State:
        """The state before the first step: at the network initialisation with ``h = hess_init``, later at the server's posterior."""
        problems = clients.problems
        ess = clients.column([p.data_weight / p.rho for p in problems])
        delta = clients.matrix([p.server.precision for p in problems]) / ess
        hess = clients.column([solver.hess_init if p.round == 1 else 0.0 for p in problems]).expand_as(delta).clone()
        info = torch.finfo(delta.dtype)
        slope, offset = delta, delta * clients.matrix([p.server.mean for p in problems])
        site: Tensor | None = None
        terms = [(p.site_terms(), p.data_weight) for p in problems]
        if any(pair is not None for pair, _ in terms):
            site = clients.matrix([pair[1] / weight for pair, weight in terms if pair is not None])
            slope = delta - site
            offset -= clients.matrix([pair[0] / weight for pair, weight in terms if pair is not None])
        return cls(
            mean=clients.matrix([p.start() for p in problems]),
            hess=hess,
            root=(hess + delta).rsqrt_(),
            momentum=clients.remembered("momentum"),
            ess=ess,
            delta=delta,
            bound=delta * (solver.min_precision - 1) if solver.min_precision else None,
            floor=(delta.amin(1, keepdim=True) * info.eps).clamp_(min=info.tiny),
            site=site,
            slope=slope,
            offset=offset,
        )

    def first(self, active: int) -> State:
        """The first rows, sharing memory."""
        given = {f.name: getattr(self, f.name) for f in fields(self) if getattr(self, f.name) is not None}
        return replace(self, **{name: value[:active] for name, value in given.items()})

    @property
    def precision(self) -> Tensor:
        """``ess (h + delta)``, (C, D)."""
        return (self.hess + self.delta) * self.ess

    def sample(self, noise: Tensor, out: Tensor) -> None:
        """``m + noise/sqrt(precision)`` into ``out``; all (C, P)."""
        torch.mul(self.root * self.ess.rsqrt(), noise, out=out).add_(self.mean)

    def step(self, gradient: Tensor, product: Tensor, rates: Tensor, debias: Tensor, solver: IVONSolver) -> None:
        """Move ``h`` towards ``hhat = sqrt(ess (h + delta)) z g - V``, then ``m`` along the preconditioned direction.

        Args:
            gradient, product: (C, P) ``g`` and ``z g``, averaged over the step's samples.
            rates: (C, 1) learning rates.
            debias: (C, 1) what the momentum is divided by.
            solver: beta1, beta2 and clip_radius.
        """
        c = 1 - solver.beta2
        if self.hess.shape[1] == 1:
            product = product.mean(1, keepdim=True)
        # with t = (hhat - h) root the recursion is h += c t / root + (c t)^2 / 2
        t = (product * self.ess.sqrt()).addcmul_(self.hess, self.root, value=-1)
        if self.site is not None:
            t.addcmul_(self.site, self.root, value=-1)
        self.hess.addcdiv_(t, self.root, value=c).addcmul_(t, t, value=0.5 * c * c)
        if self.bound is not None:
            torch.maximum(self.hess, self.bound, out=self.hess)
        denominator = torch.maximum(torch.add(self.hess, self.delta, out=t), self.floor, out=t)
        torch.rsqrt(denominator, out=self.root)

        self.momentum.lerp_(gradient, 1 - solver.beta1)
        # everything is kept multiplied by debias, which the step size divides out
        direction = (self.slope * self.mean).sub_(self.offset).mul_(debias).add_(self.momentum).div_(denominator)
        if solver.clip_radius < math.inf:
            bound = solver.clip_radius * debias
            torch.clamp(direction, -bound, bound, out=direction)
        self.mean.addcmul_(direction, rates / debias, value=-1)

    @property
    def floored(self) -> Tensor:
        """How many entries of ``h`` are held at ``bound``, (C,)."""
        if self.bound is None:
            return torch.zeros_like(self.mean[:, 0])
        return (self.hess <= self.bound).expand_as(self.mean).sum(1)


class Sampler:
    """Gradients at samples of the posteriors.

    Args:
        solver: says how samples are drawn, how many, and the bound on the norm of each gradient.
        clients: the batch; their noise streams are those they have alone.
    """

    def __init__(self, solver: IVONSolver, clients: SideBySide):
        self.solver, self.clients = solver, clients
        self._noises = [Noise(solver.noise, p.generator("noise", clients.device)) for p in clients.problems]
        like = clients.problems[0].initial
        self._noise, self._points, self.gradient, self.product = (
            like.new_empty(len(self._noises), like.numel()) for _ in range(4)
        )
        self._unpaired = False  # whether the mirror image of the last noise is due

    def begin(self, state: State) -> None:
        """Go on with the clients of ``state``, which are the first ones."""
        self.state, active = state, len(state.mean)
        self._noise, self._points = self._noise[:active], self._points[:active]
        self.gradient, self.product = self.gradient[:active], self.product[:active]
        self._gradients = Gradients(self.clients, self._points)

    def draw(self, step: int) -> None:
        """Fill :attr:`gradient` and :attr:`product` (z g), averaged over the samples of ``step``."""
        samples, gradient = self.solver.mc_samples, self._gradients.matrix
        batch = self.clients.batch(step, len(self._points))
        for sample in range(samples):
            self._draw_noise()
            self.state.sample(self._noise, out=self._points)
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

    def _draw_noise(self) -> None:
        if self._unpaired:
            self._noise.neg_()
        else:
            for noise, row in zip(self._noises, self._noise, strict=False):
                noise.fill(row)
        self._unpaired = self.solver.antithetic and not self._unpaired


@torch.no_grad()
def solve(solver: IVONSolver, problems: Sequence[LocalProblem]) -> list[LocalSolution]:
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
            rates = clients.column(clients.rates(step, active))
            debias = clients.column([1 - solver.beta1 ** (before + step + 1) for before in seen[:active]])
            state.step(sampler.gradient, sampler.product, rates, debias, solver)

    losses, precision, floored = clients.losses.tolist(), whole.precision, whole.floored
    return [
        solver.solution(
            problem,
            solver.metrics(problem, losses[row], solver.mc_samples),
            (start[row], whole.mean[row], precision[row]),
            floored[row],
            (whole.momentum[row], seen[row] + clients.steps[row]),
        )
        for row, problem in enumerate(problems)
    ]
