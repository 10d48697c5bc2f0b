"""The federations of quadratic clients of ``tests/exactness``, for any method."""

from __future__ import annotations

import importlib.util
import sys
from collections.abc import Callable
from pathlib import Path

import pytest
import torch
from torch import Tensor

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
    """As there; the server may start anywhere."""

    def __init__(self, *args, start: Tensor | None = None, **options):
        super().__init__(*args, **options)
        if start is not None:
            self.strategy.posterior.mean = start.clone()

    @property
    def means(self) -> list[Tensor]:
        return [q.mean for q in self.posteriors]


@pytest.fixture(scope="session")
def federate() -> Callable[..., Federation]:
    """``federate(data, strategy, rounds, solver=..., start=...)``, after that many rounds."""

    def make(data, strategy: FederatedStrategy, rounds: int, **options) -> Federation:
        return Federation(data.problem(), strategy, **options).run(rounds)

    return make


@pytest.fixture(scope="session")
def convex() -> Callable[..., object]:
    """``convex(seed, clients, dim)``: random clients of unequal sizes whose *mean* losses have curvatures in 1..3, so
    that rates don't hang on luck.
    """

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
