"""Small federations of quadratic clients, run by the real strategy, handler and solver."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator
from dataclasses import dataclass, field
from typing import ClassVar

import pytest
import torch
from flwr.app import Message
from flwr.clientapp import ClientApp
from torch import Tensor

import clients.dense
from bayesfed.engine.inline import InlineGrid
from bayesfed.families import Gaussian
from bayesfed.federation.client.sites import MemorySites, SiteStore
from bayesfed.federation.local import Solver
from bayesfed.problem import Examples, Problem
from bayesfed.problem.curvature import SummedLoss
from bayesfed.problem.flat import FlatModel
from bayesfed.problem.likelihood import Gaussian as GaussianLikelihood
from bayesfed.problem.likelihood import Likelihood
from bayesfed.problem.scaling import Scaling
from bayesfed.seeding import torch_generator
from clients.exact import ExactSolver
from strategies import BayesADMM

torch.set_num_threads(1)
Intercept = Callable[[Message], Message | None]


@dataclass(frozen=True)
class Quadratics:
    """Clients with ``l_k = beta/2 ||y_k - X_k theta||^2`` up to a constant: ``A_k = beta X^T X``, ``b_k = beta X^T
    y``.
    """

    inputs: list[Tensor]
    targets: list[Tensor]
    beta: float = 1.0

    @classmethod
    def random(cls, seed: int, clients: int, dim: int, beta: float = 1.5) -> Quadratics:
        """Correlated inputs, another mean and slope for each client, unequal sizes (some below ``dim``)."""
        g = torch_generator(seed, "quadratics")
        inputs, targets = [], []
        for _ in range(clients):
            rows = int(torch.randint(max(1, dim // 2), 3 * dim + 2, (), generator=g))
            mixing = torch.eye(dim).double() + 0.3 * torch.randn(dim, dim, generator=g, dtype=torch.float64)
            inputs.append(torch.randn(rows, dim, generator=g, dtype=torch.float64) @ mixing)
            slope = 2 * torch.randn(dim, generator=g, dtype=torch.float64)
            targets.append(inputs[-1] @ slope + torch.randn(rows, generator=g, dtype=torch.float64))
        return cls(inputs, targets, beta)

    @classmethod
    def diagonal(cls, seed: int, clients: int, dim: int) -> Quadratics:
        """``A_k`` diagonal: every input row is a multiple of a unit vector."""
        g = torch_generator(seed, "diagonal quadratics")
        inputs = [torch.diag(0.5 + torch.rand(dim, generator=g, dtype=torch.float64)) for _ in range(clients)]
        return cls(inputs, [torch.randn(dim, generator=g, dtype=torch.float64) for _ in range(clients)])

    def curvature(self, client: int) -> Tensor:
        """``A_k`` (P, P)."""
        return self.beta * self.inputs[client].T @ self.inputs[client]

    def pull(self, client: int) -> Tensor:
        """``b_k`` (P,)."""
        return self.beta * self.inputs[client].T @ self.targets[client]

    def __len__(self) -> int:
        return len(self.inputs)

    @property
    def dim(self) -> int:
        return self.inputs[0].shape[1]

    def posterior(
        self, prior_precision: float, temperature: float = 1.0, prior_mean: Tensor | float = 0.0
    ) -> tuple[Tensor, Tensor]:
        """Mean and precision matrix of the pooled posterior."""
        precision = prior_precision * torch.eye(self.dim, dtype=torch.float64)
        pull = torch.zeros(self.dim, dtype=torch.float64) + prior_precision * prior_mean
        for client in range(len(self)):
            precision = precision + self.curvature(client) / temperature
            pull = pull + self.pull(client) / temperature
        return torch.linalg.solve(precision, pull), precision

    def problem(self) -> Problem:
        return make_problem(self.inputs, self.targets, GaussianLikelihood(self.beta), 1)


def make_problem(inputs: list[Tensor], targets: list[Tensor], likelihood: Likelihood, num_outputs: int) -> Problem:
    """A problem with a linear model without bias."""
    clients = [Examples(x, y) for x, y in zip(inputs, targets, strict=True)]
    return Problem(
        clients=clients,
        test=clients[0],
        evaluated_on="test",
        likelihood=likelihood,
        input_shape=(inputs[0].shape[1],),
        num_outputs=num_outputs,
        scaling=Scaling.identity(),
        num_classes=None if num_outputs == 1 else num_outputs,
        label_counts=None,
        model={"_target_": "bayesfed.problem.models.Linear", "name": "linear", "bias": False},
        likelihood_config={"name": likelihood.name},
    )


class CachedLoss(SummedLoss):
    """The loss of a client with its derivatives remembered by position: runs on quadratics ask for the same ones each
    round.
    """

    _known: ClassVar[dict[int, tuple[SummedLoss, Examples]]] = {}

    def __new__(cls, model: FlatModel, likelihood: Likelihood, data: Examples) -> CachedLoss:
        if id(data) not in cls._known:
            loss = super().__new__(cls)
            SummedLoss.__init__(loss, model, likelihood, data)
            loss.gradient, loss.hessian = remembered(loss.gradient), remembered(loss.hessian)
            cls._known[id(data)] = (loss, data)  # the data too: else its id could be used again
        return cls._known[id(data)][0]

    def __init__(self, model: FlatModel, likelihood: Likelihood, data: Examples):
        pass


def remembered(function: Callable[[Tensor], Tensor]) -> Callable[[Tensor], Tensor]:
    values: dict[bytes, Tensor] = {}

    def call(vector: Tensor) -> Tensor:
        key = vector.numpy().tobytes()
        if key not in values:
            values[key] = function(vector)
        return values[key].clone()

    return call


@pytest.fixture(autouse=True)
def _quick_exact_solver(monkeypatch) -> None:
    monkeypatch.setattr(clients.dense, "SummedLoss", CachedLoss)


class RecordingGrid(InlineGrid):
    """Keeps the posteriors that clients uploaded; ``intercept`` may replace or lose a reply."""

    def __init__(self, app: ClientApp, num_clients: int, intercept: Intercept):
        super().__init__(app, num_clients)
        self.intercept = intercept
        self.uploads: dict[int, dict[int, dict[str, Tensor]]] = {}  # round -> client -> arrays

    def stream(self, messages: Iterable[Message], *, timeout: float | None = None) -> Iterator[Message]:
        for reply in super().stream(messages, timeout=timeout):
            if reply.metadata.message_type == "train" and not reply.has_error():
                record = reply.content["posterior"]
                arrays = {name: torch.from_numpy(array.numpy()) for name, array in record.items()}
                round = int(reply.content["metrics"]["round"])
                self.uploads.setdefault(round, {})[reply.metadata.src_node_id - 1] = arrays
            if (kept := self.intercept(reply)) is not None:
                yield kept


@dataclass
class Federation:
    """A strategy with its clients in this process.

    ``posteriors[t]`` is the server's posterior after round t (0 = before training), ``metrics[t - 1]`` the round's
    numbers.
    """

    problem: Problem
    strategy: BayesADMM
    solver: Solver = field(default_factory=ExactSolver)
    dtype: torch.dtype = torch.float64
    wire: str = "full"
    seed: int = 3
    sites: SiteStore = field(default_factory=MemorySites)
    intercept: Intercept = lambda reply: reply
    posteriors: list[Gaussian] = field(default_factory=list)
    metrics: list[dict[str, float]] = field(default_factory=list)
    accepted: list[list[int]] = field(default_factory=list)  # clients by round
    refused: list[str] = field(default_factory=list)  # reasons

    def __post_init__(self) -> None:
        self.trainer = self.strategy.client(
            name=self.strategy.name,
            family=self.strategy.family,
            solver=self.solver,
            problem=self.problem,
            sites=self.sites,
            seed=self.seed,
            dtype=self.dtype,
            device=torch.device("cpu"),
            wire_format=self.wire,
        )
        app = ClientApp()
        app.train()(self.trainer.train)
        app.query()(self.trainer.query)
        self.grid = RecordingGrid(app, len(self.problem.clients), lambda reply: self.intercept(reply))
        self.strategy.setup(self.trainer.initial, len(self.problem.clients), self.seed, self.wire)
        self.posteriors.append(self.strategy.posterior)

    def run(self, rounds: int) -> Federation:
        """That many more rounds."""
        done = len(self.posteriors) - 1
        self.strategy.start(self.grid, num_rounds=done + rounds, first_round=done + 1, callbacks=self)
        return self

    def begin_round(self, round: int, sampled: list[int]) -> None:
        self.accepted.append([])

    def client_done(self, round: int, client: int, metrics: dict[str, float] | None, reason: str) -> None:
        if metrics is not None:
            self.accepted[-1].append(client)
        else:
            self.refused.append(reason)

    def end_round(self, round: int, metrics: dict[str, float]) -> None:
        self.posteriors.append(self.strategy.posterior)
        self.metrics.append(metrics)

    def site(self, client: int) -> tuple[Tensor, Tensor]:
        """``(v_k, V_k)`` of the client's last accepted round, as it lies in the store."""
        record = self.sites.read(client, self.strategy.ledger.accepted[client])
        assert record is not None
        return record["site.first"], record["site.second"] * -2.0

    def uploaded(self, round: int, client: int) -> Gaussian:
        """``q_k`` as the client sent it, in float64 (with wire=full)."""
        return self.strategy.gaussian.from_arrays(self.grid.uploads[round][client]).to(torch.float64)


@pytest.fixture(scope="session")
def quadratics() -> type[Quadratics]:
    return Quadratics


@pytest.fixture(scope="session")
def federation() -> type[Federation]:
    return Federation


@pytest.fixture(scope="session")
def linear_problem() -> Callable[..., Problem]:
    return make_problem


def relative_error(got: Tensor, expected: Tensor) -> float:
    """Largest deviation relative to the largest entry expected."""
    assert got.shape == expected.shape
    return float((got - expected).abs().max() / expected.abs().max())


@pytest.fixture(scope="session")
def relative() -> Callable[[Tensor, Tensor], float]:
    return relative_error
