"""Federated ADMM with client sampling."""

from __future__ import annotations

import torch
from torch import Tensor

from bayesfed.errors import number
from bayesfed.families import PointMass
from bayesfed.federation.server.strategy import Sums
from strategies.fedavg import FedAvg


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
        """The proximal term and ``f_k = (K/N) l_k``; the dual is the handler's (:mod:`clients.fedadmm`)."""
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
