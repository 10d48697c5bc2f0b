"""Federated ADMM from Bayesian duality."""

from __future__ import annotations

from logging import getLogger

import torch
from torch import Tensor

from bayesfed.errors import InputError, choice, number
from bayesfed.families import ExponentialFamily, NaturalParameters, exponential
from bayesfed.federation.server.strategy import FederatedStrategy, Sums

log = getLogger("bayesfed")


class BayesADMM(FederatedStrategy[ExponentialFamily]):
    r"""Bayesian-duality ADMM for isotropic, diagonal and full-covariance Gaussians (arXiv 2506.13150; spec 1.3).

    Solves ``min_q sum_k E_q[l_k]/tau + KL(q || p_0)`` over an exponential family with natural parameters lambda:

        client   q_k = argmin_q  E_q[l_k]/tau + <eta_k, mu_q> + rho KL(q || q_g)
        dual     eta_k += gamma rho (lambda_k - lambda_g)
        server   lambda_g = (1 - alpha) mean_k lambda_k + alpha (lambda_0 + sum_k eta_k),    alpha = 1/(1 + K rho)

    The server never sees single duals: ``sum_k eta_k`` follows from ``Hsum += gamma rho sum_k (lambda_k - lambda_g)``. Sums are
    float64 in client order; memory is O(P) (O(P^2) for the full family).

    With client sampling absent clients keep their duals, ``Hsum`` still contains all of them, and the mean is over the
    participants (``absent="mean"``) or counts absent clients as agreeing with the server (``absent="agree"``; spec 1.9).

    Special cases: ``alpha=1, rho=1`` is PVI; ``covariance="fixed"`` federated ADMM, with ``alpha=1, rho=1`` FedLap; ``damping=0``
    no duals; ``damping * rho * K = 1`` natural-parameter averaging.

    Args:
        family: ``isotropic``, ``diagonal`` or ``full``; ``lognormal`` for ``client=lmd``, where precisions are those of logarithms.
        rho: weight of the KL to the server in the local problem.
        damping: gamma in [0, 1]; the dual is a moving average, at this rate, of the client's natural gradient.
        alpha: weight of prior and duals in the server's step, in (0, 1]; None is ``1/(1 + K rho)``.
        prior_precision: S_0 of the prior N(0, I/S_0).
        init_precision: precision of the server before round 1; None is ``prior_precision``.
        temperature: tau; tempers the data, not the prior.
        covariance: ``learned``, or ``fixed``: the precision stays ``prior_precision``.
        absent: ``mean`` or ``agree``, see above.
        precision_floor: smallest server precision, relative to the smaller of ``prior_precision`` and ``init_precision``.
            Expected Hessians can be indefinite, and then ``S_0 + sum_k V_k`` can be negative; where the server's precision falls
            below the floor, it is raised to it, the mean there is the participants' precision-weighted mean, and the event is
            counted (``guard/count``) and logged. The duals are left untouched. Convex problems never touch it.
        fraction, min_replies, timeout: see :class:`FederatedStrategy`.

    Raises:
        InputError: a value out of range.
    """

    name: str = "bayes_admm"

    def __init__(
        self,
        family: str = "diagonal",
        rho: float = 1.0,
        damping: float = 1.0,
        alpha: float | None = None,
        prior_precision: float = 1.0,
        init_precision: float | None = None,
        temperature: float = 1.0,
        covariance: str = "learned",
        absent: str = "mean",
        precision_floor: float = 0.1,
        fraction: float = 1.0,
        min_replies: int = 1,
        timeout: float = 86400.0,
    ):
        super().__init__(fraction=fraction, min_replies=min_replies, timeout=timeout)
        self.gaussian = exponential(family)
        number("rho", rho, above=0)
        number("damping", damping, at_least=0, at_most=1)
        number("alpha", alpha, above=0, at_most=1, optional=True)
        number("prior_precision", prior_precision, above=0)
        number("init_precision", init_precision, above=0, optional=True)
        number("temperature", temperature, above=0)
        choice("covariance", covariance, ("learned", "fixed"))
        choice("absent", absent, ("mean", "agree"))
        number("precision_floor", precision_floor, above=0, at_most=1)
        if covariance == "fixed" and init_precision not in (None, prior_precision):
            raise InputError("init_precision", init_precision, "must be null with covariance=fixed")
        self.family, self.rho, self.damping, self.alpha = family, float(rho), float(damping), alpha
        self.prior_precision, self.temperature = float(prior_precision), float(temperature)
        self.init_precision = float(prior_precision if init_precision is None else init_precision)
        self.covariance, self.absent, self.precision_floor = covariance, absent, float(precision_floor)
        self.asks = frozenset({"fixed"} if covariance == "fixed" else ())

    # -- state --------------------------------------------------------------------------------------------------------

    def prepare(self, initial: Tensor) -> None:
        """The server starts at N(0, 1/init_precision); clients start their first iterations at the network initialisation."""
        self.posterior = self.gaussian.prior(initial, self.init_precision)
        self.prior = self.gaussian.prior(initial.to(torch.float64), self.prior_precision).natural
        self.hsum = self.prior.zeros_like()  # sum_k eta_k

    def tensors(self) -> dict[str, Tensor]:
        """``sum_k eta_k``; the posterior is saved by the run."""
        return {"hsum.first": self.hsum.linear, "hsum.second": self.hsum.quadratic}

    def load_tensors(self, tensors: dict[str, Tensor]) -> None:
        """Inverse of :meth:`tensors`."""
        self.hsum = NaturalParameters(self.family, tensors["hsum.first"], tensors["hsum.second"])

    def local_settings(self) -> dict[str, float | bool | str]:
        """What clients need of the local problem."""
        return {
            "rho": self.rho,
            "damping": self.damping,
            "temperature": self.temperature,
            "learn_precision": self.covariance == "learned",
        }

    @property
    def server_weight(self) -> float:
        """alpha: ``1/(1 + K rho)`` with K *all* clients, unless overridden."""
        return 1 / (1 + self.num_clients * self.rho) if self.alpha is None else self.alpha

    # -- one round ----------------------------------------------------------------------------------------------------

    def begin(self) -> None:
        """``lambda_g`` as it was sent (rounded to the wire's dtype)."""
        self._server = self.posterior.to(torch.float64).natural

    def empty(self) -> Sums:
        """``sum_k lambda_k``."""
        return {"first": torch.zeros_like(self._server.linear), "second": torch.zeros_like(self._server.quadratic)}

    def accumulate(self, sums: Sums, posterior: ExponentialFamily, num_examples: int) -> dict[str, float]:
        """Add ``lambda_k``. Clients are not weighted by size: their precision does that."""
        natural = posterior.natural
        sums["first"].add_(natural.linear)
        sums["second"].add_(natural.quadratic)
        return {
            "residual": float(natural.add_(self._server, -1.0).norm())
        }  # in place: large vectors cost time to allocate

    def combine(self, sums: Sums, replies: int) -> dict[str, float]:
        """The dual sum, then the server's step."""
        total = NaturalParameters(self.family, sums["first"], sums["second"])
        self.hsum.add_(self.dual_change(sums, replies), self.damping * self.rho)
        mean = total / replies
        if self.absent == "agree":
            absent = self.num_clients - replies
            mean = (total + self._server * absent) / self.num_clients

        alpha = self.server_weight
        natural = mean * (1 - alpha) + (self.prior + self.hsum) * alpha
        if self.covariance == "fixed":
            natural = NaturalParameters(self.family, natural.linear, self._server.quadratic)
        natural, raised = self._guard(natural, mean)
        self.posterior = self.gaussian.from_natural(natural).to(self.dtype)
        moved = (self.posterior.to(torch.float64).natural - self._server).norm()
        return {
            "guard/count": raised,
            "dual/norm": float(self.hsum.norm()),
            "admm/dual": self.rho * float(moved),
        }

    def dual_change(self, sums: Sums, replies: int) -> NaturalParameters:
        """``sum_k (lambda_k - lambda_g)`` over the participants: what the duals move along."""
        return NaturalParameters(self.family, sums["first"], sums["second"]) - self._server * replies

    def _guard(self, natural: NaturalParameters, mean: NaturalParameters) -> tuple[NaturalParameters, int]:
        """Keep the precision at its floor or above; says so when it acts."""
        floor = self.precision_floor * min(self.prior_precision, self.init_precision)
        participants = self.gaussian.solve(mean.precision, mean.linear)
        natural, raised = self.gaussian.raise_precision(natural, natural.quadratic.new_tensor(floor), participants)
        if count := int(raised):
            log.warning(
                "precision guard: %d of %d precisions fell below %g and were raised to it; smaller strategy.damping, "
                "or larger strategy.prior_precision, avoids this",
                count,
                natural.quadratic.shape[0] if natural.quadratic.dim() else 1,
                floor,
            )
        return natural, count
