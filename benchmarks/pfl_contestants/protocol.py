"""What all contestants share: the problem, and taking turns. No imports beyond NumPy: pfl's environment has no
bayesfed.
"""

from __future__ import annotations

import argparse
import json
import os
import sys
import time
from dataclasses import dataclass
from pathlib import Path

import numpy as np

SHAPE, CLASSES = (32, 32, 3), 10  # CIFAR10's, channels last as in pfl's benchmark
PARAMETERS = 1_626_442


@dataclass(frozen=True)
class Protocol:
    """pfl-research's CIFAR10 benchmark (benchmarks/image_classification/configs/baseline.yaml), one local epoch of SGD.

    Attributes:
        clients: K; client k holds rows k * images ... (k + 1) * images.
        images: of each client.
        cohort: clients of a round.
        batch_size, lr: of the clients' SGD; the server averages.
        seed: of the data, and of everything random where a contestant lets us choose it.
        workers: processes that train.
    """

    clients: int = 1000
    images: int = 50
    cohort: int = 50
    batch_size: int = 10
    lr: float = 0.1
    seed: int = 1
    workers: int = 2

    def write_data(self, path: Path) -> None:
        """Random images and labels, as ``data=npz`` takes them."""
        generator = np.random.default_rng(self.seed)
        rows = self.clients * self.images
        x = generator.standard_normal((rows, *SHAPE), dtype=np.float32)
        y = generator.integers(CLASSES, size=rows)
        client = np.repeat(np.arange(self.clients), self.images)
        np.savez(path, x=x, y=y, client=client, x_test=x[:CLASSES], y_test=np.arange(CLASSES))

    @staticmethod
    def read_data(path: Path) -> tuple[np.ndarray, np.ndarray]:
        """x (N, 32, 32, 3) float32 and y (N,) int64."""
        with np.load(path) as file:
            return file["x"], file["y"]


def parse(description: str | None) -> tuple[argparse.Namespace, Protocol]:
    """The command line of a contestant: the protocol as JSON, and the folder with ``data.npz``."""
    parser = argparse.ArgumentParser(description=description)
    parser.add_argument("--protocol", required=True, help="JSON of the protocol")
    parser.add_argument("--work", type=Path, required=True, help="folder with data.npz; results go there")
    parser.add_argument("--part", type=int, help="of a cohort split among independent loops")
    parser.add_argument("--parts", type=int, default=1)
    parser.add_argument("--check", action="store_true", help="train the first round as bayesfed does, not timed")
    args = parser.parse_args()
    return args, Protocol(**json.loads(args.protocol))


class Finished(Exception):
    """No more turns."""


class Turns:
    """Train only when it is one's turn, and keep the time.

    ``next_round`` is called where a round begins (thus also where the last one ended). A turn is a line on stdin with
    its number of rounds; when they are done, a line with their seconds, as a JSON list, goes to stdout. Everything else
    that is printed goes to stderr.
    """

    def __init__(self) -> None:
        self._out = os.fdopen(os.dup(1), "w")
        os.dup2(2, 1)
        self._left = 0
        self._seconds: list[float] = []
        self._started: float | None = None

    def next_round(self) -> None:
        """Wait for the turn if the last one is over.

        Raises:
            Finished: there will be none.
        """
        if self._started is not None:
            self._seconds.append(time.perf_counter() - self._started)
        if self._left == 0:
            print(json.dumps(self._seconds), file=self._out, flush=True)
            self._seconds = []
            line = sys.stdin.readline()
            if not line:
                raise Finished
            self._left = int(line)
        self._left -= 1
        self._started = time.perf_counter()
