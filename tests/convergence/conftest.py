"""The federations of quadratic clients of ``tests/exactness``, for methods with any handler."""

from __future__ import annotations

import importlib.util
import sys
from collections.abc import Callable
from pathlib import Path

import pytest
import torch
from flwr.clientapp import ClientApp
from torch import Tensor

from bayesfed.federation.client.handler import Trainer
from strategies import FederatedStrategy


def _exactness():
    """``tests/exactness/conftest.py`` as a module of its own name (tests are no package)."""
    name = "bayesfed_exactness"
    if name not in sys.modules:
        path = Path(__file__).parents[1] / "exactness" / "conftest.py"
        spec = importlib.util.spec_from_file_location(name, path)
        assert spec is not None
        assert spec.loader is not None
        sys.modules[name] = module = importlib.util.module_from_spec(spec)
        spec.loader.exec_module(module)
    return sys.modules[name]


exactness = _exactness()
_quick_exact_solver = exactness._quick_exact_solver
quadratics = exactness.quadratics
relative = exactness.relative


class Federation(exactness.Federation):
    """As there; ``trainer_class`` is the method's handler, and the server may start anywhere."""

    def __init__(self, *args, handler: type[Trainer] = Trainer, start: Tensor | None = None, **options):
        self.handler, self.start = handler, start
        super().__init__(*args, **options)

    def __post_init__(self) -> None:
        super().__post_init__()
        if type(self.trainer) is not self.handler:
            self.trainer = self.handler(
                name=self.strategy.name, family=self.strategy.family, solver=self.solver, problem=self.problem,
                sites=self.sites, seed=self.seed, dtype=self.dtype, device=torch.device("cpu"), wire_format=self.wire,
            )  # fmt: skip
            app = ClientApp()
            app.train()(self.trainer.train)
            app.query()(self.trainer.query)
            self.grid = exactness.RecordingGrid(app, len(self.problem.clients), lambda reply: self.intercept(reply))
        if self.start is not None:
            self.strategy.posterior.mean = self.start.clone()

    @property
    def means(self) -> list[Tensor]:
        return [q.mean for q in self.posteriors]


@pytest.fixture(scope="session")
def federate() -> Callable[..., Federation]:
    """``federate(data, strategy, rounds, handler=..., solver=..., start=...)``, after that many rounds."""

    def make(data, strategy: FederatedStrategy, rounds: int, **options) -> Federation:
        return Federation(data.problem(), strategy, **options).run(rounds)

    return make


@pytest.fixture(scope="session")
def convex() -> Callable[..., object]:
    """``convex(seed, clients, dim)``: random clients of unequal sizes whose *mean* losses have curvatures in 1..3, so that rates don't hang on luck."""

    def make(seed: int, clients: int, dim: int):
        g = torch.Generator().manual_seed(seed)
        inputs, targets = [], []
        for _ in range(clients):
            rows = int(torch.randint(dim, 4 * dim, (), generator=g))
            directions, _ = torch.linalg.qr(torch.randn(rows, dim, generator=g, dtype=torch.float64))
            rotation, _ = torch.linalg.qr(torch.randn(dim, dim, generator=g, dtype=torch.float64))
            scale = (1 + 2 * torch.rand(dim, generator=g, dtype=torch.float64)).sqrt()
            inputs.append(rows**0.5 * directions * scale @ rotation)
            slope = 2 * torch.randn(dim, generator=g, dtype=torch.float64)
            targets.append(inputs[-1] @ slope + torch.randn(rows, generator=g, dtype=torch.float64))
        return exactness.Quadratics(inputs, targets)

    return make


def pooled(data) -> Tensor:
    """The minimum of ``sum_k l_k``, without a prior."""
    curvature = sum(data.curvature(k) for k in range(len(data)))
    return torch.linalg.solve(curvature, sum(data.pull(k) for k in range(len(data))))


@pytest.fixture(scope="session")
def optimum() -> Callable[..., Tensor]:
    return pooled
