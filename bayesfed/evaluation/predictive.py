"""Predictive distributions: at the posterior mean and by Bayesian model averaging.

Bayesian model averaging averages *probabilities* (or densities) over draws of the parameters,

    p(y | x) = 1/S sum_s p(y | f(x; theta_s)),   theta_s ~ q,

not outputs. The sums run in log space and in float64. Draws are evaluated one at a time, or several at once with
``torch.func.vmap``, which pays on GPUs only: on a CPU it took 1.1 to 1.9 times as long for every model tried (docs/performance.md).
There the batches of inputs are shared out among the cores, one torch thread each, so that bits don't depend on how many there are.
"""

from __future__ import annotations

import copy
import math
from collections.abc import Callable, Iterable, Iterator, Mapping
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager
from dataclasses import dataclass
from itertools import islice
from typing import Any, Protocol

import torch
from torch import Tensor, nn
from torch.func import functional_call, vmap

from bayesfed.errors import InputError, integer
from bayesfed.evaluation.metrics import ECE_BINS, calibration_bins, classification_scores, regression_scores
from bayesfed.host import cores
from bayesfed.problem.flat import FlatModel
from bayesfed.problem.inputs import Inputs, arrays_of

Progress = Callable[[int, int], None]  # which draw of the parameters is next, from 1, and how many there are
CPU_BATCH = 512  # rows in a forward pass: few enough for a core's caches, and for every core to have several batches
GPU_BATCH = 2048
CACHE_BYTES = 2**27  # scaled inputs up to 128 MiB (10,000 float32 CIFAR images) are kept between draws


class Posterior(Protocol):
    """What is needed of a member of ``bayesfed.families``."""

    @property
    def name(self) -> str: ...
    @property
    def mean(self) -> Tensor: ...
    def sample(self, n: int, *, generator: torch.Generator) -> Tensor: ...


class EvaluationSet(Protocol):
    """What is needed of ``bayesfed.problem`` examples."""

    def __len__(self) -> int: ...
    def batch(self, positions: slice, dtype: torch.dtype, device: torch.device) -> tuple[Inputs, Tensor]: ...
    def targets(self) -> Tensor: ...


class InputBatches:
    """Inputs as the model takes them, in batches, iterated once for every draw of the parameters.

    Converting and scaling can cost as much as a small model, so the batches are kept if all of them fit in
    ``CACHE_BYTES``; otherwise each pass makes them anew.

    Args:
        load: gives the inputs of a slice of rows.
        count: number of rows N.
        batch_size: rows in one batch.
    """

    def __init__(self, load: Callable[[slice], Inputs], count: int, batch_size: int):
        self._load, self.count = load, count
        self._slices = [slice(start, min(start + batch_size, count)) for start in range(0, count, batch_size)]
        self._kept: list[Inputs] = []
        self._keep = True

    def __len__(self) -> int:
        return len(self._slices)

    def __iter__(self) -> Iterator[tuple[slice, Inputs]]:
        for position, rows in enumerate(self._slices):
            if position < len(self._kept):
                yield rows, self._kept[position]
                continue
            x = self._load(rows)
            size = sum(array.nbytes / len(array) for array in arrays_of(x)) * self.count  # bytes of all rows
            self._keep = self._keep and size <= CACHE_BYTES
            if self._keep:
                self._kept.append(x)
            yield rows, x


@dataclass(frozen=True)
class GaussianPredictive:
    """The predictive of a regression.

    Attributes:
        mean: (N, D) float64 predictive mean.
        variance: (N, D) float64 predictive variance: spread of the function over draws plus noise.
        log_density: (N,) float64 log of the mixture density at the targets; None without targets.
    """

    mean: Tensor
    variance: Tensor
    log_density: Tensor | None


def parameter_draws(
    posterior: Posterior, samples: int, generator: torch.Generator | None, progress: Progress | None = None
) -> Iterator[Tensor]:
    """``samples`` draws of shape (P,), one at a time; the mean alone for ``samples=0`` or a point mass.

    ``progress`` is told of each draw before it is made, but not of the mean.
    """
    if samples == 0 or posterior.name == "point":
        yield posterior.mean
        return
    if generator is None:
        raise ValueError("drawing from the posterior needs a generator")
    for draw in range(1, samples + 1):
        if progress is not None:
            progress(draw, samples)
        yield posterior.sample(1, generator=generator)[0]


@contextmanager
def evaluation_mode(model: FlatModel) -> Iterator[None]:
    """No gradients and the module in eval mode; every submodule's own mode is restored."""
    modes = [(module, module.training) for module in model.module.modules()]
    model.module.eval()
    try:
        with torch.no_grad():
            yield
    finally:
        for module, training in modes:
            module.training = training


def together(device: torch.device, requested: int | None = None) -> int:
    """How many draws to evaluate at once: as requested, else 8 on a GPU and 1 elsewhere."""
    return requested or (8 if device.type == "cuda" else 1)


def _cores(device: torch.device) -> int:
    """How many batches to evaluate side by side."""
    return cores() if device.type == "cpu" else 1


def _replicas(module: nn.Module, count: int) -> list[nn.Module]:
    """``module`` and copies that share its parameters and buffers: a forward may keep what it computes in attributes.

    Fewer than ``count`` if it can't be copied.
    """
    tensors = [*module.parameters(), *module.buffers()]
    try:
        copies = [copy.deepcopy(module, {id(tensor): tensor for tensor in tensors}) for _ in range(count - 1)]
    except Exception:  # a stranger's attributes may be of any kind
        copies = []
    return [module, *copies]


def outputs(
    model: FlatModel,
    draws: Iterable[Tensor],
    inputs: InputBatches,
    at_once: int | None = None,
    function: Callable[[Tensor], Tensor] = lambda values: values,
) -> Iterator[Tensor]:
    """``function`` of the model's outputs for every draw in turn, (N, ...) in float64 on the CPU.

    Args:
        model: left at the last draw if they are evaluated one at a time.
        draws: parameter vectors of shape (P,); the next one is made while the model runs, so making it must not touch the model.
        inputs: N scaled inputs.
        at_once: draws evaluated together by ``torch.func.vmap``; None is :func:`together`.
        function: of outputs (..., C) in float64, which it treats row by row.
    """
    size, thetas = together(model.vector.device, at_once), iter(draws)

    def one(theta: Tensor, x: Inputs) -> Tensor:
        return functional_call(model.module, model.named(theta), (x,))

    modules = _replicas(model.module, min(_cores(model.vector.device), len(inputs)))

    def at_the_last(batch: tuple[slice, Inputs]) -> Tensor:
        module = modules.pop()  # as many as there are threads
        try:
            with torch.no_grad():  # a thread's own setting
                return function(module(batch[1]).to("cpu", torch.float64))
        finally:
            modules.append(module)

    with ThreadPoolExecutor(len(modules)) as pool:
        chunk = list(islice(thetas, size))
        while chunk:
            if len(chunk) == 1:
                model.load(chunk[0])
                batches = pool.map(at_the_last, inputs)
                chunk = list(islice(thetas, size))  # drawn while the batches are evaluated
                yield torch.cat(list(batches))
                continue
            stacked = torch.stack(chunk).to(model.vector)
            several = [vmap(one, (0, None))(stacked, x).to("cpu", torch.float64) for _, x in inputs]
            yield from function(torch.cat(several, 1))
            chunk = list(islice(thetas, size))


def class_log_probabilities(
    model: FlatModel, draws: Iterable[Tensor], inputs: InputBatches, at_once: int | None = None
) -> Tensor:
    """Log of the class probabilities averaged over ``draws``.

    Args:
        model: maps a batch to (n, C) logits; it is left at the last draw.
        draws: parameter vectors of shape (P,).
        inputs: N scaled inputs.
        at_once: see :func:`outputs`.

    Returns:
        (N, C) float64 log probabilities, normalized over classes, on the CPU.
    """
    total: Tensor | None = None
    count = 0
    with evaluation_mode(model):
        for logs in outputs(model, draws, inputs, at_once, lambda logits: logits.log_softmax(-1)):
            total = logs if total is None else torch.logaddexp(total, logs)
            count += 1
    if total is None:
        raise ValueError("no parameters to predict with")
    return total - math.log(count)


def gaussian_predictive(
    model: FlatModel,
    draws: Iterable[Tensor],
    inputs: InputBatches,
    precision: float,
    y: Tensor | None = None,
    at_once: int | None = None,
) -> GaussianPredictive:
    """The predictive ``1/S sum_s N(y | f(x; theta_s), 1/precision)``.

    The variance over draws divides by S - 1 (an unbiased estimate of the variance under the posterior), so with one
    draw only the noise 1/precision is left.

    Args:
        model: maps a batch to (n, D) outputs; it is left at the last draw.
        draws: parameter vectors of shape (P,).
        inputs: N scaled inputs.
        precision: noise precision of every output.
        y: (N, D) or (N,) targets to take the density of.
        at_once: see :func:`outputs`.
    """
    count = 0
    mean = squares = torch.zeros(())
    log_density: Tensor | None = None
    with evaluation_mode(model):
        for values in outputs(model, draws, inputs, at_once):
            f = values.flatten(1)
            count += 1
            if count == 1:
                mean, squares = f.clone(), torch.zeros_like(f)
            else:  # Welford's update: no cancellation when the spread is small against the mean
                change = f - mean
                mean = mean + change / count
                squares = squares + change * (f - mean)
            if y is not None:
                errors = (f - y.to("cpu", torch.float64).reshape(f.shape)).square().sum(1)
                logs = 0.5 * f.shape[1] * math.log(precision / (2 * math.pi)) - 0.5 * precision * errors
                log_density = logs if log_density is None else torch.logaddexp(log_density, logs)
    if count == 0:
        raise ValueError("no parameters to predict with")
    variance = squares / max(count - 1, 1) + 1 / precision
    return GaussianPredictive(mean, variance, None if log_density is None else log_density - math.log(count))


def noise_precision(likelihood: Any) -> float | None:
    """The noise precision of a regression likelihood; None for classification.

    Raises:
        InputError: for a likelihood whose predictive isn't known here.
    """
    name = getattr(likelihood, "name", type(likelihood).__name__)
    if name == "categorical":
        return None
    if name == "gaussian":
        return float(likelihood.precision)
    raise InputError("likelihood", name, "has no predictive distribution; valid: categorical, gaussian")


def evaluate(
    model: FlatModel,
    posterior: Posterior,
    examples: EvaluationSet,
    likelihood: Any,
    *,
    samples: int,
    generator: torch.Generator,
    batch_size: int | None = None,
    bayes: bool = True,
    at_once: int | None = None,
    progress: Progress | None = None,
    predictions: dict[str, Tensor] | None = None,
) -> dict[str, float]:
    """Score the predictive at the posterior mean and by Bayesian model averaging.

    Args:
        model: the model; its parameters are the posterior mean afterwards, its train/eval mode is unchanged.
        posterior: a member of ``bayesfed.families``.
        examples: N test examples.
        likelihood: a ``categorical`` or ``gaussian`` likelihood.
        samples: posterior draws S of the average (0: the mean).
        generator: where the draws come from.
        batch_size: examples in one forward pass; None is 512 on a CPU, 2048 elsewhere.
        bayes: also score the average. Under a point mass it is the prediction at the mean and costs nothing.
        at_once: draws evaluated together, see :func:`outputs`.
        progress: see :func:`parameter_draws`.
        predictions: gets the (N, C) log class probabilities that are scored, as ``mean`` and, if they are others, ``bayes``; nothing for
            regression.

    Returns:
        ``mean/...`` and, with ``bayes``, ``bayes/...`` of ``accuracy`` (%), ``nll`` (nats/example), ``ece`` (%) and
        ``brier``; for regression of ``rmse`` and ``nll``.
    """
    inputs = input_batches(model, examples, batch_size)
    y = examples.targets().cpu()
    precision = noise_precision(likelihood)
    kept = {} if predictions is None else predictions

    def scores(kind: str, draws: int) -> dict[str, float]:
        thetas = parameter_draws(posterior, draws, generator, progress)
        if precision is None:
            kept[kind] = class_log_probabilities(model, thetas, inputs, at_once)
            return classification_scores(kept[kind], y)
        predicted = gaussian_predictive(model, thetas, inputs, precision, y, at_once)
        assert predicted.log_density is not None
        return regression_scores(predicted.mean, predicted.log_density, y.reshape(predicted.mean.shape))

    try:
        at_mean = scores("mean", 0)
        averaged = {}
        if bayes:
            averaged = at_mean if samples == 0 or posterior.name == "point" else scores("bayes", samples)
    finally:
        model.load(posterior.mean)
    return {f"mean/{k}": v for k, v in at_mean.items()} | {f"bayes/{k}": v for k, v in averaged.items()}


def reliability(predictions: Mapping[str, Tensor], y: Tensor, bins: int = ECE_BINS) -> dict[str, Any]:
    """Confidence and accuracy per confidence bin, for a reliability diagram.

    Args:
        predictions: (N, C) log class probabilities by name, as :func:`evaluate` hands them out.
        y: (N,) labels.
        bins: the number M of equal-width bins.

    Returns:
        ``{"bins": M, "mean": {"confidence": [...], "accuracy": [...], "count": [...]}, ...}``, plain JSON: one entry for every
        prediction; fractions in [0, 1], None in empty bins.
    """
    diagram: dict[str, Any] = {"bins": bins}
    for kind, logs in predictions.items():
        confidence, accuracy, count = calibration_bins(logs.exp(), y, bins)
        diagram[kind] = {
            "confidence": [None if math.isnan(v) else v for v in confidence.tolist()],
            "accuracy": [None if math.isnan(v) else v for v in accuracy.tolist()],
            "count": [int(c) for c in count.tolist()],
        }
    return diagram


def input_batches(model: FlatModel, examples: EvaluationSet, batch_size: int | None) -> InputBatches:
    """The scaled inputs of ``examples`` where the model lives; ``batch_size`` as in :func:`evaluate`."""
    if len(examples) == 0:
        raise ValueError("there are no examples to evaluate on")
    integer("batch_size", batch_size, at_least=1, optional=True)
    vector = model.vector
    size = batch_size or (CPU_BATCH if vector.device.type == "cpu" else GPU_BATCH)
    return InputBatches(lambda rows: examples.batch(rows, vector.dtype, vector.device)[0], len(examples), size)
