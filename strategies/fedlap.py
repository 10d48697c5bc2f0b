"""Federated Laplace with a fixed covariance."""

from __future__ import annotations

from strategies.pvi import PVI


class FedLap(PVI):
    r"""FedLap (Swaroop et al. 2025, arXiv 2501.17325) with prior N(0, I/delta):

        client   w_k = argmin_w  l_k(w)/tau + v_k^T w + delta/2 ||w - w_g||^2
        site     v_k += gamma delta (w_k - w_g)
        server   w_g = (1/delta) sum_k v_k

    (the paper stores ``v_k/delta``). This is BayesADMM and PVI with the isotropic precision fixed at delta and the delta method ``E_q[f] = f(m)``:
    ``rho = 1, alpha = 1``. Unlike FedDyn it weights by the size of the client's data (``l_k`` is a sum), has a prior, and does not average on the
    server. Undamped it diverges unless delta is large against the spread of the clients' curvatures, hence ``damping = 1/K`` by default.

    Client state: ``v_k``. Travels as P + 1 numbers each way (the constant delta is one of them).

    Args:
        prior_precision: delta.
        damping: gamma in [0, 1]; null is ``1/K``.
        temperature: tau, 1 in the paper.
        fraction, min_replies, timeout: see :class:`FederatedStrategy`.

    Raises:
        InputError: a value out of range.
    """

    name: str = "fedlap"

    def __init__(
        self,
        prior_precision: float = 1.0,
        damping: float | None = None,
        temperature: float = 1.0,
        fraction: float = 1.0,
        min_replies: int = 1,
        timeout: float = 86400.0,
    ):
        super().__init__(
            family="isotropic", covariance="fixed", damping=damping, prior_precision=prior_precision, temperature=temperature,
            fraction=fraction, min_replies=min_replies, timeout=timeout,
        )  # fmt: skip
