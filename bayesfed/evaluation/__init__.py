"""What a posterior is worth: predictive distributions and their scores."""

from bayesfed.evaluation.clients import evaluate_clients, fairness
from bayesfed.evaluation.ood import ood_auroc
from bayesfed.evaluation.predictive import evaluate, predict

__all__ = ["evaluate", "evaluate_clients", "fairness", "ood_auroc", "predict"]
