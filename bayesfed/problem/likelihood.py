"""Likelihoods p(y | f(x)): what a model's outputs mean."""

from __future__ import annotations

import math
from abc import ABC, abstractmethod

import numpy as np
import torch
import torch.nn.functional as F
from torch import Tensor

from bayesfed.errors import InputError, number


class Likelihood(ABC):
    """Stateless; losses are in nats."""

    name: str

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


class Categorical(Likelihood):
    """Class labels 0..C-1; the model gives logits (B, C)."""

    name = "categorical"

    def targets(self, y: np.ndarray) -> np.ndarray:
        if y.ndim != 1:
            raise InputError("likelihood", self.name, f"needs one label per example, y has shape {y.shape}")
        if y.dtype.kind not in "iub" and (y.dtype.kind != "f" or (y != np.floor(y)).any()):
            bad = int(np.argmax(y != np.floor(y))) if y.dtype.kind == "f" else 0
            fix = f"needs whole-number labels, y of row {bad} is {y[bad]}; for regression use likelihood=gaussian"
            raise InputError("likelihood", self.name, fix)
        labels = y.astype(np.int64)
        if (labels < 0).any():
            bad = int(np.argmax(labels < 0))
            found = ",".join(map(str, np.unique(labels)[:11]))
            given = f"[{found}]" if found.count(",") < 10 else "[...]"
            fix = f"needs labels 0..C-1, y of row {bad} is {labels[bad]}: name them in order with data.classes={given}"
            raise InputError("likelihood", self.name, fix)
        return labels

    def num_outputs(self, y: Tensor | np.ndarray) -> int:
        return int(y.max()) + 1

    loss = staticmethod(F.cross_entropy)  # type: ignore[assignment]

    def losses(self, outputs: Tensor, y: Tensor) -> Tensor:
        return F.cross_entropy(outputs, y, reduction="none")


class Gaussian(Likelihood):
    """Real targets with known noise: -log N(y | f, 1/precision), constants included, summed over the D outputs.

    Args:
        precision: of the noise, > 0 (1 / variance, in units of the target).

    Raises:
        InputError: if ``precision`` is not a positive finite number.
    """

    name = "gaussian"

    def __init__(self, precision: float = 1.0):
        number("precision", precision, above=0)
        self.precision = float(precision)

    def targets(self, y: np.ndarray) -> np.ndarray:
        if y.dtype.kind != "f":
            fix = "needs float targets, y holds integers; for classes use likelihood=categorical, else store y as float"
            raise InputError("likelihood", self.name, fix)
        if y.ndim not in (1, 2) or 0 in y.shape:
            raise InputError("likelihood", self.name, f"needs y of shape (N,) or (N, D), got {y.shape}")
        return y.astype(np.float32 if y.itemsize <= 4 else np.float64, copy=False)

    def num_outputs(self, y: Tensor | np.ndarray) -> int:
        return 1 if y.ndim == 1 else int(y.shape[1])

    def loss(self, outputs: Tensor, y: Tensor) -> Tensor:
        return self._nll(self._squares(outputs, y).mean(), outputs)

    def losses(self, outputs: Tensor, y: Tensor) -> Tensor:
        return self._nll(self._squares(outputs, y), outputs)

    @staticmethod
    def _squares(outputs: Tensor, y: Tensor) -> Tensor:
        """Squared error of each example, (B,)."""
        if outputs.numel() != y.numel():  # (B, D) - (B,) would broadcast silently
            raise ValueError(f"outputs {tuple(outputs.shape)} do not match targets {tuple(y.shape)}")
        return torch.square(outputs - y.reshape(outputs.shape)).flatten(1).sum(1)

    def _nll(self, squares: Tensor, outputs: Tensor) -> Tensor:
        dims = outputs[0].numel()
        return 0.5 * self.precision * squares + 0.5 * dims * math.log(2 * math.pi / self.precision)
