"""The state of a model: what can be kept of it, and what training must not change."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn.parameter import is_lazy

from bayesfed.errors import InputError
from bayesfed.problem.flat import FlatModel


def check_state(module: nn.Module, config: Mapping[str, Any]) -> None:
    """Whether the parameters of a model as it was constructed can be kept.

    Raises:
        InputError: none is trainable, or one is lazy, complex, or the memory of another.
    """
    trainable: dict[int, str] = {}
    for name, tensor in state_of(module):
        if is_lazy(tensor):
            raise refused(
                config, f"'{name}' has no shape before the first forward (a lazy layer); give the sizes instead"
            )
        if tensor.is_complex():
            raise refused(
                config, f"'{name}' is {dtype_of(tensor)}; real and imaginary parts must be parameters of their own"
            )
        if not tensor.requires_grad:
            continue
        other = trainable.setdefault(tensor.data_ptr(), name) if tensor.numel() else name
        if other != name:
            raise refused(config, f"'{other}' and '{name}' share memory; share the nn.Parameter itself")
    if not trainable:
        raise refused(config, "has no trainable parameters")


class Constants:
    """The buffers and frozen parameters of a model as it was built: what one client's training changes must not reach
    the next.

    On two rows :func:`bayesfed.problem.model_check.check_forward` misses what changes later, such as in every tenth
    forward.
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
            raise changed_buffer(self._config, changed[0])

    @torch.no_grad()
    def _put_back(self) -> list[str]:
        fixed = self._model.fixed
        changed = [name for name, value in self._values.items() if not same(fixed.get(name), value)]
        for name in changed:
            value, here = self._values[name], fixed.get(name)
            if here is not None and here.shape == value.shape and here.dtype == value.dtype:
                here.copy_(value)
            else:
                owner, _, leaf = name.rpartition(".")
                setattr(self._model.module.get_submodule(owner), leaf, value.clone())
        return changed


def state_of(module: nn.Module) -> Iterator[tuple[str, Tensor]]:
    yield from module.named_parameters()
    yield from module.named_buffers()


def same(now: Tensor | None, value: Tensor) -> bool:
    return now is not None and now.dtype == value.dtype and equal(now, value)


def equal(a: Tensor, b: Tensor) -> bool:
    return a.shape == b.shape and bool(((a == b) | ((a != a) & (b != b))).all())


def dtype_of(tensor: Tensor) -> str:
    return str(tensor.dtype).removeprefix("torch.")


def changed_buffer(config: Mapping[str, Any], name: str) -> InputError:
    fix = (
        f"training changes the buffer '{name}', and only parameters are averaged; use nn.GroupNorm or nn.LayerNorm "
        "instead of batch normalisation, and keep other buffers constant"
    )
    return refused(config, fix)


def refused(config: Mapping[str, Any], fix: str) -> InputError:
    return InputError("model", config.get("name"), fix)
