"""Whether the predictive is less sure on inputs of another kind."""

from __future__ import annotations

import math
from collections.abc import Mapping
from dataclasses import dataclass, replace
from typing import Any

import torch
from torch import Tensor

from bayesfed.composing import options, without_values
from bayesfed.configured import GROUPS, build, naming, plain_section
from bayesfed.errors import InputError, choice
from bayesfed.evaluation.inputs import EvaluationSet, input_batches
from bayesfed.evaluation.outputs import Posterior, parameter_draws
from bayesfed.evaluation.predictive import predict
from bayesfed.evaluation.probes.base import PredictiveProbe, Subject
from bayesfed.problem import Examples, Problem
from bayesfed.problem.data.source import Source
from bayesfed.problem.flat import FlatModel
from bayesfed.problem.inputs import scalable, shape_of, tensors
from bayesfed.problem.likelihood import Likelihood
from bayesfed.seeding import global_generators, torch_generator

BUILT_IN = ("noise", "inverted")  # inputs that need no other data


@dataclass(kw_only=True)
class OutOfDistribution(PredictiveProbe):
    """``ood/auroc_mean`` and ``ood/auroc_bayes`` after the last round.

    Args:
        ood: ``noise``, ``inverted`` or the name of a data group, see :func:`ood_examples`; None = not measured.
    """

    ood: str | None = None

    def __post_init__(self) -> None:
        super().__post_init__()
        if self.ood is not None:
            choice("ood", self.ood, [*BUILT_IN, *options("data")])

    def begin(self, subject: Subject) -> None:
        super().begin(subject)
        if self.ood is None:
            return
        if self.ood == subject.data:
            raise InputError("eval.ood", self.ood, "is what the model is trained on; name another data set")
        named = None if self.ood in BUILT_IN else plain_section(without_values([f"data={self.ood}"], GROUPS)["data"])
        self._outside = ood_examples(self.ood, subject.problem, subject.seed, named)

    def after_round(self, round: int, posterior: Posterior) -> dict[str, float]:
        subject = self.subject
        if self.ood is None or round != subject.rounds or not len(subject.problem.test):
            return {}
        scores = ood_auroc(
            subject.model,
            posterior,
            subject.problem.test,
            self._outside,
            subject.problem.likelihood,
            samples=self.samples,
            generator=subject.generator(round, "ood"),
            **self.options,
        )
        return {f"ood/auroc_{kind}": value for kind, value in scores.items()}


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
    """AUROC in percent of telling ``outside`` from ``inside`` by the entropy of the predictive (50 = chance, 100 =
    always).

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


def ood_examples(kind: str, problem: Problem, seed: int, data: Mapping[str, Any] | None = None) -> Examples:
    """What ``eval.ood`` names; scaled as the problem's inputs are.

    Args:
        kind: ``noise`` (uniform in each input's range; for images in that of all pixels), ``inverted`` (the test
            inputs with
            small and large values exchanged), or the name of ``data``.
        problem: gives shape, scaling and test inputs.
        seed: of the run.
        data: the data group of that name; its test set is used.

    Raises:
        InputError: a regression, the problem's own data, or inputs of another shape.
    """
    if problem.num_classes is None:
        raise InputError("eval.ood", kind, "predictive entropy needs classes, this is a regression")
    if data is not None:
        with naming("eval.ood"), global_generators(seed, "data"):
            loaded = build(data, "data", seed, Source).load(seed)
        shape = shape_of(loaded.test_x)
        if shape != problem.input_shape:
            fix = f"its inputs have shape {shape}, the model takes {problem.input_shape}; use noise or inverted"
            raise InputError("eval.ood", kind, fix)
        rows = None if loaded.test_rows is None else torch.from_numpy(loaded.test_rows)
        targets = torch.zeros(len(loaded.test_y), dtype=torch.int64, device="cpu")
        return Examples(tensors(loaded.test_x), targets, rows, problem.test.scaling)
    test = problem.test
    if not scalable(test.x):
        raise InputError("eval.ood", kind, "needs inputs of one array of floats; give the name of a data group")
    rows = torch.arange(len(test.y), device="cpu") if test.index is None else test.index
    inputs = test.x.index_select(0, rows)
    low, high = _range(inputs)
    if kind == "inverted":
        made = (high + low - inputs.to(torch.float32)).to(inputs.dtype)
    else:
        generator = torch_generator(seed, "ood", "noise")
        uniform = torch.rand(inputs.shape, generator=generator, dtype=torch.float32, device="cpu")
        made = low + uniform * (high - low)
    return replace(test, x=made, y=torch.zeros(len(made), dtype=torch.int64, device="cpu"), index=None)


def _range(inputs: Tensor) -> tuple[Tensor, Tensor]:
    """Smallest and largest value: of all pixels, or of each feature."""
    values = inputs.to(torch.float32)
    return (values.min(), values.max()) if values.dim() > 2 else (values.amin(0), values.amax(0))
