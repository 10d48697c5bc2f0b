"""Posterior averaging."""

from __future__ import annotations

from dataclasses import dataclass, replace

import torch
from torch import Tensor

from bayesfed import wire
from bayesfed.families import PointMass
from bayesfed.federation.client.assignment import Assignment
from bayesfed.federation.client.contribution import Contribution
from bayesfed.federation.client.handler import Trainer
from bayesfed.federation.local import LocalPath, LocalProblem, LocalSolution
from bayesfed.federation.server.strategy import Sent, Sums
from bayesfed.settings import setting
from strategies.fedavg import FedAvg


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
    """``Sigma^-1 (w_g - mu)`` with ``Sigma = r I + (1 - r) S``, ``r = 1/(1 + (L - 1) shrinkage)``, in O(L^2 P).

    By Woodbury's identity.

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
    delta: Tensor = (gap - centred.T @ torch.linalg.solve(inner, centred @ gap)) / share
    return delta


class FedPAClient(Trainer):
    """Client side of FedPA (Al-Shedivat et al. 2021): uploads ``w_g - Delta_k``. Keeps nothing.

    Raises:
        ValueError: the solver doesn't show its path, or the path has fewer than two steps after the burn-in.
    """

    def pose(self, assignment: Assignment) -> LocalProblem:
        if assignment.settings.round <= wire.value(assignment.values, "burn_in_rounds", int):
            return assignment.problem
        epochs, batch = getattr(self.solver, "epochs", None), getattr(self.solver, "batch_size", None)
        if epochs is None or batch is None:
            raise ValueError(
                f"strategy=fedpa needs a client that takes gradient steps; {type(self.solver).__name__} does not"
            )
        steps = assignment.problem.steps(epochs, batch)
        burn_in, samples = (
            wire.value(assignment.values, "burn_in", float),
            wire.value(assignment.values, "samples", int),
        )
        return replace(assignment.problem, path=LocalPath(observer=PathSamples(steps, burn_in, samples)))

    def answer(self, assignment: Assignment, solution: LocalSolution) -> Contribution:
        path = assignment.problem.path.observer
        if not isinstance(path, PathSamples):
            return Contribution(solution.posterior)
        if len(path.values) < 2:
            raise ValueError(
                f"the local path gave {len(path.values)} posterior samples, 2 are needed; more client.epochs"
            )
        server = assignment.server.mean.to(torch.float64)
        delta = posterior_delta(
            server, torch.stack(path.values).cpu(), wire.value(assignment.values, "shrinkage", float)
        )
        return Contribution(PointMass(server - delta))


@dataclass(kw_only=True, eq=False)
class FedPA(FedAvg):
    r"""FedPA (Al-Shedivat et al., ICLR 2021), with ``p_k = N_k / sum_P N_j``:

        client   runs local steps from w_g; means of L successive pieces of the path are its posterior samples, with
        mean
                 mu and covariance S:
                 Delta_k = Sigma^-1 (w_g - mu),    Sigma = r I + (1 - r) S,   r = 1/(1 + (L - 1) shrinkage)
        dual     none
        server   w_g -= eta sum_{k in P} p_k Delta_k

    The mode of a product of Gaussians solves ``sum_k p_k Sigma_k^-1 (w - mu_k) = 0``, of which the server's step is
    gradient descent. In the first ``burn_in_rounds`` rounds ``Delta_k = w_g - w_k`` (FedAvg), as in the paper: far from
    the optimum the path says nothing about the posterior.

    Relation: precision weights the clients as in BayesADMM, but it never travels, and is estimated from the path anew
    each round. State: none. Traffic: P numbers each way; the client needs ``samples`` P numbers of memory.

    Args:
        samples: L, at least 2.
        shrinkage: at 0 Sigma is the identity and FedPA averages the means of the paths.
        burn_in: share of the local steps before the first sample, in [0, 1).
        burn_in_rounds: rounds of FedAvg at the start.
        server_step: eta.

    Raises:
        InputError: a value out of range.
    """

    name = "fedpa"
    asks = frozenset({"path"})
    client = FedPAClient

    samples: int = setting(5, at_least=2)
    shrinkage: float = setting(0.01, at_least=0)
    burn_in: float = setting(0.4, at_least=0, at_most=0.99)
    burn_in_rounds: int = setting(5, at_least=0)
    server_step: float = setting(1.0, above=0)

    # -- one round ----------------------------------------------------------------------------------------------------

    def local_settings(self) -> dict[str, float | bool | str]:
        """What :class:`FedPAClient` reads."""
        return {name: getattr(self, name) for name in ("samples", "shrinkage", "burn_in", "burn_in_rounds")}

    def combine(self, sums: Sums, sent: Sent[PointMass], replies: int) -> dict[str, float]:
        """The server's step; clients upload ``w_g - Delta_k``."""
        move = (sums["weighted"] / sums["examples"] - sent.mean) * self.server_step
        self.posterior = PointMass((sent.mean + move).to(self.dtype))
        return {}
