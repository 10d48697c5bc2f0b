"""Federated ADMM with client sampling."""

from __future__ import annotations

from dataclasses import replace
from typing import ClassVar

import torch
from torch import Tensor

from bayesfed.errors import number
from bayesfed.families import NaturalParameters, PointMass
from bayesfed.federation.client.assignment import Assignment
from bayesfed.federation.client.contribution import Contribution
from bayesfed.federation.client.handler import Trainer
from bayesfed.federation.client.sites import Record
from bayesfed.federation.local import LocalProblem, LocalSolution
from bayesfed.federation.server.strategy import Sums
from strategies.fedavg import FedAvg


class FedADMMClient(Trainer):
    """Client side of FedADMM (Gong et al. 2022).

    Keeps ``y_k`` and the augmented model ``u_k = w_k + y_k/rho``, both (P,) float64; uploads ``w_g + Delta_k`` with ``Delta_k = u_k - u_k'``. ``u_k`` follows
    what the upload decodes to, so that the server's sum of them agrees to rounding.
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


class FedADMM(FedAvg):
    r"""FedADMM (Gong et al., ICDE 2022), minimising ``sum_k l_k(w)`` through ``f_k = (N_k / mean_j N_j) l_k/N_k``:

        client   w_k = argmin_w  f_k(w) + y_k^T (w - w_g) + rho/2 ||w - w_g||^2
        dual     y_k += rho (w_k - w_g)
        upload   Delta_k = (w_k + y_k/rho) - (w_k' + y_k'/rho),  ' = before the round
        server   w_g += eta/|P| sum_{k in P} Delta_k

    with ``w_k' = w_g^0`` and ``y_k = 0`` at first. With ``eta = |P|/K`` (the default) the server holds ``mean_k (w_k + y_k/rho)`` over *all* clients:
    ADMM whose absent clients agree with what they said last. At full participation this is FedDyn's step too.

    In BayesADMM's terms: fixed isotropic precision delta in the flat limit ``delta -> 0`` with ``rho delta`` kept (spec 1.4).
    Client state: ``y_k`` and ``w_k + y_k/rho``. Uploads P numbers: ``w_g + Delta_k``.

    Args:
        rho: weight of the proximal term, and step of the duals.
        server_step: eta; null is ``|P|/K``.
        fraction, min_replies, timeout: see :class:`FederatedStrategy`.

    Raises:
        InputError: a value out of range.
    """

    name: str = "fedadmm"
    asks: frozenset[str] = frozenset({"proximal"})
    client = FedADMMClient

    def __init__(
        self,
        rho: float = 0.1,
        server_step: float | None = None,
        fraction: float = 1.0,
        min_replies: int = 1,
        timeout: float = 86400.0,
    ):
        super().__init__(fraction=fraction, min_replies=min_replies, timeout=timeout)
        number("rho", rho, above=0)
        number("server_step", server_step, above=0, optional=True)
        self.rho, self.server_step = float(rho), server_step

    def local_settings(self) -> dict[str, float | bool | str]:
        """The proximal term and ``f_k = (K/N) l_k``; the dual is the client's."""
        return {"proximal": self.rho, "size_scale": self.size_scale}

    def empty(self) -> Sums:
        """``sum_k (w_g + Delta_k)``."""
        return {"moved": torch.zeros_like(self._server)}

    def accumulate(self, sums: Sums, posterior: PointMass, num_examples: int) -> dict[str, float]:
        """Add ``w_g + Delta_k``; sizes are in ``f_k``."""
        return {"residual": self.add_mean(sums["moved"], posterior)}

    def combine(self, sums: Sums, replies: int) -> dict[str, float]:
        """The server's step."""
        step = replies / self.num_clients if self.server_step is None else self.server_step
        move: Tensor = (sums["moved"] / replies - self._server) * step
        self.posterior = PointMass((self._server + move).to(self.dtype))
        return {"admm/dual": self.rho * float(move.norm())}
