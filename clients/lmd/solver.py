"""LMD as a client solver: the log-normal family, or point estimates."""

from __future__ import annotations

from dataclasses import dataclass
from functools import partial
from types import MappingProxyType
from typing import ClassVar

from torch import Tensor

from bayesfed.errors import choice, integer, number
from bayesfed.families import LogNormal, PointMass
from bayesfed.federation.local import LocalProblem, LocalSolution, Posterior
from bayesfed.lowprecision.emulation import MXForward
from bayesfed.lowprecision.mx import FORMATS
from bayesfed.profiling import span
from clients.lmd.optimizer import LMD
from clients.training import GradientSolver, begin

_INSTEAD = "strategy=fedavg, which averages its mean weights, or strategy=bayes_admm strategy.family=lognormal"


@dataclass(kw_only=True, eq=False)
class LMDSolver(GradientSolver):
    """Solve the local problem over log-normal posteriors with :class:`clients.optim.LMD`, sigma fixed.

    With ``z = (log m+, log m-)``, (2P,), ``S = 1/sigma^2`` the server's precision and ``G = E_q[(u grad l_k, -v grad
    l_k)]``, the gradient is

        G/tau + v_k - V_k z + rho S (z - z_g)

    and all of it goes into the sign, so that the fixed point is that of the local problem. In round 1 it starts at the
    network initialisation, later at ``z_g``, each time with an empty momentum. The precision stays the server's (and is
    without effect on the gradient where ``learn_precision`` is off: expectations are then taken at the medians), so
    sites only hold first natural parameters and ``strategy.prior_precision`` sets both sigma and (times tau) the
    strength of the prior.

    Uploads log-medians and the precision, 2P + 1 numbers. No Gaussian is fitted: strategies of other Gaussian families
    refuse this client. Under strategies of point estimates it minimises the mean loss with decoupled decay and uploads
    ``E[w]``, P numbers; only for methods whose clients have neither duals nor a proximal term (``fedavg`` and server
    optimizers on top of it).

    Args:
        lr: step of the log-medians; the largest change of log m in a step if ``signed``, else multiplies the gradient.
        sigma: of point estimates only; a log-normal server's precision decides otherwise.
        beta1, beta2: momentum in the update and in the memory.
        decay: strength of the weight-scaled l1 decay outside the sign; null is 0 under a prior and 0.1 for point
            estimates.
        signed: see :class:`clients.optim.LMD`.
        mc_samples: posterior samples (gradients) per step.
        local_schedule: learning rate over the steps of a round; signed steps only settle if it falls to 0.
        noise: ``quantile`` (fast on CPUs) or ``normal``.
        mx: format of the forward pass (:mod:`bayesfed.lowprecision`): ``e2m1``, ``e2m3``, ``e3m2``, ``e4m3``; ``none``.
        epochs, batch_size, amp: see :class:`clients.training.GradientSolver`.

    Raises:
        InputError: a value out of range.
    """

    families: ClassVar[frozenset[str]] = frozenset({"lognormal", "point"})
    learns_precision: ClassVar[bool] = False
    lacks = MappingProxyType(
        {
            "proximal": ("has no proximal term and no dual for point estimates", _INSTEAD),
            "path": ("has no control variates, samples or step counts for point estimates", _INSTEAD),
        }
    )

    lr: float = 0.02
    epochs: int = 5
    batch_size: int = 32
    sigma: float = 0.1
    beta1: float = 0.9
    beta2: float = 0.99
    decay: float | None = None
    signed: bool = True
    mc_samples: int = 1
    local_schedule: str = "cosine"
    noise: str = "quantile"
    mx: str = "none"

    def __post_init__(self) -> None:
        super().__post_init__()
        choice("mx", self.mx, ("none", *FORMATS))
        choice("noise", self.noise, ("quantile", "normal"))
        number("sigma", self.sigma, at_least=0)
        number("beta1", self.beta1, at_least=0, at_most=1 - 1e-9)
        number("beta2", self.beta2, at_least=0, at_most=1 - 1e-9)
        number("decay", self.decay, at_least=0, optional=True)
        integer("mc_samples", self.mc_samples, at_least=1)

    def solve(self, problem: LocalProblem) -> LocalSolution:
        """Mini-batch steps of :class:`clients.optim.LMD`, from the start of the round."""
        self.require(problem)
        begin(problem)
        with span("optimizer"):
            optimizer = self._optimizer(problem)
        metrics = self.train(problem, optimizer)
        posterior: Posterior = PointMass(optimizer.mean)
        if isinstance(problem.server, LogNormal):
            posterior = LogNormal.from_log_median(optimizer.log_median.flatten(), problem.server.precision)
        return LocalSolution(posterior, metrics)

    def backward(self, problem: LocalProblem, x: Tensor, y: Tensor) -> Tensor:
        """The loss of a mini-batch at a sample, by a forward pass in the format ``mx``."""
        if self.mx == "none":
            return super().backward(problem, x, y)
        with MXForward(self.mx):
            loss = problem.loss(x, y, self.amp)
        loss.backward()
        return loss.detach()

    def _optimizer(self, problem: LocalProblem) -> LMD:
        """LMD on the local problem, in units of the mean loss, at its start."""
        server, weight = problem.server, problem.data_weight
        build = partial(
            LMD,
            problem.model.parameters,
            lr=self.lr * problem.lr_factor,
            beta1=self.beta1,
            beta2=self.beta2,
            signed=self.signed,
            mc_samples=self.mc_samples,
            noise=self.noise,
            generator=problem.generator("noise", problem.device),
        )
        if not isinstance(server, LogNormal):
            return build(sigma=self.sigma, decay=0.1 if self.decay is None else self.decay)
        site = problem.site_terms()
        optimizer = build(
            sigma=float(server.precision) ** -0.5 if problem.learn_precision else 0.0,  # no noise: at the medians
            decay=self.decay or 0.0,
            prior_log_median=server.log_median.view(2, -1),
            prior_precision=problem.rho * float(server.precision) / weight,
            site_linear=None if site is None else site[0].view(2, -1) / weight,
            site_quadratic=0.0 if site is None else float(site[1]) / weight,
        )
        if problem.round > 1:
            optimizer.set_log_median(server.log_median)
        return optimizer
