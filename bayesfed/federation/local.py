"""The problem a client solves in one round, and what a solver is."""

from __future__ import annotations

import math
from abc import ABC, abstractmethod
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager, nullcontext
from dataclasses import dataclass, field
from types import MappingProxyType
from typing import ClassVar

import torch
from torch import Tensor

from bayesfed import seeding
from bayesfed.errors import InputError
from bayesfed.families import ExponentialFamily, NaturalParameters, PointMass
from bayesfed.problem import Examples, Likelihood
from bayesfed.problem.flat import FlatModel
from bayesfed.problem.inputs import Inputs

Posterior = ExponentialFamily | PointMass


@dataclass(frozen=True)
class LocalPath:
    """What a method asks of the way to the solution: only solvers that take gradient steps have one.

    Attributes:
        linear: (P,) added to every gradient of the mean loss (control variates); None for none.
        keep_gradient: the solver has to return the mean of the loss gradients it saw.
        observer: called with the step, from 1, and the parameters (P,) after it (not to be kept without a copy); None
            for none.
    """

    linear: Tensor | None = None
    keep_gradient: bool = False
    observer: Callable[[int, Tensor], None] | None = None

    @property
    def asked(self) -> bool:
        """Whether anything is."""
        return self.linear is not None or self.keep_gradient or self.observer is not None


@dataclass(frozen=True)
class LocalProblem:
    """``min_q E_q[l_k]/tau + <eta_k, mu_q> + rho KL(q || q_g)`` for client k (arXiv 2506.13150; docs/method.md 1).

    ``l_k`` is the summed negative log-likelihood of the client's ``N_k`` examples. For point estimates (``server`` a
    point mass) the problem is ``min_w loss_scale l_k(w)/N_k + v_k^T w + proximal/2 ||w - w_g||^2``, of which solvers
    work on ``1/loss_scale``.

    Attributes:
        model: parameters are overwritten by the solver.
        initial: (P,) the seeded network initialisation, the same on all clients.
        data: the client's training examples.
        likelihood: gives the mean loss of a batch.
        server: ``q_g`` as received.
        site: ``eta_k`` in float64, zero at first; None for methods without duals.
        rho: weight of the KL term.
        temperature: ``tau``, tempers the data term.
        proximal: weight of the proximal term of point estimates.
        learn_precision: False keeps the server's precision and uses the delta method ``E_q[f] = f(m)``.
        round: communication round, from 1.
        client: partition id, a key of the client's random streams.
        seed: the run's seed.
        lr_factor: the schedule's factor on the learning rate in this round.
        memory: tensors this solver returned in the client's previous accepted round.
        loss_scale: weight of the mean loss of point estimates; 1, or ``N_k`` over the mean of all clients' for methods
            whose sum over clients is the pooled loss.
        path: what is asked of the way to the solution.
        work: share of its steps that the client gets done, in (0, 1]; below 1 it is a straggler.
    """

    model: FlatModel
    initial: Tensor
    data: Examples
    likelihood: Likelihood
    server: Posterior
    site: NaturalParameters | None
    rho: float
    temperature: float
    proximal: float
    learn_precision: bool
    round: int
    client: int
    seed: int
    lr_factor: float = 1.0
    memory: dict[str, Tensor] = field(default_factory=dict)
    loss_scale: float = 1.0
    path: LocalPath = LocalPath()
    work: float = 1.0

    @property
    def asks(self) -> frozenset[str]:
        """What it needs of a solver beyond the loss's minimum, in the words of ``Solver.lacks``."""
        point = isinstance(self.server, PointMass)
        needed = {
            "path": self.path.asked,
            "proximal": point and (self.site is not None or self.proximal > 0),
            "fixed": not point and not self.learn_precision,
        }
        return frozenset(ability for ability, asked in needed.items() if asked)

    @property
    def num_examples(self) -> int:
        """``N_k``."""
        return len(self.data)

    @property
    def data_weight(self) -> float:
        """``N_k/tau``: the weight of the client's mean loss."""
        return self.num_examples / self.temperature

    @property
    def device(self) -> torch.device:
        """Where the model lives."""
        return self.model.vector.device

    @property
    def dtype(self) -> torch.dtype:
        """The floating-point precision of the model."""
        return self.model.vector.dtype

    def generator(self, purpose: str, device: torch.device | str = "cpu") -> torch.Generator:
        """The stream of this client, round and purpose."""
        return seeding.torch_generator(self.seed, purpose, self.client, self.round, device=device)

    def start(self) -> Tensor:
        """(P,) where the local iterations start: the network initialisation in round 1, the server's mean later.

        A network must not start at the prior mean 0, which is a symmetric saddle point (docs/method.md 7).
        """
        return self.initial if self.round == 1 else self.server.mean

    def site_terms(self) -> tuple[Tensor, Tensor] | None:
        """The site as ``(v, V)`` with ``<eta, mu> = v^T m - 1/2 tr(V E[theta theta^T])``, in its dtype; None if 0."""
        if self.site is None:
            return None
        site = self.site.to(self.server.mean.dtype, self.server.mean.device)
        return site.linear, site.precision

    def loss(self, x: Inputs, y: Tensor, amp: str = "none") -> Tensor:
        """Mean loss of a batch at the model's parameters; ``amp=bfloat16`` runs the model in mixed precision."""
        if amp == "none":
            return self.likelihood.loss(self.model(x), y)
        with torch.autocast(self.device.type, torch.bfloat16):
            outputs = self.model(x)
        return self.likelihood.loss(outputs.to(self.dtype), y)

    def backward(self, x: Inputs, y: Tensor, amp: str = "none") -> Tensor:
        """:meth:`loss`, detached, after ``backward()``: adds its gradient to the parameters' ``grad``.

        By ``model.gradient`` where that can; torch's numbers to rounding. Call ``model.drop_grad()`` first: with
        gradients that are there already, even zeros, autograd has to do it.
        """
        if self.model.gradient is not None and amp == "none" and type(self).loss is LocalProblem.loss:
            loss = self.model.gradient(self.likelihood.loss, x, y)
            if loss is not None:
                return loss
        loss = self.loss(x, y, amp)
        loss.backward()
        return loss.detach()

    @contextmanager
    def keyed_dropout(self) -> Iterator[None]:
        """Key torch's global generators, from which dropout draws, by (seed, client, round); put them back afterwards.

        NumPy's and Python's too (some microseconds) where somebody else's module might draw from them.
        """
        key = "dropout", self.client, self.round
        seed = seeding.derive(self.seed, *key)
        own = type(self.model.module).__module__.startswith("bayesfed.")
        others = nullcontext() if own else seeding.global_generators(self.seed, *key)
        with others, torch.random.fork_rng(devices=[self.device] if self.device.type == "cuda" else []):
            torch.default_generator.manual_seed(seed)  # torch.manual_seed takes 0.4 ms to look for other devices
            if self.device.type == "cuda":
                torch.cuda.manual_seed(seed)
            yield

    def orders(self, epochs: int) -> Iterator[Tensor]:
        """The order of the examples, (N_k,) int64, in each of ``epochs`` passes; keyed by (seed, client, round)."""
        generator = self.generator("batches")
        for _ in range(epochs):
            yield torch.randperm(self.num_examples, generator=generator, device="cpu")

    def batches(self, epochs: int, batch_size: int) -> Iterator[tuple[Inputs, Tensor]]:
        """Mini-batches of ``epochs`` passes over :meth:`orders`, as many as :meth:`steps` says."""
        left = self.steps(epochs, batch_size)
        for order in self.orders(epochs):
            for rows in order.split(batch_size)[:left]:
                yield self.data.batch(rows, self.dtype, self.device)
            left = max(left - math.ceil(self.num_examples / batch_size), 0)

    def steps(self, epochs: int, batch_size: int) -> int:
        """How many mini-batches :meth:`batches` yields."""
        return self.budget(epochs * math.ceil(self.num_examples / batch_size))

    def budget(self, steps: int) -> int:
        """How many of ``steps`` the client gets done, at least 1."""
        return steps if self.work == 1 else max(1, math.floor(self.work * steps))

    def examples_seen(self, epochs: int, batch_size: int) -> int:
        """How many examples the mini-batches hold together."""
        full, rest = divmod(self.steps(epochs, batch_size), math.ceil(self.num_examples / batch_size))
        return full * self.num_examples + rest * batch_size


@dataclass(frozen=True)
class LocalSolution:
    """What a solver found.

    Attributes:
        posterior: ``q_k``.
        metrics: numbers for the log: ``loss`` = mean training loss over the round, ``gradient-evaluations`` = examples
            x posterior samples, summed over steps (a solver that doesn't say leaves the run's count unknown).
        memory: tensors to be handed to this client's next round (empty unless asked for).
        gradient: (P,) mean of the loss gradients along the local path, if ``path.keep_gradient`` asked for it.
    """

    posterior: Posterior
    metrics: dict[str, float]
    memory: dict[str, Tensor] = field(default_factory=dict)
    gradient: Tensor | None = None


# for ``Solver.lacks``
_SAY = "client=sgd, or declare it in the solver's `lacks`"
UNDECLARED: Mapping[str, tuple[str, str]] = MappingProxyType(
    {
        "path": ("does not declare control variates, samples or counts of its steps", _SAY),
        "fixed": ("does not declare that it keeps the server's precision, a fixed covariance", _SAY),
        "proximal": ("does not declare proximal terms and duals of point estimates", _SAY),
    }
)
NO_PATH = "has no control variates, samples or counts of its steps", "client=sgd or client=adam"
LEARNS = "learns its precision and can't keep the server's, a fixed covariance", "client=adam or client=sgd"


class Solver(ABC):
    """Solves a client's local problem.

    Adding one: subclass, implement :meth:`solve`, name the class in ``conf/client/NAME.yaml``.

    Attributes:
        families: names of the posterior families it can return.
        batches: whether :meth:`solve_many` can be faster than one client after the other.
        learns_precision: whether it returns another precision than the server's where ``learn_precision`` says so.
        stepwise: whether it takes as many steps as :meth:`LocalProblem.budget` leaves it, so that clients can be
            stragglers.
        lacks: what it cannot do (``path``: control variates, samples or counts of its steps; ``fixed``: keep the
            server's precision, with expectations at the mean; ``proximal``: proximal terms and duals of point
            estimates), each as a clause and what to use instead, see :meth:`refusal`. All of it, until a class declares
            what it can: ``lacks = {}`` is everything.
    """

    families: ClassVar[frozenset[str]]
    batches: ClassVar[bool] = False
    learns_precision: ClassVar[bool] = True
    stepwise: ClassVar[bool] = True
    lacks: Mapping[str, tuple[str, str]] = UNDECLARED

    @abstractmethod
    def solve(self, problem: LocalProblem) -> LocalSolution:
        """Run the local iterations."""

    def solve_many(self, problems: Sequence[LocalProblem]) -> list[LocalSolution]:
        """Solve the problems of several clients, which may share one model; the solutions are those of :meth:`solve`.

        One after the other here; solvers that run clients side by side (``batches``) agree with that to rounding.
        """
        solutions = []
        for problem in problems:
            with problem.keyed_dropout():
                solutions.append(self.solve(problem))
        return solutions

    def refusal(self, ability: str, client: str, strategy: str = "this strategy") -> InputError:
        """The error for a ``strategy`` that needs what the solver, called ``client``, ``lacks``."""
        missing, instead = self.lacks[ability]
        return InputError("client", client, f"{missing}, which {strategy} needs; use {instead}")

    def require(self, problem: LocalProblem) -> None:
        """Raise InputError if ``problem`` asks for what the solver does not declare; asked before it solves."""
        client, family = type(self).__name__, problem.server.name
        if family not in self.families:
            raise InputError(
                "client", client, f"solves for {', '.join(sorted(self.families))}, not for family {family}"
            )
        for ability in sorted(problem.asks & self.lacks.keys(), reverse=True):
            raise self.refusal(ability, client)
        if problem.work < 1 and not self.stepwise:
            raise InputError("client", client, "has no steps to leave out, which system.stragglers needs")

    def check(self, model: str, likelihood: str) -> None:  # noqa: B027 - most solvers take any model
        """Raise InputError if the solver can't work with this model and likelihood."""
