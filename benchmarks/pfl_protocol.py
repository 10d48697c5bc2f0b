"""pfl-research's CIFAR10 protocol: seconds a round of bayesfed, pfl, Flower and a plain loop, measured in turns on one
machine.

    python benchmarks/pfl_protocol.py --json --pfl-python PFL_ENVIRONMENT/bin/python

A convolutional net of 1,626,442 parameters, 1,000 clients of 50 images each (random, of CIFAR10's shape), 50 of them a
round, batches of 10, one epoch of SGD, federated averaging; no evaluation. Every process computes with one thread and
at the same priority (Ray's workers would run at nice 15 and so suffer more than the others from whatever else the
machine does).

- ``ours``: bayesfed's FedAvg on its Ray engine, ``client=sgd``; two workers. - ``pfl``: pfl-research's
FederatedAveraging and SimulatedBackend, two processes under torchrun. It needs an environment of its own
  (``pip install "pfl[pytorch]==0.6.0"``); left out (null) without ``--pfl-python``.
- ``flower``: Flower's own FedAvg on its simulation runtime, two actors. - ``loop``: a plain torch loop in one process
(``benchmarks/pfl_contestants/plain_loop.py``). - ``floor``: two such loops at once, each with half of every cohort and
without averaging between them: what two processes can do
  on this machine. Two busy cores are often slower than one busy core, so ``floor_s`` is more than half of ``loop_s``.

All are started first and then train ``--rounds`` rounds each in turn, ``--turns`` times, the others idle. ``..._s`` is
the median over all rounds, after ``--warm-up`` rounds; ``startup_s`` goes until the end of the first round.
``parallel_efficiency`` is loop_s / (ours_s * workers) and ``floor_efficiency`` floor_s / ours_s. ``cpu_s`` is the
processor time of a round, of all processes together: what a contestant spends beyond the loop's is its overhead, and it
suffers less than the rest from other load on the machine. Nothing else should run meanwhile: ``busy_before`` is the
share of the machine (%) that was in use when the script started. Ours and the loop draw the same cohorts and batches; a
second loop, not timed, also has bayesfed's layers and so the same dropout: its average after the first round must agree
with ours, or the script fails.
"""

from __future__ import annotations

import argparse
import json
import os
import signal
import statistics
import subprocess
import sys
import tempfile
import time
from contextlib import suppress
from dataclasses import asdict
from pathlib import Path

import numpy as np
import psutil

ROOT = str(Path(__file__).resolve().parents[1])
sys.path.insert(0, ROOT)

from benchmarks.pfl_contestants.protocol import PARAMETERS, Protocol  # noqa: E402 - found through the line above

NAMES = ("ours", "pfl", "flower", "loop", "floor")


def environment_of_all() -> dict[str, str]:
    """Environment variables of every process: the same threads, priority and import path."""
    path = os.pathsep.join([ROOT, os.environ.get("PYTHONPATH", "")])
    quiet = {"FLWR_TELEMETRY_ENABLED": "0", "RAY_USAGE_STATS_ENABLED": "0"}
    alike = {"OMP_NUM_THREADS": "1", "RAY_worker_niceness": "0"}
    return os.environ | quiet | alike | {"PYTHONPATH": path}


class Contestant:
    """Processes that train in their turn (one for all contestants but the floor).

    Args:
        name: for messages, and of its log.
        commands: one a process.
        work: folder with the data.
    """

    def __init__(self, name: str, commands: list[list[str]], work: Path):
        self.name, self.log = name, work / f"{name}.log"
        environment = environment_of_all()
        self.seconds: list[float] = []
        self.cpu_seconds: list[float] = []
        self.startup = 0.0
        self.processes: list[subprocess.Popen[str]] = []
        started = time.perf_counter()
        pipe = subprocess.PIPE
        with self.log.open("w") as log:
            for command in commands:
                process = subprocess.Popen(
                    command,
                    stdin=pipe,
                    stdout=pipe,
                    stderr=log,
                    text=True,
                    env=environment,
                    cwd=work,
                    start_new_session=True,
                )
                self.processes.append(process)
        try:
            self._read()
            self.turn(1)
        except BaseException:
            self.stop()
            raise
        self.startup = time.perf_counter() - started

    def turn(self, rounds: int) -> list[float]:
        """Train; seconds of each round. Independent processes count as long as the slowest, on average
        over the turn.
        """
        before = self._cpu()
        for process in self.processes:
            assert process.stdin is not None
            process.stdin.write(f"{rounds}\n")
            process.stdin.flush()
        every = self._read()
        self.cpu_seconds.append((self._cpu() - before) / rounds)
        if len(every) == 1:
            return every[0]
        return [max(sum(seconds) for seconds in every) / rounds] * rounds

    def _cpu(self) -> float:
        """CPU seconds that its processes, and all they started, have used."""
        total = 0.0
        for process in self.processes:
            parent = psutil.Process(process.pid)
            for each in (parent, *parent.children(recursive=True)):
                with suppress(psutil.NoSuchProcess):
                    total += sum(each.cpu_times()[:2])
        return total

    def _read(self) -> list[list[float]]:
        lines = [process.stdout.readline() if process.stdout else "" for process in self.processes]
        if not all(lines):
            raise SystemExit(f"{self.name} ended early:\n{self.log.read_text()[-3000:]}")
        return [json.loads(line) for line in lines]

    def stop(self) -> None:
        """End its processes and all they started."""
        for process in self.processes:
            assert process.stdin is not None
            process.stdin.close()
        for process in self.processes:
            with suppress(subprocess.TimeoutExpired):
                process.wait(20)
            with suppress(ProcessLookupError):
                os.killpg(process.pid, signal.SIGKILL)
            process.wait()


def contestant_module(protocol: Protocol, work: Path, name: str, *more: str) -> list[str]:
    """What python is given to run a module of ``pfl_contestants``."""
    return [
        "-m",
        f"benchmarks.pfl_contestants.{name}",
        "--protocol",
        json.dumps(asdict(protocol)),
        "--work",
        str(work),
        *more,
    ]


def commands(protocol: Protocol, work: Path, pfl_python: str | None) -> dict[str, list[list[str]]]:
    """How to start each contestant."""

    def module(name: str, *more: str) -> list[str]:
        return contestant_module(protocol, work, name, *more)

    count = protocol.workers
    found = {
        "ours": [[sys.executable, *module("with_bayesfed")]],
        "flower": [[sys.executable, *module("with_flower")]],
        "loop": [[sys.executable, *module("plain_loop")]],
        "floor": [
            [sys.executable, *module("plain_loop", "--part", str(i), "--parts", str(count))] for i in range(count)
        ],
    }
    if pfl_python:
        torchrun = [pfl_python, "-m", "torch.distributed.run", "--standalone", "--nproc-per-node", str(count)]
        found["pfl"] = [[*torchrun, *module("with_pfl")]]
    return found


def measure(protocol: Protocol, args: argparse.Namespace, work: Path) -> dict[str, object]:
    """All contestants in turns."""
    busy = psutil.cpu_percent(1.0)
    protocol.write_data(work / "data.npz")
    starts = commands(protocol, work, args.pfl_python)
    contestants: list[Contestant] = []
    try:
        for name in (n for n in NAMES if n in args.only and n in starts):
            contestants.append(Contestant(name, starts[name], work))
            say(f"{name}: first round after {contestants[-1].startup:.1f} s")
            if args.warm_up > 1:
                contestants[-1].turn(args.warm_up - 1)
        difference = compare(protocol, work)
        for turn in range(args.turns):
            for contestant in reversed(contestants) if turn % 2 else contestants:
                seconds = contestant.turn(args.rounds)
                contestant.seconds += seconds
                say(f"turn {turn + 1}, {contestant.name}: {' '.join(f'{s:.3f}' for s in seconds)}")
    finally:
        for contestant in contestants:
            contestant.stop()

    medians = {c.name: statistics.median(c.seconds) for c in contestants}
    result: dict[str, object] = {f"{name}_s": medians.get(name) for name in NAMES}
    if {"ours", "loop"} <= medians.keys():
        result["parallel_efficiency"] = medians["loop"] / (medians["ours"] * protocol.workers)
    if {"ours", "floor"} <= medians.keys():
        result["floor_efficiency"] = medians["floor"] / medians["ours"]
    for name in ("pfl", "flower"):
        if {"ours", name} <= medians.keys():
            result[f"{name}_over_ours"] = medians[name] / medians["ours"]
    result["cpu_s"] = {c.name: round(statistics.median(c.cpu_seconds[-args.turns :]), 3) for c in contestants}
    result["startup_s"] = {c.name: round(c.startup, 2) for c in contestants}
    result["seconds"] = {c.name: [round(s, 4) for s in c.seconds] for c in contestants}
    result |= {"largest_difference": difference, "busy_before": busy}
    return result | {
        "parameters": PARAMETERS,
        **asdict(protocol),
        "rounds": args.rounds,
        "turns": args.turns,
        "cpu_count": os.cpu_count(),
    }


def compare(protocol: Protocol, work: Path) -> float | None:
    """The largest difference of weights of ours and a loop with our layers after the first round.

    Raises:
        SystemExit: more than rounding.
    """
    if not (work / "ours.npy").exists():
        return None
    command = [sys.executable, *contestant_module(protocol, work, "plain_loop", "--check")]
    subprocess.run(command, check=True, env=environment_of_all(), cwd=work)
    ours, loop = (np.load(work / f"{name}.npy") for name in ("ours", "loop"))
    difference = float(np.abs(ours - loop).max())
    if ours.size != PARAMETERS or not difference <= 1e-5:
        raise SystemExit(f"ours and the loop differ by {difference:g} after the first round: not the same arithmetic")
    return difference


def say(text: str) -> None:
    """Progress."""
    print(text, file=sys.stderr, flush=True)


def main() -> None:
    """Measure and print."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--pfl-python", help="python of an environment with pfl[pytorch]==0.6.0")
    parser.add_argument("--rounds", type=int, default=3, help="rounds in a turn (default: 3)")
    parser.add_argument("--turns", type=int, default=3, help="turns of each contestant (default: 3)")
    parser.add_argument("--warm-up", type=int, default=2, help="rounds before the first turn, at least 1 (default: 2)")
    parser.add_argument("--only", nargs="+", choices=NAMES, default=NAMES, help="contestants (default: all)")
    parser.add_argument("--json", action="store_true", help="one JSON object instead of a table")
    args = parser.parse_args()
    signal.signal(signal.SIGTERM, lambda *_: sys.exit(143))  # the contestants end with this process
    with tempfile.TemporaryDirectory(prefix="pfl-protocol-") as folder:
        result = measure(Protocol(), args, Path(folder))
    if args.json:
        print(json.dumps(result))
        return
    for key, value in result.items():
        print(f"{key:<20} {value}")


if __name__ == "__main__":
    main()
