"""Whether the predictive is less sure on inputs of another kind."""

from __future__ import annotations

import math

import torch
from torch import Tensor

from bayesfed.errors import InputError
from bayesfed.evaluation.inputs import EvaluationSet, input_batches
from bayesfed.evaluation.outputs import Posterior, parameter_draws
from bayesfed.evaluation.predictive import predict
from bayesfed.problem.flat import FlatModel
from bayesfed.problem.likelihood import Likelihood


def ood_auroc(
    model: FlatModel,
    posterior: Posterior,
    inside: EvaluationSet,
    outside: EvaluationSet,
    likelihood: Likelihood,
    *,
    samples: int,
    generator: torch.Generator,
    batch_size: int | None = None,
    at_once: int | None = None,
) -> dict[str, float]:
    """AUROC in percent of telling ``outside`` from ``inside`` by the entropy of the predictive (50 = chance, 100 = always).

    Args:
        model: its parameters are the posterior mean afterwards.
        posterior: a member of ``bayesfed.families``.
        inside: test examples.
        outside: examples of another distribution.
        likelihood: of classes.
        samples, generator, batch_size, at_once: see :func:`bayesfed.evaluation.evaluate`.

    Returns:
        ``mean`` and ``bayes`` (model-averaged): equal for a point mass.

    Raises:
        InputError: a regression.
    """
    from torchmetrics.functional.classification import binary_auroc  # slow to import

    if not likelihood.classes:
        raise InputError("eval.ood", likelihood.name, "predictive entropy needs classes (likelihood=categorical)")
    sets = [input_batches(model, examples, batch_size) for examples in (inside, outside)]
    target = torch.cat([torch.zeros(len(inside), dtype=torch.long), torch.ones(len(outside), dtype=torch.long)])
    found: dict[str, float] = {}
    try:
        for kind, count in (("mean", 0), ("bayes", samples)):
            if kind == "bayes" and (posterior.is_point or samples == 0):
                found[kind] = found["mean"]
                continue
            draws = list(parameter_draws(posterior, count, generator)) if count else [posterior.mean]
            predictives = [predict(model, draws, inputs, likelihood, at_once=at_once) for inputs in sets]
            scores = torch.cat([entropy(predictive["log_probabilities"]) for predictive in predictives])
            found[kind] = 100 * binary_auroc(scores, target).item() if scores.isfinite().all() else math.nan
    finally:
        model.load(posterior.mean)
    return found


def entropy(log_probabilities: Tensor) -> Tensor:
    """Entropy (N,) of class probabilities (N, C), relative to the largest possible, so in [0, 1]."""
    values = -(log_probabilities.exp() * log_probabilities.clamp_min(-1e300)).sum(1)
    return (values / math.log(log_probabilities.shape[1])).clamp(0, 1)
