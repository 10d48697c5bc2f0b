"""Averaging of posteriors in natural parameters, without duals."""

from __future__ import annotations

from bayesfed.errors import number
from strategies.bayes_admm import BayesADMM


class NaturalAveraging(BayesADMM):
    r"""The logarithmic pool of the clients' posteriors, round after round, without duals:

        client   q_k = argmin_q  E_q[l_k]/tau + rho KL(q || q_g)
        server   lambda_g = (1 - w) mean_{k in P} lambda_k + w lambda_0

    For Gaussians: the precision is the mean of the precisions and the mean is weighted by precision. BayesADMM with ``gamma = 0`` and
    ``alpha = w``. With ``w = 0``, the plain average, each round adds ``mean_k H_k/(tau rho)`` to the precision: after t rounds it counts the data ``t/(K rho)`` times, and
    the prior is forgotten, so predictions grow overconfident. With ``w = 1/(1 + K rho)`` (null) the fixed point of the precision
    is ``S_0 + sum_k H_k/tau``, counted once. What is missing without duals: client k's gradient is taken at q_k, not at q_g.

    Client state: none. Travels as the family does: diagonal 2P numbers each way.

    Args:
        family, rho, prior_precision, init_precision, temperature, covariance, precision_floor: see :class:`BayesADMM`.
        prior_weight: w in [0, 1]; null is ``1/(1 + K rho)``.
        fraction, min_replies, timeout: see :class:`FederatedStrategy`.

    Raises:
        InputError: a value out of range.
    """

    name: str = "natural_averaging"

    def __init__(
        self,
        family: str = "diagonal",
        rho: float = 1.0,
        prior_weight: float | None = 0.0,
        prior_precision: float = 1.0,
        init_precision: float | None = None,
        temperature: float = 1.0,
        covariance: str = "learned",
        precision_floor: float = 0.1,
        fraction: float = 1.0,
        min_replies: int = 1,
        timeout: float = 86400.0,
    ):
        number("prior_weight", prior_weight, at_least=0, at_most=1, optional=True)
        super().__init__(
            family=family, rho=rho, damping=0.0, prior_precision=prior_precision, init_precision=init_precision,
            temperature=temperature, covariance=covariance, precision_floor=precision_floor,
            fraction=fraction, min_replies=min_replies, timeout=timeout,
        )  # fmt: skip
        self.prior_weight = prior_weight

    @property
    def server_weight(self) -> float:
        """w."""
        return super().server_weight if self.prior_weight is None else self.prior_weight
