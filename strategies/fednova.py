"""Normalised averaging."""

from __future__ import annotations

from dataclasses import dataclass

from bayesfed.families import PointMass
from bayesfed.federation.server.strategy import Reply, Sent, Sums
from bayesfed.settings import setting
from strategies.fedavg import FedAvg


@dataclass(kw_only=True, eq=False)
class FedNova(FedAvg):
    r"""FedNova (Wang et al., NeurIPS 2020), with ``p_k = N_k / sum_P N_j``:

        client   as FedAvg's, to w_k; also says how often gradients count in ``w_k - w_g``, ``a_k`` (steps, for plain
        SGD) dual     none
        server   w_g += eta tau_eff sum_{k in P} p_k (w_k - w_g)/a_k,    tau_eff = sum_P p_k a_k

    Clients that do more steps no longer pull the optimum towards their own, so the fixed point is that of the pooled
    loss to first order in the learning rate. ``a_k`` is the paper's ``||a_k||_1`` with momentum and schedules; for
    Adam, whose steps aren't sums of gradients, the number of steps is a heuristic.

    Relation: with equal ``a_k`` FedAvg. State: none. Traffic: P numbers each way.

    Args:
        server_step: eta.

    Raises:
        InputError: a value out of range.
    """

    name = "fednova"
    asks = frozenset({"path"})

    server_step: float = setting(1.0, above=0)

    # -- one round ----------------------------------------------------------------------------------------------------

    def empty(self) -> Sums:
        """``sum_k N_k (w_k - w_g)/a_k``, ``sum_k N_k a_k`` and ``sum_k N_k``."""
        zeros = self.zeros()
        return {"directions": zeros, "progress": zeros.new_zeros(()), "examples": zeros.new_zeros(())}

    def accumulate(self, sums: Sums, reply: Reply[PointMass]) -> dict[str, float]:
        """Add a normalised change."""
        progress = reply.metric("local-progress")
        change = reply.posterior.mean - reply.sent.mean
        sums["directions"].add_(change, alpha=reply.num_examples / progress)
        sums["progress"].add_(reply.num_examples * progress)
        sums["examples"].add_(reply.num_examples)
        return {"residual": float(change.norm())}

    def combine(self, sums: Sums, sent: Sent[PointMass], replies: int) -> dict[str, float]:
        """The server's step."""
        effective = sums["progress"] / sums["examples"]
        move = sums["directions"] / sums["examples"] * (self.server_step * effective)
        self.posterior = PointMass((sent.mean + move).to(self.dtype))
        return {"progress/effective": float(effective)}
