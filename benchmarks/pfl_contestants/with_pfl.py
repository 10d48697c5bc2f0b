"""FedAvg with pfl-research: its algorithm, model and simulation backend, put together as in its benchmark; under
torchrun.
"""

from __future__ import annotations

from contextlib import suppress

import numpy as np
import torch
from pfl.aggregate.simulate import SimulatedBackend
from pfl.aggregate.weighting import WeightByUser
from pfl.algorithm.base import NNAlgorithmParams
from pfl.algorithm.federated_averaging import FederatedAveraging
from pfl.callback.base import TrainingProcessCallback
from pfl.data.federated_dataset import FederatedDataset
from pfl.data.sampling import get_user_sampler
from pfl.hyperparam import NNTrainHyperParams
from pfl.internal.ops import pytorch_ops
from pfl.metrics import Metrics, Weighted
from pfl.model.pytorch import PyTorchModel
from torch import Tensor, nn

from benchmarks.pfl_contestants.cnn import SimpleCNN
from benchmarks.pfl_contestants.protocol import CLASSES, SHAPE, Finished, Turns, parse


class Module(SimpleCNN):
    """With the methods pfl asks for."""

    def loss(self, x: Tensor, y: Tensor) -> Tensor:
        """Mean loss of a batch."""
        return nn.functional.cross_entropy(self.train()(x), y)

    def metrics(self, x: Tensor, y: Tensor) -> dict[str, Weighted]:
        """Of the clients of the first round, which pfl always evaluates; it belongs to the warm-up."""
        with torch.no_grad():
            return {"loss": Weighted(len(x) * float(self.loss(x, y)), len(x))}


class Wait(TrainingProcessCallback):
    """Rounds wait for their turn; all ranks go on together."""

    def __init__(self) -> None:
        self.turns = Turns() if pytorch_ops.distributed.global_rank == 0 else None

    def on_train_begin(self, *, model: PyTorchModel) -> Metrics:
        """The first round."""
        self._wait()
        return Metrics()

    def after_central_iteration(
        self, aggregate_metrics: Metrics, model: PyTorchModel, *, central_iteration: int
    ) -> tuple[bool, Metrics]:
        """A round begins where the last one ended."""
        self._wait()
        return False, Metrics()

    def _wait(self) -> None:
        if self.turns is not None:
            self.turns.next_round()
        torch.distributed.barrier()


def main() -> None:
    """Train whenever it is this contestant's turn."""
    args, protocol = parse(__doc__)
    torch.set_num_threads(1)
    wait = Wait()
    np.random.seed(protocol.seed)  # noqa: NPY002 - what pfl draws cohorts from
    torch.manual_seed(protocol.seed)
    module = Module(SHAPE, CLASSES)
    x, y = map(torch.from_numpy, protocol.read_data(args.work / "data.npz"))
    users = [(a, b) for a, b in zip(x.split(protocol.images), y.split(protocol.images), strict=True)]
    training = FederatedDataset.from_slices(users, get_user_sampler("random", range(protocol.clients)))
    model = PyTorchModel(module, torch.optim.SGD, torch.optim.SGD(module.parameters(), lr=1.0))
    with suppress(Finished):
        FederatedAveraging().run(
            algorithm_params=NNAlgorithmParams(
                central_num_iterations=10**9,
                evaluation_frequency=10**9,
                train_cohort_size=protocol.cohort,
                val_cohort_size=0,
            ),
            backend=SimulatedBackend(training, training, [WeightByUser()]),
            model=model,
            model_train_params=NNTrainHyperParams(
                local_learning_rate=protocol.lr, local_num_epochs=1, local_batch_size=protocol.batch_size
            ),
            callbacks=[wait],
        )


if __name__ == "__main__":
    main()
