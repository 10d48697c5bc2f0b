"""The server steps that are flwr's equal flwr's own aggregation of the same replies."""

from __future__ import annotations

import numpy as np
import pytest
import torch
from flwr.app import Array, ArrayRecord, Message, MessageType, MetricRecord, RecordDict
from flwr.serverapp import strategy as flower

from bayesfed.seeding import torch_generator
from strategies import FedAdagrad, FedAdam, FedAvgM, FedMedian, FedTrimmedAvg, FedYogi, Krum

CLIENTS, DIM, ROUNDS = 7, 5, 4
PAIRS = {
    "fedavgm": (FedAvgM(server_lr=0.5, momentum=0.8), flower.FedAvgM(server_learning_rate=0.5, server_momentum=0.8)),
    "fedadam": (
        FedAdam(server_lr=0.1, beta1=0.8, beta2=0.95, tau=0.01),
        flower.FedAdam(eta=0.1, beta_1=0.8, beta_2=0.95, tau=0.01),
    ),
    "fedyogi": (
        FedYogi(server_lr=0.1, beta1=0.8, beta2=0.95, tau=0.01),
        flower.FedYogi(eta=0.1, beta_1=0.8, beta_2=0.95, tau=0.01),
    ),
    "fedadagrad": (FedAdagrad(server_lr=0.1, tau=0.01), flower.FedAdagrad(eta=0.1, tau=0.01)),
    "fedmedian": (FedMedian(), flower.FedMedian()),
    "krum": (Krum(malicious=2), flower.Krum(num_malicious_nodes=2)),
    "fedtrimmedavg": (FedTrimmedAvg(trim=0.3), flower.FedTrimmedAvg(beta=0.3)),
}


class Scripted:
    """The grid that a strategy sees: a query tells sizes, a TRAIN message is answered by ``weights[round][client]``."""

    def __init__(self, weights):
        self.weights = weights

    def get_node_ids(self):
        return list(range(1, CLIENTS + 1))

    def send_and_receive(self, messages, *, timeout=None):
        from flwr.app import ConfigRecord

        replies = []
        for message in messages:
            client = message.metadata.dst_node_id - 1
            if message.metadata.message_type == "query":
                content = {"client": ConfigRecord({"partition-id": client, "num-examples": client + 1})}
            else:
                round = int(message.content["method"]["round"])
                content = {
                    "posterior": ArrayRecord({"mean": Array(self.weights[round - 1][client])}),
                    "metrics": MetricRecord({"num-examples": client + 1, "round": round}),
                }
            replies.append(Message(RecordDict(content), reply_to=message))
        return replies

    stream = send_and_receive


@pytest.mark.parametrize("name", PAIRS)
def test_iterates(name: str) -> None:
    from bayesfed.wire.flower_version import set_identity

    set_identity()
    ours, theirs = PAIRS[name]
    g = torch_generator(7)
    weights = [
        [torch.randn(DIM, generator=g, dtype=torch.float64).numpy() for _ in range(CLIENTS)] for _ in range(ROUNDS)
    ]
    ours.setup(torch.zeros(DIM, dtype=torch.float64), CLIENTS)
    current = ArrayRecord({"mean": Array(np.zeros(DIM))})
    for round in range(1, ROUNDS + 1):
        if name == "fedavgm":
            theirs.current_arrays = theirs.current_arrays or current
        else:
            theirs.current_arrays = {"mean": current["mean"].numpy()}
        messages = [
            Message(
                RecordDict({"a": ArrayRecord({"mean": Array(w)}), "m": MetricRecord({"num-examples": k + 1})}),
                0,
                MessageType.TRAIN,
            )
            for k, w in enumerate(weights[round - 1])
        ]
        current, _ = theirs.aggregate_train(round, messages)
        ours.start(Scripted(weights), num_rounds=round, first_round=round)
        found, expected = ours.posterior.mean.numpy(), current["mean"].numpy()
        assert np.abs(found - expected).max() < 1e-13 * max(1, np.abs(expected).max())
    assert np.abs(found).max() > 0.01
