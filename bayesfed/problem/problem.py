"""The problem of a run, and what is needed to use its result later."""

from __future__ import annotations

import json
import math
from contextlib import suppress
from dataclasses import dataclass, field
from functools import cached_property
from typing import Any

import numpy as np
import torch
from torch import nn

from bayesfed.configured import build
from bayesfed.problem.examples import Examples
from bayesfed.problem.inputs import Shape, arrays_of, dtypes_of, each, scalable
from bayesfed.problem.likelihood import Likelihood
from bayesfed.problem.model_check import check_state
from bayesfed.problem.scaling import Scaling
from bayesfed.seeding import global_generators
from bayesfed.tensors import ordinary_tensors


@dataclass(eq=False)
class Problem:
    """Clients' data, evaluation data, model and likelihood.

    Attributes:
        clients: the data of client k at position k.
        test: what is evaluated: the test set, or the held-out split if ``eval.validation`` > 0.
        evaluated_on: ``test`` or ``validation``.
        likelihood: of the targets given the model's outputs.
        input_shape: of one example, or of each of its arrays by name.
        num_outputs: columns of the model's output.
        scaling: of the inputs, already part of every ``Examples``.
        num_classes: C, or None for regression.
        label_counts: (K, C) examples per client and class as the clients see them, or None for regression.
        client_tests: what client k's own test distribution is, at position k; may be empty.
        model: ``_target_``, ``name`` and options of the model.
        likelihood_config: ``_target_``, ``name`` and options of the likelihood.
        classes: names of the C classes in the order of the outputs; None = 0..C-1 (or a regression).
        columns: names of the features of a table in the order of the inputs; None: the data are arrays.
        client_names: of each client, as the data call it; None = 0..K-1.
        split_by_data: whether the data's client column decided who holds what, and not the partitioner.
        spare: models built already, each with the arguments it was built from: :meth:`build_model` hands it out once.
    """

    clients: list[Examples]
    test: Examples
    evaluated_on: str
    likelihood: Likelihood
    input_shape: Shape
    num_outputs: int
    scaling: Scaling
    num_classes: int | None
    label_counts: np.ndarray | None
    model: dict[str, Any]
    likelihood_config: dict[str, Any]
    client_tests: list[Examples] = field(default_factory=list)
    classes: list[str] | None = None
    client_names: list[str] | None = None
    columns: list[str] | None = None
    split_by_data: bool = False
    spare: list[tuple[tuple[Any, ...], nn.Module]] = field(default_factory=list, repr=False)

    def build_model(self, seed: int) -> nn.Module:
        """The model in float32 on the CPU; drawn from ``seed`` alone, the global generators are left as they were.

        What its constructor loads stays as it is, and only parameters that require a gradient are learned, sent and
        stored.

        Raises:
            InputError: an option is no good, or the model has state that can't be kept.
        """
        arguments = self.model, self.input_shape, self.num_outputs, seed
        with suppress(IndexError):
            built_from, model = self.spare.pop()  # big ones take a while to load
            if built_from == arguments:
                return model
        return build_model(*arguments)

    @cached_property
    def shape(self) -> dict[str, int]:
        """What the data of all clients have in common: the numbers of ``features`` (values of an input) and of
        ``outputs``, and, if columns or classes have any, a digest of their ``names`` and order (63 bits: the names
        themselves don't travel)."""
        shape = {"features": sum(map(math.prod, arrays_of(self.input_shape))), "outputs": self.num_outputs}
        if self.columns is None and self.classes is None:
            return shape
        import xxhash

        return shape | {"names": xxhash.xxh3_64_intdigest(json.dumps([self.columns, self.classes]).encode()) >> 1}

    def named(self, client: int) -> dict[str, str]:
        """What a record that gives a client's number says besides: its ``name``, if it has one."""
        return {} if self.client_names is None else {"name": self.client_names[client]}

    def description(self) -> dict[str, Any]:
        """Plain JSON from which ``restore_model`` rebuilds model, scaling and likelihood."""
        named = {"classes": self.classes, "columns": self.columns}
        return {
            "model": dict(self.model),
            "input_shape": each(list, self.input_shape),
            **({} if scalable(self.test.x) else {"input_dtype": dtypes_of(self.test.x)}),
            "num_outputs": self.num_outputs,
            "num_classes": self.num_classes,
            "scaling": self.scaling.description(),
            "likelihood": dict(self.likelihood_config),
            **{key: names for key, names in named.items() if names is not None},
        }


def restore_model(description: dict[str, Any], seed: int = 0) -> tuple[nn.Module, Scaling, Likelihood]:
    """Model, scaling and likelihood of ``Problem.description()``; what isn't saved of the model is as in the run with
    ``seed``.

    Raises:
        InputError: if the description names a class that does not exist or is no model or likelihood.
    """
    model = build_model(description["model"], each(tuple, description["input_shape"]), description["num_outputs"], seed)
    likelihood = build(description["likelihood"], "likelihood", seed, Likelihood)
    return model, Scaling.from_description(description["scaling"]), likelihood


def build_model(config: dict[str, Any], input_shape: Shape, num_outputs: int, seed: int) -> nn.Module:
    """See :meth:`Problem.build_model`."""
    with global_generators(seed, "init"), ordinary_tensors():
        default = torch.get_default_dtype()
        torch.set_default_dtype(torch.float32)  # the draws depend on it
        try:
            model = build(config, "model", None, nn.Module, input_shape=input_shape, num_outputs=num_outputs)
        finally:
            torch.set_default_dtype(default)
        check_state(model, config)
        return model.to(dtype=torch.float32)
