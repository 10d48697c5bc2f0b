"""A whole experiment: bayesfed on its Ray engine against the sequential loop a researcher would write.

    BAYESFED_DATA=... python benchmarks/end_to_end.py --json --rounds 50

The experiment is ``fmnist_het10``: Bayesian ADMM, diagonal Gaussians, IVON on 10 clients, 10 % of Fashion-MNIST,
evaluation every round at the mean and every fifth round by model averaging.

- ``ours``: ``bayesfed.run`` as the experiment is configured (``engine=ray``), its whole wall-clock: data, Ray's start,
  training, evaluation, checkpoints, logs, figures.
- ``loop``: the same algorithm in one process with one thread: clients one after the other, plain torch operations, the
  parameters gathered and scattered around a flat IVON step as ivon-opt does; the same data, split and evaluations;
  nothing is written.

Each runs in a process of its own, timed after ``import torch``. They take turns of ``--turn`` rounds, so that the
machine's better and worse minutes fall to both; a process's clock stands while it is the other's turn. Accuracies (%)
are those of the last round on the test set; the two draw different random numbers, so they agree as two seeds do.
``speedup`` is loop_s / ours_s.
"""

from __future__ import annotations

import argparse
import json
import math
import os
import signal
import subprocess
import sys
import tempfile
import time
from collections import deque
from pathlib import Path

os.environ.setdefault("OMP_NUM_THREADS", "1")
os.environ.setdefault("RAY_worker_niceness", "0")  # Ray's 15 lets whatever else runs starve the workers
sys.path.insert(0, str(Path(__file__).resolve().parents[1]))

import torch
from omegaconf import DictConfig
from torch import Tensor, nn

EXPERIMENT = "fmnist_het10"
TURN = "the other's turn"


class Turns:
    """Stops this process after every ``every`` rounds until its standard input says go on."""

    def __init__(self, every: int, rounds: int):
        self.every, self.rounds = every, rounds
        self.waited = 0.0  # seconds

    def after(self, round: int) -> None:
        """A round is over."""
        if 0 < round < self.rounds and round % self.every == 0:
            stopped = time.perf_counter()
            print(TURN, flush=True)
            sys.stdin.readline()
            self.waited += time.perf_counter() - stopped


def ours(turns: Turns, workers: int, folder: Path) -> dict[str, float]:
    """The product, as a user runs it."""
    import bayesfed
    from bayesfed.runs.loggers import NoLogger

    NoLogger.log = lambda self, record: turns.after(record["round"])  # type: ignore[method-assign]
    started = time.perf_counter()
    result = bayesfed.run([
        f"experiment={EXPERIMENT}", f"rounds={turns.rounds}", f"engine.num_workers={workers}", "device=cpu",
        f"hydra.run.dir={folder / 'run'}",
    ])  # fmt: skip
    seconds = time.perf_counter() - started - turns.waited
    rounds_seconds = sum(row.get("seconds/round", 0.0) for row in result.rounds) - turns.waited
    summary = result.summary
    return {
        "seconds": seconds,
        "in_rounds": rounds_seconds,
        "accuracy": summary["mean/accuracy"],
        "nll": summary["mean/nll"],
        "bayes_accuracy": summary["bayes/accuracy"],
        "bayes_nll": summary["bayes/nll"],
    }


class Loop:
    """Bayesian ADMM with a diagonal Gaussian and IVON clients (arXiv 2506.13150), sequentially.

    The server keeps lambda_g = (r, S) with r = S m, and the sum of the duals; client k keeps its dual (v, V), in
    float64. IVON runs in float32 with h the curvature beyond the server's precision.
    """

    def __init__(self, cfg: DictConfig):
        from bayesfed.app import plain, problem_of

        self.cfg, self.admm, self.ivon = cfg, cfg.strategy, cfg.client
        problem = problem_of(plain(cfg))
        torch.manual_seed(cfg.seed)
        self.model = problem.build_model(cfg.seed)
        self.params = list(self.model.parameters())
        everything = slice(None)
        self.data = [client.batch(everything, torch.float32, "cpu") for client in problem.clients]
        self.test = problem.test.batch(everything, torch.float32, "cpu")
        self.init = torch.cat([p.detach().flatten() for p in self.params])

        zero = torch.zeros_like(self.init, dtype=torch.float64)
        self.prior_precision = self.admm.prior_precision
        self.mean, self.precision = zero.clone(), torch.full_like(zero, self.prior_precision)
        self.duals = [(zero.clone(), zero.clone()) for _ in self.data]
        self.dual_sum = (zero.clone(), zero.clone())

    def load(self, vector: Tensor) -> None:
        """Put a vector (P,) into the model."""
        offset = 0
        for p in self.params:
            p.data = vector[offset : offset + p.numel()].view(p.shape)
            offset += p.numel()

    def train_client(self, k: int, round: int) -> tuple[Tensor, Tensor]:
        """Mean and precision of client k: IVON on E_q[l_k]/tau + <eta_k, mu_q> + rho KL(q || q_g)."""
        c = self.ivon
        x, y = self.data[k]
        weight = len(x) / self.admm.temperature
        ess = weight / self.admm.rho
        server, precision = self.mean.float(), self.precision.float()
        delta = precision / ess
        v, curvature = (dual.float() / weight for dual in self.duals[k])
        lr = c.lr * 0.5 * (1 + math.cos(math.pi * (round - 1) / c.schedule_rounds))
        mean = self.init if round == 1 else server
        h = torch.full_like(mean, c.hess_init if round == 1 else 0.0)
        lowest = delta * (c.min_precision - 1)
        momentum, step = torch.zeros_like(mean), 0
        for _ in range(c.epochs):
            for rows in torch.randperm(len(x)).split(c.batch_size):
                step += 1
                noise = torch.randn_like(mean) / torch.sqrt(ess * (h + delta))
                self.load(mean + noise)
                for p in self.params:
                    p.grad = None
                nn.functional.cross_entropy(self.model(x[rows]), y[rows]).backward()
                g = torch.cat([torch.as_tensor(p.grad).flatten() for p in self.params])
                hhat = ess * (h + delta) * noise * g - curvature
                momentum = c.beta1 * momentum + (1 - c.beta1) * g
                correction = 0.5 * (1 - c.beta2) ** 2 * (h - hhat) ** 2 / (h + delta)
                h = torch.maximum(c.beta2 * h + (1 - c.beta2) * hhat + correction, lowest)
                direction = momentum / (1 - c.beta1**step) + v - curvature * mean + delta * (mean - server)
                mean = mean - lr * direction / (h + delta)
        return mean, ess * (h + delta)

    def train_round(self, round: int) -> None:
        """All clients, their duals, the server's step."""
        clients, rho, gamma = len(self.data), self.admm.rho, self.admm.damping
        old = self.precision * self.mean, self.precision
        total = torch.zeros_like(old[0]), torch.zeros_like(old[1])
        for k in range(clients):
            mean, precision = (value.double() for value in self.train_client(k, round))
            natural = precision * mean, precision
            for i in range(2):
                change = gamma * rho * (natural[i] - old[i])
                self.duals[k][i].add_(change)
                self.dual_sum[i].add_(change)
                total[i].add_(natural[i])
        alpha = 1 / (1 + clients * rho)
        first = (1 - alpha) * total[0] / clients + alpha * self.dual_sum[0]
        precision = (1 - alpha) * total[1] / clients + alpha * (self.prior_precision + self.dual_sum[1])
        low = precision < self.admm.precision_floor * self.prior_precision
        self.precision = precision.clamp(min=self.admm.precision_floor * self.prior_precision)
        self.mean = torch.where(low, total[0] / total[1], first / self.precision)

    @torch.no_grad()
    def evaluate(self, samples: int) -> tuple[float, float]:
        """Accuracy (%) and NLL at the mean (0 samples) or averaged over samples of the posterior."""
        from bayesfed.evaluation.inputs import CPU_BATCH

        x, y = self.test
        mean, deviation = self.mean.float(), self.precision.float().rsqrt()
        probabilities = torch.zeros(len(x), int(y.max()) + 1)
        for _ in range(max(samples, 1)):
            self.load(mean + deviation * torch.randn_like(mean) if samples else mean)
            logits = torch.cat([self.model(rows) for rows in x.split(CPU_BATCH)])
            probabilities += logits.softmax(1) / max(samples, 1)
        accuracy = (probabilities.argmax(1) == y).float().mean()
        return 100 * float(accuracy), float(nn.functional.nll_loss(probabilities.log(), y))

    def run(self, turns: Turns) -> dict[str, float]:
        """All rounds, evaluated as the experiment says."""
        rounds = self.cfg.rounds
        at_mean = averaged = (math.nan, math.nan)
        for round in range(rounds + 1):
            if round > 0:
                self.train_round(round)
            at_mean = self.evaluate(0)
            if round == rounds or round % self.cfg.eval.bayes_every == 0:
                averaged = self.evaluate(self.cfg.eval.samples)
            turns.after(round)
        return {"accuracy": at_mean[0], "nll": at_mean[1], "bayes_accuracy": averaged[0], "bayes_nll": averaged[1]}


def loop(turns: Turns) -> dict[str, float]:
    """The loop, from reading the data to the last evaluation."""
    from bayesfed.config import compose_config

    torch.set_num_threads(1)
    cfg = compose_config([f"experiment={EXPERIMENT}", f"rounds={turns.rounds}"])
    started = time.perf_counter()
    result = Loop(cfg).run(turns)
    return {"seconds": time.perf_counter() - started - turns.waited} | result


def in_turns(args: argparse.Namespace, folder: Path) -> dict[str, dict[str, float]]:
    """What ``ours`` and ``loop`` give, each in a process of its own, one of which works at a time."""
    options = [f"--{name}={getattr(args, name)}" for name in ("rounds", "workers", "turn")]
    children: dict[str, subprocess.Popen[str]] = {}
    found: dict[str, dict[str, float]] = {}
    waiting = deque(["ours", "loop"])
    try:
        while waiting:
            name, last = waiting.popleft(), ""
            if name in children:
                print(file=children[name].stdin, flush=True)
            else:
                command = [sys.executable, __file__, "--child", name, "--folder", str(folder), *options]
                with (folder / name).open("w") as errors:
                    children[name] = subprocess.Popen(
                        command, stdin=subprocess.PIPE, stdout=subprocess.PIPE, stderr=errors, text=True
                    )
            output = children[name].stdout
            assert output is not None
            while (line := output.readline()) and line.strip() != TURN:
                last = line
            if line:
                waiting.append(name)
                continue
            if children[name].wait() != 0:
                raise SystemExit(f"{name} failed:\n{(folder / name).read_text()[-3000:]}")
            found[name] = json.loads(last)
    finally:
        for child in children.values():
            child.terminate()
            child.wait()
    return found


def main() -> None:
    """Measure and print."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    from bayesfed.host import cores as allowed_cores

    cores = allowed_cores()
    parser.add_argument("--rounds", type=int, default=50, help="communication rounds (default: 50)")
    parser.add_argument("--workers", type=int, default=cores, help=f"Ray workers (default: {cores})")
    parser.add_argument("--turn", type=int, default=10, help="rounds of one before the other goes on (default: 10)")
    parser.add_argument("--json", action="store_true", help="one JSON object instead of a table")
    parser.add_argument("--child", choices=("ours", "loop"), help=argparse.SUPPRESS)
    parser.add_argument("--folder", type=Path, help=argparse.SUPPRESS)
    args = parser.parse_args()
    signal.signal(signal.SIGTERM, lambda *_: sys.exit(143))  # the child and its files go with this process
    if args.child:
        turns = Turns(args.turn, args.rounds)
        print(json.dumps(ours(turns, args.workers, args.folder) if args.child == "ours" else loop(turns)))
        return

    with tempfile.TemporaryDirectory(prefix="end-to-end-") as folder:
        both = in_turns(args, Path(folder))
    seconds = {name: values.pop("seconds") for name, values in both.items()}
    result: dict[str, object] = {f"{name}_s": round(value, 2) for name, value in seconds.items()}
    result["speedup"] = round(seconds["loop"] / seconds["ours"], 3)
    for name, values in both.items():
        result |= {f"{name}_{key}": round(value, 4) for key, value in values.items()}
    result |= {"experiment": EXPERIMENT, "rounds": args.rounds, "workers": args.workers, "cpu_count": cores}
    if args.json:
        print(json.dumps(result))
        return
    for key, value in result.items():
        print(f"{key:<20} {value}")


if __name__ == "__main__":
    main()
