"""Federated ADMM with client sampling."""

from __future__ import annotations

from dataclasses import dataclass, replace
from typing import ClassVar

import torch

from bayesfed.families import NaturalParameters, PointMass
from bayesfed.federation.client.assignment import Assignment
from bayesfed.federation.client.contribution import Contribution
from bayesfed.federation.client.handler import Trainer
from bayesfed.federation.client.sites import Record
from bayesfed.federation.local import LocalProblem, LocalSolution
from bayesfed.federation.server.strategy import Reply, Sent, Sums
from bayesfed.settings import setting
from strategies.fedavg import FedAvg, add_mean


class FedADMMClient(Trainer):
    """Client side of FedADMM (Gong et al. 2022).

    Keeps ``y_k`` and the augmented model ``u_k = w_k + y_k/rho``, both (P,) float64; uploads ``w_g + Delta_k`` with
    ``Delta_k = u_k - u_k'``. ``u_k`` follows what the upload decodes to, so that the server's sum of them agrees to
    rounding.
    """

    remembers: ClassVar[bool] = True

    def pose(self, assignment: Assignment) -> LocalProblem:
        dual = assignment.state.get("dual", torch.zeros_like(self.initial, dtype=torch.float64, device="cpu"))
        site = NaturalParameters(PointMass.name, dual, dual.new_zeros(())).to(device=assignment.problem.device)
        return replace(assignment.problem, site=site)

    def answer(self, assignment: Assignment, solution: LocalSolution) -> Contribution:
        new = self._augmented(assignment, solution)
        return Contribution(PointMass(assignment.server.mean.to(torch.float64) + (new - self._before(assignment))))

    def settle(self, assignment: Assignment, solution: LocalSolution, sent: Contribution) -> Record:
        weights = solution.posterior.mean.to(dtype=torch.float64, device="cpu")
        augmented = self._before(assignment) + (
            sent.posterior.mean.to(torch.float64) - assignment.server.mean.to(torch.float64)
        )
        return {"dual": (augmented - weights) * assignment.settings.proximal, "augmented": augmented}

    def _before(self, assignment: Assignment) -> torch.Tensor:
        """``u_k`` before the round: at first the network initialisation, where the server started too."""
        return assignment.state.get("augmented", self.initial.to(dtype=torch.float64, device="cpu"))

    def _augmented(self, assignment: Assignment, solution: LocalSolution) -> torch.Tensor:
        """``w_k + y_k/rho`` after the dual's step, ``2 w_k - w_g + y_k'/rho``."""
        weights = solution.posterior.mean.to(dtype=torch.float64, device="cpu")
        server, rho = assignment.server.mean.to(torch.float64), assignment.settings.proximal
        dual = assignment.state.get("dual", torch.zeros_like(weights))
        return 2 * weights - server + dual / rho


@dataclass(kw_only=True, eq=False)
class FedADMM(FedAvg):
    r"""FedADMM (Gong et al., ICDE 2022), minimising ``sum_k l_k(w)`` through ``f_k = (N_k / mean_j N_j) l_k/N_k``:

        client   w_k = argmin_w  f_k(w) + y_k^T (w - w_g) + rho/2 ||w - w_g||^2
        dual     y_k += rho (w_k - w_g)
        upload   Delta_k = (w_k + y_k/rho) - (w_k' + y_k'/rho),  ' = before the round
        server   w_g += eta/|P| sum_{k in P} Delta_k

    with ``w_k' = w_g^0`` and ``y_k = 0`` at first. With ``eta = |P|/K`` (the default) the server holds
    ``mean_k (w_k + y_k/rho)`` over *all* clients: ADMM whose absent clients agree with what they said last. At full
    participation this is FedDyn's step too.

    Relation: BayesADMM with fixed isotropic precision delta in the flat limit ``delta -> 0`` with ``rho delta`` kept
    (docs/method.md 5). State: ``y_k`` and ``w_k + y_k/rho`` on clients. Traffic: P numbers each way (``w_g +
    Delta_k``).

    Args:
        rho: weight of the proximal term, and step of the duals.
        server_step: eta; null is ``|P|/K``.

    Raises:
        InputError: a value out of range.
    """

    name = "fedadmm"
    asks = frozenset({"proximal"})
    client = FedADMMClient

    rho: float = setting(0.1, above=0)
    server_step: float | None = setting(None, above=0)

    # -- one round ----------------------------------------------------------------------------------------------------

    def local_settings(self) -> dict[str, float | bool | str]:
        """The proximal term and ``f_k = (K/N) l_k``; the dual is the client's."""
        return {"proximal": self.rho, "size_scale": self.size_scale}

    def empty(self) -> Sums:
        """``sum_k (w_g + Delta_k)``."""
        return {"moved": self.zeros()}

    def accumulate(self, sums: Sums, reply: Reply[PointMass]) -> dict[str, float]:
        """Add ``w_g + Delta_k``; sizes are in ``f_k``."""
        return {"residual": add_mean(sums["moved"], reply)}

    def combine(self, sums: Sums, sent: Sent[PointMass], replies: int) -> dict[str, float]:
        """The server's step."""
        step = replies / self.num_clients if self.server_step is None else self.server_step
        move = (sums["moved"] / replies - sent.mean) * step
        self.posterior = PointMass((sent.mean + move).to(self.dtype))
        return {"admm/dual": self.rho * float(move.norm())}
