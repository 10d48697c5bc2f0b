"""FedADMM's client: what it uploads is a change of its augmented model."""

from __future__ import annotations

from dataclasses import replace
from typing import ClassVar

import torch

from bayesfed.families import NaturalParameters, PointMass
from bayesfed.federation.client.handler import Task, Trainer
from bayesfed.federation.client.sites import Record
from bayesfed.federation.local import LocalProblem, LocalSolution, Posterior


class FedADMMTrainer(Trainer):
    """Client side of FedADMM (Gong et al. 2022; see ``strategies/fedadmm.py``).

    Keeps ``y_k`` and the augmented model ``u_k = w_k + y_k/rho``, both (P,) float64; uploads ``w_g + Delta_k`` with ``Delta_k = u_k - u_k'``. ``u_k`` follows
    what the upload decodes to, so that the server's sum of them agrees to rounding.
    """

    remembers: ClassVar[bool] = True

    def pose(self, task: Task) -> LocalProblem:
        dual = task.state.get("dual", torch.zeros_like(self.initial, dtype=torch.float64, device="cpu"))
        site = NaturalParameters(PointMass.name, dual, dual.new_zeros(())).to(device=task.local.device)
        return replace(task.local, site=site)

    def answer(self, task: Task, solution: LocalSolution) -> tuple[Posterior, Record]:
        new = self._augmented(task, solution)
        return PointMass(task.server.mean.to(torch.float64) + (new - self._before(task))), {}

    def settle(self, task: Task, solution: LocalSolution, sent: Posterior, extra: Record) -> Record:
        weights = solution.posterior.mean.to(dtype=torch.float64, device="cpu")
        augmented = self._before(task) + (sent.mean.to(torch.float64) - task.server.mean.to(torch.float64))
        return {"dual": (augmented - weights) * task.method.proximal, "augmented": augmented}

    def _before(self, task: Task) -> torch.Tensor:
        """``u_k`` before the round: at first the network initialisation, where the server started too."""
        return task.state.get("augmented", self.initial.to(dtype=torch.float64, device="cpu"))

    def _augmented(self, task: Task, solution: LocalSolution) -> torch.Tensor:
        """``w_k + y_k/rho`` after the dual's step, ``2 w_k - w_g + y_k'/rho``."""
        weights = solution.posterior.mean.to(dtype=torch.float64, device="cpu")
        server, rho = task.server.mean.to(torch.float64), task.method.proximal
        dual = task.state.get("dual", torch.zeros_like(weights))
        return 2 * weights - server + dual / rho
