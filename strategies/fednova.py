"""Normalised averaging."""

from __future__ import annotations

import torch

from bayesfed.errors import number
from bayesfed.families import PointMass
from bayesfed.federation.server.reading import Reply
from bayesfed.federation.server.strategy import Sums
from strategies.fedavg import FedAvg


class FedNova(FedAvg):
    r"""FedNova (Wang et al., NeurIPS 2020), with ``p_k = N_k / sum_P N_j``:

        client   as FedAvg's, to w_k; also says how often gradients count in ``w_k - w_g``, ``a_k`` (steps, for plain SGD)
        server   w_g += eta tau_eff sum_{k in P} p_k (w_k - w_g)/a_k,    tau_eff = sum_P p_k a_k

    Clients that do more steps no longer pull the optimum towards their own, so the fixed point is that of the pooled loss to first order
    in the learning rate. With equal ``a_k`` this is FedAvg. ``a_k`` is the paper's ``||a_k||_1`` with momentum and schedules; for Adam, whose steps aren't
    sums of gradients, the number of steps is a heuristic.

    No duals, no client state. P numbers each way.

    Args:
        server_step: eta.
        fraction, min_replies, timeout: see :class:`FederatedStrategy`.

    Raises:
        InputError: a value out of range.
    """

    name: str = "fednova"
    asks: frozenset[str] = frozenset({"path"})

    def __init__(self, server_step: float = 1.0, fraction: float = 1.0, min_replies: int = 1, timeout: float = 86400.0):
        super().__init__(fraction=fraction, min_replies=min_replies, timeout=timeout)
        number("server_step", server_step, above=0)
        self.server_step = float(server_step)

    def empty(self) -> Sums:
        """``sum_k N_k (w_k - w_g)/a_k``, ``sum_k N_k a_k`` and ``sum_k N_k``."""
        zero = self._server.new_zeros(())
        return {"directions": torch.zeros_like(self._server), "progress": zero, "examples": zero.clone()}

    def add(self, sums: Sums, reply: Reply[PointMass]) -> dict[str, float]:
        """Add a normalised change."""
        progress = reply.metric("local-progress")
        change = reply.posterior.mean - self._server
        sums["directions"].add_(change, alpha=reply.num_examples / progress)
        sums["progress"].add_(reply.num_examples * progress)
        sums["examples"].add_(reply.num_examples)
        return {"residual": float(change.norm())}

    def combine(self, sums: Sums, replies: int) -> dict[str, float]:
        """The server's step."""
        effective = sums["progress"] / sums["examples"]
        move = sums["directions"] / sums["examples"] * (self.server_step * effective)
        self.posterior = PointMass((self._server + move).to(self.dtype))
        return {"progress/effective": float(effective)}
