"""A small quadratic problem: linear regression, five clients, float64."""

from pathlib import Path
from typing import Any

import pytest
import torch
import yaml

from bayesfed.federation.client.handler import Trainer
from bayesfed.federation.local import LocalProblem, LocalSolution, Solver
from bayesfed.problem import Problem
from bayesfed.problem.build import build_problem
from bayesfed.wire.flower_version import node_context, set_identity
from clients.exact import ExactSolver

CONF = Path(__file__).resolve().parents[2] / "conf"


@pytest.fixture(scope="session")
def quadratic() -> Problem:
    def group(kind: str, name: str, **values: Any) -> dict[str, Any]:
        return yaml.safe_load((CONF / kind / f"{name}.yaml").read_text()) | values

    config = {
        "data": group("data", "linreg", num_clients=5, num_features=3, examples_per_client=20),
        "partition": group("partition", "natural_id"),
        "model": group("model", "linear"),
        "likelihood": group("likelihood", "gaussian", precision=4.0),
    }
    return build_problem(config, 1, 0.0)


@pytest.fixture
def trainer(quadratic):
    """``trainer(sites, family="diagonal", solver=ExactSolver(), name="bayes_admm", wire="full")``."""

    def make(sites, family: str = "diagonal", solver=None, name: str = "bayes_admm", wire: str = "full") -> Trainer:
        return Trainer(
            name=name,
            family=family,
            solver=solver or ExactSolver(),
            problem=quadratic,
            sites=sites,
            seed=1,
            dtype=torch.float64,
            device=torch.device("cpu"),
            wire_format=wire,
        )

    return make


@pytest.fixture
def context():
    set_identity()
    return lambda client: node_context(client + 1, client, 5)


class Remembering(Solver):
    """Counts its calls in the memory it is handed back."""

    families = frozenset({"diagonal"})
    keep_momentum = True

    def solve(self, problem: LocalProblem) -> LocalSolution:
        count = problem.memory.get("count", torch.zeros(())) + 1
        return LocalSolution(problem.server, {"loss": 0.0, "count": float(count)}, {"count": count})


@pytest.fixture
def remembering() -> Remembering:
    return Remembering()
