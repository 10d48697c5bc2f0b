"""SGD, Adam and AdamW: the mode of the local problem, for point estimates and fixed precisions."""

from __future__ import annotations

from collections.abc import Sequence
from types import MappingProxyType
from typing import ClassVar

import torch
from torch import Tensor

from bayesfed.accelerate.undecorated import bare_step
from bayesfed.errors import choice, number
from bayesfed.families import PointMass
from bayesfed.federation.local import LocalProblem, LocalSolution, check_training
from bayesfed.problem.flat import FlatModel
from bayesfed.profiling import each, span
from bayesfed.schedule import Schedule
from clients.side_by_side import BatchingSolver


class PointSolver(BatchingSolver):
    """Minimise ``l_k(m)/tau + <eta_k, T(m)> + rho/2 (m - m_g)^T S_g (m - m_g)`` in units of the mean loss.

    This is the local problem under the delta method ``E_q[f] = f(m)`` with the precision held at the server's (federated ADMM,
    spec 1.4). For point-estimate strategies it is ``loss_scale l_k(w)/N_k + v_k^T w + proximal/2 ||w - w_g||^2``, divided by ``loss_scale``.

    Uploads the mean, and the server's precision unchanged.

    Args:
        optimizer: ``sgd``, ``adam`` or ``adamw``.
        lr: learning rate.
        epochs: passes over the client's data in a round.
        batch_size: examples per step.
        momentum: of SGD; ignored by Adam.
        beta1, beta2: of Adam; ignored by SGD.
        weight_decay: coupled (L2) for SGD and Adam, decoupled for AdamW.
        clip_norm: bound on the norm of the whole gradient; null for none.
        schedule, schedule_rounds, schedule_decay: learning rate over communication rounds.
        local_schedule: learning rate over the steps of a round.
        keep_momentum: keep the optimizer's state between rounds instead of restarting it.
        amp: ``bfloat16`` runs the model in mixed precision (parameters, gradients and update stay in ``dtype``); ``none``.
        native: gradients by a C function where it fits, see :meth:`bayesfed.federation.local.LocalProblem.backward`.

    Raises:
        InputError: a value out of range.
    """

    families: ClassVar[frozenset[str]] = frozenset({"point", "isotropic", "diagonal", "full"})
    learns_precision: ClassVar[bool] = False
    lacks = MappingProxyType({})

    def __init__(
        self,
        optimizer: str,
        lr: float,
        epochs: int,
        batch_size: int,
        momentum: float = 0.0,
        beta1: float = 0.9,
        beta2: float = 0.999,
        weight_decay: float = 0.0,
        clip_norm: float | None = None,
        schedule: str = "constant",
        schedule_rounds: int | None = None,
        schedule_decay: float = 0.1,
        local_schedule: str = "constant",
        keep_momentum: bool = False,
        amp: str = "none",
        native: bool = True,
    ):
        choice("optimizer", optimizer, ("sgd", "adam", "adamw"))
        check_training(lr, epochs, batch_size, local_schedule, amp)
        Schedule(schedule, schedule_rounds or 1, schedule_decay)
        for name, value in (("momentum", momentum), ("beta1", beta1), ("beta2", beta2)):
            number(name, value, at_least=0, at_most=1 - 1e-9)
        number("weight_decay", weight_decay, at_least=0)
        number("clip_norm", clip_norm, above=0, optional=True)
        self.optimizer, self.lr, self.epochs, self.batch_size = optimizer, lr, epochs, batch_size
        self.momentum, self.beta1, self.beta2, self.weight_decay = momentum, beta1, beta2, weight_decay
        self.clip_norm, self.local_schedule, self.keep_momentum = clip_norm, local_schedule, keep_momentum
        self.amp, self.native = amp, native

    def solve(self, problem: LocalProblem) -> LocalSolution:
        model = problem.model
        model.load(problem.start())
        model.module.train()
        model.drop_grad()
        with span("optimizer"):
            optimizer = self._build(model.parameters, self.lr * problem.lr_factor)
        if problem.memory:
            _restore(optimizer, model, problem.memory)
        slope, offset = quadratic_terms(problem)

        take_step = bare_step(optimizer)
        rates = Schedule(self.local_schedule, problem.steps(self.epochs, self.batch_size))
        total = torch.zeros((), dtype=problem.dtype, device=problem.device)
        seen = torch.zeros_like(model.vector) if problem.keep_gradient else None
        progress = Progress(self)
        step = 0
        for step, (x, y) in enumerate(each("data", problem.batches(self.epochs, self.batch_size)), start=1):
            with span("gradient"):
                loss = problem.backward(x, y, self.amp, self.native)
            with span("update"):
                gradients = model.gradients()
                if seen is not None:
                    torch._foreach_add_(model.split(seen), gradients)
                if slope is not None and offset is not None:
                    extra = slope @ model.vector if slope.dim() == 2 else slope * model.vector
                    torch._foreach_add_(gradients, model.split(extra.add_(offset)))
                if self.clip_norm is not None:
                    torch.nn.utils.clip_grad_norm_(model.parameters, self.clip_norm)
                optimizer.param_groups[0]["lr"] = self.lr * problem.lr_factor * rates(step - 1)
                take_step()
                model.drop_grad()
                progress.step(rates(step - 1))
            if problem.observer is not None:
                problem.observer(step, model.vector)
            total += loss

        mean = model.vector.clone()
        server = problem.server
        posterior = PointMass(mean) if isinstance(server, PointMass) else type(server)(mean, server.precision)
        memory = _memory(optimizer, model) if self.keep_momentum else {}
        metrics = {
            "loss": float(total) / max(step, 1),
            "gradient-evaluations": problem.examples_seen(self.epochs, self.batch_size),
            "local-progress": progress.total,
        }
        return LocalSolution(posterior, metrics, memory, None if seen is None else seen / max(step, 1))

    def solve_together(self, problems: Sequence[LocalProblem]) -> list[LocalSolution]:
        from clients.point import side_by_side

        return side_by_side.solve(self, problems)

    def _build(self, parameters: list[torch.nn.Parameter], lr: float) -> torch.optim.Optimizer:
        if self.optimizer == "sgd":
            return torch.optim.SGD(parameters, lr=lr, momentum=self.momentum, weight_decay=self.weight_decay)
        kind = torch.optim.Adam if self.optimizer == "adam" else torch.optim.AdamW
        fused = parameters[0].device.type in ("cpu", "cuda")
        betas = (self.beta1, self.beta2)
        return kind(parameters, lr=lr, betas=betas, weight_decay=self.weight_decay, fused=fused)


class Progress:
    """How often a gradient of the local path counts in the change of the weights, summed over gradients: FedNova's ``||a_k||_1``.

    In units of the round's learning rate. The number of steps for SGD and Adam with a constant rate; heavy-ball momentum beta makes a
    gradient count ``1 + beta + beta^2 + ...`` times as far as the path goes.
    """

    def __init__(self, solver: PointSolver):
        self._momentum = solver.momentum if solver.optimizer == "sgd" else 0.0
        self._weight = self.total = 0.0

    def step(self, rate: float) -> None:
        """One more step, at ``rate`` times the round's learning rate."""
        self._weight = self._momentum * self._weight + 1.0
        self.total += rate * self._weight


def _memory(optimizer: torch.optim.Optimizer, model: FlatModel) -> dict[str, Tensor]:
    """The optimizer's state as vectors (P,), and its count of steps, shape ()."""
    states = [optimizer.state[p] for p in model.parameters]
    return {
        name: value if name == "step" else torch.cat([state[name].reshape(-1) for state in states])
        for name, value in states[0].items()
    }


def _restore(optimizer: torch.optim.Optimizer, model: FlatModel, memory: dict[str, Tensor]) -> None:
    """Inverse of :func:`_memory`."""
    for name, value in memory.items():
        count = len(model.parameters)
        pieces = [value.clone() for _ in range(count)] if name == "step" else model.split(value.clone())
        for parameter, piece in zip(model.parameters, pieces, strict=True):
            optimizer.state[parameter][name] = piece


def quadratic_terms(problem: LocalProblem) -> tuple[Tensor | None, Tensor | None]:
    """The gradient of site, linear and proximal terms is ``slope m + offset``, in mean-loss units; (None, None) if there are none.

    ``slope = (rho S_g - V)/(N_k/tau)`` has the shape of the precision, ``offset = (v - rho S_g m_g)/(N_k/tau)`` shape (P,).
    """
    server = problem.server
    if isinstance(server, PointMass):
        proximal = problem.proximal / problem.loss_scale
        if proximal == 0 and problem.site is None and problem.linear is None:
            return None, None
        slope = server.mean.new_full((), proximal)
        offset = -slope * server.mean
        if problem.site is not None:
            offset += problem.site.linear.to(offset) / problem.loss_scale
        return slope, offset if problem.linear is None else offset + problem.linear
    slope = problem.rho * server.precision
    offset = -problem.rho * server.multiply(server.precision, server.mean)
    site = problem.site_terms()
    if site is not None:
        slope, offset = slope - site[1], offset + site[0]
    offset = offset / problem.data_weight
    return slope / problem.data_weight, offset if problem.linear is None else offset + problem.linear
