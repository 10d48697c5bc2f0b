"""Inputs of another kind than a problem's, with its shape."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import replace
from typing import Any

import torch
from torch import Tensor

from bayesfed.configured import build, naming
from bayesfed.errors import InputError
from bayesfed.problem.data.source import Source
from bayesfed.problem.examples import Examples
from bayesfed.problem.inputs import scalable, shape_of, tensors
from bayesfed.problem.problem import Problem
from bayesfed.seeding import global_generators, torch_generator


def ood_examples(kind: str, problem: Problem, seed: int, data: Mapping[str, Any] | None = None) -> Examples:
    """What ``eval.ood`` names; scaled as the problem's inputs are.

    Args:
        kind: ``noise`` (uniform in each input's range; for images in that of all pixels), ``inverted`` (the test inputs
            with small and large values exchanged), or the name of ``data``.
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
