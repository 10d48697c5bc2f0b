"""Classes."""

from __future__ import annotations

import math
from collections.abc import Iterable
from typing import ClassVar

import numpy as np
import torch
import torch.nn.functional as F
from torch import Tensor

from bayesfed.errors import InputError
from bayesfed.problem.likelihood.base import Likelihood, Predictive
from bayesfed.problem.likelihood.metrics import classification_scores
from bayesfed.scores import ACCURACY, BRIER, ECE, NLL, Score


class Categorical(Likelihood):
    """Class labels 0..C-1; the model gives logits (B, C)."""

    name = "categorical"
    measures: ClassVar[tuple[Score, ...]] = (ACCURACY, NLL, ECE, BRIER)
    classes: ClassVar[bool] = True

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
            listed = ",".join(map(str, np.unique(labels)[:11]))
            names = f"[{listed}]" if listed.count(",") < 10 else "[...]"
            fix = f"needs labels 0..C-1, y of row {bad} is {labels[bad]}: name them in order with data.classes={names}"
            raise InputError("likelihood", self.name, fix)
        return labels

    def num_outputs(self, y: Tensor | np.ndarray) -> int:
        return int(y.max()) + 1

    loss = staticmethod(F.cross_entropy)  # type: ignore[assignment]

    def losses(self, outputs: Tensor, y: Tensor) -> Tensor:
        return F.cross_entropy(outputs, y, reduction="none")

    def transform(self, outputs: Tensor) -> Tensor:
        return outputs.log_softmax(-1)

    def predictive(self, draws: Iterable[Tensor], y: Tensor | None = None) -> Predictive:
        """``log_probabilities`` (N, C): the log of the probabilities averaged over draws."""
        total: Tensor | None = None
        count = 0
        for logs in draws:
            total = logs if total is None else torch.logaddexp(total, logs)
            count += 1
        if total is None:
            raise ValueError("no parameters to predict with")
        return {"log_probabilities": total - math.log(count)}

    def scores(self, predictive: Predictive, y: Tensor) -> dict[str, float]:
        return classification_scores(predictive["log_probabilities"], y)

    def answer(self, predictive: Predictive) -> Tensor:
        """(N, C) probabilities."""
        return predictive["log_probabilities"].exp()
