"""A trained posterior, ready to use: ``bayesfed.load(run_dir)``."""

from __future__ import annotations

import copy
import math
import os
from collections.abc import Iterator, Mapping
from contextlib import contextmanager, suppress
from functools import cached_property
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor, nn

from bayesfed.config import import_from_here
from bayesfed.errors import InputError, integer
from bayesfed.evaluation.inputs import CPU_BATCH, InputBatches
from bayesfed.evaluation.outputs import parameter_draws
from bayesfed.evaluation.predictive import predict
from bayesfed.foreign import plain_text
from bayesfed.problem.examples import Examples
from bayesfed.problem.flat import FlatModel
from bayesfed.problem.inputs import MASK, Inputs, arrays_of, each, scalable
from bayesfed.runs.directory import RunDirectory
from bayesfed.runs.posterior_file import FILE_NAME, load_fixed, load_posterior
from bayesfed.runs.reading import read_json
from bayesfed.seeding import torch_generator
from bayesfed.tensors import ordinary_tensors


class TrainedRun:
    """The posterior of a run with its model.

    Attributes:
        run_dir: where it was read from.
        posterior: a member of ``bayesfed.families``.
        model_description: the model, input shape, scaling and likelihood as saved.
        input_shape: shape of one example, or of each of its arrays by name.
        scaling: maps inputs in the units of the data source to what the modules expect.
        likelihood: the likelihood the run was trained with.
        classes: names of the classes in the order of the columns that :meth:`predict` gives; None for a regression.
        columns: names of the table's columns that were the features, in the order of the inputs; None: the data were
            arrays.
    """

    def __init__(self, run_dir: Path, posterior: Any, model_description: dict[str, Any]):
        from bayesfed.problem import restore_model

        self.run_dir = run_dir
        self.posterior = posterior
        self.model_description = model_description
        self.input_shape = each(tuple, model_description["input_shape"])
        count = model_description.get("num_classes")
        self.classes: list[str] | None = model_description.get("classes") or (
            None if count is None else [str(label) for label in range(count)]
        )
        self.columns: list[str] | None = model_description.get("columns")
        with ordinary_tensors():
            seed = 0
            with suppress(
                InputError, AttributeError
            ):  # for a file from before fixed tensors were kept; others don't need it
                seed = RunDirectory.open(run_dir).config().seed
            module, self.scaling, self.likelihood = restore_model(model_description, seed)
            self._model = FlatModel(module, dtype=posterior.mean.dtype)
            if self._model.dim != posterior.dim:
                raise InputError(
                    "run_dir", run_dir, f"its posterior has {posterior.dim} parameters but its model {self._model.dim}"
                )
            self._model.load(posterior.mean)
            self._restore(load_fixed(run_dir / FILE_NAME))
            self._model.module.eval()
        self._idle: list[FlatModel] = []  # copies that no call of `predict` uses at the moment

    @cached_property
    def summary(self) -> dict[str, Any]:
        """``summary.json``; {} if the run didn't write it yet."""
        return read_json(self.run_dir / "summary.json")

    @cached_property
    def rounds(self) -> list[dict[str, Any]]:
        """``rounds.jsonl`` as a list."""
        return RunDirectory(self.run_dir).rounds()

    def predict(self, x: Any, samples: int = 32, seed: int = 0) -> Tensor | tuple[Tensor, ...]:
        """The predictive distribution at ``x``, averaged over draws of the posterior.

        Args:
            x: (N, *input_shape) array, tensor or nested list (rows may be flattened), in the units of the data source;
                a dict of them where the source gives one (rows of different length:
                ``bayesfed.problem.inputs.padded``). Of a data frame (pandas, polars, Arrow) the :attr:`columns` are
                taken by name, in any order and among others; if there are none, by position.
            samples: posterior draws; 0 predicts at the posterior mean.
            seed: of the draws; equal seeds give equal predictions.

        Returns:
            what the likelihood answers, in the dtype of the run. Classification: (N, C) probabilities of
            :attr:`classes`. Regression: mean and variance of the target, noise included, each (N,) for one output and
            (N, D) for D > 1.

        Raises:
            InputError: ``x`` has another shape, lacks a column, isn't finite, or ``samples`` is negative.
        """
        samples = integer("samples", samples, at_least=0)
        with ordinary_tensors(), self._borrowed() as model:
            inputs = self._inputs(x)
            draws = parameter_draws(self.posterior, samples, torch_generator(seed, "predict"))
            answer = self.likelihood.answer(predict(model, draws, inputs, self.likelihood))
            dtype = self.posterior.mean.dtype
            return answer.to(dtype) if isinstance(answer, Tensor) else tuple(part.to(dtype) for part in answer)

    def sample(self, n: int, seed: int = 0) -> list[nn.Module]:
        """``n`` models with parameters drawn from the posterior, in eval mode and sharing no memory.

        They take inputs after ``.scaling``.
        """
        n = integer("n", n, at_least=1)
        with ordinary_tensors():
            generator = torch_generator(seed, "sample")
            return [self._module(self.posterior.sample(1, generator=generator)[0]) for _ in range(n)]

    def mean_model(self) -> nn.Module:
        """The model at the posterior mean, in eval mode; it takes inputs after ``.scaling``."""
        with ordinary_tensors():
            return self._module(self.posterior.mean)

    def __repr__(self) -> str:
        return f"TrainedRun({str(self.run_dir)!r}, {self.posterior!r})"

    def _restore(self, fixed: dict[str, Tensor]) -> None:
        own = self._model.fixed
        for name, value in fixed.items():
            if name not in own or own[name].shape != value.shape:
                what = f"its file holds '{name}' {tuple(value.shape)}"
                fix = f"{what}, which its model has not: the class has changed since"
                raise InputError("run_dir", self.run_dir, fix)
            own[name].copy_(value)

    @contextmanager
    def _borrowed(self) -> Iterator[FlatModel]:
        """A model of one's own: draws are written into it, and threads may predict at the same time."""
        try:
            model = self._idle.pop()
        except IndexError:
            model = copy.deepcopy(self._model)
        try:
            yield model
        finally:
            self._idle.append(model)

    def _module(self, theta: Tensor) -> nn.Module:
        module = copy.deepcopy(self._model).module
        module.load_state_dict(self._model.named(theta), strict=False)  # copies; buffers stay
        return module

    def _inputs(self, x: Any) -> InputBatches:
        kinds = self.model_description.get("input_dtype", "float")
        inputs: Inputs
        if isinstance(kinds, dict):
            if not isinstance(x, Mapping) or set(x) != set(kinds):
                has = ", ".join(map(str, x)) if isinstance(x, Mapping) else type(x).__name__
                raise InputError("x", plain_text(has, 200), f"needs a dict of {', '.join(kinds)}")
            inputs = {name: self._array(x[name], self._shape(name, x), kind) for name, kind in kinds.items()}
            if len({len(array) for array in inputs.values()}) > 1:
                raise InputError("x", f"{[len(array) for array in inputs.values()]} rows", "needs equally many of each")
        else:
            inputs = self._array(self._chosen(x), self.input_shape, kinds)
        count = len(arrays_of(inputs)[0])
        examples = Examples(inputs, torch.zeros(count), None, self.scaling)
        dtype = self.posterior.mean.dtype
        return InputBatches(lambda part: examples.batch(part, dtype, "cpu")[0], count, CPU_BATCH)

    def _shape(self, name: str, x: Mapping[str, Any]) -> tuple[int, ...]:
        """Of an example's array; padded rows may have another length than in training."""
        shape: tuple[int, ...] = self.input_shape[name]
        if MASK not in self.input_shape or shape[:1] != self.input_shape[MASK]:
            return shape
        return (*np.shape(x[MASK])[1:2], *shape[1:])

    def _array(self, x: Any, shape: tuple[int, ...], kind: str) -> Tensor:
        """(N, *shape) finite numbers, whole ones of exactly the type ``kind``."""
        expected = f"must have shape (N, {', '.join(map(str, shape))})"
        rows = _numbers(x, expected)
        if rows.dim() >= 2 and len(rows) > 0 and rows[0].numel() == math.prod(shape):
            rows = rows.reshape(-1, *shape)  # flattened rows, or images without the channel, are as good
        if tuple(rows.shape[1:]) != shape or rows.dim() == 0 or len(rows) == 0:
            raise InputError("x", f"array of shape {tuple(rows.shape)}", f"{expected}, N >= 1")
        if not bool(rows.isfinite().all()):
            raise InputError("x", "array with nan or inf", "must be finite")
        exact = rows if scalable(rows) else rows.to(self.posterior.mean.dtype)
        if kind != "float":
            exact = rows.to(getattr(torch, kind))
            if not torch.equal(exact.to(torch.float64), rows.to(torch.float64)):
                raise InputError(
                    "x", f"array of {rows.dtype}".replace("torch.", ""), f"must hold numbers of type {kind}"
                )
        return exact

    def _chosen(self, x: Any) -> Any:
        """The features of a data frame."""
        if self.columns is None or not hasattr(x, "columns"):
            return x
        arrow = hasattr(type(x), "column_names")
        named = {str(name): name for name in (x.column_names if arrow else x.columns)}
        if missing := [name for name in self.columns if name not in named]:
            raise InputError(
                "x", f"{type(x).__name__} without column {missing[0]!r}", f"needs {', '.join(self.columns)}"
            )
        chosen = [named[name] for name in self.columns]
        return x.select(chosen) if arrow else x[chosen]


def _numbers(x: Any, expected: str) -> Tensor:
    """``x`` as a tensor of real numbers on the CPU."""
    kind, fix = type(x).__name__, f"{expected} and hold numbers"
    try:
        if isinstance(x, Tensor):
            rows = x.detach().cpu()
            rows = rows if rows.layout == torch.strided else rows.to_dense()
        else:
            array = np.asarray(x)
            kind = f"{kind} of {array.dtype}"
            if array.dtype == object:
                fix += "; convert what it holds, as with x.astype(float)"
            if array.dtype.kind not in "biuf":
                raise TypeError(kind)
            if (array.dtype.kind == "u" and array.itemsize > 1) or array.dtype.itemsize > 8:  # torch has none of these
                array = array.astype(np.float64)
            # torch wants its own byte order, no negative strides, and memory that may be written
            rows = torch.from_numpy(np.require(array, array.dtype.newbyteorder("="), ["C", "W"]))
        if rows.is_complex():
            raise TypeError(kind)
    except (TypeError, ValueError, RuntimeError) as error:
        raise InputError("x", kind, fix) from error
    return rows


def load(run_dir: str | Path) -> TrainedRun:
    """The trained posterior of a run, with its model.

    Args:
        run_dir: directory of a finished or interrupted run.

    Raises:
        InputError: there is no such directory, or no usable ``posterior.safetensors`` in it.
    """
    run_dir = Path(run_dir).expanduser()
    if not os.path.isdir(run_dir):
        raise InputError("run_dir", run_dir, "no such directory")
    if not os.path.isfile(run_dir / FILE_NAME):
        raise InputError("run_dir", run_dir, f"has no {FILE_NAME}: not a finished or interrupted bayesfed run")
    import_from_here()
    with ordinary_tensors():
        posterior, description = load_posterior(run_dir / FILE_NAME)
    try:
        return TrainedRun(run_dir, posterior, description)
    except InputError as error:
        module = str(error.value).partition(".")[0]
        if not isinstance(error.__cause__, ModuleNotFoundError) or error.__cause__.name != module:
            raise
        raise InputError(error.field, error.value, f"{error.fix}; {_whereabouts(run_dir, module)}") from error
    except (KeyError, TypeError, ValueError, AttributeError, RuntimeError) as error:
        fix = f"{FILE_NAME} describes no model that this bayesfed can build ({plain_text(error)})"
        raise InputError("run_dir", run_dir, fix) from error


def _whereabouts(run_dir: Path, module: str) -> str:
    """Where a module of the user's is, for one who isn't there."""
    for folder in run_dir.resolve().parents:
        if (folder / f"{module}.py").is_file() or (folder / module / "__init__.py").is_file():
            return f"it lies in {folder}: start there, or sys.path.append({str(folder)!r}) first"
    return f"start in the folder that holds {module}.py, or put that folder on sys.path first"
