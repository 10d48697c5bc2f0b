"""One vector for many parameters: the memory layout under the posterior optimizers."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from typing import Any

import torch
from torch import Tensor

from bayesfed.errors import InputError
from bayesfed.families.natural import all_finite


def consecutive(tensors: Sequence[Tensor]) -> Tensor | None:
    """The vector whose consecutive pieces ``tensors`` are, sharing their memory; ``None`` if they are not that."""
    first = tensors[0]
    storage, start = first.untyped_storage()._cdata, first.storage_offset()
    end = start
    for tensor in tensors:
        same = tensor.untyped_storage()._cdata == storage and tensor.dtype == first.dtype
        if not same or tensor.storage_offset() != end or not tensor.is_contiguous():
            return None
        end += tensor.numel()
    return first.detach().as_strided((end - start,), (1,), start)


class FlatParameters:
    """The trainable parameters of one group as one contiguous vector.

    Parameters that already are consecutive pieces of one vector are used as they are; others are moved into a new one
    (``p.data`` becomes a view of it, with the same values). Gradients that are preset as consecutive pieces of one
    vector stay so; otherwise ``p.grad`` is ``None`` before a backward pass (autograd then hands over its own tensors
    without adding) and is gathered afterwards, the faster of the two.

    Attributes:
        parameters: the parameters that required a gradient at construction, in order.
        vector: their values, shape (P,).
        views: pieces of the vector, shaped like the parameters.
        frozen: slices of the vector whose parameters did not require a gradient at the last :meth:`look`.

    Copies and pickles take the (copied) parameters into a vector of their own.

    Args:
        parameters: all parameters of the group; those without a gradient are left alone.
        names: of all of them, for messages.

    Raises:
        InputError: there are no parameters, they differ in dtype or device, or their memory format would be lost.
    """

    def __init__(self, parameters: Sequence[Tensor], names: Sequence[str] | None = None):
        given = list(parameters)
        if not given:
            raise InputError("params", "a group without parameters", "give at least one")
        self.parameters = [p for p in given if p.requires_grad]
        self._left = {
            names[i] if names else f"number {i}, of shape {tuple(p.shape)}": p
            for i, p in enumerate(given)
            if not p.requires_grad
        }
        kinds = {(p.dtype, p.device) for p in self.parameters or given[:1]}
        if len(kinds) > 1 or not given[0].is_floating_point():
            raise InputError("params", sorted(map(str, kinds)), "one real dtype and device in each parameter group")
        if any(_channels_last(p) for p in self.parameters):
            fix = (
                "one vector holds all weights in torch's usual order: build the optimizer of a contiguous_format model "
                "(inputs may stay channels_last)"
            )
            raise InputError("params", "channels_last", fix)
        self._like = given[0].detach().new_empty(0)
        self.frozen: list[slice] = []
        self._lay_out()

    def _lay_out(self) -> None:
        self.sizes = [p.numel() for p in self.parameters]
        vector = consecutive([p.detach() for p in self.parameters]) if self.parameters else self._like
        self.vector = self._move() if vector is None else vector
        self.views = self.split(self.vector)
        self._addresses = [view.data_ptr() for view in self.views]
        grads = [p.grad for p in self.parameters if p.grad is not None]
        self._grad_vector = consecutive(grads) if grads and len(grads) == len(self.parameters) else None
        self._grad_views = grads if self._grad_vector is not None else []

    def __getstate__(self) -> dict[str, Any]:
        return {"parameters": self.parameters, "_left": self._left, "_like": self._like, "frozen": self.frozen}

    def __setstate__(self, state: dict[str, Any]) -> None:
        self.__dict__.update(state)
        with torch.inference_mode(False), torch.no_grad():
            self._lay_out()

    def split(self, vector: Tensor) -> list[Tensor]:
        """Views of a (P,) vector in the shapes of the parameters."""
        pieces = vector.split(self.sizes)
        return [piece.view(p.shape) for piece, p in zip(pieces, self.parameters, strict=True)]

    def _move(self) -> Tensor:
        first = self.parameters[0]
        vector = torch.empty(sum(self.sizes), dtype=first.dtype, device=first.device)
        for view, p in zip(self.split(vector), self.parameters, strict=True):
            view.copy_(p.detach())
            p.data = view
        return vector

    def attach(self) -> bool:
        """Bring back parameters whose ``.data`` was replaced since, with their new values; True if there were any.

        Raises:
            RuntimeError: the dtype or device changed (build the optimizer after ``model.to(...)``).
        """
        found = False
        for p, view, address in zip(self.parameters, self.views, self._addresses, strict=True):
            if p.data_ptr() != address:
                found = True
                if p.dtype != view.dtype or p.device != view.device:
                    raise RuntimeError("the parameters changed dtype or device: build the optimizer after model.to()")
                view.copy_(p.detach())
                p.data = view
        return found

    def look(self) -> None:
        """See which parameters require a gradient now.

        Raises:
            RuntimeError: one does that did not at construction.
        """
        late = [name for name, p in self._left.items() if p.requires_grad]
        if late:
            raise RuntimeError(
                f"parameter {', '.join(late)} requires a gradient but was frozen when the optimizer was built: "
                "build it before freezing (frozen parameters keep their values), or anew"
            )
        self.frozen = []
        if not all(p.requires_grad for p in self.parameters):
            ends = [sum(self.sizes[: i + 1]) for i in range(len(self.sizes))]
            parts = zip(self.parameters, self.sizes, ends, strict=True)
            self.frozen = [slice(end - size, end) for p, size, end in parts if not p.requires_grad]

    @contextmanager
    def keeping(self, *states: Tensor) -> Iterator[None]:
        """Put the frozen columns of tensors (..., P) back after the block."""
        kept = [(state[..., part], state[..., part].clone()) for part in self.frozen for state in states]
        yield
        for columns, old in kept:
            columns.copy_(old)

    def show(self, views: Sequence[Tensor]) -> None:
        """Let the parameters be ``views`` of another vector; ``views`` of this one bring them back."""
        for p, view in zip(self.parameters, views, strict=True):
            p.data = view

    def clear_gradients(self) -> None:
        """Make every gradient zero or absent, so that the next backward pass does not add to an old one."""
        preset = self._grad_vector is not None
        if preset and all(p.grad is view for p, view in zip(self.parameters, self._grad_views, strict=True)):
            self._grad_vector.zero_()  # type: ignore[union-attr]
            return
        for p in self.parameters:
            p.grad = None

    def release_gradients(self) -> list[Tensor] | None:
        """Hand over the tensors autograd made, one per parameter, and forget them; ``None`` if that is not possible."""
        if self._grad_vector is not None or not self.parameters:
            return None
        grads: list[Tensor] = []
        for p in self.parameters:
            if p.grad is None or p.grad.layout != torch.strided:
                return None
            grads.append(p.grad)
        for p in self.parameters:
            p.grad = None
        return grads

    def take_gradients(self, out: Tensor) -> bool:
        """Copy the gradients into ``out`` (P,), 0 where there is none, then clear them; False if there is none at all.

        Preset gradient views are put back, so that their vector keeps being the gradient.
        """
        grads = [p.grad for p in self.parameters]
        if self._grad_vector is not None and all(g is v for g, v in zip(grads, self._grad_views, strict=True)):
            out.copy_(self._grad_vector)
            return True
        for piece, grad in zip(self.split(out), grads, strict=True):
            piece.zero_() if grad is None else piece.copy_(grad.to_dense() if grad.is_sparse else grad)
        for p in self.parameters:
            p.grad = None
        for p, view in zip(self.parameters, self._grad_views, strict=False):
            p.grad = view
        return any(g is not None for g in grads)


def _channels_last(p: Tensor) -> bool:
    formats = {4: torch.channels_last, 5: torch.channels_last_3d}
    return p.dim() in formats and not p.is_contiguous() and p.is_contiguous(memory_format=formats[p.dim()])


def spread(field: str, value: object, groups: Sequence[FlatParameters]) -> list[float | Tensor]:
    """``value`` for every group: a number or a (P_group,) vector each.

    ``value`` is a number, one vector over the parameters of all groups (any shape with that many elements), a list
    with one number or vector per group, or a list with one tensor per parameter.

    Raises:
        InputError: naming ``field``, for anything else and for values that are not finite.
    """
    sizes = [flat.vector.numel() for flat in groups]
    total = sum(sizes)
    parts: list[object]
    if isinstance(value, list | tuple):
        every = [size for flat in groups for size in flat.sizes]
        given = [v.numel() if isinstance(v, Tensor) else -1 for v in value]
        if given == every and given != sizes:
            parts = list(torch.cat([v.reshape(-1) for v in value]).split(sizes))
        else:
            parts = list(value)
    elif isinstance(value, Tensor) and value.numel() == total and value.dim() > 0:
        parts = list(value.detach().reshape(-1).split(sizes))
    else:
        parts = [value] * len(groups)
    fix = f"must be a finite number, {total} values, or one of these for each of the {len(groups)} parameter groups"
    if len(parts) != len(groups):
        raise InputError(field, f"{len(parts)} entries", fix)
    result: list[float | Tensor] = []
    for part, flat in zip(parts, groups, strict=True):
        if isinstance(part, Tensor) and part.dim() > 0:
            if part.numel() != flat.vector.numel():
                raise InputError(field, f"{part.numel()} values", fix)
            part = part.detach().reshape(-1).to(device=flat.vector.device)
            if not part.is_meta and not all_finite(part):
                raise InputError(field, "not finite", fix)
            result.append(part)
            continue
        try:
            scalar = float(part)  # type: ignore[arg-type]
        except (TypeError, ValueError):
            raise InputError(field, part, fix) from None
        if isinstance(part, bool) or not abs(scalar) < float("inf"):
            raise InputError(field, part, fix)
        result.append(scalar)
    return result
