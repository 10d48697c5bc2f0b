"""SGD, Adam and AdamW for many clients side by side: :class:`clients.point.PointSolver` on (C, P) matrices."""

from __future__ import annotations

from collections.abc import Sequence
from typing import TYPE_CHECKING

import torch
from torch import Tensor

from bayesfed.federation.local import LocalProblem, LocalSolution
from clients.point.optimizer import quadratic_terms
from clients.point.step import adam_step, sgd_step
from clients.side_by_side import Gradients, SideBySide

if TYPE_CHECKING:
    from clients.point.solver import PointSolver


class State:
    """What the optimizer keeps, a row per client.

    Args:
        solver: its settings.
        clients: memory of earlier rounds is taken up.

    Attributes:
        names: of the tensors in ``memory`` as torch's optimizers name them.
        first: (C, P) momentum buffer of SGD, or running mean of the gradients of Adam; None for plain SGD.
        second: (C, P) running mean of Adam's squared gradients.
        steps: how many steps they have seen before this round, one number per client.
    """

    def __init__(self, solver: PointSolver, clients: SideBySide):
        self.solver, self._column = solver, clients.column
        self.names = ["exp_avg", "exp_avg_sq"]
        if solver.optimizer == "sgd":
            self.names = ["momentum_buffer"] if solver.momentum else []
        tensors = [clients.remembered(name) for name in self.names]
        self.first: Tensor | None = tensors[0] if tensors else None
        self.second: Tensor | None = tensors[1] if len(tensors) > 1 else None
        self.steps = [float(p.memory.get("step", 0.0)) for p in clients.problems]

    def step(self, weights: Tensor, gradient: Tensor, rates: list[float], step: int) -> None:
        """Update ``weights`` (A, P) at A learning rates; ``gradient`` is overwritten, ``step`` counts from 1."""
        solver, column, active = self.solver, self._column, len(weights)
        if solver.weight_decay and solver.optimizer == "adamw":
            weights.mul_(column([1 - rate * solver.weight_decay for rate in rates]))
        elif solver.weight_decay:
            gradient.add_(weights, alpha=solver.weight_decay)
        first = None if self.first is None else self.first[:active]
        if first is None or self.second is None:
            sgd_step(weights, gradient, first, rate=column(rates), momentum=solver.momentum)
            return
        seen = [before + step for before in self.steps[:active]]
        rate = column([rate / (1 - solver.beta1**t) for rate, t in zip(rates, seen, strict=True)])
        root = column([(1 - solver.beta2**t) ** -0.5 for t in seen])
        betas = {"beta1": solver.beta1, "beta2": solver.beta2}
        adam_step(weights, gradient, first, self.second[:active], rate=rate, root=root, **betas)

    def memory(self, row: int, steps: int) -> dict[str, Tensor]:
        """What one client's torch optimizer would hold after ``steps`` steps of this round."""
        tensors = (t for t in (self.first, self.second) if t is not None)
        kept = {name: tensor[row].clone() for name, tensor in zip(self.names, tensors, strict=True)}
        if self.second is not None:
            kept["step"] = torch.tensor(self.steps[row] + steps, dtype=torch.float32, device=self.second.device)
        return kept


@torch.no_grad()
def solve(solver: PointSolver, problems: Sequence[LocalProblem]) -> list[LocalSolution]:
    """:meth:`PointSolver.solve_together`."""
    clients = SideBySide(problems, solver)
    weights = clients.matrix([p.start() for p in problems])
    state = State(solver, clients)
    slope, offset = _stack(clients)
    seen = torch.zeros_like(weights) if problems[0].path.keep_gradient else None

    for active, steps in clients.segments():
        here = weights[:active]
        gradients = Gradients(clients, here)
        for step in steps:
            gradients(*clients.batch(step, active))
            if seen is not None:
                seen[:active] += gradients.matrix
            if slope is not None and offset is not None:
                gradients.matrix.addcmul_(slope[:active], here).add_(offset[:active])
            if solver.clip_norm is not None:
                gradients.clip(solver.clip_norm)
            state.step(here, gradients.matrix, clients.rates(step, active), step + 1)

    rows = zip(problems, clients.steps, clients.losses.tolist(), strict=True)
    return [
        solver.solution(
            problem,
            weights[row].clone(),
            solver.metrics(problem, loss, 1),
            state.memory(row, count) if solver.keep_momentum else {},
            None if seen is None else seen[row],
        )
        for row, (problem, count, loss) in enumerate(rows)
    ]


def _stack(clients: SideBySide) -> tuple[Tensor | None, Tensor | None]:
    """:func:`quadratic_terms` of all clients: slope (C, P) or (C, 1), offset (C, P); (None, None) if there are none."""
    slopes, offsets = zip(*(quadratic_terms(p) for p in clients.problems), strict=True)
    if all(slope is None for slope in slopes):
        return None, None
    zero = torch.zeros_like(clients.problems[0].initial)
    return (
        clients.matrix([zero[:1] if s is None else s for s in slopes]),
        clients.matrix([zero if o is None else o for o in offsets]),
    )
