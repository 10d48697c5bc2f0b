"""SGD, Adam and AdamW: the mode of the local problem, for point estimates and fixed precisions."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from types import MappingProxyType
from typing import ClassVar

import torch
from torch import Tensor

from bayesfed.errors import choice, number
from bayesfed.families import PointMass
from bayesfed.federation.local import LocalProblem, LocalSolution
from bayesfed.problem.flat import FlatModel
from bayesfed.profiling import span
from bayesfed.schedule import Schedule
from clients.point import side_by_side
from clients.point.optimizer import LocalOptimizer
from clients.side_by_side import BatchingSolver
from clients.training import begin


@dataclass(kw_only=True, eq=False)
class PointSolver(BatchingSolver):
    """Minimise ``l_k(m)/tau + <eta_k, T(m)> + rho/2 (m - m_g)^T S_g (m - m_g)`` in units of the mean loss.

    This is the local problem under the delta method ``E_q[f] = f(m)`` with the precision held at the server's
    (federated ADMM, docs/method.md 5). For point-estimate strategies it is ``loss_scale l_k(w)/N_k + v_k^T w +
    proximal/2 ||w - w_g||^2``, divided by ``loss_scale`` (docs/method.md 6).

    Uploads the mean, and the server's precision unchanged.

    Args:
        optimizer: ``sgd``, ``adam`` or ``adamw``.
        momentum: of SGD; ignored by Adam.
        beta1, beta2: of Adam; ignored by SGD.
        weight_decay: coupled (L2) for SGD and Adam, decoupled for AdamW.
        clip_norm: bound on the norm of the whole gradient; null for none.
        keep_momentum: keep the optimizer's state between rounds instead of restarting it.

    Raises:
        InputError: a value out of range.
    """

    families: ClassVar[frozenset[str]] = frozenset({"point", "isotropic", "diagonal", "full"})
    learns_precision: ClassVar[bool] = False
    lacks = MappingProxyType({})

    optimizer: str
    momentum: float = 0.0
    beta1: float = 0.9
    beta2: float = 0.999
    weight_decay: float = 0.0
    clip_norm: float | None = None
    keep_momentum: bool = False

    def __post_init__(self) -> None:
        super().__post_init__()
        choice("optimizer", self.optimizer, ("sgd", "adam", "adamw"))
        for name in ("momentum", "beta1", "beta2"):
            number(name, getattr(self, name), at_least=0, at_most=1 - 1e-9)
        number("weight_decay", self.weight_decay, at_least=0)
        number("clip_norm", self.clip_norm, above=0, optional=True)

    def solve(self, problem: LocalProblem) -> LocalSolution:
        """Mini-batch steps of torch's optimizer, from the start of the round."""
        model = begin(problem)
        with span("optimizer"):
            optimizer = self.build(model.parameters, self.lr * problem.lr_factor)
        if problem.memory:
            _restore(optimizer, model, problem.memory)
        local = LocalOptimizer(problem, optimizer, self.clip_norm)
        metrics = self.train(problem, local)
        memory = _memory(optimizer, model) if self.keep_momentum else {}
        return self.solution(problem, model.vector.clone(), metrics, memory, local.seen)

    def solve_together(self, problems: Sequence[LocalProblem]) -> list[LocalSolution]:
        """:meth:`solve` for clients side by side."""
        return side_by_side.solve(self, problems)

    def build(self, parameters: list[torch.nn.Parameter], lr: float) -> torch.optim.Optimizer:
        """torch's optimizer with these settings."""
        if self.optimizer == "sgd":
            return torch.optim.SGD(parameters, lr=lr, momentum=self.momentum, weight_decay=self.weight_decay)
        kind = torch.optim.Adam if self.optimizer == "adam" else torch.optim.AdamW
        fused = parameters[0].device.type in ("cpu", "cuda")
        betas = (self.beta1, self.beta2)
        return kind(parameters, lr=lr, betas=betas, weight_decay=self.weight_decay, fused=fused)

    def solution(
        self,
        problem: LocalProblem,
        mean: Tensor,
        metrics: dict[str, float],
        memory: dict[str, Tensor],
        seen: Tensor | None,
    ) -> LocalSolution:
        """The answer of weights (P,) that were reached, from the sum (P,) of the loss's gradients on the way."""
        server, rates = problem.server, self.rates(problem)
        posterior = PointMass(mean) if isinstance(server, PointMass) else type(server)(mean, server.precision)
        progress = local_progress(rates, self.momentum if self.optimizer == "sgd" else 0.0)
        return LocalSolution(
            posterior, metrics | {"local-progress": progress}, memory, None if seen is None else seen / rates.horizon
        )


def local_progress(rates: Schedule, momentum: float) -> float:
    """How often a gradient of the local path counts in the change of the weights, summed over gradients: FedNova's
    ``||a_k||_1``.

    In units of the round's learning rate. The number of steps for SGD and Adam with a constant rate; heavy-ball
    momentum beta makes a gradient count ``1 + beta + beta^2 + ...`` times as far as the path goes.
    """
    weight = total = 0.0
    for step in range(rates.horizon):
        weight = momentum * weight + 1.0
        total += rates(step) * weight
    return total


def _memory(optimizer: torch.optim.Optimizer, model: FlatModel) -> dict[str, Tensor]:
    """The optimizer's state as vectors (P,), and its count of steps, shape ()."""
    states = [optimizer.state[p] for p in model.parameters]
    return {
        name: value if name == "step" else torch.cat([state[name].reshape(-1) for state in states])
        for name, value in states[0].items()
    }


def _restore(optimizer: torch.optim.Optimizer, model: FlatModel, memory: dict[str, Tensor]) -> None:
    """Inverse of :func:`_memory`."""
    for name, value in memory.items():
        count = len(model.parameters)
        pieces = [value.clone() for _ in range(count)] if name == "step" else model.split(value.clone())
        for parameter, piece in zip(model.parameters, pieces, strict=True):
            optimizer.state[parameter][name] = piece
