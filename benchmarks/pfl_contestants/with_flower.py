"""FedAvg with Flower: its own strategy, messages and simulation runtime, as its documentation shows."""

from __future__ import annotations

from functools import lru_cache
from pathlib import Path
from typing import Any

import torch
from flwr.app import ArrayRecord, ConfigRecord, Context, Message, MetricRecord, RecordDict
from flwr.clientapp import ClientApp
from flwr.serverapp import Grid, ServerApp
from flwr.serverapp.strategy import FedAvg
from flwr.simulation import run_simulation
from torch import Tensor, nn

from benchmarks.pfl_contestants.cnn import SimpleCNN
from benchmarks.pfl_contestants.protocol import CLASSES, SHAPE, Protocol, Turns, parse


@lru_cache
def resources(work: Path) -> tuple[nn.Module, Tensor, Tensor]:
    """Model and data of this process."""
    torch.set_num_threads(1)
    x, y = Protocol.read_data(work / "data.npz")
    return SimpleCNN(SHAPE, CLASSES), torch.from_numpy(x), torch.from_numpy(y)


def train(message: Message, context: Context, protocol: Protocol, work: Path) -> Message:
    """One epoch of a client."""
    model, x, y = resources(work)
    model.load_state_dict(message.content.array_records["arrays"].to_torch_state_dict())
    model.train()
    optimizer = torch.optim.SGD(model.parameters(), lr=protocol.lr)
    first = int(context.node_config["partition-id"]) * protocol.images
    for rows in (torch.randperm(protocol.images) + first).split(protocol.batch_size):
        optimizer.zero_grad()
        nn.functional.cross_entropy(model(x[rows]), y[rows]).backward()
        optimizer.step()
    metrics = MetricRecord({"num-examples": protocol.images})
    return Message(RecordDict({"arrays": ArrayRecord(model.state_dict()), "metrics": metrics}), reply_to=message)


class TimedFedAvg(FedAvg):
    """Flower's FedAvg, whose rounds wait for their turn."""

    turns: Turns

    def configure_train(self, server_round: int, arrays: ArrayRecord, config: ConfigRecord, grid: Grid):
        """A round begins where the last one ended."""
        self.turns.next_round()
        return super().configure_train(server_round, arrays, config, grid)

    def aggregate_train(self, server_round: int, replies):
        """Every client has to count."""
        replies = list(replies)
        for reply in replies:
            if reply.has_error():
                raise RuntimeError(reply.error.reason)
        return super().aggregate_train(server_round, replies)


def main() -> None:
    """Train whenever it is this contestant's turn."""
    args, protocol = parse(__doc__)
    turns = Turns()
    client, server = ClientApp(), ServerApp()

    @client.train()
    def train_client(message: Message, context: Context) -> Message:
        from benchmarks.pfl_contestants import (
            with_flower,  # by name: in this process it is __main__, and would travel by value
        )

        return with_flower.train(message, context, protocol, args.work)

    @server.main()
    def serve(grid: Grid, context: Context) -> None:
        torch.manual_seed(protocol.seed)
        strategy = TimedFedAvg(
            fraction_train=protocol.cohort / protocol.clients,
            min_train_nodes=protocol.cohort,
            min_available_nodes=protocol.clients,
            fraction_evaluate=0.0,
        )
        strategy.turns = turns
        arrays = ArrayRecord(SimpleCNN(SHAPE, CLASSES).state_dict())
        strategy.start(grid, arrays, num_rounds=10**9)

    backend: dict[str, dict[str, Any]] = {
        "client_resources": {"num_cpus": 1, "num_gpus": 0.0},
        "init_args": {"num_cpus": protocol.workers},
    }
    run_simulation(server, client, protocol.clients, backend_config=backend)


if __name__ == "__main__":
    main()
