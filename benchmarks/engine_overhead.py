"""What an engine costs per client and round: clients that send the posterior back, and do nothing else.

    python benchmarks/engine_overhead.py --json --clients 10 --params 178110

Inline and Ray alternate round by round in this process; Flower's runtime, which ends with ``ray.shutdown()``, runs in a
child process right after. Each figure is the median over rounds, after some to warm up (Ray's own processes take a
while to settle). A round is that of a training run: messages with the posterior (mean and precision, float32) for every
client, until the arrays of every reply can be read; what a strategy does with them is the same on every engine and left
out.
"""

from __future__ import annotations

import argparse
import json
import math
import os
import statistics
import subprocess
import sys
import time

os.environ.setdefault("OMP_NUM_THREADS", "1")

import torch
from flwr.app import ConfigRecord, Context, Message, MetricRecord, RecordDict
from flwr.clientapp import ClientApp
from flwr.serverapp import Grid, ServerApp

from bayesfed import wire
from bayesfed.federation.server.replies import stream
from strategies import BayesADMM

WARM_UP = 5
PAGE = 1024  # float32 numbers


def echo_app() -> ClientApp:
    """A client that sends back what it got."""
    app = ClientApp()

    @app.train()
    def train(message: Message, context: Context) -> Message:
        method = message.content.config_records["method"]
        metrics = MetricRecord({"num-examples": 1, "round": int(str(method["round"]))})
        return Message(RecordDict({"posterior": message.content["posterior"], "metrics": metrics}), reply_to=message)

    @app.query()
    def query(message: Message, context: Context) -> Message:
        info = ConfigRecord({"partition-id": context.node_config["partition-id"]})
        return Message(RecordDict({"client": info}), reply_to=message)

    return app


class Rounds:
    """The rounds of one engine, timed.

    Args:
        clients: all of them take part.
        params: of the diagonal posterior.
    """

    def __init__(self, clients: int, params: int):
        self.strategy = BayesADMM(rho=1.0, damping=1.0, temperature=1.0)
        self.strategy.setup(torch.zeros(params), clients, 1)
        self.shapes = dict.fromkeys(("mean", "precision"), (params,))
        self.clients, self.round = clients, 0
        self.milliseconds: list[float] = []

    def run(self, grid: Grid) -> None:
        """One round; those that warm up do not count."""
        self.round += 1
        started = time.perf_counter()
        arrays = wire.pack(self.strategy.posterior.arrays())
        # the first time this asks every node which partition it holds
        messages = self.strategy.configure_train(self.round, arrays, ConfigRecord(), grid)
        replies = 0
        for reply in stream(grid, messages, timeout=600, fold=1, gone=set()):
            # read in place, as strategies do; a number of every page, so that none is left to be fetched
            for values in wire.unpack(reply.content["posterior"], self.shapes, torch.float32, copy=False).values():
                values[::PAGE].sum()
            replies += 1
        seconds = time.perf_counter() - started
        if replies != self.clients:
            raise RuntimeError(f"{replies} of {self.clients} clients replied")
        if self.round > WARM_UP:
            self.milliseconds.append(seconds * 1e3 / self.clients)

    @property
    def median(self) -> float:
        """Milliseconds per client and round."""
        return statistics.median(self.milliseconds)


def inline_and_ray(clients: int, params: int, workers: int, rounds: int) -> dict[str, float]:
    """Both engines in turn."""
    import ray

    from bayesfed.engine.inline import InlineGrid
    from bayesfed.engine.ray_engine import RayEngine
    from bayesfed.engine.ray_grid import RayGrid

    RayEngine(num_workers=workers).connect()
    grids = {
        "inline": InlineGrid(echo_app(), clients),
        "ray": RayGrid(echo_app, clients, workers),
    }
    measured = {name: Rounds(clients, params) for name in grids}
    for _ in range(rounds + WARM_UP):
        for name, grid in grids.items():
            measured[name].run(grid)
    ray.shutdown()
    return {f"{name}_ms": timing.median for name, timing in measured.items()}


def flower(clients: int, params: int, rounds: int) -> float:
    """Flower's runtime, in this process."""
    from bayesfed.wire.flower_version import simulate

    timing = Rounds(clients, params)
    server = ServerApp()

    @server.main()
    def main(grid: Grid, context: Context) -> None:
        for _ in range(rounds + WARM_UP):
            timing.run(grid)

    simulate(server, echo_app(), clients, {"num_cpus": 1, "num_gpus": 0.0})
    return timing.median


def flower_in_child(args: argparse.Namespace) -> float:
    """Flower's runtime, in a process of its own."""
    command = [sys.executable, __file__, "--flower-child"]
    for name in ("clients", "params", "rounds"):
        command += [f"--{name}", str(getattr(args, name))]
    done = subprocess.run(command, capture_output=True, text=True, check=False)
    if done.returncode != 0:
        raise SystemExit(f"Flower's runtime failed:\n{done.stderr[-2000:]}")
    return float(done.stdout.strip().splitlines()[-1])


def positive(text: str) -> int:
    """A whole number of at least 1."""
    value = int(text)
    if value < 1:
        raise argparse.ArgumentTypeError(f"{value}: must be at least 1")
    return value


def main() -> None:
    """Measure and print."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    from bayesfed.host import cores as allowed_cores

    cores = allowed_cores()
    parser.add_argument("--clients", type=positive, default=10, help="clients in each round (default: 10)")
    parser.add_argument("--params", type=positive, default=178_110, help="parameters of the model (default: 178110)")
    parser.add_argument("--rounds", type=positive, default=30, help="rounds measured (default: 30)")
    parser.add_argument("--workers", type=positive, default=cores, help=f"Ray workers (default: {cores})")
    parser.add_argument("--json", action="store_true", help="one JSON object instead of a table")
    parser.add_argument("--no-flower", action="store_true", help="leave Flower's runtime out (null)")
    parser.add_argument("--flower-child", action="store_true", help=argparse.SUPPRESS)
    args = parser.parse_args()
    torch.set_num_threads(1)
    if args.flower_child:
        print(flower(args.clients, args.params, args.rounds))
        return

    result: dict[str, float | None] = {**inline_and_ray(args.clients, args.params, args.workers, args.rounds)}
    flowers = None if args.no_flower else flower_in_child(args)
    result |= {
        "flower_ms": flowers,
        "flower_over_ray": flowers and flowers / (result["ray_ms"] or math.nan),
        "flower_over_inline": flowers and flowers / (result["inline_ms"] or math.nan),
    }
    result |= {
        "clients": args.clients,
        "params": args.params,
        "workers": args.workers,
        "rounds": args.rounds,
        "cpu_count": cores,
    }
    if args.json:
        print(json.dumps(result))
        return
    print(
        f"{args.clients} clients, {args.params:,} parameters, {args.workers} workers on {cores} cores, "
        f"{args.rounds} rounds"
    )
    for name in ("inline", "ray", "flower"):
        milliseconds = result[f"{name}_ms"]
        if milliseconds is not None:
            print(
                f"  {name:7} {milliseconds:8.3f} ms per client-round   "
                f"{milliseconds * args.clients / 1e3:7.3f} s a round"
            )
    if flowers is not None:
        print(f"  Flower's runtime over ray: {result['flower_over_ray']:.1f}")


if __name__ == "__main__":
    main()
