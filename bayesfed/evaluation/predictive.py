"""Predictive distributions: at the posterior mean and by Bayesian model averaging.

Bayesian model averaging averages *probabilities* (or densities) over draws of the parameters,

    p(y | x) = 1/S sum_s p(y | f(x; theta_s)),   theta_s ~ q,

not outputs. The likelihood sums them, in log space and in float64.
"""

from __future__ import annotations

from collections.abc import Iterable

import torch
from torch import Tensor

from bayesfed.evaluation.inputs import EvaluationSet, InputBatches, input_batches
from bayesfed.evaluation.outputs import Posterior, Progress, evaluation_mode, outputs, parameter_draws
from bayesfed.problem.flat import FlatModel
from bayesfed.problem.likelihood import Likelihood, Predictive


def predict(
    model: FlatModel,
    draws: Iterable[Tensor],
    inputs: InputBatches,
    likelihood: Likelihood,
    y: Tensor | None = None,
    at_once: int | None = None,
) -> Predictive:
    """The predictive averaged over ``draws``.

    Args:
        model: it is left at the last draw.
        draws: parameter vectors of shape (P,).
        inputs: N scaled inputs.
        likelihood: says what the outputs mean.
        y: N targets, where the predictive is to be scored.
        at_once: see :func:`outputs`.
    """
    with evaluation_mode(model):
        return likelihood.predictive(outputs(model, draws, inputs, at_once, likelihood.transform), y)


def evaluate(
    model: FlatModel,
    posterior: Posterior,
    examples: EvaluationSet,
    likelihood: Likelihood,
    *,
    samples: int,
    generator: torch.Generator,
    batch_size: int | None = None,
    bayes: bool = True,
    at_once: int | None = None,
    progress: Progress | None = None,
    predictions: dict[str, Predictive] | None = None,
) -> dict[str, float]:
    """Score the predictive at the posterior mean and by Bayesian model averaging.

    Args:
        model: the model; its parameters are the posterior mean afterwards, its train/eval mode is unchanged.
        posterior: a member of ``bayesfed.families``.
        examples: N test examples.
        likelihood: makes the predictive and scores it.
        samples: posterior draws S of the average (0: the mean).
        generator: where the draws come from.
        batch_size: examples in one forward pass; None is 512 on a CPU, 2048 elsewhere.
        bayes: also score the average. Under a point mass it is the prediction at the mean and costs nothing.
        at_once: draws evaluated together, see :func:`outputs`.
        progress: see :func:`parameter_draws`.
        predictions: gets what is scored, as ``mean`` and, if it is another, ``bayes``.

    Returns:
        the likelihood's scores as ``mean/...`` and, with ``bayes``, as ``bayes/...``.
    """
    inputs = input_batches(model, examples, batch_size)
    y = examples.targets().cpu()
    predictives = {} if predictions is None else predictions

    def scores(kind: str, draws: int) -> dict[str, float]:
        thetas = parameter_draws(posterior, draws, generator, progress)
        predictives[kind] = predict(model, thetas, inputs, likelihood, y, at_once)
        return likelihood.scores(predictives[kind], y)

    try:
        at_mean = scores("mean", 0)
        averaged = {}
        if bayes:
            averaged = at_mean if samples == 0 or posterior.is_point else scores("bayes", samples)
    finally:
        model.load(posterior.mean)
    return {f"mean/{k}": v for k, v in at_mean.items()} | {f"bayes/{k}": v for k, v in averaged.items()}
