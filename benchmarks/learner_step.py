"""What a training step of each learner costs beside fused AdamW's, and SR-VN's pure step beside VON's by dimension.

``python benchmarks/learner_step.py --json``. CPU time, medians over alternating turns in one process, one thread. Steps
include forward and backward of a 784-200-100-10 network, batch 32; the pure steps are given gradient and Hessian.
"""

from __future__ import annotations

import argparse
import json
import statistics
import sys
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
from torch import nn

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))

from bayesfed.seeding import torch_generator
from benchmarks.ivon_step import steps
from clients.gaussian_steps import METHODS
from clients.optim import IVON, SRVN

LEARNERS: dict[str, Callable[[list[nn.Parameter]], torch.optim.Optimizer]] = {
    "adamw": lambda params: torch.optim.AdamW(params, lr=1e-3, fused=True),
    "adam": lambda params: torch.optim.Adam(params, lr=1e-3, fused=True),
    "sgd": lambda params: torch.optim.SGD(params, lr=1e-3),
    "ivon": lambda params: IVON(params, lr=0.02, ess=60_000),
    "srvon, diagonal": lambda params: SRVN(
        params, lr=0.01, ess=60_000, lr_covariance=1e-3, beta1=0.9, min_precision=0.1, noise="quantile"
    ),
}
PURE = ("SR-VN", "VON", "VON, safe", "forward-backward")


def pure_step(name: str, dim: int) -> Callable[[], None]:
    """A method's step from a random state."""
    root = torch.randn(dim, dim, generator=torch_generator(0, "root"), dtype=torch.float64) / dim**0.5
    hessian = root @ root.mT + torch.eye(dim, dtype=torch.float64)
    mean, method = torch.zeros(dim, dtype=torch.float64), METHODS[name]
    state = method.start(0.5 * torch.eye(dim, dtype=torch.float64))
    return lambda: (method.step(mean, state, mean, hessian, 0.01), None)[1]


def medians(steps: dict[str, Callable[[], None]], turns: int, at_once: int = 10) -> dict[str, float]:
    """Milliseconds of CPU time: one thread, and robust on a shared machine."""
    times: dict[str, list[float]] = {name: [] for name in steps}
    for turn in range(turns + 2):
        for name, step in steps.items():
            for _ in range(at_once):
                started = time.process_time()
                step()
                if turn >= 2:
                    times[name].append(1e3 * (time.process_time() - started))
    return {name: statistics.median(values) for name, values in times.items()}


def main() -> None:
    """Parse the command line, measure, print."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--json", action="store_true", help="print one JSON object")
    parser.add_argument("--turns", type=int, default=40)
    args = parser.parse_args()
    torch.set_num_threads(1)
    nets = medians({name: steps("mlp", make, 32)[0] for name, make in LEARNERS.items()}, args.turns)
    result: dict[str, dict[Any, Any]] = {
        "milliseconds": {name: round(ms, 3) for name, ms in nets.items()},
        "over_adamw": {name: round(ms / nets["adamw"], 2) for name, ms in nets.items()},
        "pure_ms": {
            dim: {
                n: round(ms, 3)
                for n, ms in medians({n: pure_step(n, dim) for n in PURE}, max(1, args.turns // 8), 5).items()
            }
            for dim in (10, 50, 200, 500)
        },
    }
    if args.json:
        print(json.dumps(result))
        return
    for title, rows in result.items():
        print(title)
        for name, row in rows.items():
            print(f"  {name!s:<18} {row}")


if __name__ == "__main__":
    main()
