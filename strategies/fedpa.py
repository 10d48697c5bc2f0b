"""Posterior averaging."""

from __future__ import annotations

from bayesfed.errors import integer, number
from bayesfed.families import PointMass
from bayesfed.federation.server.strategy import Sums
from strategies.fedavg import FedAvg


class FedPA(FedAvg):
    r"""FedPA (Al-Shedivat et al., ICLR 2021), with ``p_k = N_k / sum_P N_j``:

        client   runs local steps from w_g; means of L successive pieces of the path are its posterior samples, with mean mu and covariance S:
                 Delta_k = Sigma^-1 (w_g - mu),    Sigma = r I + (1 - r) S,   r = 1/(1 + (L - 1) shrinkage)
        server   w_g -= eta sum_{k in P} p_k Delta_k

    The mode of a product of Gaussians solves ``sum_k p_k Sigma_k^-1 (w - mu_k) = 0``, of which the server's step is gradient descent. So precision weights
    the clients as in BayesADMM, but it never travels, and is estimated from the path anew each round. In the first ``burn_in_rounds`` rounds
    ``Delta_k = w_g - w_k`` (FedAvg), as in the paper: far from the optimum the path says nothing about the posterior.

    No duals, no client state. P numbers each way; the client needs ``samples`` P numbers of memory.

    Args:
        samples: L, at least 2.
        shrinkage: at 0 Sigma is the identity and FedPA averages the means of the paths.
        burn_in: share of the local steps before the first sample, in [0, 1).
        burn_in_rounds: rounds of FedAvg at the start.
        server_step: eta.
        fraction, min_replies, timeout: see :class:`FederatedStrategy`.

    Raises:
        InputError: a value out of range.
    """

    name: str = "fedpa"
    asks: frozenset[str] = frozenset({"path"})

    def __init__(
        self,
        samples: int = 5,
        shrinkage: float = 0.01,
        burn_in: float = 0.4,
        burn_in_rounds: int = 5,
        server_step: float = 1.0,
        fraction: float = 1.0,
        min_replies: int = 1,
        timeout: float = 86400.0,
    ):
        super().__init__(fraction=fraction, min_replies=min_replies, timeout=timeout)
        integer("samples", samples, at_least=2)
        number("shrinkage", shrinkage, at_least=0)
        number("burn_in", burn_in, at_least=0, at_most=0.99)
        integer("burn_in_rounds", burn_in_rounds, at_least=0)
        number("server_step", server_step, above=0)
        self.samples, self.shrinkage, self.burn_in = samples, float(shrinkage), float(burn_in)
        self.burn_in_rounds, self.server_step = burn_in_rounds, float(server_step)

    def local_settings(self) -> dict[str, float | bool | str]:
        """What :mod:`clients.fedpa` reads."""
        return {
            "samples": self.samples, "shrinkage": self.shrinkage, "burn_in": self.burn_in, "burn_in_rounds": self.burn_in_rounds,
        }  # fmt: skip

    def combine(self, sums: Sums, replies: int) -> dict[str, float]:
        """The server's step; clients upload ``w_g - Delta_k``."""
        move = (sums["weighted"] / sums["examples"] - self._server) * self.server_step
        self.posterior = PointMass((self._server + move).to(self.dtype))
        return {}
