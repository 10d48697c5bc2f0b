"""Time of one training step: IVON here, torch's fused AdamW, and ivon-opt, measured alternately in one run.

``python benchmarks/ivon_step.py`` prints a table, ``--json`` one JSON object (times are medians in milliseconds).
A step is zero_grad, sample, forward, backward and update. ivon-opt is left out (null) when it is not installed.
"""

from __future__ import annotations

import argparse
import json
import statistics
import sys
import time
from collections.abc import Callable
from pathlib import Path

import torch
from torch import Tensor, nn

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))

from bayesfed.problem.models.cnn import CNNAcar, CNNZenke
from bayesfed.seeding import torch_generator
from clients.optim import IVON


def mlp() -> tuple[nn.Module, tuple[int, ...]]:
    """784-200-100-10 with sigmoids: 178,110 parameters."""
    layers = [nn.Linear(784, 200), nn.Sigmoid(), nn.Linear(200, 100), nn.Sigmoid(), nn.Linear(100, 10)]
    return nn.Sequential(*layers), (784,)


def cnn() -> tuple[nn.Module, tuple[int, ...]]:
    """A small convolutional net for 32x32 colour images."""
    layers = [nn.Conv2d(3, 32, 3), nn.ReLU(), nn.MaxPool2d(2), nn.Conv2d(32, 64, 3), nn.ReLU(), nn.MaxPool2d(2)]
    return nn.Sequential(*layers, nn.Flatten(), nn.Linear(2304, 128), nn.ReLU(), nn.Linear(128, 10)), (3, 32, 32)


def cnn_zenke() -> tuple[nn.Module, tuple[int, ...]]:
    """``model=cnn_zenke``: 1,250,858 parameters."""
    return CNNZenke((3, 32, 32), 10), (3, 32, 32)


def cnn_acar() -> tuple[nn.Module, tuple[int, ...]]:
    """``model=cnn_acar``: 797,962 parameters."""
    return CNNAcar((3, 32, 32), 10), (3, 32, 32)


MODELS = {"mlp": mlp, "cnn": cnn, "cnn_zenke": cnn_zenke, "cnn_acar": cnn_acar}
TURN = 10  # consecutive steps: enough for a learner to have the caches to itself, as in training


def learners() -> dict[str, Callable[[list[nn.Parameter]], torch.optim.Optimizer]]:
    """How to build each optimizer from a model's parameters."""
    found: dict[str, Callable[[list[nn.Parameter]], torch.optim.Optimizer]] = {
        "ivon": lambda params: IVON(params, lr=0.1, ess=60_000),
        "ivon_antithetic": lambda params: IVON(params, lr=0.1, ess=60_000, antithetic=True),
        "adamw_fused": lambda params: torch.optim.AdamW(params, lr=1e-3, fused=True),
    }
    try:
        import ivon
    except ImportError:
        ivon = None
    if ivon is None:
        return found
    found["ivon_opt"] = lambda params: ivon.IVON(params, lr=0.1, ess=60_000)
    return found


def steps(model_name: str, make: Callable, batch: int) -> tuple[Callable[[], None], int]:  # type: ignore[type-arg]
    """A function that does one training step, and the number of parameters it trains."""
    with torch.random.fork_rng():
        torch.manual_seed(0)
        model, shape = MODELS[model_name]()
    generator = torch_generator(0, "data")
    x = torch.randn(batch, *shape, generator=generator)
    y = torch.randint(10, (batch,), generator=generator)
    optimizer = make(list(model.parameters()))
    step = training_step(model, optimizer, x, y)
    return step, sum(p.numel() for p in model.parameters())


def training_step(model: nn.Module, optimizer: torch.optim.Optimizer, x: Tensor, y: Tensor) -> Callable[[], None]:
    """A step on one batch: at a sample of the posterior where the optimizer has one."""
    sampled = getattr(optimizer, "sampled_params", None)

    def step() -> None:
        optimizer.zero_grad()
        if sampled is None:
            nn.functional.cross_entropy(model(x), y).backward()
        else:
            with sampled(train=True):
                nn.functional.cross_entropy(model(x), y).backward()
        optimizer.step()

    return step


def measure(model: str, batch: int, threads: int, repeats: int) -> dict[str, object]:
    """Median milliseconds of each learner's step, ``TURN`` steps of each in turn, and their ratios."""
    torch.set_num_threads(threads)
    made = {name: steps(model, make, batch) for name, make in learners().items()}
    times: dict[str, list[float]] = {name: [] for name in made}
    for turn in range(repeats // TURN + 2):
        for name, (step, _) in made.items():
            for _ in range(TURN):
                start = time.perf_counter()
                step()
                if turn >= 2:
                    times[name].append(time.perf_counter() - start)
    ms = {name: 1e3 * statistics.median(values) for name, values in times.items()}
    other = ms.get("ivon_opt")
    return {
        "ivon_ms": round(ms["ivon"], 4),
        "adamw_fused_ms": round(ms["adamw_fused"], 4),
        "ivon_opt_ms": None if other is None else round(other, 4),
        "ivon_over_adamw": round(ms["ivon"] / ms["adamw_fused"], 3),
        "ivon_opt_over_ivon": None if other is None else round(other / ms["ivon"], 3),
        "ivon_antithetic_ms": round(ms["ivon_antithetic"], 4),
        "model": model,
        "parameters": made["ivon"][1],
        "batch": batch,
        "threads": threads,
        "repeats": repeats,
        "torch": torch.__version__,
    }


def main() -> None:
    """Parse the command line, measure, print."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--json", action="store_true", help="print one JSON object")
    parser.add_argument("--model", choices=sorted(MODELS), default="mlp")
    parser.add_argument("--batch", type=int, default=32)
    parser.add_argument("--threads", type=int, default=1)
    parser.add_argument("--repeats", type=int, default=400)
    args = parser.parse_args()
    result = measure(args.model, args.batch, args.threads, args.repeats)
    if args.json:
        print(json.dumps(result))
        return
    for key, value in result.items():
        print(f"{key:<20} {value}")


if __name__ == "__main__":
    main()
