"""ADMM with duals in expectation parameters."""

from __future__ import annotations

from dataclasses import dataclass

import torch

from bayesfed.families import ExponentialFamily, NaturalParameters
from bayesfed.federation import duals
from bayesfed.federation.server.strategy import Reply, Sent, Sums
from bayesfed.settings import setting
from strategies.bayes_admm import BayesADMM


@dataclass(kw_only=True, eq=False)
class BregmanADMM(BayesADMM):
    r"""Bregman ADMM (Wang and Banerjee, NeurIPS 2014) on the lifted problem: BayesADMM but for the dual's step.

        client   q_k = argmin_q  E_q[l_k]/tau + <eta_k, mu_q> + rho KL(q || q_g)
        dual     eta_k += gamma rho (mu_k - mu_g)
        server   lambda_g = (1 - alpha) mean_k lambda_k + alpha (lambda_0 + sum_k eta_k),    alpha = 1/(1 + K rho)

    For Gaussians, with ``<eta, mu> = v^T m - 1/2 tr(V E[theta theta^T])``: ``v += gamma rho (m_k - m_g)`` and
    ``V -= 2 gamma rho (E_k[theta theta^T] - E_g[theta theta^T])``.

    Relation: the ablation "lambda against mu in the dual". Steps in expectation parameters don't have the units of
    ``eta``: where curvatures differ by orders of magnitude, no single ``gamma rho`` suits all parameters.
    State: ``eta_k`` on clients, their sum on the server. Traffic: the posterior each way.

    Args:
        others: see :class:`BayesADMM`.

    Raises:
        InputError: a value out of range.
    """

    name = "bregman_admm"

    covariance: str = setting("learned", init=False)

    # -- one round ----------------------------------------------------------------------------------------------------

    def local_settings(self) -> dict[str, float | bool | str]:
        """BayesADMM's, and what the dual moves along."""
        return super().local_settings() | {"dual": "expectation"}

    def empty(self) -> Sums:
        """``sum_k lambda_k`` and ``sum_k mu_k``."""
        sums = super().empty()
        return sums | {f"{name}_moment": torch.zeros_like(value) for name, value in sums.items()}

    def accumulate(self, sums: Sums, reply: Reply[ExponentialFamily]) -> dict[str, float]:
        """Add ``lambda_k`` and ``mu_k``."""
        first, second = reply.posterior.expectation
        sums["linear_moment"].add_(first)
        sums["quadratic_moment"].add_(second)
        return super().accumulate(sums, reply)

    def dual_change(self, sums: Sums, sent: Sent[ExponentialFamily], replies: int) -> NaturalParameters:
        """``sum_k (mu_k - mu_g)``."""
        total = NaturalParameters(self.family, sums["linear_moment"], sums["quadratic_moment"])
        return duals.change(total, duals.coordinates("expectation", sent.posterior), replies)
