"""Many clients side by side (``torch.vmap``) against one after the other, over the size of the model.

    python benchmarks/client_batching.py --json
    python benchmarks/client_batching.py --client adam --clients 8 16 32 --batch-size 10 --params 1000 10000

Both solve the same local problems, in turns, on one thread; each time is the median over turns of a round of all
clients, in seconds (of processor time on a CPU). Clients hold unequal numbers of examples (half to one and a half times
``--examples``); the model is a perceptron with one hidden layer, 64 inputs and 10 classes, of about ``--params``
parameters. Messages and sites are not part of it.
"""

from __future__ import annotations

import argparse
import json
import os
import statistics
import time
from collections.abc import Callable

os.environ.setdefault("OMP_NUM_THREADS", "1")

import torch

from bayesfed.families import DiagonalGaussian, PointMass
from bayesfed.federation.local import LocalProblem, Solver
from bayesfed.problem import Categorical, Examples
from bayesfed.problem.flat import FlatModel
from bayesfed.problem.models import MLP
from bayesfed.problem.scaling import Scaling
from bayesfed.seeding import torch_generator
from clients.ivon import IVONSolver
from clients.point import PointSolver
from clients.side_by_side import can_batch

INPUTS, CLASSES = 64, 10
PARAMS = (100, 1000, 3000, 10_000, 20_000, 50_000, 100_000, 200_000)


def solver_of(client: str, batch_size: int) -> Solver:
    """One epoch of IVON, Adam or SGD."""
    if client == "ivon":
        return IVONSolver(lr=0.01, epochs=1, batch_size=batch_size, hess_init=0.1)
    return PointSolver(optimizer=client, lr=0.01, epochs=1, batch_size=batch_size)


def problems_of(client: str, params: int, clients: int, examples: int, device: torch.device) -> list[LocalProblem]:
    """Local problems on random data with a model of about ``params`` parameters."""
    hidden = max(1, round((params - CLASSES) / (INPUTS + CLASSES + 1)))
    with torch.random.fork_rng():
        torch.manual_seed(0)
        model = FlatModel(MLP((INPUTS,), CLASSES, hidden=[hidden]), torch.float32, device)
    initial = model.vector.clone()
    server = PointMass(initial) if client != "ivon" else DiagonalGaussian(initial, torch.full_like(initial, 10.0))
    generator = torch_generator(1, "benchmark")
    sizes = torch.randint(max(1, examples // 2), examples + examples // 2 + 1, (clients,), generator=generator).tolist()
    x = torch.randn(sum(sizes), INPUTS, generator=generator)
    y = torch.randint(CLASSES, (sum(sizes),), generator=generator)
    scaling, likelihood = Scaling.identity(), Categorical()
    site = server.zero(initial.double()) if isinstance(server, DiagonalGaussian) else None
    return [
        LocalProblem(
            model=model,
            initial=initial,
            data=Examples(x, y, rows, scaling),
            likelihood=likelihood,
            server=server,
            site=site,
            rho=0.5,
            temperature=1.0,
            proximal=0.0,
            learn_precision=True,
            round=2,
            client=k,
            seed=1,
        )
        for k, rows in enumerate(torch.arange(len(x)).split(sizes))
    ]


def seconds(work: Callable[[], object], device: torch.device) -> float:
    """How long ``work`` takes; on a CPU its processor time, which other processes disturb less."""
    if device.type == "cpu":
        started = time.process_time()
        work()
        return time.process_time() - started
    started = time.perf_counter()
    work()
    torch.cuda.synchronize(device)
    return time.perf_counter() - started


def compare(solver: Solver, problems: list[LocalProblem], repeats: int) -> tuple[float, float]:
    """Median seconds of all clients one after the other, and side by side."""
    assert can_batch(problems)
    device, times = problems[0].device, ([], [])  # type: ignore[var-annotated]
    for turn in range(repeats + 1):
        for found, way in zip(times, (Solver.solve_many, type(solver).solve_many), strict=True):
            elapsed = seconds(lambda way=way: way(solver, problems), device)  # type: ignore[misc]
            if turn:  # the first warms up
                found.append(elapsed)
    return statistics.median(times[0]), statistics.median(times[1])


def main() -> None:
    """Measure and print."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--json", action="store_true", help="a JSON list instead of a table")
    parser.add_argument("--client", choices=("ivon", "adam", "adamw", "sgd"), default="ivon")
    parser.add_argument("--params", type=int, nargs="+", default=PARAMS, help="parameters of the models")
    parser.add_argument("--clients", type=int, nargs="+", default=(32,), help="clients side by side")
    parser.add_argument("--batch-size", type=int, nargs="+", default=(10, 32), help="examples per step")
    parser.add_argument("--examples", type=int, default=60, help="of a client, on average")
    parser.add_argument("--repeats", type=int, default=5)
    parser.add_argument("--device", default="cpu")
    args = parser.parse_args()
    torch.set_num_threads(1)
    device, results = torch.device(args.device), []
    for params in args.params:
        for clients in args.clients:
            for batch_size in args.batch_size:
                problems = problems_of(args.client, params, clients, args.examples, device)
                alone, together = compare(solver_of(args.client, batch_size), problems, args.repeats)
                results.append(
                    {
                        "client": args.client,
                        "params": problems[0].model.dim,
                        "clients": clients,
                        "batch_size": batch_size,
                        "one_by_one_s": round(alone, 6),
                        "batched_s": round(together, 6),
                        "speedup": round(alone / together, 2),
                    }
                )
                if not args.json:
                    row = results[-1]
                    print("  ".join(f"{key} {value:>9}" for key, value in row.items()), flush=True)
    if args.json:
        print(json.dumps(results))


if __name__ == "__main__":
    main()
