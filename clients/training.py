"""What learners by mini-batches share: the settings of local training, and the loop over a round's steps."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from bayesfed import accelerate
from bayesfed.errors import Diverged, choice, integer, number
from bayesfed.federation.local import LocalProblem, Solver
from bayesfed.problem.flat import FlatModel
from bayesfed.profiling import each, inside, span
from bayesfed.schedule import Schedule


@dataclass(kw_only=True, eq=False)
class GradientSolver(Solver):
    """A solver by mini-batch gradients: a keyword-only dataclass whose fields are its settings, the keys of its YAML.

    ``solve`` puts the model at the start (:func:`begin`), builds an optimizer on the local problem and runs
    :meth:`train`.

    Args:
        lr: learning rate.
        epochs: passes over the client's data in a round.
        batch_size: examples per step.
        local_schedule: learning rate over the steps of a round.
        amp: ``bfloat16`` runs the model in mixed precision (parameters, gradients and update stay in ``dtype``);
            ``none``.

    Raises:
        InputError: a value out of range.
    """

    lr: float
    epochs: int
    batch_size: int
    local_schedule: str = "constant"
    amp: str = "none"

    def __post_init__(self) -> None:
        choice("amp", self.amp, ("none", "bfloat16"))
        optional = getattr(type(self), "lr", 0.0) is None  # a class whose default is null decides itself
        number("lr", self.lr, above=0, optional=optional)
        integer("epochs", self.epochs, at_least=1)
        integer("batch_size", self.batch_size, at_least=1)
        choice("local_schedule", self.local_schedule, Schedule.KINDS)

    def backward(self, problem: LocalProblem, x: Tensor, y: Tensor) -> Tensor:
        """The mean loss of a mini-batch at the model's parameters, detached; its gradient is in their ``grad``."""
        return problem.backward(x, y, self.amp)

    def train(self, problem: LocalProblem, optimizer: Any) -> dict[str, float]:
        """Run the steps of a round.

        Args:
            optimizer: built at the round's learning rate. One with ``sampled_params`` (:mod:`clients.optimizer`) gets
                ``mc_samples`` gradients a step, each at a sample of its posterior; any other gets one, at the
                parameters.

        Returns:
            ``loss``, the mean over the round's gradients, and ``gradient-evaluations``.

        Raises:
            Diverged: a gradient was not finite: a solution that it is missing from isn't the client's.
        """
        sampled = getattr(optimizer, "sampled_params", None)
        samples = 1 if sampled is None else optimizer.mc_samples
        rate, rates = float(optimizer.param_groups[0]["lr"]), self.rates(problem)
        take_step = accelerate.bare_step(optimizer)
        total = torch.zeros((), dtype=problem.dtype, device=problem.device)
        for step, (x, y) in enumerate(each("data", problem.batches(self.epochs, self.batch_size))):
            for _ in range(samples):
                with span("gradient") if sampled is None else inside(sampled(train=True), "sampling", "gradient"):
                    total += self.backward(problem, x, y)
            optimizer.param_groups[0]["lr"] = rate * rates(step)
            with span("update"):
                take_step()
        gradients = rates.horizon * samples
        if refused := getattr(optimizer, "refused", 0):
            fix = "use a smaller learning rate, or look at the client's data"
            raise Diverged(f"{refused} of {gradients} gradients were not finite; {fix}")
        return self.metrics(problem, float(total), samples)

    def rates(self, problem: LocalProblem) -> Schedule:
        """Factor on the learning rate over the round's steps, as many as its ``horizon``."""
        return Schedule(self.local_schedule, problem.steps(self.epochs, self.batch_size))

    def metrics(self, problem: LocalProblem, total: float, samples: int) -> dict[str, float]:
        """What :meth:`train` returns, from the sum of the losses at ``samples`` points a step."""
        return {
            "loss": total / (problem.steps(self.epochs, self.batch_size) * samples),
            "gradient-evaluations": problem.examples_seen(self.epochs, self.batch_size) * samples,
        }


def begin(problem: LocalProblem) -> FlatModel:
    """The problem's model at the point where the round starts, in training mode, without gradients."""
    model = problem.model
    model.load(problem.start())
    model.module.train()
    model.drop_grad()
    return model
