"""Federated Laplace with a learned diagonal covariance."""

from __future__ import annotations

from dataclasses import dataclass

from bayesfed.settings import setting
from strategies.pvi import PVI


@dataclass(kw_only=True, eq=False)
class FedLapCov(PVI):
    r"""FedLap-Cov (Swaroop et al. 2025, arXiv 2501.17325) with prior N(0, I/delta) and diagonal precisions:

        client   w_k = argmin_w  l_k(w)/tau + v_k^T w - 1/2 w^T V_k w + 1/2 (w - w_g)^T S_g (w - w_g)
                 S_k = S_g - V_k + H_k/tau,    H_k = diagonal of the generalised Gauss-Newton matrix of l_k at w_k
        dual     v_k += gamma (S_k w_k - S_g w_g),   V_k += gamma (S_k - S_g)   (V_k moves to H_k/tau at rate gamma)
        server   S_g = delta + sum_k V_k,   w_g = sum_k v_k / S_g

    Relation: BayesADMM with the diagonal family, ``rho = 1``, ``alpha = 1`` and a Laplace client (``client=laplace``);
    PVI whose expectations are taken at the mode. ``H_k >= 0``, so precisions never fall below delta. Curvature is of
    the client's *own* data (reference code takes that of all clients' on CIFAR). Any client for diagonal Gaussians can
    replace Laplace's; with ``ivon`` it is PVI.
    State: ``v_k, V_k`` on clients, their sums on the server. Traffic: 2P numbers each way.

    Args:
        prior_precision: delta.
        damping: gamma in [0, 1]; null is ``1/K``.
        temperature: tau, 1 in the paper.
        precision_floor: see :class:`BayesADMM`.

    Raises:
        InputError: a value out of range.
    """

    name = "fedlap_cov"

    temperature: float = setting(1.0, above=0)
    family: str = setting("diagonal", init=False)
    covariance: str = setting("learned", init=False)
    init_precision: float | None = setting(None, init=False)
