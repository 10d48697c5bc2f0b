"""What a posterior is worth: predictive distributions, their scores, and the probes that a run takes of them."""

from bayesfed.evaluation.predictive import evaluate, predict

__all__ = ["evaluate", "predict"]
