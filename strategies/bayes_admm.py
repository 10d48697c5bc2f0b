"""Federated ADMM from Bayesian duality."""

from __future__ import annotations

from dataclasses import dataclass
from logging import getLogger

import torch
from torch import Tensor

from bayesfed.errors import InputError
from bayesfed.families import ExponentialFamily, Gaussian, NaturalParameters, exponential
from bayesfed.federation import duals
from bayesfed.federation.server.strategy import FederatedStrategy, Reply, Sent, Sums
from bayesfed.settings import setting

log = getLogger("bayesfed")


@dataclass(kw_only=True, eq=False)
class BayesADMM(FederatedStrategy[ExponentialFamily]):
    r"""Bayesian-duality ADMM for exponential families (arXiv 2506.13150; docs/method.md 2).

        client   q_k = argmin_q  E_q[l_k]/tau + <eta_k, mu_q> + rho KL(q || q_g)
        dual     eta_k += gamma rho (lambda_k - lambda_g)
        server   lambda_g = (1 - alpha) mean_k lambda_k + alpha (lambda_0 + sum_k eta_k),    alpha = 1/(1 + K rho)

    Solves ``min_q sum_k E_q[l_k]/tau + KL(q || p_0)``, lambda the natural parameters. The server never sees single
    duals: ``sum_k eta_k`` follows from ``Hsum += gamma rho sum_k (lambda_k - lambda_g)``, float64 in client order.

    With client sampling absent clients keep their duals, ``Hsum`` still contains all of them, and the mean is over the
    participants (``absent="mean"``) or counts absent clients as agreeing with the server (``absent="agree"``).

    Relation: ``alpha=1, rho=1`` is PVI; ``covariance="fixed"`` federated ADMM, with ``alpha=1, rho=1`` FedLap;
    ``damping=0`` no duals; ``damping * rho * K = 1`` natural-parameter averaging (docs/method.md 5).
    State: ``eta_k`` on clients, ``Hsum`` on the server, O(P) (full family: O(P^2)). Traffic: the posterior each way,
    diagonal 2P numbers.

    Args:
        family: ``isotropic``, ``diagonal`` or ``full``; ``lognormal`` for ``client=lmd``, of logarithms.
        rho: weight of the KL to the server in the local problem.
        damping: gamma in [0, 1]; the dual is a moving average, at this rate, of the client's natural gradient.
        alpha: weight of prior and duals in the server's step, in (0, 1]; None is ``1/(1 + K rho)``.
        prior_precision: S_0 of the prior N(m_0, I/S_0).
        prior_mean: ``zero``, or ``initial``: m_0 are the initial weights, as of a pretrained model.
        init_precision: precision of the server before round 1; None is ``prior_precision``.
        temperature: tau; tempers the data, not the prior.
        covariance: ``learned``, or ``fixed``: the precision stays ``prior_precision``.
        absent: ``mean`` or ``agree``, see above.
        precision_floor: smallest server precision, relative to the smaller of ``prior_precision`` and
            ``init_precision``. Expected Hessians can be indefinite, and then ``S_0 + sum_k V_k`` can be negative; where
            the server's precision falls below the floor, it is raised to it, the mean there is the participants'
            precision-weighted mean, and the event is counted (``guard/count``) and logged (docs/method.md 8).

    Raises:
        InputError: a value out of range.
    """

    name = "bayes_admm"

    family: str = setting("diagonal")
    rho: float = setting(0.5, above=0)
    damping: float = setting(0.1, at_least=0, at_most=1)
    alpha: float | None = setting(None, above=0, at_most=1)
    prior_precision: float = setting(1.0, above=0)
    prior_mean: str = setting("zero", choices=("zero", "initial"))
    init_precision: float | None = setting(None, above=0)
    temperature: float = setting(0.1, above=0)
    covariance: str = setting("learned", choices=("learned", "fixed"))
    absent: str = setting("mean", choices=("mean", "agree"))
    precision_floor: float = setting(0.1, above=0, at_most=1)

    def __post_init__(self) -> None:
        super().__post_init__()
        self.gaussian = exponential(self.family)
        if self.prior_mean == "initial" and not issubclass(self.gaussian, Gaussian):
            raise InputError("prior_mean", self.prior_mean, f"needs a Gaussian; family={self.family} is around 0")
        if self.covariance == "fixed":
            self.asks = frozenset({"fixed"})
            if self.init_precision not in (None, self.prior_precision):
                raise InputError("init_precision", self.init_precision, "must be null with covariance=fixed")

    @property
    def dual_rate(self) -> float:
        """gamma."""
        return self.damping

    @property
    def server_weight(self) -> float:
        """alpha: ``1/(1 + K rho)`` with K *all* clients, unless overridden."""
        return 1 / (1 + self.num_clients * self.rho) if self.alpha is None else self.alpha

    # -- state --------------------------------------------------------------------------------------------------------

    def prepare(self, initial: Tensor) -> None:
        """The server starts at N(m_0, 1/init_precision); clients start their first iterations at the initialisation."""
        self.posterior = self.around(initial, self.init_precision or self.prior_precision)
        self.prior = self.around(initial.to(torch.float64), self.prior_precision).natural
        self.hsum = self.prior.zeros_like()  # sum_k eta_k

    def around(self, initial: Tensor, precision: float) -> ExponentialFamily:
        """N(m_0, I/precision); any other member of the family serves as a prior, too."""
        if self.prior_mean == "initial" and issubclass(self.gaussian, Gaussian):
            return self.gaussian.isotropic(initial, precision)
        return self.gaussian.prior(initial, precision)

    def tensors(self) -> dict[str, Tensor]:
        """``sum_k eta_k``."""
        return {"hsum.first": self.hsum.linear, "hsum.second": self.hsum.quadratic}

    def load_tensors(self, tensors: dict[str, Tensor]) -> None:
        """Inverse of :meth:`tensors`."""
        self.hsum = NaturalParameters(self.family, tensors["hsum.first"], tensors["hsum.second"])

    # -- one round ----------------------------------------------------------------------------------------------------

    def local_settings(self) -> dict[str, float | bool | str]:
        """What clients need of the local problem."""
        return {
            "rho": self.rho, "damping": self.dual_rate, "temperature": self.temperature,
            "learn_precision": self.covariance == "learned",
        }  # fmt: skip

    def empty(self) -> Sums:
        """``sum_k lambda_k``."""
        return {"linear": torch.zeros_like(self.hsum.linear), "quadratic": torch.zeros_like(self.hsum.quadratic)}

    def accumulate(self, sums: Sums, reply: Reply[ExponentialFamily]) -> dict[str, float]:
        """Add ``lambda_k``. Clients are not weighted by size: their precision does that."""
        natural = reply.posterior.natural
        sums["linear"].add_(natural.linear)
        sums["quadratic"].add_(natural.quadratic)
        gap = natural.add_(reply.sent.natural, -1.0)  # in place: large vectors cost time to allocate
        return {"residual": float(gap.norm())}

    def combine(self, sums: Sums, sent: Sent[ExponentialFamily], replies: int) -> dict[str, float]:
        """The dual sum, then the server's step."""
        total = NaturalParameters(self.family, sums["linear"], sums["quadratic"])
        self.hsum.add_(self.dual_change(sums, sent, replies), self.dual_rate * self.rho)
        mean = total / replies
        if self.absent == "agree":
            mean = (total + sent.natural * (self.num_clients - replies)) / self.num_clients

        alpha = self.server_weight
        natural = mean * (1 - alpha) + (self.prior + self.hsum) * alpha
        if self.covariance == "fixed":
            natural = NaturalParameters(self.family, natural.linear, sent.natural.quadratic)
        natural, raised = self._guard(natural, mean)
        self.posterior = self.gaussian.from_natural(natural).to(self.dtype)
        moved = (self.posterior.to(torch.float64).natural - sent.natural).norm()
        return {"guard/count": raised, "dual/norm": float(self.hsum.norm()), "admm/dual": self.rho * float(moved)}

    def dual_change(self, sums: Sums, sent: Sent[ExponentialFamily], replies: int) -> NaturalParameters:
        """``sum_k (lambda_k - lambda_g)`` over the participants: what the duals move along."""
        total = NaturalParameters(self.family, sums["linear"], sums["quadratic"])
        return duals.change(total, sent.natural, replies)

    def _guard(self, natural: NaturalParameters, mean: NaturalParameters) -> tuple[NaturalParameters, int]:
        """Keep the precision at its floor or above; says so when it acts."""
        floor = self.precision_floor * min(self.prior_precision, self.init_precision or self.prior_precision)
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
