"""Partitioned variational inference."""

from __future__ import annotations

from torch import Tensor

from bayesfed.errors import number
from strategies.bayes_admm import BayesADMM


class PVI(BayesADMM):
    r"""PVI (Bui et al. 2018; Ashman et al. 2022), damped:

        client   q_k = argmin_q  E_q[l_k]/tau + KL(q || q_g / t_k),    t_k = exp <eta_k, T>   (q_g/t_k is the cavity)
        site     eta_k += gamma (lambda_k - lambda_g)
        server   lambda_g = lambda_0 + sum_k eta_k

    As ``KL(q || q_g/t_k) = KL(q || q_g) + <eta_k, mu_q> + const`` this is BayesADMM with ``rho = 1`` and ``alpha = 1``. Undamped parallel updates overshoot
    (each client explains the whole gap), hence ``damping = 1/K`` by default; then the server's step is the mean of the clients'
    natural parameters. Absent clients keep their sites.

    Client state: ``eta_k``. Travels as the family does: diagonal 2P numbers each way.

    Args:
        family, prior_precision, init_precision, temperature, covariance, precision_floor: see :class:`BayesADMM`.
        damping: gamma in [0, 1]; null is ``1/K``.
        fraction, min_replies, timeout: see :class:`FederatedStrategy`.

    Raises:
        InputError: a value out of range.
    """

    name: str = "pvi"

    def __init__(
        self,
        family: str = "diagonal",
        damping: float | None = None,
        prior_precision: float = 1.0,
        init_precision: float | None = None,
        temperature: float = 1.0,
        covariance: str = "learned",
        precision_floor: float = 0.1,
        fraction: float = 1.0,
        min_replies: int = 1,
        timeout: float = 86400.0,
    ):
        number("damping", damping, at_least=0, at_most=1, optional=True)
        super().__init__(
            family=family, rho=1.0, alpha=1.0, damping=1.0 if damping is None else damping, prior_precision=prior_precision,
            init_precision=init_precision, temperature=temperature, covariance=covariance, precision_floor=precision_floor,
            fraction=fraction, min_replies=min_replies, timeout=timeout,
        )  # fmt: skip
        self._per_client = damping is None

    def prepare(self, initial: Tensor) -> None:
        """The server starts at N(0, 1/init_precision); now K is known."""
        super().prepare(initial)
        if self._per_client:
            self.damping = 1 / self.num_clients
