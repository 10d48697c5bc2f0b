"""ADMM with duals in expectation parameters."""

from __future__ import annotations

import torch

from bayesfed.families import ExponentialFamily, NaturalParameters
from bayesfed.federation.server.strategy import Sums
from strategies.bayes_admm import BayesADMM


class BregmanADMM(BayesADMM):
    r"""Bregman ADMM (Wang and Banerjee, NeurIPS 2014) on the lifted problem: BayesADMM but for the dual's step,

        dual     eta_k += gamma rho (mu_k - mu_g)

    i.e. for Gaussians with ``<eta, mu> = v^T m - 1/2 tr(V E[theta theta^T])``:  ``v += gamma rho (m_k - m_g)`` and ``V -= 2 gamma rho (E_k[theta theta^T] - E_g[theta theta^T])``.
    Steps in expectation parameters don't have the units of ``eta``: where curvatures differ by orders of magnitude, no single
    ``gamma rho`` suits all parameters. This is the ablation "lambda against mu in the dual".

    Client state: ``eta_k``. Travels as the family does.

    Args:
        others: see :class:`BayesADMM`.

    Raises:
        InputError: a value out of range.
    """

    name: str = "bregman_admm"

    def __init__(
        self,
        family: str = "diagonal",
        rho: float = 1.0,
        damping: float = 0.1,
        alpha: float | None = None,
        prior_precision: float = 1.0,
        init_precision: float | None = None,
        temperature: float = 1.0,
        absent: str = "mean",
        precision_floor: float = 0.1,
        fraction: float = 1.0,
        min_replies: int = 1,
        timeout: float = 86400.0,
    ):
        super().__init__(
            family=family, rho=rho, damping=damping, alpha=alpha, prior_precision=prior_precision, init_precision=init_precision,
            temperature=temperature, absent=absent, precision_floor=precision_floor,
            fraction=fraction, min_replies=min_replies, timeout=timeout,
        )  # fmt: skip

    def local_settings(self) -> dict[str, float | bool | str]:
        """BayesADMM's, and what the dual moves along."""
        return super().local_settings() | {"dual": "expectation"}

    def empty(self) -> Sums:
        """``sum_k lambda_k`` and ``sum_k mu_k``."""
        sums = super().empty()
        return sums | {f"{name}_moment": torch.zeros_like(value) for name, value in sums.items()}

    def accumulate(self, sums: Sums, posterior: ExponentialFamily, num_examples: int) -> dict[str, float]:
        """Add ``lambda_k`` and ``mu_k``."""
        first, second = posterior.expectation
        sums["first_moment"].add_(first)
        sums["second_moment"].add_(second)
        return super().accumulate(sums, posterior, num_examples)

    def dual_change(self, sums: Sums, replies: int) -> NaturalParameters:
        """``sum_k (mu_k - mu_g)``."""
        first, second = self._sent_moments()
        return NaturalParameters(
            self.family, sums["first_moment"] - first * replies, sums["second_moment"] - second * replies
        )

    def _sent_moments(self) -> tuple[torch.Tensor, torch.Tensor]:
        """``mu_g`` as it was sent."""
        return self.posterior.to(torch.float64).expectation
