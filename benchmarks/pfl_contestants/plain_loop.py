"""FedAvg as a plain torch loop: one process, one thread, clients one after the other, nothing but the arithmetic.

With ``--part`` and ``--parts`` it trains its share of each cohort, and leaves the average of the shares out: two such
loops at the same time show what two processes on this machine can do at best. With ``--check`` it has bayesfed's
layers, whose dropout draws differently, trains one round and writes the weights: what bayesfed's must agree with.
"""

from __future__ import annotations

import numpy as np
import torch
from torch import nn

from bayesfed.accelerate.layers import quicken
from bayesfed.seeding import derive, numpy_generator, torch_generator
from benchmarks.pfl_contestants.cnn import SimpleCNN
from benchmarks.pfl_contestants.protocol import CLASSES, SHAPE, Finished, Protocol, Turns, parse


class Loop:
    """The server's weights, and a round.

    Cohorts, batches and dropout are drawn from the streams that bayesfed uses, so that the results can be compared.
    """

    def __init__(self, protocol: Protocol, x: np.ndarray, y: np.ndarray, part: int, parts: int):
        torch.manual_seed(derive(protocol.seed, "init"))
        self.model = SimpleCNN(SHAPE, CLASSES).train()
        self.weights = [p.detach() for p in self.model.parameters()]  # the same memory as the parameters
        self.server = [w.clone() for w in self.weights]
        self.x, self.y = torch.from_numpy(x), torch.from_numpy(y)
        self.protocol, self.part, self.parts, self.round = protocol, part, parts, 0

    def run_round(self) -> None:
        """Train this loop's share of the cohort and average."""
        protocol = self.protocol
        self.round += 1
        generator = numpy_generator(protocol.seed, "participants", self.round)
        cohort = sorted(generator.choice(protocol.clients, protocol.cohort, replace=False).tolist())
        mine = cohort[self.part :: self.parts]
        total = [torch.zeros_like(w) for w in self.server]
        for client in mine:
            torch._foreach_copy_(self.weights, self.server)
            self.train(client)
            torch._foreach_add_(total, self.weights)  # all clients hold equally many images
        self.server = list(torch._foreach_div(total, len(mine)))

    def train(self, client: int) -> None:
        """One epoch of a client."""
        protocol = self.protocol
        optimizer = torch.optim.SGD(self.model.parameters(), lr=protocol.lr)
        order = torch.randperm(protocol.images, generator=torch_generator(protocol.seed, "batches", client, self.round))
        torch.manual_seed(derive(protocol.seed, "dropout", client, self.round))
        for rows in (order + client * protocol.images).split(protocol.batch_size):
            optimizer.zero_grad()
            nn.functional.cross_entropy(self.model(self.x[rows]), self.y[rows]).backward()
            optimizer.step()


def main() -> None:
    """Train whenever it is this loop's turn."""
    args, protocol = parse(__doc__)
    torch.set_num_threads(1)
    loop = Loop(protocol, *protocol.read_data(args.work / "data.npz"), args.part or 0, args.parts)
    if args.check:
        quicken(loop.model)
        loop.run_round()
        np.save(args.work / "loop.npy", torch.cat([w.flatten() for w in loop.server]).numpy())
        return
    turns = Turns()
    try:
        while True:
            turns.next_round()
            loop.run_round()
    except Finished:
        pass


if __name__ == "__main__":
    main()
