"""What a likelihood is."""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Iterable
from typing import Any, ClassVar

import numpy as np
import torch
from torch import Tensor

from bayesfed import scores
from bayesfed.scores import Score

Predictive = dict[str, Tensor]  # float64 tensors on the CPU by name, each with one row an example


class Likelihood(ABC):
    """Stateless; losses are in nats.

    Attributes:
        name: as ``likelihood=NAME`` gives it.
        measures: what :meth:`scores` gives, the one that counts first.
        classes: whether targets are class labels. Then a predictive has ``log_probabilities`` (N, C), which
            calibration diagrams and
            out-of-distribution scores are made of.
    """

    name: str
    measures: ClassVar[tuple[Score, ...]] = ()
    classes: ClassVar[bool] = False

    def __init_subclass__(cls, **options: Any):
        super().__init_subclass__(**options)
        scores.register(cls.measures)

    @abstractmethod
    def targets(self, y: np.ndarray) -> np.ndarray:
        """``y`` as this likelihood wants it (int64 labels or float targets).

        Raises:
            InputError: on targets it cannot score, naming the first bad row.
        """

    @abstractmethod
    def num_outputs(self, y: Tensor | np.ndarray) -> int:
        """How many outputs a model needs for targets ``y`` (N,) or (N, D)."""

    @abstractmethod
    def loss(self, outputs: Tensor, y: Tensor) -> Tensor:
        """Mean negative log likelihood over the batch, a scalar; ``outputs`` is (B, num_outputs)."""

    def losses(self, outputs: Tensor, y: Tensor) -> Tensor:
        """Negative log likelihood of each example, (B,), whose mean :meth:`loss` is."""
        return torch.vmap(lambda output, target: self.loss(output[None], target[None]))(outputs, y)

    def transform(self, outputs: Tensor) -> Tensor:
        """What :meth:`predictive` gets of a model's outputs (..., num_outputs), row by row: they themselves, or log
        probabilities."""
        return outputs

    @abstractmethod
    def predictive(self, draws: Iterable[Tensor], y: Tensor | None = None) -> Predictive:
        """The predictive averaged over draws of the parameters: of probabilities or densities, not of outputs.

        Args:
            draws: for each draw :meth:`transform` of the outputs for all N examples, (N, ...) in float64 on the CPU.
                They are made
                while they are read: add them up as they come.
            y: (N,) or (N, D) targets, where the predictive is to be scored.

        Raises:
            ValueError: there are no draws.
        """

    @abstractmethod
    def scores(self, predictive: Predictive, y: Tensor) -> dict[str, float]:
        """The :attr:`measures` of a predictive made with ``y``, or of some of its rows and these rows' targets."""

    @abstractmethod
    def answer(self, predictive: Predictive) -> Tensor | tuple[Tensor, ...]:
        """What ``bayesfed.load(run).predict`` gives."""
