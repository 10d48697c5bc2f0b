"""torch's optimizers on a client's problem."""

from __future__ import annotations

import torch
from torch import Tensor

from bayesfed import accelerate
from bayesfed.families import PointMass
from bayesfed.federation.local import LocalProblem


class LocalOptimizer:
    """An optimizer on the client's whole objective: ``step`` adds site, linear and proximal terms to the loss's
    gradient first.

    Args:
        problem: the objective; its path's ``observer`` is called after every step.
        optimizer: of the model's parameters.
        clip_norm: bound on the norm of the whole gradient; None for none.

    Attributes:
        seen: (P,) sum of the loss's gradients, if the problem asks for it.
    """

    def __init__(self, problem: LocalProblem, optimizer: torch.optim.Optimizer, clip_norm: float | None):
        self.param_groups, self._step = optimizer.param_groups, accelerate.bare_step(optimizer)
        self._problem, self._clip_norm = problem, clip_norm
        self._slope, self._offset = quadratic_terms(problem)
        self._count = 0
        self.seen = torch.zeros_like(problem.model.vector) if problem.path.keep_gradient else None

    def step(self) -> None:
        """Complete the gradients, clip them, step, and leave them to autograd again."""
        problem, model = self._problem, self._problem.model
        gradients = model.gradients()
        if self.seen is not None:
            torch._foreach_add_(model.split(self.seen), gradients)
        if self._slope is not None and self._offset is not None:
            extra = self._slope @ model.vector if self._slope.dim() == 2 else self._slope * model.vector
            torch._foreach_add_(gradients, model.split(extra.add_(self._offset)))
        if self._clip_norm is not None:
            torch.nn.utils.clip_grad_norm_(model.parameters, self._clip_norm)
        self._step()
        model.drop_grad()
        self._count += 1
        if problem.path.observer is not None:
            problem.path.observer(self._count, model.vector)


def quadratic_terms(problem: LocalProblem) -> tuple[Tensor | None, Tensor | None]:
    """The gradient of site, linear and proximal terms is ``slope m + offset``, in mean-loss units; (None, None) if
    there are none.

    ``slope = (rho S_g - V)/(N_k/tau)`` has the shape of the precision, ``offset = (v - rho S_g m_g)/(N_k/tau)`` shape
    (P,).
    """
    server, linear = problem.server, problem.path.linear
    if isinstance(server, PointMass):
        proximal = problem.proximal / problem.loss_scale
        if proximal == 0 and problem.site is None and linear is None:
            return None, None
        slope = server.mean.new_full((), proximal)
        offset = -slope * server.mean
        if problem.site is not None:
            offset += problem.site.linear.to(offset) / problem.loss_scale
        return slope, offset if linear is None else offset + linear
    slope = problem.rho * server.precision
    offset = -problem.rho * server.multiply(server.precision, server.mean)
    site = problem.site_terms()
    if site is not None:
        slope, offset = slope - site[1], offset + site[0]
    offset = offset / problem.data_weight
    return slope / problem.data_weight, offset if linear is None else offset + linear
