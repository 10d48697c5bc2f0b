"""Rounds and seconds to the pooled posterior: client=srvon against client=von, full covariance, side by side in one
process.

``python benchmarks/srvn_federation.py --save docs/results/srvn_federation.json``. BayesADMM (rho = 1/K and no damping;
"damped": rho = 1, damping 0.3; prior N(0, I)) in float64 on linear-Gaussian clients and on logistic ones
(scikit-learn's data, standardised, with a bias, two outputs), delta method, so that the pooled Laplace posterior is the
fixed point. The learners take turns, round by round. Errors are the largest deviation of mean or precision, relative to
the largest entry. Seconds are processor time of whole rounds (clients, server and messages).
"""

from __future__ import annotations

import argparse
import sys
import time
from collections.abc import Callable
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import numpy as np
import torch
from flwr.clientapp import ClientApp
from torch import Tensor

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))

from bayesfed.engine.inline import InlineGrid
from bayesfed.federation.client.handler import Trainer
from bayesfed.federation.client.sites import MemorySites
from bayesfed.federation.local import Solver
from bayesfed.problem import Examples, Problem
from bayesfed.problem.likelihood import Categorical, Gaussian, Likelihood
from bayesfed.problem.scaling import Scaling
from bayesfed.seeding import torch_generator
from benchmarks.results_file import keep, kept
from benchmarks.srvn_logistic import DATA
from clients.srvn import SRVNSolver
from clients.von import VONSolver
from strategies import BayesADMM

LEVELS = (1e-2, 1e-6)
DAMPED: dict[str, Any] = {"rho": 1.0, "damping": 0.3}
SOLVERS: dict[str, Callable[[int, float], Solver]] = {
    "von": lambda steps, lr: VONSolver(lr=lr, lr_precision=lr, epochs=steps, mc_samples=0, local_schedule="constant"),
    "srvon": lambda steps, lr: SRVNSolver(lr=lr, epochs=steps, mc_samples=0),
}


@dataclass(frozen=True)
class Case:
    """A federation: inputs (N_k, d) and targets of every client, the likelihood, and BayesADMM's rho (None: 1/K) and
    damping.
    """

    inputs: list[Tensor]
    targets: list[Tensor]
    likelihood: Likelihood
    rho: float | None = None
    damping: float = 1.0

    @property
    def outputs(self) -> int:
        """1 for a regression, 2 classes otherwise."""
        return 1 if isinstance(self.likelihood, Gaussian) else 2

    def problem(self) -> Problem:
        """With a linear model without bias."""
        clients = [Examples(x, y) for x, y in zip(self.inputs, self.targets, strict=True)]
        return Problem(
            clients=clients,
            test=clients[0],
            evaluated_on="test",
            likelihood=self.likelihood,
            input_shape=(self.inputs[0].shape[1],),
            num_outputs=self.outputs,
            scaling=Scaling.identity(),
            num_classes=None if self.outputs == 1 else 2,
            label_counts=None,
            model={"_target_": "bayesfed.problem.models.Linear", "name": "linear", "bias": False},
            likelihood_config={"name": self.likelihood.name},
        )

    def pooled(self) -> tuple[Tensor, Tensor]:
        """Mode and Hessian of the pooled negative log posterior, by damped Newton steps; exact for the linear
        clients.
        """
        x, y = torch.cat(self.inputs), torch.cat(self.targets)

        def value(theta: Tensor) -> Tensor:
            outputs = x @ theta.view(self.outputs, -1).T
            return self.likelihood.loss(outputs, y) * len(x) + 0.5 * theta.square().sum()

        theta = torch.zeros(self.outputs * x.shape[1], dtype=torch.float64)
        for _ in range(100):
            gradient, hessian = torch.func.grad(value)(theta), torch.func.hessian(value)(theta)
            step, size = torch.linalg.solve(hessian, gradient), 1.0
            while value(theta - size * step) > value(theta) + 1e-12 and size > 1e-6:
                size /= 2
            theta = theta - size * step
        return theta, torch.func.hessian(value)(theta)


def linear(dim: int, clients: int = 5) -> Case:
    """Clients with other slopes and correlated inputs, 2 to 4 examples a dimension."""
    g, inputs, targets = torch_generator(50, "linear", dim), [], []
    for k in range(clients):
        mixing = torch.eye(dim).double() + 0.3 * torch.randn(dim, dim, generator=g, dtype=torch.float64)
        inputs.append(torch.randn((2 + k % 3) * dim, dim, generator=g, dtype=torch.float64) @ mixing)
        slope = torch.randn(dim, generator=g, dtype=torch.float64)
        noise = torch.randn(len(inputs[-1]), generator=g, dtype=torch.float64)
        targets.append((inputs[-1] @ slope + noise)[:, None])
    return Case(inputs, targets, Gaussian(1.0))


def logistic(name: str, clients: int, by_feature: bool) -> Case:
    """Data split evenly: at random, or in the order of the first feature."""
    x, y = DATA[name]()
    x = (x - x.mean(0)) / np.maximum(x.std(0), 1e-12)
    order = np.argsort(x[:, 0], kind="stable") if by_feature else np.random.default_rng(0).permutation(len(x))
    design = torch.from_numpy(np.hstack([x, np.ones((len(x), 1))]))[order]
    labels = torch.from_numpy(np.asarray(y, dtype=np.int64))[order]
    return Case(list(design.tensor_split(clients)), list(labels.tensor_split(clients)), Categorical())


CASES: dict[str, Callable[[], Case]] = {
    "linear, 5 clients, P = 20": lambda: linear(20),
    "linear, 5 clients, P = 100": lambda: linear(100),
    "wine at random, 3 clients, P = 28": lambda: logistic("wine", 3, False),
    "wine by feature": lambda: logistic("wine", 3, True),
    "wine by feature, damped": lambda: replace(logistic("wine", 3, True), **DAMPED),
    "wdbc at random, 5 clients, P = 62": lambda: logistic("wdbc", 5, False),
    "wdbc by feature": lambda: logistic("wdbc", 5, True),
    "wdbc by feature, damped": lambda: replace(logistic("wdbc", 5, True), **DAMPED),
}


class Federation:
    """The real strategy, handler and solver on in-process messages, one round at a time."""

    def __init__(self, case: Case, solver: Solver):
        count = len(case.inputs)
        self.strategy = BayesADMM(
            family="full", rho=case.rho or 1 / count, damping=case.damping, prior_precision=1.0, temperature=1.0
        )
        trainer = Trainer(
            name="bayes_admm", family="full", solver=solver, problem=case.problem(), sites=MemorySites(), seed=3,
            dtype=torch.float64, device=torch.device("cpu"),
        )  # fmt: skip
        app = ClientApp()
        app.train()(trainer.train)
        app.query()(trainer.query)
        self.grid = InlineGrid(app, count)
        self.strategy.setup(trainer.initial, count, 3)
        self.rounds, self.failed = 0, 0

    def round(self) -> float:
        """One more round; its processor time in seconds."""
        started = time.process_time()
        self.rounds += 1
        self.strategy.start(self.grid, num_rounds=self.rounds, first_round=self.rounds, callbacks=self)
        return time.process_time() - started

    def error(self, mean: Tensor, precision: Tensor) -> float:
        """Of the server's posterior."""
        q = self.strategy.posterior
        pairs = (q.mean, mean), (q.precision, precision)
        return max(float((got - wanted).abs().max() / wanted.abs().max()) for got, wanted in pairs)

    def begin_round(self, round: int, sampled: list[int]) -> None:
        pass

    def client_done(self, round: int, client: int, metrics: dict[str, float] | None, reason: str) -> None:
        self.failed += metrics is None

    def end_round(self, round: int, metrics: dict[str, float]) -> None:
        pass


def compare(case: Case, rounds: int, steps: int, lr: float = 1.0) -> dict[str, Any]:
    """Errors after, and seconds of, each round by learner; a learner that is at the finer level is done."""
    mean, precision = case.pooled()
    for build in SOLVERS.values():
        Federation(case, build(1, lr)).round()  # what only the first round of a process pays
    made = {name: Federation(case, build(steps, lr)) for name, build in SOLVERS.items()}
    rows: dict[str, dict[str, list[float]]] = {name: {"errors": [], "seconds": []} for name in made}
    for _ in range(rounds):
        for name, federation in made.items():
            errors = rows[name]["errors"]
            if errors and not LEVELS[-1] <= errors[-1] < 1e6:
                continue
            try:
                rows[name]["seconds"].append(round(federation.round(), 4))
                errors.append(float(f"{federation.error(mean, precision):.3g}"))
            except Exception as error:  # every client failed: the run ends here
                errors.append(float("inf"))
                print(f"{name}: {error}", file=sys.stderr)
    return rows


def reached(row: dict[str, list[float]], level: float) -> str:
    """ "rounds / seconds" to the level."""
    for number, error in enumerate(row["errors"], start=1):
        if error < level:
            return f"{number} / {sum(row['seconds'][:number]):.2f}"
    return "–"


def table(results: dict[str, Any]) -> str:
    """As Markdown."""
    lines = [
        "| federation | learner | to 1e-2: rounds / seconds | to 1e-6: rounds / seconds | error at the end "
        "| ms a round |",
        "|---|---|---|---|---|---|",
    ]
    for case, rows in results.items():
        for name, row in rows.items():
            pace = 1e3 * float(np.median(row["seconds"]))
            levels = " | ".join(reached(row, level) for level in LEVELS)
            lines.append(
                f"| {case} | {name} | {levels} | {row['errors'][-1]:.0e} ({len(row['errors'])}) | {pace:.0f} |"
            )
    return "\n".join(lines)


def main() -> None:
    """Parse the command line, measure and print."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--rounds", type=int, default=40)
    parser.add_argument("--steps", type=int, default=25, help="local steps a round")
    parser.add_argument("--lr", type=float, default=1.0)
    parser.add_argument("--only", nargs="+", choices=list(CASES), default=list(CASES))
    parser.add_argument("--save", type=Path, help="JSON to keep results in; what is in it is not measured again")
    args = parser.parse_args()
    torch.set_num_threads(1)
    results = kept(args.save)
    for name in args.only:
        if name not in results:
            results[name] = compare(CASES[name](), args.rounds, args.steps, args.lr)
            keep(args.save, results)
    print(table(results))


if __name__ == "__main__":
    main()
