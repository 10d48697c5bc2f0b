"""FedAvg with bayesfed: its configuration, strategy, messages, clients and Ray engine; evaluation, checkpoints and logs
left out.
"""

from __future__ import annotations

import os
from contextlib import suppress
from pathlib import Path

import numpy as np
from flwr.serverapp import Grid

from bayesfed import accelerate
from bayesfed.config import compose_config
from bayesfed.configured import build
from bayesfed.runs.directory import RunDirectory
from bayesfed.runs.session import Session
from benchmarks.pfl_contestants.protocol import PARAMETERS, Finished, Protocol, Turns, parse

MODEL = "_target_: benchmarks.pfl_contestants.cnn.SimpleCNN\nname: pfl_cnn\n"


class TimedSession(Session):
    """A run whose rounds wait for their turn."""

    def serve(self, grid: Grid) -> None:
        """The strategy's rounds, without what a run does after each."""
        self.turns = Turns()
        with accelerate.running("auto"):
            self.strategy.start(grid, num_rounds=10**9, callbacks=self)

    def begin_round(self, round: int, sampled: list[int]) -> None:
        """A round begins where the last one ended."""
        self.turns.next_round()

    def client_done(self, round: int, client: int, metrics: dict[str, float] | None, reason: str) -> None:
        """Every client has to count."""
        if metrics is None:
            raise RuntimeError(f"client {client} was left out: {reason}")

    def end_round(self, round: int, metrics: dict[str, float]) -> None:
        """Keep the first average, to be compared with the plain loop's."""
        if round == 1:
            np.save(self.directory.path / "ours.npy", self.strategy.posterior.mean.numpy())


def overrides(protocol: Protocol, work: Path) -> list[str]:
    """The protocol as a user of bayesfed writes it."""
    return [
        "data=npz", f"data.path={work / 'data.npz'}", "partition=iid", "model=pfl_cnn", "likelihood=categorical",
        "strategy=fedavg", f"strategy.fraction={protocol.cohort / protocol.clients}", f"seed={protocol.seed}",
        "client=sgd", f"client.lr={protocol.lr}", "client.epochs=1", f"client.batch_size={protocol.batch_size}",
        "engine=ray", f"engine.num_workers={protocol.workers}", "device=cpu", f"hydra.run.dir={work}",
    ]  # fmt: skip


def main() -> None:
    """Train whenever it is this contestant's turn."""
    args, protocol = parse(__doc__)
    os.chdir(args.work)  # where bayesfed looks for a user's own configuration
    model = args.work / "conf" / "model" / "pfl_cnn.yaml"
    model.parent.mkdir(parents=True, exist_ok=True)
    model.write_text(MODEL)
    cfg = compose_config(overrides(protocol, args.work))
    session = TimedSession(cfg)
    if (session.num_clients, session.num_parameters) != (protocol.clients, PARAMETERS):
        raise RuntimeError(f"{session.num_clients} clients, {session.num_parameters} parameters")
    session.open(RunDirectory(args.work), resumed=False)
    with suppress(Finished):
        build(cfg.engine, "engine").run(session)


if __name__ == "__main__":
    main()
