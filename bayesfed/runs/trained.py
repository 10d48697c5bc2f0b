"""A trained posterior, ready to use: ``bayesfed.load(run_dir)``."""

from __future__ import annotations

import copy
import math
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor, nn

from bayesfed.errors import InputError, integer
from bayesfed.evaluation.predictive import (
    CPU_BATCH,
    InputBatches,
    class_log_probabilities,
    gaussian_predictive,
    noise_precision,
    parameter_draws,
)
from bayesfed.problem.flat import FlatModel
from bayesfed.problem.layers import restore
from bayesfed.runs.directory import RunDirectory
from bayesfed.runs.posterior_file import FILE_NAME, load_posterior
from bayesfed.seeding import torch_generator


class TrainedRun:
    """The posterior of a run with its model.

    Attributes:
        run_dir: where it was read from.
        posterior: a member of ``bayesfed.families``.
        model_description: the model, input shape, scaling and likelihood as saved.
        input_shape: shape of one example.
        scaling: maps inputs in the units of the data source to what the modules expect.
        likelihood: the likelihood the run was trained with.
        classes: names of the classes in the order of the columns that :meth:`predict` gives; None for a regression.
        summary: ``summary.json`` ({} if the run didn't write it yet).
        rounds: ``rounds.jsonl`` as a list.
    """

    def __init__(self, run_dir: Path, posterior: Any, model_description: dict[str, Any]):
        from bayesfed.problem import restore_model

        self.run_dir = run_dir
        self.posterior = posterior
        self.model_description = model_description
        self.input_shape = tuple(model_description["input_shape"])
        module, self.scaling, self.likelihood = restore_model(model_description)
        count = model_description.get("num_classes")
        self.classes: list[str] | None = model_description.get("classes") or (
            None if count is None else [str(label) for label in range(count)]
        )
        self._model = FlatModel(module, dtype=posterior.mean.dtype)
        if self._model.dim != posterior.dim:
            raise InputError(
                "run_dir", run_dir, f"its posterior has {posterior.dim} parameters but its model {self._model.dim}"
            )
        self._model.load(posterior.mean)
        self._model.module.eval()
        self.summary = RunDirectory(run_dir).summary()
        self.rounds = RunDirectory(run_dir).rounds()

    def predict(self, x: Any, samples: int = 32, seed: int = 0) -> Tensor | tuple[Tensor, Tensor]:
        """The predictive distribution at ``x``, averaged over draws of the posterior.

        Args:
            x: (N, *input_shape) array, tensor or nested list (rows may be flattened), in the units of the data source.
            samples: posterior draws; 0 predicts at the posterior mean.
            seed: of the draws; equal seeds give equal predictions.

        Returns:
            Classification: (N, C) probabilities of :attr:`classes`. Regression: mean and variance of the target, noise included,
            each (N,) for one output and (N, D) for D > 1. In the dtype of the run.

        Raises:
            InputError: ``x`` has another shape, isn't finite, or ``samples`` is negative.
        """
        integer("samples", samples, at_least=0)
        inputs = self._inputs(x)
        draws = parameter_draws(self.posterior, samples, torch_generator(seed, "predict"))
        precision = noise_precision(self.likelihood)
        dtype = self.posterior.mean.dtype
        try:
            if precision is None:
                return class_log_probabilities(self._model, draws, inputs).exp().to(dtype)
            predicted = gaussian_predictive(self._model, draws, inputs, precision)
        finally:
            self._model.load(self.posterior.mean)
        mean, variance = predicted.mean.to(dtype), predicted.variance.to(dtype)
        return (mean[:, 0], variance[:, 0]) if mean.shape[1] == 1 else (mean, variance)

    def sample(self, n: int, seed: int = 0) -> list[nn.Module]:
        """``n`` models with parameters drawn from the posterior, in eval mode and sharing no memory.

        They take inputs after ``.scaling``.
        """
        integer("n", n, at_least=1)
        generator = torch_generator(seed, "sample")
        return [self._module(self.posterior.sample(1, generator=generator)[0]) for _ in range(n)]

    def mean_model(self) -> nn.Module:
        """The model at the posterior mean, in eval mode; it takes inputs after ``.scaling``."""
        return self._module(self.posterior.mean)

    def __repr__(self) -> str:
        return f"TrainedRun({str(self.run_dir)!r}, {self.posterior!r})"

    def _module(self, theta: Tensor) -> nn.Module:
        module = copy.deepcopy(self._model.module)
        module.load_state_dict(self._model.named(theta), strict=False)  # copies; buffers stay
        restore(module)
        return module

    def _inputs(self, x: Any) -> InputBatches:
        expected = f"must have shape (N, {', '.join(map(str, self.input_shape))})"
        try:
            rows = x if isinstance(x, Tensor) else torch.as_tensor(np.asarray(x))
        except (TypeError, ValueError) as error:
            raise InputError("x", type(x).__name__, f"{expected} and hold numbers") from error
        size = math.prod(self.input_shape)
        if rows.dim() >= 2 and len(rows) > 0 and rows[0].numel() == size:
            rows = rows.reshape(-1, *self.input_shape)  # flattened rows, or images without the channel, are as good
        if tuple(rows.shape[1:]) != self.input_shape or rows.dim() == 0 or len(rows) == 0:
            raise InputError("x", f"array of shape {tuple(rows.shape)}", f"{expected}, N >= 1")
        rows = rows.detach().cpu()
        if not bool(rows.isfinite().all()):
            raise InputError("x", "array with nan or inf", "must be finite")
        dtype = self.posterior.mean.dtype
        return InputBatches(lambda part: self.scaling(rows[part], dtype), len(rows), CPU_BATCH)


def load(run_dir: str | Path) -> TrainedRun:
    """The trained posterior of a run, with its model.

    Args:
        run_dir: directory of a finished or interrupted run.

    Raises:
        InputError: there is no such directory, or no usable ``posterior.safetensors`` in it.
    """
    run_dir = Path(run_dir)
    if not run_dir.is_dir():
        raise InputError("run_dir", run_dir, "no such directory")
    if not (run_dir / FILE_NAME).is_file():
        raise InputError("run_dir", run_dir, f"has no {FILE_NAME}: not a finished or interrupted bayesfed run")
    return TrainedRun(run_dir, *load_posterior(run_dir / FILE_NAME))
