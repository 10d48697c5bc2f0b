"""Rounds and seconds to the pooled posterior with full covariances: client=srvon against client=von.

``python benchmarks/srvn_federated.py --json``. Linear-Gaussian: ``experiment=linreg``. Logistic: Breast cancer Wisconsin, standardised,
4 clients, sorted by the first feature so that they differ. BayesADMM with rho = 1/K, damping 1, prior N(0, I), delta method;
the pooled (Laplace) posterior is computed by Newton's method. Error: largest deviation of mean and precision relative to their
largest entry.
"""

from __future__ import annotations

import argparse
import json
import sys
import tempfile
from pathlib import Path

import numpy as np
import torch
from sklearn.datasets import load_breast_cancer
from torch import Tensor

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))

import bayesfed

QUIET = ["display=false", "figures=false", "eval.samples=2", "dtype=float64"]
CLIENTS = {
    "von": ["client=von", "client.epochs=15", "client.mc_samples=0", "client.local_schedule=constant"],
    "srvon": ["client=srvon", "client.epochs=15", "client.curvature=hessian", "client.mc_samples=0"],
}


def wdbc(folder: Path) -> tuple[Tensor, Tensor, list[str]]:
    """Inputs, labels, and the overrides that make the federation of them."""
    x, y = load_breast_cancer(return_X_y=True)
    x = (x - x.mean(0)) / x.std(0)
    client = np.empty(len(x), dtype=int)
    client[x[:, 0].argsort()] = np.arange(len(x)) * 4 // len(x)
    np.savez(folder / "wdbc.npz", x=x, y=y, client=client, x_test=x, y_test=y)
    overrides = [
        "data=npz", f"data.path={folder / 'wdbc.npz'}", "data.scaling=raw", "model=linear", "likelihood=categorical",
        "strategy=bayes_admm", "strategy.family=full", "strategy.rho=0.25", "strategy.damping=1.0", "strategy.prior_precision=1.0",
        "strategy.temperature=1.0",
    ]  # fmt: skip
    return torch.from_numpy(x), torch.from_numpy(y), overrides


def laplace(x: Tensor, y: Tensor) -> tuple[Tensor, Tensor]:
    """Mode and Hessian of the softmax regression's posterior with prior N(0, I): weights (2, D), then biases (2,)."""
    inputs = x.shape[1]

    def loss(theta: Tensor) -> Tensor:
        logits = x @ theta[: 2 * inputs].view(2, inputs).T + theta[2 * inputs :]
        return torch.nn.functional.cross_entropy(logits, y, reduction="sum") + 0.5 * theta.square().sum()

    theta = torch.zeros(2 * inputs + 2, dtype=torch.float64)
    for _ in range(30):
        theta = theta - torch.linalg.solve(torch.func.hessian(loss)(theta), torch.func.grad(loss)(theta))
    return theta, torch.func.hessian(loss)(theta)


def error(posterior: object, mean: Tensor, precision: Tensor) -> float:
    """The larger of the relative errors of mean and precision."""
    pairs = ((posterior.mean, mean), (posterior.precision, precision))
    return max(float((got - want).abs().max() / want.abs().max()) for got, want in pairs)


def measure(rounds: int) -> dict[str, dict[str, dict[str, object]]]:
    """By problem and client: the error after each round, and seconds a round."""
    table: dict[str, dict[str, dict[str, object]]] = {"linear-Gaussian": {}, "logistic": {}}
    with tempfile.TemporaryDirectory() as made:
        folder = Path(made)

        linear = ["experiment=linreg"]
        exact = bayesfed.run(
            [*linear, "client=exact", "rounds=1", *QUIET, f"hydra.run.dir={folder / 'exact'}"]
        ).posterior
        x, y, logistic = wdbc(folder)
        problems = {"linear-Gaussian": (linear, exact.mean, exact.precision), "logistic": (logistic, *laplace(x, y))}
        for title, (overrides, mean, precision) in problems.items():
            for name, client in CLIENTS.items():
                errors, seconds = [], 0.0
                for count in range(1, rounds + 1):
                    where = f"{title}-{name}"
                    more = (
                        [f"resume={folder / where}"]
                        if count > 1
                        else [*overrides, *client, *QUIET, f"hydra.run.dir={folder / where}"]
                    )
                    result = bayesfed.run([*more, f"rounds={count}"])
                    errors.append(float(f"{error(result.posterior, mean, precision):.1e}"))
                    seconds = result.summary["seconds/total"] / count
                table[title][name] = {"error_after_round": errors, "seconds_per_round": round(seconds, 2)}
    return table


def main() -> None:
    """Parse the command line, measure, print."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--rounds", type=int, default=5)
    parser.add_argument("--json", action="store_true", help="print one JSON object")
    args = parser.parse_args()
    table = measure(args.rounds)
    if args.json:
        print(json.dumps(table))
        return
    for title, rows in table.items():
        for name, row in rows.items():
            print(title, name, row)


if __name__ == "__main__":
    main()
