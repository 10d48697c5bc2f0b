"""Scores of predictive distributions, from arrays that already hold one row per test example."""

from __future__ import annotations

import math
from collections.abc import Mapping
from typing import Any

import torch
from torch import Tensor

ECE_BINS = 15


def classification_scores(log_probabilities: Tensor, y: Tensor, bins: int = ECE_BINS) -> dict[str, float]:
    """Accuracy, NLL, ECE and Brier score of class probabilities.

    Args:
        log_probabilities: (N, C) float64 log predictive probabilities, normalized over classes.
        y: (N,) int64 labels.
        bins: number of equal-width confidence bins of the ECE.

    Returns:
        ``accuracy`` and ``ece`` in percent, ``nll`` in nats per example, and ``brier``, the mean over examples of
        ``sum_c (p_c - 1[y = c])^2`` (0 to 2). All NaN if a probability is NaN.
    """
    if torch.isnan(log_probabilities).any():
        return dict.fromkeys(("accuracy", "nll", "ece", "brier"), math.nan)
    probabilities = log_probabilities.exp()
    correct = log_probabilities.argmax(1) == y
    of_label = log_probabilities.gather(1, y[:, None])
    # sum_c (p_c - 1[y=c])^2 = sum_c p_c^2 - 2 p_y + 1 needs no one-hot matrix
    brier = (probabilities.square().sum(1) - 2 * of_label.exp()[:, 0] + 1).mean()
    return {
        "accuracy": 100 * correct.double().mean().item(),
        "nll": -of_label.mean().item(),
        "ece": expected_calibration_error(probabilities, y, bins),
        "brier": brier.item(),
    }


def regression_scores(mean: Tensor, log_density: Tensor, y: Tensor) -> dict[str, float]:
    """RMSE of the predictive mean and NLL of the predictive density.

    Args:
        mean: (N, D) predictive means.
        log_density: (N,) log predictive density of each example's target.
        y: (N, D) targets.

    Returns:
        ``rmse``, over all N * D entries and in the units of ``y``, and ``nll`` in nats per example.
    """
    return {
        "rmse": (mean - y.to(mean.dtype)).square().mean().sqrt().item(),
        "nll": -log_density.mean().item(),
    }


def calibration_bins(probabilities: Tensor, y: Tensor, bins: int = ECE_BINS) -> tuple[Tensor, Tensor, Tensor]:
    """Examples grouped by the confidence (largest probability) of their prediction.

    Bin m of M holds the confidences in ``((m - 1) / M, m / M]`` (Guo et al. 2017, On Calibration of Modern Neural
    Networks, section 2).

    Args:
        probabilities: (N, C) predictive probabilities.
        y: (N,) labels.
        bins: the number M of equal-width bins.

    Returns:
        Three (M,) float64 tensors: mean confidence, accuracy (both in [0, 1], NaN in an empty bin) and count.
    """
    confidence, prediction = probabilities.double().max(1)
    position = ((confidence * bins).ceil().long() - 1).clamp(0, bins - 1)
    count = torch.bincount(position, minlength=bins).double()
    correct = (prediction == y).double()
    return (
        torch.bincount(position, weights=confidence, minlength=bins) / count,
        torch.bincount(position, weights=correct, minlength=bins) / count,
        count,
    )


def expected_calibration_error(probabilities: Tensor, y: Tensor, bins: int = ECE_BINS) -> float:
    """ECE in percent: mean distance of accuracy and confidence over the bins, weighted by their counts."""
    confidence, accuracy, count = calibration_bins(probabilities, y, bins)
    gaps = (count * (accuracy - confidence).abs()).nan_to_num(nan=0.0)
    return 100 * (gaps.sum() / count.sum()).item()


def reliability(predictions: Mapping[str, Mapping[str, Tensor]], y: Tensor, bins: int = ECE_BINS) -> dict[str, Any]:
    """Confidence and accuracy per confidence bin, for a reliability diagram.

    Args:
        predictions: predictives of classes by name, as :func:`bayesfed.evaluation.evaluate` hands them out.
        y: (N,) labels.
        bins: the number M of equal-width bins.

    Returns:
        ``{"bins": M, "mean": {"confidence": [...], "accuracy": [...], "count": [...]}, ...}``, plain JSON: one entry
        for every
        prediction; fractions in [0, 1], None in empty bins.
    """
    diagram: dict[str, Any] = {"bins": bins}
    for kind, predictive in predictions.items():
        confidence, accuracy, count = calibration_bins(predictive["log_probabilities"].exp(), y, bins)
        diagram[kind] = {
            "confidence": [None if math.isnan(v) else v for v in confidence.tolist()],
            "accuracy": [None if math.isnan(v) else v for v in accuracy.tolist()],
            "count": [int(c) for c in count.tolist()],
        }
    return diagram
