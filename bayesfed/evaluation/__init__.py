"""What a posterior is worth: metrics and predictive distributions."""

from bayesfed.evaluation.metrics import calibration_bins, classification_scores, regression_scores
from bayesfed.evaluation.predictive import evaluate, reliability

__all__ = ["calibration_bins", "classification_scores", "evaluate", "regression_scores", "reliability"]
