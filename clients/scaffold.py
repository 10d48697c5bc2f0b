"""SCAFFOLD's client: local steps along corrected gradients."""

from __future__ import annotations

from dataclasses import replace
from typing import ClassVar

import torch
from torch import Tensor

from bayesfed.federation.client.handler import Task, Trainer
from bayesfed.federation.client.sites import Record
from bayesfed.federation.local import LocalProblem, LocalSolution, Posterior


class ScaffoldTrainer(Trainer):
    """Client side of SCAFFOLD (Karimireddy et al. 2020; see ``strategies/scaffold.py``).

    Keeps its control variate ``c_k`` (P,) in float64; gets ``control`` = c, uploads ``control_change`` = ``c_k' - c_k``. ``c_k`` follows what the
    upload decodes to, so that the server's weighted sum of them agrees to rounding.

    Raises:
        ValueError: the solver takes no gradient steps.
    """

    received: ClassVar[tuple[str, ...]] = ("control",)
    returned: ClassVar[tuple[str, ...]] = ("control_change",)
    remembers: ClassVar[bool] = True

    def pose(self, task: Task) -> LocalProblem:
        correction = task.extra["control"].to(torch.float64) - self._control(task)
        return replace(task.local, linear=correction.to(self.model.vector), keep_gradient=True)

    def answer(self, task: Task, solution: LocalSolution) -> tuple[Posterior, Record]:
        if solution.gradient is None:
            raise ValueError(
                f"strategy=scaffold needs a client that takes gradient steps; {type(self.solver).__name__} does not"
            )
        change = solution.gradient.to(dtype=torch.float64, device="cpu") - self._control(task)
        return solution.posterior, {"control_change": change}

    def settle(self, task: Task, solution: LocalSolution, sent: Posterior, extra: Record) -> Record:
        return {"control": self._control(task) + extra["control_change"].to(torch.float64)}

    def _control(self, task: Task) -> Tensor:
        zero = torch.zeros(self.model.dim, dtype=torch.float64, device="cpu")
        return task.state.get("control", zero)
