"""Whether a model can be trained, evaluated and saved: found out on two rows, before any work."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor, nn
from torch.nn.parameter import is_lazy

from bayesfed.configured import reason
from bayesfed.errors import InputError
from bayesfed.problem.flat import FlatModel
from bayesfed.problem.inputs import Inputs, arrays_of, each
from bayesfed.seeding import global_generators

if TYPE_CHECKING:
    from bayesfed.problem.problem import Problem


def check_state(module: nn.Module, config: Mapping[str, Any]) -> None:
    """Whether the parameters of a model as it was constructed can be kept.

    Raises:
        InputError: none is trainable, or one is lazy, complex, or the memory of another.
    """
    trainable: dict[int, str] = {}
    for name, tensor in _state(module):
        if is_lazy(tensor):
            raise _refused(
                config, f"'{name}' has no shape before the first forward (a lazy layer); give the sizes instead"
            )
        if tensor.is_complex():
            raise _refused(
                config, f"'{name}' is {_dtype(tensor)}; real and imaginary parts must be parameters of their own"
            )
        if not tensor.requires_grad:
            continue
        other = trainable.setdefault(tensor.data_ptr(), name) if tensor.numel() else name
        if other != name:
            raise _refused(config, f"'{other}' and '{name}' share memory; share the nn.Parameter itself")
    if not trainable:
        raise _refused(config, "has no trainable parameters")


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
        raise _refused(problem.model, f"two models built from one seed predict differently; {_DRAWS}")
    trial.module.train()
    with global_generators(seed, "check"):
        outputs = _output(trial, x, problem, len(y))
        if not outputs.requires_grad:
            raise _refused(problem.model, "its output does not depend on a trainable parameter by autograd")
        with _explained("likelihood", problem.likelihood_config, "loss"):
            loss = problem.likelihood.loss(outputs, y)
        _check_loss(loss, problem.likelihood_config)
        with _explained("model", problem.model, "the gradient"):
            torch.autograd.grad(loss, trial.parameters, allow_unused=True)
    for name, value in before.items():
        if not _same(trial.fixed.get(name), value):
            raise _changed(problem.model, name)
    if steady and not _close(first, evaluated(trial)):
        raise _refused(problem.model, "a forward in training mode changes what it predicts later; keep no other state")


class Constants:
    """The buffers and frozen parameters of a model as it was built: what one client's training changes must not reach
    the next.

    On two rows :func:`check_forward` misses what changes later, such as in every tenth forward.
    """

    def __init__(self, model: FlatModel, config: Mapping[str, Any]):
        self._model, self._config = model, config
        self._values = {name: value.detach().clone() for name, value in model.fixed.items()}

    @contextmanager
    def unchanged(self) -> Iterator[None]:
        """Put back what the block changed.

        Raises:
            InputError: there was something, by name.
        """
        changed: list[str] = []
        try:
            yield
        finally:
            if self._values:  # most models have none
                changed = self._put_back()
        if changed:
            raise _changed(self._config, changed[0])

    @torch.no_grad()
    def _put_back(self) -> list[str]:
        fixed = self._model.fixed
        changed = [name for name, value in self._values.items() if not _same(fixed.get(name), value)]
        for name in changed:
            value, here = self._values[name], fixed.get(name)
            if here is not None and here.shape == value.shape and here.dtype == value.dtype:
                here.copy_(value)
            else:
                owner, _, leaf = name.rpartition(".")
                setattr(self._model.module.get_submodule(owner), leaf, value.clone())
        return changed


_DRAWS = "draw from torch's, NumPy's or Python's global generator (np.random.normal, not np.random.default_rng)"


def _compare(model: FlatModel, again: FlatModel, config: Mapping[str, Any]) -> None:
    """Whether both models are the same: every process builds its own."""
    state, other = dict(_state(model.module)), dict(_state(again.module))
    for name, value in state.items():
        if name not in other or not _equal(value, other[name]):
            raise _refused(config, f"'{name}' differs between two models built from one seed; {_DRAWS}")


def _output(model: FlatModel, x: Inputs, problem: Problem, rows: int) -> Tensor:
    copies = each(torch.clone, x)
    with _explained("model", problem.model, f"forward of inputs {each(lambda v: tuple(v.shape), x)}"):
        outputs = model(copies)
    if any(copy._version for copy in arrays_of(copies)):
        raise _refused(
            problem.model, "forward writes to its input, which others read; begin without in-place operations"
        )
    needed = rows, problem.num_outputs
    if not isinstance(outputs, Tensor):
        raise _refused(problem.model, f"output is a {type(outputs).__name__}, needs a tensor {needed}")
    if tuple(outputs.shape) != needed:
        raise _refused(problem.model, f"output {tuple(outputs.shape)}, needs {needed}")
    if not outputs.is_floating_point():
        raise _refused(problem.model, f"output is {_dtype(outputs)}, needs floating point")
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


def _state(module: nn.Module) -> Iterator[tuple[str, Tensor]]:
    yield from module.named_parameters()
    yield from module.named_buffers()


def _same(now: Tensor | None, value: Tensor) -> bool:
    return now is not None and now.dtype == value.dtype and _equal(now, value)


def _equal(a: Tensor, b: Tensor) -> bool:
    return a.shape == b.shape and bool(((a == b) | ((a != a) & (b != b))).all())


def _close(a: Tensor, b: Tensor) -> bool:
    """Equal but for what the alignment of memory may change."""
    return torch.allclose(a, b, rtol=1e-3, atol=1e-5, equal_nan=True)


def _dtype(tensor: Tensor) -> str:
    return str(tensor.dtype).removeprefix("torch.")


def _changed(config: Mapping[str, Any], name: str) -> InputError:
    fix = (
        f"training changes the buffer '{name}', and only parameters are averaged; use nn.GroupNorm or nn.LayerNorm "
        "instead of batch normalisation, and keep other buffers constant"
    )
    return _refused(config, fix)


def _refused(config: Mapping[str, Any], fix: str) -> InputError:
    return InputError("model", config.get("name"), fix)
