"""Whether a model can be trained, evaluated and saved: found out on two rows, before any work."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from typing import Any

import torch
from torch import Tensor

from bayesfed.configured import reason
from bayesfed.errors import InputError
from bayesfed.problem.flat import FlatModel
from bayesfed.problem.inputs import Inputs, arrays_of, each
from bayesfed.problem.model_state import changed_buffer, dtype_of, equal, refused, same, state_of
from bayesfed.problem.problem import Problem
from bayesfed.seeding import global_generators


def check_forward(problem: Problem, model: FlatModel, seed: int) -> None:
    """Predict two rows with ``model``, built from ``seed``, and train another such model on them.

    Raises:
        InputError: outputs of another shape than the likelihood needs, state that training changes besides the
            parameters, draws that don't follow the seed, or whatever the model raises.
    """
    data = next(client for client in problem.clients if len(client))
    dtype, device = model.vector.dtype, model.vector.device
    x, y = data.batch(torch.tensor([0, len(data) - 1], device="cpu"), dtype, device)
    trial = FlatModel(problem.build_model(seed), dtype, device)
    _compare(model, trial, problem.model)
    before = {name: value.clone() for name, value in trial.fixed.items()}

    def evaluated(of: FlatModel) -> Tensor:
        of.module.eval()
        with torch.no_grad(), global_generators(seed, "check"):
            return _output(of, x, problem, len(y))

    first = evaluated(trial)
    steady = device.type == "cpu" and _close(first, evaluated(trial))  # else it draws from elsewhere
    if steady and not _close(first, evaluated(model)):
        raise refused(problem.model, f"two models built from one seed predict differently; {_DRAWS}")
    trial.module.train()
    with global_generators(seed, "check"):
        outputs = _output(trial, x, problem, len(y))
        if not outputs.requires_grad:
            raise refused(problem.model, "its output does not depend on a trainable parameter by autograd")
        with _explained("likelihood", problem.likelihood_config, "loss"):
            loss = problem.likelihood.loss(outputs, y)
        _check_loss(loss, problem.likelihood_config)
        with _explained("model", problem.model, "the gradient"):
            torch.autograd.grad(loss, trial.parameters, allow_unused=True)
    for name, value in before.items():
        if not same(trial.fixed.get(name), value):
            raise changed_buffer(problem.model, name)
    if steady and not _close(first, evaluated(trial)):
        raise refused(problem.model, "a forward in training mode changes what it predicts later; keep no other state")


_DRAWS = "draw from torch's, NumPy's or Python's global generator (np.random.normal, not np.random.default_rng)"


def _compare(model: FlatModel, again: FlatModel, config: Mapping[str, Any]) -> None:
    """Whether both models are the same: every process builds its own."""
    state, other = dict(state_of(model.module)), dict(state_of(again.module))
    for name, value in state.items():
        if name not in other or not equal(value, other[name]):
            raise refused(config, f"'{name}' differs between two models built from one seed; {_DRAWS}")


def _output(model: FlatModel, x: Inputs, problem: Problem, rows: int) -> Tensor:
    copies = each(torch.clone, x)
    with _explained("model", problem.model, f"forward of inputs {each(lambda v: tuple(v.shape), x)}"):
        outputs = model(copies)
    if any(copy._version for copy in arrays_of(copies)):
        raise refused(
            problem.model, "forward writes to its input, which others read; begin without in-place operations"
        )
    needed = rows, problem.num_outputs
    if not isinstance(outputs, Tensor):
        raise refused(problem.model, f"output is a {type(outputs).__name__}, needs a tensor {needed}")
    if tuple(outputs.shape) != needed:
        raise refused(problem.model, f"output {tuple(outputs.shape)}, needs {needed}")
    if not outputs.is_floating_point():
        raise refused(problem.model, f"output is {dtype_of(outputs)}, needs floating point")
    return outputs


def _check_loss(loss: object, config: Mapping[str, Any]) -> None:
    found = f"a {type(loss).__name__}"
    if isinstance(loss, Tensor):
        if loss.dim() == 0 and loss.requires_grad:
            return
        found = f"a tensor {tuple(loss.shape)}{'' if loss.requires_grad else ' without gradient'}"
    raise InputError(
        "likelihood", config.get("name"), f"loss gives {found}, needs a scalar tensor that can be differentiated"
    )


@contextmanager
def _explained(group: str, config: Mapping[str, Any], what: str) -> Iterator[None]:
    try:
        yield
    except InputError:
        raise
    except Exception as error:  # a stranger's code may raise anything
        raise InputError(group, config.get("name"), f"{what} fails: {reason(error)}") from error


def _close(a: Tensor, b: Tensor) -> bool:
    """Equal but for what the alignment of memory may change."""
    return torch.allclose(a, b, rtol=1e-3, atol=1e-5, equal_nan=True)
