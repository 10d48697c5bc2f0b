"""How bayesfed grows with clients and parameters: seconds a round and memory of the server.

    python benchmarks/scaling.py --json --cases a,b,c

Bayesian ADMM with diagonal Gaussians, IVON on the clients, all clients every round, one epoch; ``engine=ray``:
strategy, messages, clients and sites (on disk) as in a run, without evaluation, checkpoints and logs. Each row is
measured in a process of its own.

- ``a``: 10 to 10,000 clients that share 20,000 examples; 1,002 parameters. What a client costs, whatever it computes. -
``b``: 10 to 1,000 clients with 4 examples each; 178,110 parameters. The server's memory must not grow with the clients.
- ``c``: 0.1 to 25 million parameters; 10 clients with 4 examples each. (The last row's sites take 8 GB of disk in the
temporary folder.)

``seconds_per_round`` is the median over ``--rounds`` after one to warm up; ``server_rss_mb`` the peak resident memory
of the server's process; ``server_private_mb`` the largest private share of it (without pages of Ray's object store and
of files), looked at with every reply.
"""

from __future__ import annotations

import argparse
import json
import os
import signal
import subprocess
import sys
import tempfile
import time
from dataclasses import asdict, dataclass
from itertools import pairwise
from pathlib import Path
from resource import RUSAGE_SELF, getrusage

os.environ.setdefault("OMP_NUM_THREADS", "1")
os.environ.setdefault("RAY_worker_niceness", "0")  # Ray's 15 lets whatever else runs starve the workers
sys.path.insert(0, str(Path(__file__).resolve().parents[1]))

import numpy as np
import psutil
from flwr.serverapp import Grid

from bayesfed import accelerate
from bayesfed.config import compose_config
from bayesfed.configured import build
from bayesfed.runs.directory import RunDirectory
from bayesfed.runs.session import Session

CLASSES, WARM_UP = 10, 1


@dataclass(frozen=True)
class Case:
    """One row.

    Attributes:
        case: a, b or c.
        clients: K.
        examples: of all clients together.
        features: of an example.
        hidden: sizes of the perceptron's hidden layers.
    """

    case: str
    clients: int
    examples: int
    features: int
    hidden: tuple[int, ...]

    @property
    def params(self) -> int:
        """The number of parameters."""
        sizes = [self.features, *self.hidden, CLASSES]
        return sum((a + 1) * b for a, b in pairwise(sizes))


CASES = [
    *(Case("a", clients, 20_000, 20, (32,)) for clients in (10, 100, 1_000, 10_000)),
    *(Case("b", clients, 4 * clients, 784, (200, 100)) for clients in (10, 100, 1_000)),
    *(Case("c", 10, 40, 1_000, (hidden,)) for hidden in (99, 989, 4_945, 24_727)),
]


class TimedSession(Session):
    """A run that keeps time and memory of its rounds and nothing else."""

    def serve(self, grid: Grid) -> None:
        """The strategy's rounds, without what a run does after each."""
        self.times: list[float] = []
        self.private = 0
        self.process = psutil.Process()
        with accelerate.running("auto"):
            self.strategy.start(grid, num_rounds=self.cfg.rounds, callbacks=self)
        self.times.append(time.perf_counter())

    def begin_round(self, round: int, sampled: list[int]) -> None:
        """A round begins where the last one ended."""
        self.times.append(time.perf_counter())

    def client_done(self, round: int, client: int, metrics: dict[str, float] | None, reason: str) -> None:
        """Every client has to count."""
        if metrics is None:
            raise RuntimeError(f"client {client} was left out: {reason}")
        memory = self.process.memory_info()
        self.private = max(self.private, memory.rss - memory.shared)

    def end_round(self, round: int, metrics: dict[str, float]) -> None:
        """Nothing to write."""


def write_data(case: Case, path: Path) -> None:
    """Random examples, dealt to the clients in turn."""
    generator = np.random.default_rng(1)
    x = generator.standard_normal((case.examples, case.features), dtype=np.float32)
    y = generator.integers(CLASSES, size=case.examples)
    client = np.arange(case.examples) % case.clients
    np.savez(path, x=x, y=y, client=client, x_test=x[:CLASSES], y_test=np.arange(CLASSES))


def run(case: Case, rounds: int, workers: int, folder: Path) -> dict[str, object]:
    """Measure a row in this process."""
    write_data(case, folder / "data.npz")
    cfg = compose_config(
        [
            "data=npz",
            f"data.path={folder / 'data.npz'}",
            "partition=iid",
            "likelihood=categorical",
            "model=mlp",
            f"model.hidden=[{','.join(map(str, case.hidden))}]",
            "strategy=bayes_admm",
            "strategy.family=diagonal",
            "strategy.damping=0.01",
            "client=ivon",
            "client.epochs=1",
            "client.batch_size=32",
            "client.lr=0.001",
            "client.hess_init=0.01",
            "engine=ray",
            f"engine.num_workers={workers}",
            "device=cpu",
            f"rounds={rounds + WARM_UP}",
            f"hydra.run.dir={folder}",
        ]
    )
    session = TimedSession(cfg)
    if (session.num_clients, session.num_parameters) != (case.clients, case.params):
        raise RuntimeError(f"{session.num_clients} clients, {session.num_parameters} parameters")
    session.open(RunDirectory(folder), resumed=False)
    build(cfg.engine, "engine").run(session)
    seconds = np.diff(session.times)[WARM_UP:]
    return {
        "case": case.case,
        "clients": case.clients,
        "params": case.params,
        "seconds_per_round": round(float(np.median(seconds)), 4),
        "server_rss_mb": round(getrusage(RUSAGE_SELF).ru_maxrss / 1024, 1),
        "server_private_mb": round(session.private / 2**20, 1),
        "examples": case.examples,
        "workers": workers,
        "rounds": rounds,
    }


def in_child(case: Case, args: argparse.Namespace) -> dict[str, object]:
    """Measure a row in a process of its own."""
    command = [sys.executable, __file__, "--child", json.dumps(asdict(case)), "--rounds", str(args.rounds)]
    command += ["--workers", str(args.workers)]
    with tempfile.TemporaryDirectory(prefix="scaling-") as folder:
        done = subprocess.run([*command, "--folder", folder], capture_output=True, text=True, check=False)
    if done.returncode != 0:
        raise SystemExit(f"{case} failed:\n{done.stderr[-3000:]}")
    return json.loads(done.stdout.strip().splitlines()[-1])


def main() -> None:
    """Measure and print."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    from bayesfed.host import cores as allowed_cores

    cores = allowed_cores()
    parser.add_argument("--cases", default="a,b,c", help="which of a, b, c (default: a,b,c)")
    parser.add_argument("--rounds", type=int, default=3, help="rounds measured (default: 3)")
    parser.add_argument("--workers", type=int, default=cores, help=f"Ray workers (default: {cores})")
    parser.add_argument("--max-clients", type=int, default=10**9, help="leave rows with more clients out")
    parser.add_argument("--max-params", type=int, default=10**9, help="leave rows with more parameters out")
    parser.add_argument("--json", action="store_true", help="one JSON list instead of a table")
    parser.add_argument("--child", help=argparse.SUPPRESS)
    parser.add_argument("--folder", type=Path, help=argparse.SUPPRESS)
    args = parser.parse_args()
    signal.signal(signal.SIGTERM, lambda *_: sys.exit(143))  # the child and its files go with this process
    if args.child:
        values = json.loads(args.child)
        case = Case(**{**values, "hidden": tuple(values["hidden"])})
        print(json.dumps(run(case, args.rounds, args.workers, args.folder)))
        return

    rows = []
    for case in CASES:
        if case.case in args.cases.split(",") and case.clients <= args.max_clients and case.params <= args.max_params:
            rows.append(in_child(case, args))
            row = rows[-1]
            text = (
                "{case}: {clients:6,} clients {params:11,} parameters {seconds_per_round:9.3f} s a round, "
                "server {server_rss_mb:8,.0f} MB"
            )
            print(text.format(**row), file=sys.stderr if args.json else sys.stdout, flush=True)
    if args.json:
        print(json.dumps(rows))


if __name__ == "__main__":
    main()
