"""Bayesian logistic regression: SR-VN against other geometries on the same exact gradients, scikit-learn's real data.

``python benchmarks/srvn_logistic.py --json --out srvn.png``. All methods start at N(0, c^2 I) with c^2 the inverse of a
bound on the curvature, get expectations by quadrature, and the step size from 2^-k, k = 0 ... 12, that is best after
``--steps`` steps; those that break down drop out. "SR-VN, controlled" has step size 1, 1/2 or 1/4, shortened by the
control that the optimizer and client=srvon have. A gap is KL(q || posterior) less that of the best Gaussian (SR-VN
after 200 steps of 1/4), in nats.
"""

from __future__ import annotations

import argparse
import json
import math
import sys
import time
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch
from matplotlib.figure import Figure
from sklearn import datasets
from torch import Tensor

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))

from benchmarks.results_file import keep, kept
from clients.gaussian_steps import METHODS
from clients.logistic import LogisticPosterior
from clients.srvn.step import srvn_step, step_limit, whiten

CONTROLLED = "SR-VN, controlled"
STYLES = {
    CONTROLLED: ("#D55E00", "-"), "SR-VN": ("#D55E00", "--"), "VON": ("#0072B2", "-"), "VON, safe": ("#0072B2", "--"),
    "local parameters": ("#56B4E9", "-"), "Lie group": ("#56B4E9", "--"), "Euclidean": ("#555555", "-"),
    "Bures-Wasserstein": ("#009E73", "-"), "forward-backward": ("#009E73", "--"),
}  # fmt: skip
FLOOR = 1e-7  # of gaps in the picture: what quadrature and reference resolve


def wdbc() -> tuple[np.ndarray, np.ndarray]:
    """Breast cancer Wisconsin (diagnostic), 569 x 30."""
    return datasets.load_breast_cancer(return_X_y=True)


def wine() -> tuple[np.ndarray, np.ndarray]:
    """Wine, cultivar 1 against the others, 178 x 13."""
    x, y = datasets.load_wine(return_X_y=True)
    return x, y == 1


def digits() -> tuple[np.ndarray, np.ndarray]:
    """Digits 3 against 8, 357 x 64."""
    x, y = datasets.load_digits(return_X_y=True)
    rows = (y == 3) | (y == 8)
    return x[rows], y[rows] == 8


DATA: dict[str, Callable[[], tuple[np.ndarray, np.ndarray]]] = {"wdbc": wdbc, "wine": wine, "digits 3/8": digits}


def posterior_of(name: str) -> LogisticPosterior:
    """Standardised inputs and a bias, prior N(0, I)."""
    x, y = DATA[name]()
    x = (x - x.mean(0)) / np.maximum(x.std(0), 1e-12)
    design = torch.from_numpy(np.hstack([x, np.ones((len(x), 1))]))
    return LogisticPosterior(design, torch.from_numpy(np.where(y, 1.0, -1.0)))


@dataclass
class Run:
    """Objective after each step (inf from a breakdown on) and seconds a step."""

    values: list[float]
    seconds: float
    step_size: float

    def gaps(self, best: float) -> list[float]:
        """Nats above the best Gaussian."""
        return [max(value - best, 0.0) for value in self.values]


def follow(target: LogisticPosterior, name: str, step_size: float, steps: int, every: int = 1) -> Run:
    """A method from the common start; the objective every so many steps."""
    dim = target.signed.shape[1]
    curvature = 0.25 * target.signed.T @ target.signed
    scale = float(torch.linalg.eigvalsh(curvature)[-1] + target.prior_precision) ** -0.5
    mean, factor = torch.zeros(dim, dtype=torch.float64), scale * torch.eye(dim, dtype=torch.float64)
    method = METHODS["SR-VN" if name == CONTROLLED else name]
    state, values, spent = method.start(factor), [float(target.objective(mean, factor))], 0.0
    try:
        for number in range(1, steps + 1):
            gradient, hessian = target.expectations(mean, factor)
            started = time.process_time()
            mean, state = _step(method.step, name, mean, state, gradient, hessian, step_size)
            spent += time.process_time() - started
            factor = method.factor(state)
            if number % every == 0:
                values.append(float(target.objective(mean, factor)))
            if not math.isfinite(values[-1]) or values[-1] > 1e6:
                raise ValueError("diverged")
    except (ValueError, RuntimeError):
        values += [math.inf] * (steps // every + 1 - len(values))
        values[-1] = math.inf
    return Run(values, spent / steps, step_size)


def _step(
    step: Callable[..., tuple[Tensor, Tensor]],
    name: str,
    mean: Tensor,
    state: Tensor,
    gradient: Tensor,
    hessian: Tensor,
    size: float,
) -> tuple[Tensor, Tensor]:
    if name == CONTROLLED:
        size = min(size, float(step_limit(whiten(state, hessian))))
        return srvn_step(mean, state, gradient, hessian, size)
    return step(mean, state, gradient, hessian, size)


def best_run(target: LogisticPosterior, name: str, steps: int) -> Run:
    """The run with the lowest final objective over step sizes."""
    sizes = [2.0**-k for k in range(3 if name == CONTROLLED else 13)]
    tried = {size: follow(target, name, size, steps, every=steps).values[-1] for size in sizes}
    return follow(target, name, min(tried, key=tried.__getitem__), steps)


def first_below(gaps: list[float], level: float) -> int | None:
    """Steps until the gap stays below the level."""
    above = [i for i, gap in enumerate(gaps) if not gap < level]
    return None if above and above[-1] == len(gaps) - 1 else (above[-1] + 1 if above else 0)


def measure(steps: int, only: list[str], results: dict[str, Any], save: Path | None) -> None:
    """Add to ``results``, by data set and method: the table's numbers, and the gaps along the way. What is there
    stays.
    """
    for data in only:
        rows = results.setdefault(data, {})
        target = posterior_of(data)
        if set(STYLES) <= set(rows):
            continue
        best = follow(target, "SR-VN", 0.25, 200, every=200).values[-1]
        for name in (name for name in STYLES if name not in rows):
            run = best_run(target, name, steps)
            gaps = [gap if math.isfinite(gap) else None for gap in run.gaps(best)]
            rows[name] = {
                "step_size": run.step_size,
                "gap": gaps[-1],
                "steps_to_1e-2": first_below(run.gaps(best), 1e-2),
                "steps_to_1e-6": first_below(run.gaps(best), 1e-6),
                "ms_per_step": round(1e3 * run.seconds, 3),
                "gaps": [gap if gap is None else float(f"{gap:.3g}") for gap in gaps],
            }
            keep(save, results)


def draw(results: dict[str, Any], path: Path) -> None:
    """Gaps against steps, one panel a data set."""
    figure = Figure(figsize=(11, 3.9), layout="constrained")
    panels = np.atleast_1d(figure.subplots(1, len(results), sharey=True))
    for axes, (data, runs) in zip(panels, results.items(), strict=True):
        for name, row in runs.items():
            gaps = [math.nan if gap is None else gap for gap in row["gaps"]]
            colour, line = STYLES[name]
            axes.plot(range(len(gaps)), np.maximum(gaps, FLOOR), line, color=colour, label=name, linewidth=1.6)
        dim = posterior_of(data).signed.shape
        axes.set(
            xscale="symlog", yscale="log", xlabel="steps", ylim=(FLOOR, 1e4), title=f"{data}  ({dim[0]} x {dim[1]})"
        )
        axes.set_xticks([0, 1, 10, 100], ["0", "1", "10", "100"])
        axes.set_xlim(0, len(gaps) - 1)
        axes.grid(alpha=0.25)
        axes.spines[["top", "right"]].set_visible(False)
    panels[0].set_ylabel("nats above the best Gaussian")
    handles, labels = panels[0].get_legend_handles_labels()
    figure.legend(handles, labels, loc="outside right center", frameon=False, fontsize=9)
    figure.savefig(path, dpi=150, metadata={"Software": None})


def main() -> None:
    """Parse the command line, measure, print and draw."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--steps", type=int, default=100)
    parser.add_argument("--only", choices=list(DATA), nargs="+", default=list(DATA), help="data sets to measure")
    parser.add_argument("--save", type=Path, help="JSON to keep results in; what is in it is not measured again")
    parser.add_argument("--json", action="store_true", help="print one JSON object")
    parser.add_argument("--out", type=Path, help="PNG to draw")
    args = parser.parse_args()
    torch.set_num_threads(1)
    results = kept(args.save)
    measure(args.steps, args.only, results, args.save)
    if args.out:
        draw(results, args.out)
    if args.json:
        print(json.dumps(results))
        return
    for data, rows in results.items():
        print(data)
        for name, row in rows.items():
            print(f"  {name:<20}", *(f"{key}={value}" for key, value in row.items() if key != "gaps"))


if __name__ == "__main__":
    main()
