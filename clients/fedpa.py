"""FedPA's client: posterior samples from the local path."""

from __future__ import annotations

from dataclasses import replace

import torch
from torch import Tensor

from bayesfed import wire
from bayesfed.families import PointMass
from bayesfed.federation.client.handler import Task, Trainer
from bayesfed.federation.client.sites import Record
from bayesfed.federation.local import LocalProblem, LocalSolution, Posterior


class PathSamples:
    """Means of equally long pieces of a path of parameters, after a burn-in.

    Args:
        steps: of the whole path.
        burn_in: share of the steps before the first piece.
        samples: number of pieces; fewer if there aren't enough steps.

    Attributes:
        values: the means so far, (P,) float64 each.
    """

    def __init__(self, steps: int, burn_in: float, samples: int):
        self._first = int(burn_in * steps)
        kept = steps - self._first
        self._length = max(1, kept // samples)
        self._samples = min(samples, kept)
        self._sum: Tensor | None = None
        self.values: list[Tensor] = []

    def __call__(self, step: int, weights: Tensor) -> None:
        """Take note of the parameters after ``step`` (from 1)."""
        if step <= self._first or len(self.values) == self._samples:
            return
        wide = weights.detach().to(dtype=torch.float64, copy=True)
        self._sum = wide if self._sum is None else self._sum.add_(wide)
        if (step - self._first) % self._length == 0:
            self.values.append(self._sum / self._length)
            self._sum = None


def posterior_delta(server: Tensor, samples: Tensor, shrinkage: float) -> Tensor:
    """``Sigma^-1 (w_g - mu)`` with ``Sigma = r I + (1 - r) S``, ``r = 1/(1 + (L - 1) shrinkage)``, by Woodbury's identity in O(L^2 P).

    Args:
        server: ``w_g`` (P,).
        samples: (L, P) with mean mu and covariance S (divisor L - 1).
        shrinkage: >= 0.
    """
    count = len(samples)
    mean = samples.mean(0)
    gap = server - mean
    share = 1 / (1 + (count - 1) * shrinkage)
    if share == 1:
        return gap
    centred = samples - mean
    inner = centred @ centred.T
    inner.diagonal().add_(share * (count - 1) / (1 - share))
    return (gap - centred.T @ torch.linalg.solve(inner, centred @ gap)) / share


class FedPATrainer(Trainer):
    """Client side of FedPA (Al-Shedivat et al. 2021; see ``strategies/fedpa.py``): uploads ``w_g - Delta_k``. Keeps nothing.

    Raises:
        ValueError: the solver doesn't show its path, or the path has fewer than two steps after the burn-in.
    """

    def pose(self, task: Task) -> LocalProblem:
        if task.method.round <= wire.value(task.message.content["method"], "burn_in_rounds", int):
            return task.local
        epochs, batch = getattr(self.solver, "epochs", None), getattr(self.solver, "batch_size", None)
        if epochs is None or batch is None:
            raise ValueError(
                f"strategy=fedpa needs a client that takes gradient steps; {type(self.solver).__name__} does not"
            )
        steps = task.local.steps(epochs, batch)
        burn_in, samples = float(task.settings["burn_in"]), int(task.settings["samples"])
        return replace(task.local, observer=PathSamples(steps, burn_in, samples))

    def answer(self, task: Task, solution: LocalSolution) -> tuple[Posterior, Record]:
        path = task.local.observer
        if not isinstance(path, PathSamples):
            return solution.posterior, {}
        if len(path.values) < 2:
            raise ValueError(
                f"the local path gave {len(path.values)} posterior samples, 2 are needed; more client.epochs"
            )
        server = task.server.mean.to(torch.float64)
        delta = posterior_delta(server, torch.stack(path.values).cpu(), float(task.settings["shrinkage"]))
        return PointMass(server - delta), {}
