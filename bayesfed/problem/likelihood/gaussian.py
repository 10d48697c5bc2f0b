"""Regression with known noise."""

from __future__ import annotations

import math
from collections.abc import Iterable
from typing import ClassVar

import numpy as np
import torch
from torch import Tensor

from bayesfed.errors import InputError, number
from bayesfed.problem.likelihood.base import Likelihood, Predictive
from bayesfed.problem.likelihood.metrics import regression_scores
from bayesfed.scores import NLL, RMSE, Score


class Gaussian(Likelihood):
    """Real targets with known noise: -log N(y | f, 1/precision), constants included, summed over the D outputs.

    Args:
        precision: of the noise, > 0 (1 / variance, in units of the target).

    Raises:
        InputError: if ``precision`` is not a positive finite number.
    """

    name = "gaussian"
    measures: ClassVar[tuple[Score, ...]] = (RMSE, NLL)

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

    def predictive(self, draws: Iterable[Tensor], y: Tensor | None = None) -> Predictive:
        """``mean`` and ``variance`` (N, D) of ``1/S sum_s N(y | f_s, 1/precision)``, and its ``log_density`` (N,) at
        ``y``.

        The variance is that of the function over draws, which divides by S - 1 (an unbiased estimate of the variance
        under the
        posterior; with one draw there is none), plus that of the noise.
        """
        count = 0
        mean = squares = torch.zeros(())
        log_density: Tensor | None = None
        for outputs in draws:
            f = outputs.flatten(1)
            count += 1
            if count == 1:
                mean, squares = f.clone(), torch.zeros_like(f)
            else:  # Welford's update: no cancellation when the spread is small against the mean
                change = f - mean
                mean = mean + change / count
                squares = squares + change * (f - mean)
            if y is not None:
                errors = (f - y.to("cpu", torch.float64).reshape(f.shape)).square().sum(1)
                logs = 0.5 * f.shape[1] * math.log(self.precision / (2 * math.pi)) - 0.5 * self.precision * errors
                log_density = logs if log_density is None else torch.logaddexp(log_density, logs)
        if count == 0:
            raise ValueError("no parameters to predict with")
        moments = {"mean": mean, "variance": squares / max(count - 1, 1) + 1 / self.precision}
        return moments if log_density is None else {**moments, "log_density": log_density - math.log(count)}

    def scores(self, predictive: Predictive, y: Tensor) -> dict[str, float]:
        mean = predictive["mean"]
        return regression_scores(mean, predictive["log_density"], y.reshape(mean.shape))

    def answer(self, predictive: Predictive) -> tuple[Tensor, Tensor]:
        """Mean and variance of the target, noise included, each (N,) for one output and (N, D) for D > 1."""
        mean, variance = predictive["mean"], predictive["variance"]
        return (mean[:, 0], variance[:, 0]) if mean.shape[1] == 1 else (mean, variance)

    @staticmethod
    def _squares(outputs: Tensor, y: Tensor) -> Tensor:
        """Squared error of each example, (B,)."""
        if outputs.numel() != y.numel():  # (B, D) - (B,) would broadcast silently
            raise ValueError(f"outputs {tuple(outputs.shape)} do not match targets {tuple(y.shape)}")
        return torch.square(outputs - y.reshape(outputs.shape)).flatten(1).sum(1)

    def _nll(self, squares: Tensor, outputs: Tensor) -> Tensor:
        dims = outputs[0].numel()
        return 0.5 * self.precision * squares + 0.5 * dims * math.log(2 * math.pi / self.precision)
