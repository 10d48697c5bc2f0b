"""LMD as a client solver: the log-normal family, or point estimates."""

from __future__ import annotations

from functools import partial
from types import MappingProxyType
from typing import ClassVar

import torch

from bayesfed import accelerate
from bayesfed.errors import choice, integer, number
from bayesfed.families import LogNormal, PointMass
from bayesfed.federation.local import LocalProblem, LocalSolution, Posterior, Solver, check_gradients, check_training
from bayesfed.lowprecision.emulation import MXForward
from bayesfed.lowprecision.mx import FORMATS
from bayesfed.profiling import each, inside, span
from bayesfed.schedule import Schedule
from clients.lmd.optimizer import LMD

_INSTEAD = "strategy=fedavg, which averages its mean weights, or strategy=bayes_admm strategy.family=lognormal"


class LMDSolver(Solver):
    """Solve the local problem over log-normal posteriors with :class:`clients.optim.LMD`, sigma fixed.

    With ``z = (log m+, log m-)``, (2P,), ``S = 1/sigma^2`` the server's precision and ``G = E_q[(u grad l_k, -v grad l_k)]``, the gradient is

        G/tau + v_k - V_k z + rho S (z - z_g)

    and all of it goes into the sign, so that the fixed point is that of the local problem. In round 1 it starts at the network
    initialisation, later at ``z_g``, each time with an empty momentum. The precision stays the server's (and is without effect on the
    gradient where ``learn_precision`` is off: expectations are then taken at the medians), so sites only hold first natural parameters and
    ``strategy.prior_precision`` sets both sigma and (times tau) the strength of the prior.

    Uploads log-medians and the precision, 2P + 1 numbers. No Gaussian is fitted: strategies of other Gaussian families refuse this client.
    Under strategies of point estimates it minimises the mean loss with decoupled decay and uploads ``E[w]``, P numbers; only
    for methods whose clients have neither duals nor a proximal term (``fedavg`` and server optimizers on top of it).

    Args:
        lr: step of the log-medians; the largest change of log m in a step if ``signed``, else multiplies the gradient.
        epochs: passes over the client's data in a round.
        batch_size: examples per step.
        sigma: of point estimates only; a log-normal server's precision decides otherwise.
        beta1, beta2: momentum in the update and in the memory.
        decay: strength of the weight-scaled l1 decay outside the sign; null is 0 under a prior and 0.1 for point estimates.
        signed: see :class:`clients.optim.LMD`.
        mc_samples: posterior samples (gradients) per step.
        schedule, schedule_rounds, schedule_decay: learning rate over communication rounds.
        local_schedule: learning rate over the steps of a round; signed steps only settle if it falls to 0.
        noise: ``quantile`` (fast on CPUs) or ``normal``.
        mx: format of the forward pass (:mod:`bayesfed.lowprecision`): ``e2m1``, ``e2m3``, ``e3m2``, ``e4m3``; ``none``.
        amp: ``bfloat16`` runs the model in mixed precision; ``none``.

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

    def __init__(
        self,
        lr: float,
        epochs: int,
        batch_size: int,
        sigma: float = 0.1,
        beta1: float = 0.9,
        beta2: float = 0.99,
        decay: float | None = None,
        signed: bool = True,
        mc_samples: int = 1,
        schedule: str = "constant",
        schedule_rounds: int | None = None,
        schedule_decay: float = 0.1,
        local_schedule: str = "cosine",
        noise: str = "quantile",
        mx: str = "none",
        amp: str = "none",
    ):
        check_training(lr, epochs, batch_size, local_schedule, amp)
        Schedule(schedule, schedule_rounds or 1, schedule_decay)
        choice("mx", mx, ("none", *FORMATS))
        choice("noise", noise, ("quantile", "normal"))
        number("sigma", sigma, at_least=0)
        number("beta1", beta1, at_least=0, at_most=1 - 1e-9)
        number("beta2", beta2, at_least=0, at_most=1 - 1e-9)
        number("decay", decay, at_least=0, optional=True)
        integer("mc_samples", mc_samples, at_least=1)
        self._build = partial(LMD, beta1=beta1, beta2=beta2, signed=signed, noise=noise)
        self.lr, self.epochs, self.batch_size, self.mc_samples = lr, epochs, batch_size, mc_samples
        self.sigma, self.decay, self.local_schedule, self.mx, self.amp = sigma, decay, local_schedule, mx, amp

    def solve(self, problem: LocalProblem) -> LocalSolution:
        self.require(problem)
        model, server = problem.model, problem.server
        model.load(problem.start())
        model.module.train()
        model.drop_grad()
        with span("optimizer"):
            optimizer = self._optimizer(problem)
        rates = Schedule(self.local_schedule, problem.steps(self.epochs, self.batch_size))
        take_step = accelerate.bare_step(optimizer)
        total = torch.zeros((), dtype=problem.dtype, device=problem.device)
        step = 0
        for step, (x, y) in enumerate(each("data", problem.batches(self.epochs, self.batch_size)), start=1):
            for _ in range(self.mc_samples):
                with inside(optimizer.sampled_params(train=True), "sampling", "gradient"):
                    if self.mx == "none":
                        loss = problem.backward(x, y, self.amp)
                    else:
                        with MXForward(self.mx):
                            loss = problem.loss(x, y, self.amp)
                        loss.backward()
                total += loss.detach()
            optimizer.param_groups[0]["lr"] = self.lr * problem.lr_factor * rates(step - 1)
            with span("update"):
                take_step()

        check_gradients(optimizer.refused, step * self.mc_samples)
        posterior: Posterior = PointMass(optimizer.mean)
        if isinstance(server, LogNormal):
            posterior = LogNormal.from_log_median(optimizer.log_median.flatten(), server.precision)
        metrics = {
            "loss": float(total) / max(step * self.mc_samples, 1),
            "gradient-evaluations": problem.examples_seen(self.epochs, self.batch_size) * self.mc_samples,
        }
        return LocalSolution(posterior, metrics)

    def _optimizer(self, problem: LocalProblem) -> LMD:
        """LMD on the local problem, in units of the mean loss, at its start."""
        model, server, weight = problem.model, problem.server, problem.data_weight
        generator = problem.generator("noise", problem.device)
        if not isinstance(server, LogNormal):
            decay = 0.1 if self.decay is None else self.decay
            return self._build(model.parameters, lr=self.lr, sigma=self.sigma, decay=decay, generator=generator)
        site = problem.site_terms()
        optimizer = self._build(
            model.parameters,
            lr=self.lr,
            sigma=float(server.precision) ** -0.5 if problem.learn_precision else 0.0,  # no noise: at the medians
            decay=self.decay or 0.0,
            generator=generator,
            prior_log_median=server.log_median.view(2, -1),
            prior_precision=problem.rho * float(server.precision) / weight,
            site_linear=None if site is None else site[0].view(2, -1) / weight,
            site_quadratic=0.0 if site is None else float(site[1]) / weight,
        )
        if problem.round > 1:
            optimizer.set_log_median(server.log_median)
        return optimizer
