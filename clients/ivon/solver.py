"""IVON as a client solver: the diagonal (IVON-ADMM) and isotropic Gaussian."""

from __future__ import annotations

import math
from collections.abc import Sequence
from types import MappingProxyType
from typing import ClassVar

import torch

from bayesfed import accelerate
from bayesfed.errors import choice, integer, number
from bayesfed.families import gaussian
from bayesfed.federation.local import LEARNS, NO_PATH, LocalProblem, LocalSolution, check_gradients, check_training
from bayesfed.profiling import each, inside, span
from bayesfed.schedule import Schedule
from clients.ivon import side_by_side
from clients.ivon.optimizer import IVON
from clients.side_by_side import BatchingSolver


class IVONSolver(BatchingSolver):
    """Solve the local variational problem with IVON (arXiv 2506.13150, IVON-ADMM; spec 1.6).

    IVON runs with effective sample size ``N_k/(tau rho)``, prior ``q_g`` and the site as linear and quadratic terms. Its fixed
    point is ``S_k = S_g + (N_k/tau E[hess lbar_k] - V_k)/rho``: ``h`` is the curvature *in excess of* the server's precision.
    In round 1 it starts at the network initialisation with ``h = hess_init``, later at ``(m_g, h = 0)``.

    The curvature is estimated from samples of the posterior, so IVON can't keep the server's precision: such problems are refused.

    Uploads mean and precision (2P numbers; P + 1 for the isotropic family).

    Args:
        lr: multiplies the Newton direction (``rescale_lr=False``, as the federated settings assume).
        epochs: passes over the client's data in a round.
        batch_size: examples per step.
        beta1, beta2: decay of momentum and of the curvature estimate. A round of T steps learns a fraction ``1 - beta2**T``.
        hess_init: curvature ``h`` at the start of round 1, in mean-loss units.
        mc_samples: posterior samples (gradients) per step.
        min_precision: smallest precision a client may reach, relative to the server's. Where the local problem asks for less
            (expected Hessians are indefinite, and the site can exceed the curvature), the precision is held there and
            counted (``guard/clients``).
        clip_radius: elementwise bound on the preconditioned step, before ``lr``.
        clip_norm: bound on the norm of each sampled gradient; null for none.
        schedule, schedule_rounds, schedule_decay: learning rate over communication rounds.
        local_schedule: learning rate over the steps of a round.
        noise: ``quantile`` (fast on CPUs) or ``normal``, see :mod:`clients.noise`.
        keep_momentum: keep momentum and debias counter between rounds instead of restarting them.
        amp: ``bfloat16`` runs the model in mixed precision (posterior, gradients and update stay in ``dtype``); ``none``.
        antithetic: every second sample mirrors the one before, see :class:`clients.optim.IVON`.
        compile: the optimizer's step as one kernel made by ``torch.compile``.

    Raises:
        InputError: a value out of range.
    """

    families: ClassVar[frozenset[str]] = frozenset({"diagonal", "isotropic"})
    lacks = MappingProxyType({"path": NO_PATH, "fixed": LEARNS})

    def __init__(
        self,
        lr: float,
        epochs: int,
        batch_size: int,
        beta1: float = 0.9,
        beta2: float = 0.9998,
        hess_init: float = 0.001,
        mc_samples: int = 1,
        clip_radius: float = math.inf,
        clip_norm: float | None = None,
        min_precision: float = 0.1,
        schedule: str = "constant",
        schedule_rounds: int | None = None,
        schedule_decay: float = 0.1,
        local_schedule: str = "constant",
        noise: str = "quantile",
        keep_momentum: bool = False,
        amp: str = "none",
        antithetic: bool = False,
        compile: bool = False,
    ):
        check_training(lr, epochs, batch_size, local_schedule, amp)
        Schedule(schedule, schedule_rounds or 1, schedule_decay)
        number("beta1", beta1, at_least=0, at_most=1 - 1e-9)
        number("beta2", beta2, at_least=0, at_most=1 - 1e-12)
        number("hess_init", hess_init, above=0)
        integer("mc_samples", mc_samples, at_least=1)
        number("clip_radius", clip_radius, above=0, finite=False)
        number("clip_norm", clip_norm, above=0, optional=True)
        number("min_precision", min_precision, at_least=0, at_most=0.99)
        choice("noise", noise, ("quantile", "normal"))
        self.lr, self.epochs, self.batch_size = lr, epochs, batch_size
        self.beta1, self.beta2, self.hess_init = beta1, beta2, hess_init
        self.mc_samples, self.clip_radius, self.clip_norm = mc_samples, clip_radius, clip_norm
        self.min_precision = min_precision
        self.local_schedule, self.noise, self.keep_momentum = local_schedule, noise, keep_momentum
        self.amp, self.antithetic, self.compile = amp, antithetic, compile

    def solve(self, problem: LocalProblem) -> LocalSolution:
        self.require(problem)
        model, server = problem.model, problem.server
        model.load(problem.start())
        model.module.train()
        model.drop_grad()
        site = problem.site_terms()
        with span("optimizer"):
            optimizer = IVON(
                model.parameters,
                lr=self.lr * problem.lr_factor,
                ess=problem.data_weight / problem.rho,
                hess_init=self.hess_init,
                beta1=self.beta1,
                beta2=self.beta2,
                mc_samples=self.mc_samples,
                clip_radius=self.clip_radius,
                rescale_lr=False,
                prior_mean=server.mean,
                prior_precision=server.precision,
                site_linear=None if site is None else site[0] / problem.data_weight,
                site_quadratic=None if site is None else site[1] / problem.data_weight,
                min_precision=self.min_precision,
                noise=self.noise,  # type: ignore[arg-type]
                antithetic=self.antithetic,
                compile=self.compile,
                generator=problem.generator("noise", problem.device),
                hess_structure="scalar" if server.name == "isotropic" else "diagonal",
            )
        if problem.round > 1:
            optimizer.set_posterior(server.mean, server.precision)
        if problem.memory:
            optimizer.load_momentum(problem.memory["momentum"], int(problem.memory["steps"]))

        start = optimizer.precision
        rates = Schedule(self.local_schedule, problem.steps(self.epochs, self.batch_size))
        take_step = accelerate.bare_step(optimizer)
        total = torch.zeros((), dtype=problem.dtype, device=problem.device)
        step = 0
        for step, (x, y) in enumerate(each("data", problem.batches(self.epochs, self.batch_size)), start=1):
            for _ in range(self.mc_samples):
                with inside(optimizer.sampled_params(train=True), "sampling", "gradient"):
                    loss = problem.backward(x, y, self.amp)
                    if self.clip_norm is not None:
                        torch.nn.utils.clip_grad_norm_(model.parameters, self.clip_norm)
                total += loss
            optimizer.param_groups[0]["lr"] = self.lr * problem.lr_factor * rates(step - 1)
            with span("update"):
                take_step()

        check_gradients(optimizer.refused, step * self.mc_samples)
        precision = optimizer.precision
        posterior = gaussian(server.name).from_mean_precision(
            optimizer.mean.clone(), precision.mean() if server.name == "isotropic" else precision.clone()
        )
        metrics = {
            "loss": float(total) / max(step * self.mc_samples, 1),
            "hessian-moved": float(((precision - start).abs() > 0.1 * start).to(problem.dtype).mean()),
            "floored": float(optimizer.floored()),
            "gradient-evaluations": problem.examples_seen(self.epochs, self.batch_size) * self.mc_samples,
        }
        memory = {}
        if self.keep_momentum:
            momentum, steps = optimizer.momentum()
            memory = {"momentum": momentum.clone(), "steps": torch.tensor(steps)}
        return LocalSolution(posterior, metrics, memory)

    def solve_together(self, problems: Sequence[LocalProblem]) -> list[LocalSolution]:
        return side_by_side.solve(self, problems)
