"""Partitioned variational inference."""

from __future__ import annotations

from dataclasses import dataclass

from bayesfed.settings import setting
from strategies.bayes_admm import BayesADMM


@dataclass(kw_only=True, eq=False)
class PVI(BayesADMM):
    r"""PVI (Bui et al. 2018; Ashman et al. 2022), damped:

        client   q_k = argmin_q  E_q[l_k]/tau + KL(q || q_g / t_k),    t_k = exp <eta_k, T>   (q_g/t_k is the cavity)
        dual     eta_k += gamma (lambda_k - lambda_g)        (of the site t_k)
        server   lambda_g = lambda_0 + sum_k eta_k

    Relation: as ``KL(q || q_g/t_k) = KL(q || q_g) + <eta_k, mu_q> + const``, BayesADMM with ``rho = 1`` and ``alpha =
    1``. Undamped parallel updates overshoot (each client explains the whole gap), hence ``damping = 1/K`` by default;
    then the server's step is the mean of the clients' natural parameters. Absent clients keep their sites.
    State: ``eta_k`` on clients, their sum on the server. Traffic: the posterior each way, diagonal 2P numbers.

    Args:
        damping: gamma in [0, 1]; null is ``1/K``.
        others: see :class:`BayesADMM`.

    Raises:
        InputError: a value out of range.
    """

    name = "pvi"

    rho: float = setting(1.0, init=False)
    alpha: float | None = setting(1.0, init=False)
    damping: float | None = setting(None, at_least=0, at_most=1)  # type: ignore[assignment]
    absent: str = setting("mean", init=False)

    @property
    def dual_rate(self) -> float:
        """gamma."""
        return 1 / self.num_clients if self.damping is None else self.damping
