"""The problem of a run, and what is needed to use its result later."""

from __future__ import annotations

import math
import threading
from dataclasses import dataclass, field
from typing import Any

import numpy as np
import torch
from torch import nn

from bayesfed.problem.configured import construct
from bayesfed.problem.examples import Examples
from bayesfed.problem.likelihood import Likelihood
from bayesfed.problem.scaling import Scaling
from bayesfed.seeding import derive

_INIT_LOCK = threading.Lock()  # torch draws initial parameters from one global generator


@dataclass(eq=False)
class Problem:
    """Clients' data, evaluation data, model and likelihood.

    Attributes:
        clients: the data of client k at position k.
        test: what is evaluated: the test set, or the held-out split if ``eval.validation`` > 0.
        evaluated_on: ``test`` or ``validation``.
        likelihood: of the targets given the model's outputs.
        input_shape: of one example.
        num_outputs: columns of the model's output.
        scaling: of the inputs, already part of every ``Examples``.
        num_classes: C, or None for regression.
        label_counts: (K, C) examples per client and class as the clients see them, or None for regression.
        client_tests: what client k's own test distribution is, at position k; may be empty.
        model: ``_target_``, ``name`` and options of the model.
        likelihood_config: ``_target_``, ``name`` and options of the likelihood.
        classes: names of the C classes in the order of the outputs; None = 0..C-1 (or a regression).
        client_names: of each client, as the data call it; None = 0..K-1.
        split_by_data: whether the data's client column decided who holds what, and not the partitioner.
    """

    clients: list[Examples]
    test: Examples
    evaluated_on: str
    likelihood: Likelihood
    input_shape: tuple[int, ...]
    num_outputs: int
    scaling: Scaling
    num_classes: int | None
    label_counts: np.ndarray | None
    model: dict[str, Any]
    likelihood_config: dict[str, Any]
    client_tests: list[Examples] = field(default_factory=list)
    classes: list[str] | None = None
    client_names: list[str] | None = None
    split_by_data: bool = False

    def build_model(self, seed: int) -> nn.Module:
        """The model in float32 on the CPU; drawn from ``seed`` alone, torch's global generator is left as it was."""
        return _build_model(self.model, self.input_shape, self.num_outputs, derive(seed, "init"))

    @property
    def shape(self) -> dict[str, int]:
        """What the data of all clients have in common: the numbers of ``features`` (values of an input) and of ``outputs``."""
        return {"features": math.prod(self.input_shape), "outputs": self.num_outputs}

    def named(self, client: int) -> dict[str, str]:
        """What a record that gives a client's number says besides: its ``name``, if it has one."""
        return {} if self.client_names is None else {"name": self.client_names[client]}

    def description(self) -> dict[str, Any]:
        """Plain JSON from which ``restore_model`` rebuilds model, scaling and likelihood."""
        named = {} if self.classes is None else {"classes": self.classes}
        return {
            "model": dict(self.model),
            "input_shape": list(self.input_shape),
            "num_outputs": self.num_outputs,
            "num_classes": self.num_classes,
            "scaling": self.scaling.description(),
            "likelihood": dict(self.likelihood_config),
            **named,
        }


def restore_model(description: dict[str, Any]) -> tuple[nn.Module, Scaling, Likelihood]:
    """Model (with arbitrary parameters), scaling and likelihood of ``Problem.description()``.

    Raises:
        InputError: if the description names a class that does not exist or is no model or likelihood.
    """
    shape = tuple(description["input_shape"])
    model = _build_model(description["model"], shape, description["num_outputs"], 0)
    likelihood = construct("likelihood", description["likelihood"], Likelihood)  # type: ignore[type-abstract]
    return model, Scaling.from_description(description["scaling"]), likelihood


def check_model(config: dict[str, Any], input_shape: tuple[int, ...], num_outputs: int) -> None:
    """Build the model without memory or random numbers, to refuse bad options and shapes before any work.

    Raises:
        InputError: naming the option, or ``model`` if it does not fit the data.
    """
    with torch.device("meta"):
        _construct_model(config, input_shape, num_outputs)


def _build_model(config: dict[str, Any], input_shape: tuple[int, ...], num_outputs: int, seed: int) -> nn.Module:
    with _INIT_LOCK, torch.random.fork_rng(devices=[]), torch.device("cpu"):
        torch.default_generator.manual_seed(seed)
        return _construct_model(config, input_shape, num_outputs).to(dtype=torch.float32)


def _construct_model(config: dict[str, Any], input_shape: tuple[int, ...], num_outputs: int) -> nn.Module:
    return construct("model", config, nn.Module, input_shape=input_shape, num_outputs=num_outputs)
