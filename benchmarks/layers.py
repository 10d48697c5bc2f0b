"""A training step with bayesfed's layers against torch's, in turns: forward, backward and SGD on one thread.

    python benchmarks/layers.py --json

``ratio`` is the median time with the layers of ``bayesfed/accelerate/layers.py`` over the median with torch's; ``low``
and ``high`` are the smallest and largest of the ratios of ``--blocks`` blocks of steps. ``linear`` is the median with
all of these layers over that with all but large linear ones, null where the model has none.
"""

from __future__ import annotations

import argparse
import copy
import json
import statistics
import sys
import time
from pathlib import Path

import torch
from torch import Tensor, nn

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))

from bayesfed import accelerate
from bayesfed.accelerate.layers import QuickLinear, quicken
from bayesfed.problem.models import CNNAcar, CNNZenke, ResNet20
from benchmarks.pfl_contestants.cnn import SimpleCNN

COLOUR, GREY = (3, 32, 32), (1, 28, 28)
CASES = [
    ("pfl's CNN", SimpleCNN, (32, 32, 3), 10),
    ("cnn_zenke", CNNZenke, COLOUR, 32),
    ("cnn_acar", CNNAcar, COLOUR, 32),
    ("resnet20", ResNet20, COLOUR, 32),
    ("cnn_zenke", CNNZenke, GREY, 32),
    ("cnn_acar", CNNAcar, GREY, 32),
]


def step(model: nn.Module, optimizer: torch.optim.Optimizer, x: Tensor, y: Tensor) -> float:
    """One step; its seconds."""
    started = time.perf_counter()
    optimizer.zero_grad()
    nn.functional.cross_entropy(model(x), y).backward()
    optimizer.step()
    return time.perf_counter() - started


def measure(
    kind: type[nn.Module], shape: tuple[int, ...], batch: int, blocks: int, steps: int
) -> dict[str, float | None]:
    """Blocks of steps with each in turn."""
    torch.manual_seed(1)
    plain = kind(shape, 10)
    quick, without = copy.deepcopy(plain), copy.deepcopy(plain)
    quicken(quick)
    quicken(without)
    linear: list[nn.Module] = [layer for layer in without.modules() if type(layer) is QuickLinear]
    for layer in linear:
        layer.__class__ = nn.Linear
    x, y = torch.randn(batch, *shape), torch.randint(0, 10, (batch,))
    models = [plain, quick, *([without] if linear else [])]
    runners = [(model, torch.optim.SGD(model.parameters(), lr=1e-3)) for model in models]
    times = [
        [statistics.median(step(*runner, x, y) for _ in range(steps)) for runner in runners] for _ in range(blocks + 1)
    ]
    ratios = [found[1] / found[0] for found in times[1:]]
    result: dict[str, float | None] = {"ratio": statistics.median(ratios), "low": min(ratios), "high": max(ratios)}
    return result | {"linear": statistics.median(found[1] / found[2] for found in times[1:]) if linear else None}


def main() -> None:
    """Measure and print."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--blocks", type=int, default=9, help="blocks of steps with each (default: 9)")
    parser.add_argument("--steps", type=int, default=8, help="steps in a block (default: 8)")
    parser.add_argument("--json", action="store_true", help="a JSON list instead of a table")
    args = parser.parse_args()
    torch.set_num_threads(1)
    accelerate.start("auto")
    rows = []
    for name, kind, shape, batch in CASES:
        measured = measure(kind, shape, batch, args.blocks, args.steps)
        found = {key: value if value is None else round(value, 3) for key, value in measured.items()}
        rows.append({"model": name, "input": list(shape), "batch": batch, **found})
        if not args.json:
            linear = "" if found["linear"] is None else f"; of that large linear layers {found['linear']:.2f}"
            print(f"{name:<10} {shape!s:<12} {found['ratio']:.2f} ({found['low']:.2f} to {found['high']:.2f}){linear}")
    if args.json:
        print(json.dumps(rows))


if __name__ == "__main__":
    main()
