"""What one of ten clients can do that sends its mean negated and claims a large weight: ``digits_het10``, accuracy
after the last round.

``python benchmarks/one_client_decides.py --save docs/results/one_client_decides.json``. The client of median size
claims so many times its true precision (BayesADMM) or number of examples (FedAvg; also when it connects), in the first
round or in all, with the limits of ``limits.relative_*`` off (1e300) and at their defaults, over a grid that, like a
SuperLink's, vouches for nobody. ``honest``: the largest mean precision for as many examples of an honest client, or
number of examples, in multiples of the median's.
"""

from __future__ import annotations

import argparse
import json
import logging
import sys
import tempfile
from collections.abc import Iterable
from pathlib import Path
from statistics import median
from types import SimpleNamespace
from typing import Any, cast

import torch
from flwr.app import ConfigRecord, Context, Message
from flwr.clientapp import ClientApp

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))

from bayesfed import wire
from bayesfed.config import compose_config
from bayesfed.engine.inline import InlineGrid
from bayesfed.runs.launch import prepare
from bayesfed.wire.flower_version import node_context

ROUNDS = 10
CLAIMS = (5e1, 1e2, 1e4, 1e30)
SMALL = ["experiment=digits_het10", f"rounds={ROUNDS}", f"eval.every={ROUNDS}", "eval.samples=2", "figures=false",
         "display=false", "checkpoint.every=0"]  # fmt: skip
LARGEST = {"bayes_admm": 9e29, "fedavg": 10**15}  # what limits.precision and the server take in any case


class Link:
    """A SuperLink's grid, as the strategies use it, over an engine's."""

    def __init__(self, grid: InlineGrid):
        self.grid, self.replies = grid, dict[str, Message]()
        self.count = 0

    def get_nodes(self) -> list[SimpleNamespace]:
        return [SimpleNamespace(node_id=node, last_activated_at="") for node in self.grid.get_node_ids()]

    def push_messages(self, messages: Iterable[Message]) -> list[str]:
        ids = []
        for message in messages:
            self.count += 1
            ids.append(str(self.count))
            message.metadata.__dict__["_message_id"] = ids[-1]
            self.replies[ids[-1]] = next(iter(self.grid.stream([message])))
        return ids

    def pull_messages(self, ids: Iterable[str]) -> list[Message]:
        return [self.replies.pop(name) for name in ids if name in self.replies]


class Liar:
    """The app of all clients, one of which lies: ``claim`` times its weight, in the first ``rounds`` rounds."""

    def __init__(self, app: ClientApp, sizes: list[int], claim: float, rounds: int, largest: float):
        self.app, self.sizes, self.claim, self.rounds, self.largest = app, sizes, claim, rounds, largest
        self.client = sorted(range(len(sizes)), key=sizes.__getitem__)[len(sizes) // 2] if claim else -1
        self.examples = int(min(claim * sizes[self.client], largest)) if largest == 10**15 else sizes[self.client]
        self.honest: dict[int, list[float]] = {}  # by round

    def __call__(self, message: Message, context: Context) -> Message:
        reply, client = self.app(message, context), int(cast(int, context.node_config["partition-id"]))
        if message.metadata.message_type == "query":
            if client == self.client:
                reply.content["client"] = ConfigRecord({"partition-id": client, "num-examples": self.examples})
            return reply
        round = wire.value(message.content["method"], "round", int)
        record: Any = reply.content["posterior"]
        arrays = {name: torch.from_numpy(array.numpy().copy()) for name, array in record.items()}
        if client != self.client:
            share = max(1.0, self.sizes[client] / median(self.sizes))
            value = float(arrays["precision"].mean()) / share if "precision" in arrays else self.sizes[client]
            self.honest.setdefault(round, []).append(value)
        elif round <= self.rounds:
            arrays["mean"] = -arrays["mean"]
            if "precision" in arrays:
                arrays["precision"] = (arrays["precision"] * self.claim).clamp(max=self.largest)
            metrics: Any = reply.content["metrics"]
            metrics["num-examples"] = self.examples
            reply.content["posterior"] = wire.pack(arrays)
        return reply


def run(method: str, claim: float, rounds: int, limited: bool) -> dict[str, Any]:
    """One run: its accuracy in percent, or what it ended in, and how many replies were refused."""
    result: dict[str, Any] = {"method": method, "claim": claim, "rounds": rounds, "limited": limited}
    with tempfile.TemporaryDirectory() as folder:
        settings = [*SMALL, f"strategy={method}", f"hydra.run.dir={folder}/run"]
        if not limited:
            settings += ["limits.relative_precision=1e300", "limits.relative_examples=1e300"]
        with prepare(compose_config(settings), settings) as session:
            sizes = [len(client) for client in session.problem.clients]
            app = Liar(session.client_app(), sizes, claim, rounds, LARGEST[method])
            grid: Any = Link(InlineGrid(cast(ClientApp, app), session.num_clients))
            try:
                session.server_app()(grid, node_context(0, 0, session.num_clients))
                result["accuracy"] = round(session.directory.summary()["mean/accuracy"], 1)
            except Exception as error:  # what a lie ends in
                result["failed"] = f"{type(error).__name__}: {error}"[:200]
            lines = [json.loads(line) for line in (session.directory.path / "clients.jsonl").read_text().splitlines()]
            refused = [line["reason"] for line in lines if not line["accepted"]]
            honest = max(max(values) / median(values) for values in app.honest.values())
            return result | {"refused": len(refused), "reason": (refused or [""])[0], "honest": round(honest, 2)}


def main() -> None:
    """The command."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--save", type=Path)
    options = parser.parse_args()
    logging.getLogger("bayesfed").setLevel(logging.ERROR)
    torch.set_num_threads(1)
    results = []
    for method in LARGEST:
        cases = [(0.0, 0, True)]
        cases += [(claim, rounds, limited) for limited in (False, True) for claim in CLAIMS for rounds in (1, ROUNDS)]
        for case in cases:
            results.append(run(method, *case))
            print(json.dumps(results[-1]), flush=True)
    if options.save:
        options.save.write_text(json.dumps(results, indent=1) + "\n")


if __name__ == "__main__":
    main()
