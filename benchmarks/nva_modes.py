"""How many maxima are found: NVA against CMA-ES restarts and multi-start gradient ascent, on three functions.

``python benchmarks/nva_modes.py --json --out nva.png``. Every method gets K starts in the same box (NVA: K components);
an evaluation is one value of the function (a gradient counts as one more, a Hessian as d more). CMA-ES needs `pip
install cma`.
"""

from __future__ import annotations

import argparse
import json
import math
import statistics
import sys
import time
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch
from matplotlib.axes import Axes
from matplotlib.figure import Figure
from matplotlib.patches import Ellipse
from torch import Tensor

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))

from bayesfed.seeding import numpy_generator, torch_generator
from benchmarks.results_file import keep, kept
from clients.optim import nva

RADIUS = 0.1  # a maximum counts as found within it
DTYPE = torch.float64


def triangle(x: Tensor) -> Tensor:
    """Log density of three Gaussians on a triangle whose mixture has four modes, the centre 0.0004 lower."""
    centres = torch.tensor([[0, 1], [math.cos(math.pi / 6), -0.5], [-math.cos(math.pi / 6), -0.5]], dtype=x.dtype)
    squares = (x[:, None] - centres).square().sum(-1)
    return torch.logsumexp(-0.5 * squares / 0.54, 1) - math.log(3 * 2 * math.pi * 0.54)


def himmelblau(x: Tensor) -> Tensor:
    """Four equal maxima."""
    return -((x[:, 0] ** 2 + x[:, 1] - 11) ** 2) - (x[:, 0] + x[:, 1] ** 2 - 7) ** 2


def camel(x: Tensor) -> Tensor:
    """Six-hump camel: two global maxima among six."""
    a, b = x[:, 0] ** 2, x[:, 1] ** 2
    return -(4 - 2.1 * a + a**2 / 3) * a - x[:, 0] * x[:, 1] + (4 - 4 * b) * b


@dataclass(frozen=True)
class Case:
    """A function, its maxima, the box of starts, the number of starts, and NVA's settings by estimator."""

    function: Callable[[Tensor], Tensor]
    maxima: list[list[float]]
    box: float
    starts: int
    steps: int
    hessian: dict[str, float]
    hessian_steps: int


CASES = {
    "triangle": Case(
        triangle,
        [[0, 0.5109], [0.4424, -0.2554], [-0.4424, -0.2554], [0, 0]],
        2.0,
        8,
        3000,
        {"step_size": 0.02, "temperature": 1.0},
        1500,
    ),
    "Himmelblau": Case(
        himmelblau,
        [[3, 2], [-2.805118, 3.131312], [-3.779310, -3.283186], [3.584428, -1.848126]],
        5.0,
        12,
        3000,
        {"step_size": 0.01, "temperature": 100.0},
        300,
    ),
    "six-hump camel": Case(
        camel,
        [[0.089842, -0.712656], [-0.089842, 0.712656]],
        2.0,
        8,
        3000,
        {"step_size": 0.02, "temperature": 5.0},
        300,
    ),
}


def by_nva(case: Case, seed: int, estimator: str, observer: Callable[..., None] | None = None) -> tuple[Tensor, int]:
    """Component means and evaluations."""
    hessian = estimator == "hessian"
    samples, steps = (4, case.hessian_steps) if hessian else (16, case.steps)
    options: dict[str, Any] = case.hessian if hessian else {}
    found = nva.maximize(
        case.function,
        2,
        case.starts,
        steps,
        seed,
        estimator,
        samples=samples,
        init_range=case.box,
        observer=observer,
        **options,
    )
    return found.means, steps * case.starts * samples * (4 if hessian else 1)


def starts(case: Case, seed: int) -> Tensor:
    """(K, 2), uniform in the box."""
    uniform = torch.rand(case.starts, 2, generator=torch_generator(seed, "starts"), dtype=DTYPE)
    return case.box * (2 * uniform - 1)


def by_gradient_ascent(case: Case, seed: int, steps: int = 200) -> tuple[Tensor, int]:
    """Ascent with halving and doubling step sizes from each start (Armijo)."""
    x, rate = starts(case, seed), torch.full((case.starts, 1), 0.1, dtype=DTYPE)
    evaluations = 0
    for _ in range(steps):
        x.requires_grad_()
        values = case.function(x)
        (gradient,) = torch.autograd.grad(values.sum(), x)
        x = x.detach()
        trial = x + rate * gradient
        better = case.function(trial) >= values.detach() + 1e-4 * rate[:, 0] * gradient.square().sum(1)
        x = torch.where(better[:, None], trial, x)
        rate = torch.where(better[:, None], 2 * rate, 0.5 * rate)
        evaluations += 3 * case.starts
    return x, evaluations


def by_cma(case: Case, seed: int) -> tuple[Tensor, int]:
    """CMA-ES from each start, sigma a quarter of the box."""
    import cma

    seeds = numpy_generator(seed, "cma").integers(1, 2**31, case.starts)
    found, evaluations = [], 0
    for start, own in zip(starts(case, seed).tolist(), seeds, strict=True):
        search = cma.CMAEvolutionStrategy(start, case.box / 2, {"seed": int(own), "verbose": -9, "tolx": 1e-6})
        while not search.stop():
            points = search.ask()
            search.tell(points, (-case.function(torch.from_numpy(np.array(points)))).tolist())
        found.append(search.result.xbest)
        evaluations += search.result.evaluations
    return torch.from_numpy(np.array(found)), evaluations


METHODS: dict[str, Callable[[Case, int], tuple[Tensor, int]]] = {
    "NVA, fitness-shaped": lambda case, seed: by_nva(case, seed, "fitness"),
    "NVA, derivatives": lambda case, seed: by_nva(case, seed, "hessian"),
    "CMA-ES, K restarts": by_cma,
    "gradient ascent, K starts": by_gradient_ascent,
}


def measure(seeds: int, only: list[str], results: dict[str, Any], save: Path | None) -> None:
    """Add to ``results``, by function and method: maxima found (mean over seeds and each), distance, evaluations,
    seconds.
    """
    for title, (name, method) in ((title, item) for title in only for item in METHODS.items()):
        rows, case = results.setdefault(title, {}), CASES[title]
        if name in rows:
            continue
        maxima = torch.tensor(case.maxima, dtype=DTYPE)
        found, near, evaluations, started = [], [], 0, time.process_time()
        try:
            for seed in range(seeds):
                places, evaluations = method(case, seed)
                distances = torch.cdist(maxima, places).amin(1)
                found.append(int((distances < RADIUS).sum()))
                near += distances[distances < RADIUS].tolist()
        except ImportError:
            continue
        rows[name] = {
            "found": round(statistics.mean(found), 2), "of": len(maxima), "each": found,
            "median_distance": float(f"{statistics.median(near):.2g}") if near else None,
            "evaluations": evaluations, "cpu_seconds": round((time.process_time() - started) / seeds, 2),
        }  # fmt: skip
        keep(save, results)


def draw(path: Path, seed: int = 0) -> None:
    """The components of the fitness-shaped runs on their way over the contours."""
    figure = Figure(figsize=(12, 4.9), layout="constrained")
    for axes, (title, case) in zip(figure.subplots(1, len(CASES)), CASES.items(), strict=True):
        path_of: list[Tensor] = []
        snapshots: dict[int, nva.Mixture] = {}
        last = case.steps + 2

        def watch(i: int, mixture: nva.Mixture, path_of=path_of, snapshots=snapshots, last=last) -> None:
            if i % 10 == 0 or i == last:
                path_of.append(mixture.means)
            if i in (2, last // 3, last):
                snapshots[i] = mixture

        by_nva(case, seed, "fitness", watch)
        _panel(axes, title, case, torch.stack(path_of), list(snapshots.values()))
    handles, labels = axes.get_legend_handles_labels()
    figure.legend(handles, labels, loc="outside lower center", ncols=5, frameon=False, fontsize=9)
    figure.savefig(path, dpi=150, metadata={"Software": None})


def _panel(axes: Axes, title: str, case: Case, paths: Tensor, snapshots: list[nva.Mixture]) -> None:
    half = case.box * 1.15
    axis = torch.linspace(-half, half, 200, dtype=DTYPE)
    grid = torch.cartesian_prod(axis, axis)
    heights = case.function(grid).view(200, 200).T
    levels = torch.quantile(heights.flatten(), torch.linspace(0.3, 0.999, 14, dtype=DTYPE)).unique()
    axes.contour(axis, axis, heights, levels=levels.tolist(), colors="#BBBBBB", linewidths=0.7, linestyles="solid")
    for k in range(paths.shape[1]):
        axes.plot(
            *paths[:, k].T,
            color="#0072B2",
            linewidth=1.2,
            alpha=0.8,
            label="paths of the components" if k == 0 else None,
        )
    axes.plot(*paths[0].T, "o", color="#0072B2", markersize=4, markerfacecolor="white", label="their starts")
    for mixture, alpha in zip(snapshots[1:2], (0.9,), strict=True):
        for mean, covariance in zip(mixture.means, mixture.covariances, strict=True):
            values, vectors = torch.linalg.eigh(covariance)
            angle = math.degrees(math.atan2(float(vectors[1, 1]), float(vectors[0, 1])))
            width, height = (2 * values.sqrt()).flip(0).tolist()
            axes.add_patch(
                Ellipse(mean.tolist(), width, height, angle=angle, fill=False, edgecolor="#E69F00", alpha=alpha)
            )
    axes.plot(
        [],
        [],
        "o",
        color="#E69F00",
        markerfacecolor="none",
        markersize=9,
        label="one standard deviation after a third of the steps",
    )
    axes.plot(*paths[-1].T, "o", color="#D55E00", markersize=6, label="where they end")
    axes.plot(*np.array(case.maxima).T, "x", color="black", markersize=8, markeredgewidth=1.6, label="global maxima")
    axes.set(xlim=(-half, half), ylim=(-half, half), aspect="equal", title=f"{title}, K = {case.starts}")
    axes.spines[["top", "right"]].set_visible(False)


def main() -> None:
    """Parse the command line, measure, print and draw."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--seeds", type=int, default=5)
    parser.add_argument("--only", choices=list(CASES), nargs="+", default=list(CASES), help="functions to measure")
    parser.add_argument("--save", type=Path, help="JSON to keep results in; what is in it is not measured again")
    parser.add_argument("--json", action="store_true", help="print one JSON object")
    parser.add_argument("--out", type=Path, help="PNG to draw")
    args = parser.parse_args()
    torch.set_num_threads(1)
    if args.out:
        draw(args.out)
    table = kept(args.save)
    if args.seeds:
        measure(args.seeds, args.only, table, args.save)
    if args.json:
        print(json.dumps(table))
        return
    for title, rows in table.items():
        print(title)
        for name, row in rows.items():
            print(f"  {name:<26}", *(f"{key}={value}" for key, value in row.items()))


if __name__ == "__main__":
    main()
