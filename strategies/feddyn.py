"""Federated learning with dynamic regularisation."""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor

from bayesfed.families import PointMass
from bayesfed.federation import duals
from bayesfed.federation.server.strategy import Reply, Sent, Sums
from bayesfed.settings import setting
from strategies.fedavg import FedAvg, add_mean


@dataclass(kw_only=True, eq=False)
class FedDyn(FedAvg):
    r"""FedDyn (Acar et al., ICLR 2021), minimising ``sum_k l_k(w)`` through ``L_k = (N_k / mean_j N_j) l_k/N_k``:

        client   w_k = argmin_w  L_k(w) + v_k^T w + alpha/2 ||w - w_g||^2          (v_k = -g_k of the paper)
        dual     v_k += alpha (w_k - w_g)
        server   h -= alpha/K sum_{k in P} (w_k - w_g),   w_g = mean_{k in P} w_k - h/alpha

    so the mean is not weighted: the duals put it right. Dividing a client's problem by its weight gives the official
    code's ``alpha_k = alpha mean_j N_j / N_k`` for mean losses: *its own* for each client (public code lets all clients
    share one). Under client sampling absent clients keep ``v_k``, and K in the server's step is all clients.

    Relation: the limit ``delta -> 0`` of BayesADMM with fixed isotropic precision delta, ``rho = alpha N/(K delta)``,
    ``damping=1`` (docs/method.md 5). State: ``v_k`` on clients, h on the server. Traffic: P numbers each way.

    Args:
        alpha: weight of the proximal term.

    Raises:
        InputError: a value out of range.
    """

    name = "feddyn"
    asks = frozenset({"proximal"})

    alpha: float = setting(0.1, above=0)

    # -- state --------------------------------------------------------------------------------------------------------

    def prepare(self, initial: Tensor) -> None:
        """The server starts at the network initialisation, h at 0."""
        super().prepare(initial)
        self.h = torch.zeros_like(initial, dtype=torch.float64)

    def tensors(self) -> dict[str, Tensor]:
        """h."""
        return {"h": self.h}

    def load_tensors(self, tensors: dict[str, Tensor]) -> None:
        """Inverse of :meth:`tensors`."""
        self.h = tensors["h"]

    # -- one round ----------------------------------------------------------------------------------------------------

    def local_settings(self) -> dict[str, float | bool | str]:
        """The proximal term, the dual's full step, and ``L_k = (K/N) l_k``."""
        return {"proximal": self.alpha, "damping": 1.0, "size_scale": self.size_scale}

    def empty(self) -> Sums:
        """``sum_k w_k``."""
        return {"weights": self.zeros()}

    def accumulate(self, sums: Sums, reply: Reply[PointMass]) -> dict[str, float]:
        """Add ``w_k``; sizes are in ``L_k``."""
        return {"residual": add_mean(sums["weights"], reply)}

    def combine(self, sums: Sums, sent: Sent[PointMass], replies: int) -> dict[str, float]:
        """h, then the server's step."""
        self.h.sub_(duals.change(sums["weights"], sent.mean, replies), alpha=self.alpha / self.num_clients)
        mean = sums["weights"] / replies - self.h / self.alpha
        self.posterior = PointMass(mean.to(self.dtype))
        return {
            "dual/norm": self.num_clients * float(self.h.norm()),
            "admm/dual": self.alpha * float((mean - sent.mean).norm()),
        }
