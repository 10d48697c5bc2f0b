"""Metrics against hand computations and torchmetrics."""

import math

import pytest
import torch

from bayesfed.problem.likelihood.metrics import calibration_bins, classification_scores, regression_scores


def test_scores_of_a_hand_made_example():
    probabilities = torch.tensor([[0.9, 0.1], [0.8, 0.2], [0.3, 0.7], [0.55, 0.45]], dtype=torch.float64)
    y = torch.tensor([0, 1, 1, 0])
    scores = classification_scores(probabilities.log(), y)
    assert scores["accuracy"] == 75.0
    assert scores["nll"] == pytest.approx(-(math.log(0.9) + math.log(0.2) + math.log(0.7) + math.log(0.55)) / 4)
    # four confidences in four bins: gaps |1-0.9|, |0-0.8|, |1-0.7|, |1-0.55|, each weighing 1/4
    assert scores["ece"] == pytest.approx(100 * (0.1 + 0.8 + 0.3 + 0.45) / 4)
    assert scores["brier"] == pytest.approx((2 * 0.1**2 + 2 * 0.8**2 + 2 * 0.3**2 + 2 * 0.45**2) / 4)


def test_examples_of_one_bin_are_averaged_before_the_gap_is_taken():
    probabilities = torch.tensor([[0.81, 0.19], [0.85, 0.15]], dtype=torch.float64)  # both in (12/15, 13/15]
    scores = classification_scores(probabilities.log(), torch.tensor([0, 1]))
    assert scores["ece"] == pytest.approx(100 * abs(0.5 - 0.83))


def test_bins_are_closed_on_the_right_and_hold_certainty():
    probabilities = torch.tensor([[1.0, 0.0], [0.5, 0.5], [0.75, 0.25], [0.76, 0.24]], dtype=torch.float64)
    confidence, accuracy, count = calibration_bins(probabilities, torch.tensor([0, 0, 0, 1]), bins=4)
    assert count.tolist() == [0, 1, 1, 2]
    assert confidence[1:].tolist() == pytest.approx([0.5, 0.75, 0.88])
    assert accuracy[1:].tolist() == [1.0, 1.0, 0.5]
    assert confidence[0].isnan()
    assert accuracy[0].isnan()


def test_agrees_with_torchmetrics():
    functional = pytest.importorskip("torchmetrics.functional.classification")
    generator = torch.Generator().manual_seed(0)
    logits = 3 * torch.randn(500, 7, generator=generator, dtype=torch.float64)
    y = torch.randint(7, (500,), generator=generator)
    scores = classification_scores(logits.log_softmax(1), y)
    probabilities = logits.softmax(1)
    ece = functional.multiclass_calibration_error(probabilities, y, num_classes=7, n_bins=15, norm="l1")
    accuracy = functional.multiclass_accuracy(probabilities, y, num_classes=7, average="micro")
    assert scores["ece"] == pytest.approx(100 * ece.item(), rel=1e-6)
    assert scores["accuracy"] == pytest.approx(100 * accuracy.item(), rel=1e-6)
    assert scores["nll"] == pytest.approx(torch.nn.functional.cross_entropy(logits, y).item(), rel=1e-12)


def test_a_diverged_model_scores_nan_instead_of_a_number():
    logs = torch.full((3, 2), math.nan, dtype=torch.float64)
    assert all(math.isnan(v) for v in classification_scores(logs, torch.zeros(3, dtype=torch.int64)).values())


def test_regression_scores():
    mean = torch.tensor([[1.0], [2.0]], dtype=torch.float64)
    y = torch.tensor([[1.0], [4.0]], dtype=torch.float64)
    scores = regression_scores(mean, torch.tensor([-1.0, -2.0], dtype=torch.float64), y)
    assert scores == {"rmse": pytest.approx(math.sqrt(2)), "nll": 1.5}
