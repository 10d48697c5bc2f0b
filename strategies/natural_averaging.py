"""Averaging of posteriors in natural parameters, without duals."""

from __future__ import annotations

from dataclasses import dataclass

from bayesfed.settings import setting
from strategies.bayes_admm import BayesADMM


@dataclass(kw_only=True, eq=False)
class NaturalAveraging(BayesADMM):
    r"""The logarithmic pool of the clients' posteriors, round after round.

        client   q_k = argmin_q  E_q[l_k]/tau + rho KL(q || q_g)
        dual     none
        server   lambda_g = (1 - w) mean_{k in P} lambda_k + w lambda_0

    For Gaussians: the precision is the mean of the precisions and the mean is weighted by precision. With ``w = 0``,
    the plain average, each round adds ``mean_k H_k/(tau rho)`` to the precision: after t rounds it counts the data
    ``t/(K rho)`` times, and the prior is forgotten, so predictions grow overconfident. With ``w = 1/(1 + K rho)``
    (null) the fixed point of the precision is ``S_0 + sum_k H_k/tau``, counted once. What is missing without duals:
    client k's gradient is taken at q_k, not at q_g.

    Relation: BayesADMM with ``gamma = 0`` and ``alpha = w``. State: none. Traffic: the posterior each way.

    Args:
        prior_weight: w in [0, 1]; null is ``1/(1 + K rho)``.
        others: see :class:`BayesADMM`.

    Raises:
        InputError: a value out of range.
    """

    name = "natural_averaging"

    rho: float = setting(1.0, above=0)
    prior_weight: float | None = setting(0.0, at_least=0, at_most=1)
    damping: float = setting(0.0, init=False)
    alpha: float | None = setting(None, init=False)
    absent: str = setting("mean", init=False)

    @property
    def server_weight(self) -> float:
        """w."""
        return super().server_weight if self.prior_weight is None else self.prior_weight
