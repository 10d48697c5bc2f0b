"""Federated Laplace with a fixed covariance."""

from __future__ import annotations

from dataclasses import dataclass

from bayesfed.settings import setting
from strategies.pvi import PVI


@dataclass(kw_only=True, eq=False)
class FedLap(PVI):
    r"""FedLap (Swaroop et al. 2025, arXiv 2501.17325) with prior N(0, I/delta):

        client   w_k = argmin_w  l_k(w)/tau + v_k^T w + delta/2 ||w - w_g||^2
        dual     v_k += gamma delta (w_k - w_g)
        server   w_g = (1/delta) sum_k v_k

    (the paper stores ``v_k/delta``).

    Relation: BayesADMM and PVI with the isotropic precision fixed at delta and the delta method ``E_q[f] = f(m)``:
    ``rho = 1, alpha = 1``. Unlike FedDyn it weights by the size of the client's data (``l_k`` is a sum), has a prior,
    and does not average on the server. Undamped it diverges unless delta is large against the spread of the clients'
    curvatures, hence ``damping = 1/K`` by default.
    State: ``v_k`` on clients, their sum on the server. Traffic: P + 1 numbers each way (the constant delta is one).

    Args:
        prior_precision: delta.
        damping: gamma in [0, 1]; null is ``1/K``.
        temperature: tau, 1 in the paper.

    Raises:
        InputError: a value out of range.
    """

    name = "fedlap"

    temperature: float = setting(1.0, above=0)
    family: str = setting("isotropic", init=False)
    covariance: str = setting("fixed", init=False)
    init_precision: float | None = setting(None, init=False)
    precision_floor: float = setting(0.1, init=False)
