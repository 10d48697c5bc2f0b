"""What a posterior is worth: metrics and predictive distributions."""

from bayesfed.evaluation.clients import evaluate_clients, fairness
from bayesfed.evaluation.metrics import calibration_bins, classification_scores, regression_scores
from bayesfed.evaluation.ood import ood_auroc
from bayesfed.evaluation.predictive import evaluate, reliability

__all__ = [
    "calibration_bins",
    "classification_scores",
    "evaluate",
    "evaluate_clients",
    "fairness",
    "ood_auroc",
    "regression_scores",
    "reliability",
]
